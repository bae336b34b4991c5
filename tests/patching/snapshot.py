"""Everything that `undo` must restore, as a value that can be compared.

Attributes are compared by the identity of their values and by their order; the dictionaries that
torch keeps per module (children, parameters, buffers, hooks) also by the identity and order of
their entries; a scheduler and a config also by their content; tensors by their bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_alive: list[Any] = []  # what was seen stays alive, so that an id can't be used twice


def _entry(value: Any) -> Any:
    _alive.append(value)
    if isinstance(value, dict):
        return (id(value), [(key, _entry(entry)) for key, entry in value.items()])
    return id(value)


def _attributes(owner: Any, without: frozenset[str]) -> list[Any]:
    return [(name, _entry(v)) for name, v in owner.__dict__.items() if name not in without]


def bits(module: nn.Module) -> list[Any]:
    """State dict as bytes."""
    return [
        (
            name,
            tensor.dtype,
            tuple(tensor.shape),
            tensor.contiguous().view(torch.uint8).sum().item(),
        )
        for name, tensor in module.state_dict().items()
    ] + [hash(t.contiguous().numpy().tobytes()) for t in module.state_dict().values()]


def snapshot(pipe: Any, without: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Take the state of a pipeline; `without` names attributes that its calls set themselves."""
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {
        "pipe": _attributes(pipe, without),
        "config": (list(pipe.config.items()), id(pipe.__dict__["_internal_dict"])),
        "scheduler": (id(pipe.scheduler), _attributes(pipe.scheduler, without)),
        "modules": [
            (part, name, id(module), _attributes(module, frozenset()))
            for part, root in modules.items()
            for name, module in root.named_modules(remove_duplicate=False)
        ],
        "bits": {part: bits(root) for part, root in modules.items()},
        "random": torch.get_rng_state().tolist(),
    }


def set_by_calls(pipe: Any, run: Any) -> frozenset[str]:
    """Names of the pipeline's and scheduler's attributes that an unpatched call changes."""
    names: set[str] = set()
    run()  # the first call also creates attributes
    before = [dict(pipe.__dict__), dict(pipe.scheduler.__dict__)]
    run()
    for old, owner in zip(before, (pipe, pipe.scheduler), strict=True):
        names |= {name for name, value in owner.__dict__.items() if old.get(name) is not value}
    return frozenset(names)
