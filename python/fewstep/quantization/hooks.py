"""Hooks on a layer: code of somebody else's that a new module in its place would lose."""

from __future__ import annotations

from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Return whether anything runs before or after the module, forward or backward."""
    return any(getattr(module, hooks) for hooks in _HOOKS)
