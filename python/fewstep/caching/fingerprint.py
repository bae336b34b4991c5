"""What a plan was calibrated for, and whether a pipeline is that.

    model      class and configuration of the denoiser, and a few values of its parameters
    adapters   names of active LoRAs and other adapters, with their scales: "style@0.5"
    scheduler  class and configuration

Parameters that are no longer there are not compared: quantised layers keep their plan. Values are
compared to 2 %, so that a model in bfloat16 is the one in float32. Of configurations, entries that
a newer version of their class has added are not compared, nor those that a run itself rewrites.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Fingerprint", "active_adapters"]

_PARAMETERS = 64  # whose values are looked at
_VALUES = 4  # of each
_RELATIVE, _ABSOLUTE = 0.02, 1e-5
_LONGEST = 100  # characters of an entry of a configuration; of longer ones a digest is kept

Config = tuple[tuple[str, str], ...]
Values = tuple[tuple[str, tuple[float, ...]], ...]


def _config(owner: Any) -> Config:
    """Return a configuration as JSON by entry, without what loading adds to it."""
    config = getattr(owner, "config", None)
    entries = dict(config) if isinstance(config, Mapping) else {}
    entries.pop("quantization_config", None)
    return tuple(
        (name, _text(entries[name])) for name in sorted(entries) if not name.startswith("_")
    )


def _text(entry: Any) -> str:
    text = json.dumps(entry, sort_keys=True, default=repr)
    if len(text) > _LONGEST:  # tables of betas and the like
        return f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return text


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
    """Return the names of peft's active adapters, each with its scale, a mean over the layers.

    peft itself is not needed for that.
    """
    scales: dict[str, list[float]] = {}
    for module in model.modules():
        active = getattr(module, "active_adapters", None)
        wraps = isinstance(active, list | tuple) and hasattr(module, "base_layer")
        if wraps and not getattr(module, "disable_adapters", False):
            known = getattr(module, "scaling", {})
            for name in active:
                found = scales.setdefault(str(name), [])
                if name in known:
                    found.append(float(known[name]))
    return tuple(
        f"{name}@{sum(found) / len(found):.4g}" if found else name
        for name, found in sorted(scales.items())
    )


def _same_adapters(mine: tuple[str, ...], now: tuple[str, ...]) -> bool:
    """Whether adapters are those of a fingerprint, which may not know their scales."""
    return len(mine) == len(now) and all(
        own == other or ("@" not in own and own == other.rpartition("@")[0])
        for own, other in zip(mine, now, strict=True)
    )


@dataclass(frozen=True)
class Fingerprint:
    """What a plan belongs to; see the module's text."""

    model: str
    model_config: Config
    adapters: tuple[str, ...]
    scheduler: str
    scheduler_config: Config
    values: Values
    others: tuple[Fingerprint, ...] = ()  # of the models that share the steps with it

    @classmethod
    def of(cls, denoiser: nn.Module, scheduler: Any, *others: nn.Module) -> Fingerprint:
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
            tuple(cls.of(other, None) for other in others),
        )

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> Fingerprint:
        """Return the fingerprint that `dataclasses.asdict` and JSON have made `data` of."""
        configs = {
            name: tuple((key, text) for key, text in data[name])
            for name in ("model_config", "scheduler_config")
        }
        values = tuple((name, tuple(numbers)) for name, numbers in data["values"])
        lists = {**configs, "adapters": tuple(data["adapters"]), "values": values}
        others = tuple(map(cls.of_json, data.get("others", ())))
        return cls(**{**data, **lists, "others": others})

    def without_rewritten(self, scheduler: Any) -> Fingerprint:
        """Return the fingerprint without the entries that the scheduler has rewritten since.

        Some set what a count of steps demands (`lower_order_final` of a single-step DPM-Solver), so
        a pipeline that has run has another entry than one that has just been loaded.
        """
        now = dict(_config(scheduler))
        kept = tuple(entry for entry in self.scheduler_config if now.get(entry[0]) == entry[1])
        return replace(self, scheduler_config=kept)

    def differences(self, denoiser: nn.Module, scheduler: Any, *others: nn.Module) -> list[str]:
        """Say what differs: "model: expected .., got ..", the most important first."""
        if len(self.others) != len(others):
            return [f"models: expected {len(self.others) + 1}, got {len(others) + 1}"]
        found = self._differences(denoiser, scheduler)
        for own, other in zip(self.others, others, strict=True):
            found += own._differences(other, None)
        return found

    def _differences(self, denoiser: nn.Module, scheduler: Any) -> list[str]:
        model, step = type(denoiser).__name__, type(scheduler).__name__
        adapters = active_adapters(denoiser)
        found: list[str] = []
        if self.model != model:
            found.append(f"model: expected {self.model!r}, got {model!r}")
        else:
            found += _differing("model configuration", self.model_config, _config(denoiser))
        if not _same_adapters(self.adapters, adapters):
            found.append(f"adapters: expected {self.adapters!r}, got {adapters!r}")
        if self.scheduler != step:
            found.append(f"scheduler: expected {self.scheduler!r}, got {step!r}")
        else:
            found += _differing(
                "scheduler configuration", self.scheduler_config, _config(scheduler)
            )
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


def _differing(what: str, mine: Config, theirs: Config) -> list[str]:
    now = dict(theirs)
    return [
        f"{what}: expected {name} {text}, got {now.get(name, 'none')}"
        for name, text in mine
        if now.get(name) != text
    ]


def _close(mine: float, theirs: float) -> bool:
    return abs(mine - theirs) <= _RELATIVE * abs(mine) + _ABSOLUTE
