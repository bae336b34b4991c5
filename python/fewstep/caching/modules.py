"""Caching every block, or every attention and feed-forward layer, by itself.

    full step      R = what the module returns (of a block: its output minus its input), kept
    skipped step   the forecast of R stands for the module (of a block: is added to its input)

    scope "block"    every transformer block by itself: norms, modulation and gates are left out
    scope "module"   every attention and feed-forward layer of every block; the block's norms,
                     modulation and gates run, with the step's own time embedding. The form that
                     TaylorSeer, FORA and ToCa have.

Each module has a ring of snapshots per guidance branch, and may have a schedule of its own
(`ModuleSession`). Modules with several outputs (joint attention, blocks of two streams) have them
all in one ring.

Layers are found by their names in diffusers' blocks. FLUX's single blocks compute attention and
feed-forward side by side, joined by one product,

    y = proj_out(cat(attn(x), act_mlp(proj_mlp(x))))

and y is what is kept, as in TaylorSeer. Such a block's own forward runs on a view of the block in
which the three layers return tensors without channels on a skipped step, and `proj_out` the
forecast: nothing of the block is written anew, and its instances are not touched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ._wrap import Replacement, Wrapped, follow, uncompiled
from .layers import OUT, beside, is_joined, said
from .module_session import ModuleSession
from .output import take_apart

__all__ = ["CachedModule", "ModuleStack", "hands_on"]


@dataclass
class ModuleStack:
    """Modules of a denoiser that are cached one by one.

    Args:
        denoiser: the model whose call is one evaluation.
        modules: the modules by path.
        two_streams: what is cached are whole blocks: whether they take (hidden_states,
            encoder_hidden_states) and return the two in reverse order. None for their layers.
        blocks: the blocks that the layers are in, by path; {} where they are not known.
    """

    denoiser: nn.Module
    modules: dict[str, nn.Module]
    two_streams: bool | None = None
    blocks: Mapping[str, nn.Module] = field(default_factory=dict)

    def describe(self, session: ModuleSession) -> str:
        """Say which modules have a forecast of their own."""
        text = f"a forecast for each of {len(self.modules)} modules: {said(self.modules)}"
        joined = sum(name.endswith(OUT) for name in self.modules)
        if joined:
            text += "; each proj_out with the attn and proj_mlp before it"
        text += "; all else runs on every step"
        if self.two_streams is None:
            text += ", norms, modulation and gates of the blocks included"
        return text

    @property
    def left(self) -> list[str]:
        """What of the blocks has no forecast."""
        names = beside(self.blocks, self.modules)
        return [f"layers of blocks that have no forecast: {said(names)}"] if names else []

    def replacements(self, session: ModuleSession) -> list[Replacement]:
        """Return what to set on the instances; sets nothing itself."""
        session.names = tuple(self.modules)
        found = follow(self.denoiser, session, ignore=("skip_layers",))
        for name, module in self.modules.items():
            kind: type[CachedModule] = CachedModule
            more: tuple[Any, ...] = ()
            if self.two_streams is not None:
                kind, more = _CachedBlock, (self.two_streams,)
            elif name.endswith(OUT) and is_joined(module):
                kind, more = _CachedJoin, (module,)
            value = kind(module.forward, session, name, *more)
            found.append(Replacement(module, "forward", value))
        return found


def _form(x: Any) -> Any:
    """What of an input decides the form of the output."""
    return (x.shape, x.dtype, x.device) if hasattr(x, "shape") else None


class CachedModule(Wrapped):
    """`forward` of a module; where its schedule skips, the forecast of its output stands for it.

    Of what it is given it reads the shapes alone, so quantised rows pass through it.
    """

    def __init__(self, below: Callable[..., Any], session: ModuleSession, name: str) -> None:
        super().__init__(below, session)
        self.name = name

    @uncompiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, or return its forecast."""
        tally = self.session.tally
        if tally is None:
            return self.below(*args, **kwargs)
        given = args[0] if args else kwargs.get("hidden_states")
        visit = tally.visit(self.name, _form(given))
        if visit.skips:
            return visit.ring.rebuild(visit.forecast())
        output = self.below(*args, **kwargs)
        _keep(visit, output)
        return output


