"""Blocks of diffusers that call a layer and its activation themselves, as one product.

    mlp = self.act_mlp(self.proj_mlp(x))          FLUX's single blocks, Chroma's, ...

Such a block's own forward runs, with a view of the block for `self`: in it `proj_mlp` activates,
inside of the product where that is possible, and `act_mlp` returns what it gets. Everything else of
the view is the block's. So no forward is written anew, and whoever calls the block's layers from
elsewhere finds them as they were.

A class qualifies by its forward's source: it calls both in this one expression and nowhere else,
sets nothing of `self`, and hands `self` to nobody.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

from diffusers.hooks._helpers import TransformerBlockRegistry
from torch import nn

from ..caching.layers import source_for_views
from .activations import activation_of, is_quantized, refuse_layer

_TOGETHER = "self.act_mlp(self.proj_mlp("


class _View:
    """A block as its forward sees it."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block

    def proj_mlp(self, x: Any) -> Any:
        """Return the activation of the layer's output."""
        block = self._block
        layer, act, name = block.proj_mlp, block.act_mlp, activation_of(block.act_mlp)
        if name is None or refuse_layer(layer, x) is not None:
            return act(layer(x))
        return layer(x, activation=name)

    def act_mlp(self, x: Any) -> Any:
        """Return what `proj_mlp` returned."""
        return x

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)


class ActivatedBlock(nn.Module):
    """Base of the forms of such blocks, in front of the class of the block."""

    plain: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made when it is asked for: copies and pickles name the block's own.
        return _new, (self.plain,), self.__getstate__()


@functools.cache
def form_of(plain: type[nn.Module]) -> type[nn.Module] | None:
    """Return the form of a class of blocks, or None where it does not qualify.

    It goes by the block's own name, which diffusers and accelerate know blocks by.
    """
    ours = issubclass(plain, ActivatedBlock)
    if ours or not plain.__module__.startswith("diffusers.") or not qualifies(plain.forward):
        return None

    own = plain.forward  # by this name, because torch.compile does not look into some classes

    @functools.wraps(own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return own(_View(self), *args, **kwargs)

    names = ("__module__", "__qualname__", "__doc__")
    body = {name: getattr(plain, name) for name in names} | {"plain": plain, "forward": forward}
    form = type(plain.__name__, (ActivatedBlock, plain), body)
    _enter(plain, form)
    return form


def _enter(plain: type[nn.Module], form: type[nn.Module]) -> None:
    """Tell diffusers' caches, which look blocks up by class, what they know of the block's own."""
    try:
        known = TransformerBlockRegistry.get(plain)
    except ValueError:
        return
    TransformerBlockRegistry.register(form, copy.copy(known))


def qualifies(forward: Callable[..., Any]) -> bool:
    """Return whether a forward calls act_mlp(proj_mlp(x)) and uses neither otherwise."""
    source = source_for_views(forward)
    return all(source.count(x) == 1 for x in (_TOGETHER, "self.act_mlp", "self.proj_mlp"))


def wants(module: nn.Module) -> bool:
    """Return whether a module is such a block, with a quantised layer and a known activation."""
    children = module._modules
    if children.get("proj_mlp") is None or children.get("act_mlp") is None:
        return False
    known = is_quantized(module.proj_mlp) and activation_of(module.act_mlp) is not None
    return known and form_of(type(module)) is not None


def _new(plain: type[nn.Module]) -> nn.Module:
    form = form_of(plain) or plain  # another version of diffusers may write another forward
    return form.__new__(form)
