"""What a plan was calibrated for, and whether a pipeline is that.

    model      class and configuration of the denoiser, and a few values of its parameters
    adapters   names of active LoRAs and other adapters
    scheduler  class and configuration

Parameters that are no longer there are not compared: quantised layers keep their plan. Values are
compared to 2 %, so that a model in bfloat16 is the one in float32.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Fingerprint", "active_adapters"]

_PARAMETERS = 64  # whose values are looked at
_VALUES = 4  # of each
_RELATIVE, _ABSOLUTE = 0.02, 1e-5

Values = tuple[tuple[str, tuple[float, ...]], ...]


def _config(owner: Any) -> str:
    """Return a digest of a configuration, without what loading adds to it."""
    config = getattr(owner, "config", None)
    entries = dict(config) if isinstance(config, Mapping) else {}
    kept = {name: value for name, value in entries.items() if not name.startswith("_")}
    kept.pop("quantization_config", None)
    text = json.dumps(kept, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters by their names without adapters."""
    return {
        name.replace(".base_layer", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point()
        and parameter.numel()
        and parameter.device.type != "meta"
        and "lora_" not in name
    }


@torch.no_grad()
def _values(parameter: Tensor) -> tuple[float, ...]:
    flat = parameter.detach().reshape(-1)
    picked = flat[:: max(1, flat.numel() // _VALUES)][:_VALUES]
    return tuple(float(f"{value:.6g}") for value in picked.float().cpu().tolist())


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Return the names of peft's active adapters; peft itself is not needed for that."""
    names: set[str] = set()
    for module in model.modules():
        active = getattr(module, "active_adapters", None)
        wraps = isinstance(active, list | tuple) and hasattr(module, "base_layer")
        if wraps and not getattr(module, "disable_adapters", False):
            names.update(str(name) for name in active)
    return tuple(sorted(names))


@dataclass(frozen=True)
class Fingerprint:
    """What a plan belongs to; see the module's text."""

    model: str
    model_config: str
    adapters: tuple[str, ...]
    scheduler: str
    scheduler_config: str
    values: Values

    @classmethod
    def of(cls, denoiser: nn.Module, scheduler: Any) -> Fingerprint:
        """Take the fingerprint; reads at most a few hundred values of the parameters."""
        found = sorted(_parameters(denoiser).items())
        chosen = found[:: -(-len(found) // _PARAMETERS) or 1]
        return cls(
            type(denoiser).__name__,
            _config(denoiser),
            active_adapters(denoiser),
            type(scheduler).__name__,
            _config(scheduler),
            tuple((name, _values(parameter)) for name, parameter in chosen),
        )

    def differences(self, denoiser: nn.Module, scheduler: Any) -> list[str]:
        """Say what differs: "model: expected .., got ..", the most important first."""
        pairs = (
            ("model", self.model, type(denoiser).__name__),
            ("model configuration", self.model_config, _config(denoiser)),
            ("adapters", self.adapters, active_adapters(denoiser)),
            ("scheduler", self.scheduler, type(scheduler).__name__),
            ("scheduler configuration", self.scheduler_config, _config(scheduler)),
        )
        found = [
            f"{name}: expected {mine!r}, got {theirs!r}"
            for name, mine, theirs in pairs
            if mine != theirs
        ]
        present = _parameters(denoiser)
        for name, values in self.values:
            parameter = present.get(name)
            if parameter is None:
                continue
            now = _values(parameter)
            if len(now) != len(values) or not all(map(_close, values, now)):
                found.append(f"weights: expected {name} to start {values}, got {now}")
                break
        return found


def _close(mine: float, theirs: float) -> bool:
    return abs(mine - theirs) <= _RELATIVE * abs(mine) + _ABSOLUTE
