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


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    return a is b or (type(a) is type(b) and not hasattr(a, "__array__") and a == b)


def set_by_calls(pipe: Any, run: Any) -> frozenset[str]:
    """Names of the attributes of a fresh pipeline and scheduler that an unpatched call sets."""
    fresh = type(pipe.scheduler).from_config(pipe.scheduler.config).__dict__
    unused = dict(pipe.__dict__)
    run()
    names = {name for name, value in pipe.__dict__.items() if unused.get(name, run) is not value}
    for name, value in pipe.scheduler.__dict__.items():
        if name != "_internal_dict" and not _same(fresh.get(name, fresh), value):
            names.add(name)
    # PNDM's counters are back where they started at some step counts.
    return frozenset(names | {"counter", "cur_model_output", "lower_order_nums", "_begin_index"})