def hands_on(module: nn.Module) -> bool:
    """Whether all that looks at what a module is given is a cache, which reads the shape alone."""
    forward = module.__dict__.get("forward")
    own = type(forward) is CachedModule and inspect.ismethod(forward.below)
    return own and not (module._forward_hooks or module._forward_pre_hooks)


@torch.compiler.disable
def _keep(visit: Any, output: Any) -> None:
    if not visit.wanted:
        return
    try:
        parts, rebuild = take_apart(output)
    except TypeError:
        visit.refuse("a module returns more than tensors")
    else:
        visit.keep(parts)
        visit.ring.rebuild = rebuild


class _CachedBlock(CachedModule):
    """`forward` of a block: what is forecast is what it adds to its input."""

    def __init__(
        self, below: Callable[..., Any], session: ModuleSession, name: str, two_streams: bool
    ) -> None:
        super().__init__(below, session, name)
        self.two_streams = two_streams

    @uncompiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tally = self.session.tally
        if tally is None:
            return self.below(*args, **kwargs)
        streams = self._streams(args, kwargs)
        visit = tally.visit(self.name, tuple(map(_form, streams)))
        if visit.skips:
            parts = visit.forecast(streams)
            return parts if self.two_streams else parts[0]
        output = self.below(*args, **kwargs)
        if visit.wanted:
            visit.keep(output if self.two_streams else (output,), streams)
        return output

    def _streams(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Return what goes in, in the order in which it comes out."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if not self.two_streams:
            return (hidden,)
        return args[1] if len(args) > 1 else kwargs["encoder_hidden_states"], hidden


class _CachedJoin(CachedModule):
    """`forward` of a block whose attention and feed-forward layer share their output layer."""

    def __init__(
        self, below: Callable[..., Any], session: ModuleSession, name: str, block: nn.Module
    ) -> None:
        super().__init__(below, session, name)
        self.block = block

    @uncompiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tally = self.session.tally
        if tally is None:
            return self.below(*args, **kwargs)
        streams = [args[i] if len(args) > i else kwargs.get(n) for i, n in enumerate(_STREAMS)]
        view = _View(self.block, tally.visit(self.name, tuple(map(_form, streams))))
        if getattr(self.below, "__self__", None) is self.block:
            return self.below.__func__(view, *args, **kwargs)
        # Hooks lie between, such as offloading's, which run the block itself: for this call its
        # layers' names lead to what the view has.
        own = {name: getattr(view, name) for name in _LAYERS}
        self.block.__dict__.update(own)
        try:
            return self.below(*args, **kwargs)
        finally:
            for name in own:
                self.block.__dict__.pop(name, None)


_LAYERS = ("attn", "proj_mlp", "act_mlp", "proj_out")
_STREAMS = ("hidden_states", "encoder_hidden_states")


class _View:
    """A block as its forward sees it while one of its calls is cached."""

    def __init__(self, block: nn.Module, visit: Any) -> None:
        self._block, self._visit = block, visit
        if visit.skips:
            self.attn, self.proj_mlp, self.act_mlp = _NONE, _NONE, _SAME

    def proj_out(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output, or its forecast."""
        visit = self._visit
        if visit.skips:
            return visit.forecast()[0]
        output = self._block._modules["proj_out"](x, *args, **kwargs)
        if visit.wanted:
            visit.keep((output,))
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)


class _Empty(nn.Module):
    """A layer whose output nobody reads: as its input, without channels."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return an empty tensor for each stream that is given."""
        given = [*args[:1], *(kwargs[name] for name in _STREAMS if kwargs.get(name) is not None)]
        empty = tuple(
            torch.empty((*x.shape[:-1], 0), dtype=x.dtype, device=x.device) for x in given
        )
        return empty if len(empty) > 1 else empty[0]


_NONE, _SAME = _Empty(), nn.Identity()
