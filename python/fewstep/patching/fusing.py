"""What norms and activations that reach into quantised layers have in common."""

from __future__ import annotations

import copy
import functools
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..ops._autograd import is_differentiated


def is_wrapped(module: nn.Module) -> bool:
    """Return whether somebody looks at what goes in or out of a module."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    return bool(hooked) or "forward" in module.__dict__


def is_watched(module: nn.Module) -> bool:
    """Return whether somebody may look at what comes out of a module: not where it is offloaded.

    The hooks of diffusers' group offloading and of accelerate's offloading hand on all arguments.
    """
    if module._forward_hooks:
        return True
    forward = module.__dict__.get("forward")
    if forward is None:
        return False
    if torch.compiler.is_compiling():
        return True
    while isinstance(forward, functools.partial):
        if forward.func.__module__ not in ("diffusers.hooks.hooks", "accelerate.hooks"):
            return True
        forward = getattr(forward, "__wrapped__", None)
    registry = module.__dict__.get("_diffusers_hook")
    hooks = [] if registry is None else [*registry.hooks.values()]
    if "_hf_hook" in module.__dict__:
        hooks.append(module._hf_hook)
    known = all(
        type(hook).__module__ == "diffusers.hooks.group_offloading"
        or type(hook).__name__ == "AlignDevicesHook"
        for hook in hooks
    )
    return not known or getattr(forward, "__func__", None) is not type(module).forward


def needs_derivative(*tensors: Tensor | None) -> bool:
    """Return whether a call with these tensors is one that someone may differentiate."""
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return is_differentiated(tensors)


class Parent:
    """The module that another one is in, without keeping it alive: `parent()`, None if it is gone.

    A module that held the one around it would make a cycle, whose weights are freed only when
    Python looks for cycles. Copies, and what pickle makes, are of the copied module.
    """

    def __init__(self, module: nn.Module | None) -> None:
        self._module = None if module is None else weakref.ref(module)

    def __call__(self) -> nn.Module | None:
        """Return the module, or None."""
        return None if self._module is None else self._module()

    def __deepcopy__(self, memo: dict[int, Any]) -> Parent:
        return Parent(copy.deepcopy(self(), memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return Parent, (self(),)
