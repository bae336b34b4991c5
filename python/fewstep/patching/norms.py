"""Norms that hand quantised rows to the layers behind them.

    z = norm(x) * (1 + scale) + shift         q, q_scale = quantize_int8(z)

In diffusers' blocks to_q, to_k, to_v (and, in FLUX's single blocks, proj_mlp) read one z, and each
quantised layer quantises it again. Here a norm in such a place is replaced by one that returns
`QuantizedRows`, which the layers take as they are:

    "share"   z as the block computes it, quantised once: the same bits as without
    "fuse"    norm, modulation and quantisation in one op, `ops.norm_quantize_int8`; z is rounded
              once, where the block rounds it after the norm, the product and the sum

The modulation is written out in the blocks' own forwards, as arithmetic on what the norm returns.
So the norm returns a `DeferredNorm`, which takes part in a product and a sum and is quantised with
the sum. No block's forward is changed, no class, and no parameter's name: the new norm shares the
old one's tensors.

Which layers read which norm is in `_PLACES`, for blocks that the tests run. Before every call a
norm looks at the layers as they are then, and computes what the block wants as ever while one of
them needs z itself (a low-rank branch, a LoRA, a hook, an attention processor that is not known),
while they smooth by different factors, while anything is differentiated, and under autocast.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..caching import hands_on
from ..quantization import QuantLinear
from ..quantization.linear import autocast_dtype
from ..quantization.rows import QuantizedRows
from .fusing import Parent, is_wrapped, needs_derivative

__all__ = ["FusedNorms", "fuse_norms"]

HOW = ("share", "fuse")


class _Place(NamedTuple):
    """A norm of a block, by its path, and what reads its output."""

    norm: str
    layers: tuple[str, ...]
    attentions: tuple[str, ...] = ()
    modulated: bool = True


def _qkv(attention: str, of: str = "to_{}") -> tuple[str, ...]:
    return tuple(f"{attention}.{of.format(x)}" for x in "qkv")


_ADDED = _qkv("attn", "add_{}_proj")
_FEED_FORWARD = (
    _Place("norm2", ("ff.net.0.proj",)),
    _Place("norm2_context", ("ff_context.net.0.proj",)),
)
_CONTEXT = _Place("norm1_context.norm", _ADDED, ("attn",))


def _joint_places(block: nn.Module) -> tuple[_Place, ...]:
    layers, attentions = _qkv("attn"), ("attn",)
    if block.use_dual_attention:
        layers, attentions = (*layers, *_qkv("attn2")), ("attn", "attn2")
    return (_Place("norm1.norm", layers, attentions), _CONTEXT, *_FEED_FORWARD)


def _basic_places(block: nn.Module) -> tuple[_Place, ...]:
    first, feed_forward = _Place("norm1", _qkv("attn1"), ("attn1",)), ("ff.net.0.proj",)
    if block.pos_embed is not None or block.only_cross_attention:
        return ()
    if block.norm_type == "ada_norm_single":  # PixArt
        return (first, _Place("norm2", feed_forward))
    if block.norm_type == "ada_norm_zero":  # DiT
        return (first._replace(norm="norm1.norm"), _Place("norm3", feed_forward))
    if block.norm_type == "layer_norm":  # UNets
        second = _Place("norm2", ("attn2.to_q",), ("attn2",), modulated=False)
        third = _Place("norm3", feed_forward, modulated=False)
        crossed = block.attn2 is not None and block.attn2.is_cross_attention
        return (first._replace(modulated=False), *([second] * crossed), third)
    return ()


_PLACES: dict[str, Callable[[nn.Module], tuple[_Place, ...]]] = {
    "FluxTransformerBlock": lambda block: (
        _Place("norm1.norm", _qkv("attn"), ("attn",)),
        _CONTEXT,
        *_FEED_FORWARD,
    ),
    "FluxSingleTransformerBlock": lambda block: (
        _Place("norm.norm", ("proj_mlp", *_qkv("attn")), ("attn",)),
    ),
    "JointTransformerBlock": _joint_places,
    "SanaTransformerBlock": lambda block: (_Place("norm1", _qkv("attn1"), ("attn1",)),),
    "BasicTransformerBlock": _basic_places,
}
# They hand hidden_states to the projections and read nothing else of it but its shape and dtype.
_PROCESSORS = {
    "AttnProcessor2_0",
    "FluxAttnProcessor",
    "JointAttnProcessor2_0",
    "SanaLinearAttnProcessor2_0",
}


def _at(module: nn.Module | None, path: str) -> nn.Module | None:
    for key in path.split("."):
        module = None if module is None else module._modules.get(key)
    return module


def _refuse_wrapped(block: nn.Module, path: str) -> str | None:
    """Return which module on the way to a layer would show its input to somebody else, or None."""
    keys = path.split(".")
    for i in range(1, len(keys) + 1):
        module = _at(block, name := ".".join(keys[:i]))
        if module is not None and is_wrapped(module) and not hands_on(module):
            return f"{name} has hooks"
    return None


def _refuse_layer(path: str, layer: nn.Module | None) -> str | None:
    if not isinstance(layer, QuantLinear):
        return f"{path} is {'absent' if layer is None else type(layer).__name__}"
    reason = layer.refuse_rows()
    return None if reason is None else f"{path} {reason}"


def _refuse_attention(path: str, attention: nn.Module | None) -> str | None:
    if attention is None:
        return f"{path} is absent"
    processor = type(attention.processor)
    known = processor.__name__ in _PROCESSORS and processor.__module__.startswith("diffusers.")
    if not known or getattr(attention, "fused_projections", False):
        return f"{path} has a processor that is not known: {processor.__name__}"
    for name in ("spatial_norm", "group_norm"):
        if getattr(attention, name, None) is not None:
            return f"{path} has a {name}"
    if getattr(attention, "residual_connection", False):
        return f"{path} adds its input"
    return None


class _Readers(NamedTuple):
    """What a norm has to know of its block."""

    parent: Parent
    place: _Place
    plain: Callable[[nn.Module, Tensor], Tensor]  # forward of the norm's own class
    fused: bool

    def refuse(self) -> str | None:
        """Return why the layers can't take quantised rows now, or None."""
        block = self.parent()
        if block is None:
            return "its block is gone"
        if getattr(block, "_chunk_size", None) is not None:
            return "the feed-forward layer runs in chunks"
        for path in (*self.place.layers, *self.place.attentions):
            if (reason := _refuse_wrapped(block, path)) is not None:
                return reason
        for path in self.place.attentions:
            if (reason := _refuse_attention(path, _at(block, path))) is not None:
                return reason
        smooth, rotate = self.prologue()
        for path in self.place.layers:
            layer = _at(block, path)
            if (reason := _refuse_layer(path, layer)) is not None:
                return reason
            if layer.rotate != rotate or layer.smooth is not smooth:
                return "its layers differ in what they smooth or rotate by"
        return None

    def prologue(self) -> tuple[Tensor | None, int]:
        """Return the smoothing factors and the rotation of the first layer."""
        layer = _at(self.parent(), self.place.layers[0])
        return getattr(layer, "smooth", None), getattr(layer, "rotate", 0)


class QuantizingNorm(nn.LayerNorm):
    """A LayerNorm of a block, which returns rows for the quantised layers behind it."""

    _readers: _Readers

    @classmethod
    def of(cls, norm: nn.LayerNorm, readers: _Readers) -> QuantizingNorm:
        """Return the form of a norm that shares its parameters, buffers and state."""
        made = cls.__new__(cls)
        made.__dict__.update(norm.__dict__)
        made.__dict__["_readers"] = readers
        return made

    def forward(self, input: Tensor) -> Any:
        """Return what the block's arithmetic makes `QuantizedRows` of, or the norm of a tensor."""
        readers = self._readers
        if (
            is_wrapped(self)
            or autocast_dtype(input) is not None
            or needs_derivative(input, self.weight, self.bias)
            or readers.refuse() is not None
        ):
            return readers.plain(self, input)
        return DeferredNorm(self, input) if readers.place.modulated else self.finish(input)

    def finish(
        self, x: Tensor, factor: Tensor | None = None, shift: Tensor | None = None
    ) -> QuantizedRows | Tensor:
        """Return norm(x) * factor + shift in int8, as a tensor where it is differentiated."""
        smooth, rotate = self._readers.prologue()
        modulation = [v for v in (factor, shift) if v is not None]
        given = [*modulation, *(v for v in (self.weight, self.bias) if v is not None)]
        differentiated = needs_derivative(x, *modulation)
        if self._readers.fused and not differentiated and all(v.dtype == x.dtype for v in given):
            # factor is 1 + scale, rounded; with |scale| up to 2^8 in bfloat16, 2^11 in float16, the
            # difference is exact, and the op's 1 + scale is that factor again.
            scale = None if factor is None else factor - 1
            options = {"weight": self.weight, "bias": self.bias, "eps": self.eps}
            options |= {"scale": scale, "shift": shift, "smooth": smooth, "rotate": rotate}
            return QuantizedRows(*ops.norm_quantize_int8(x, **options), x.dtype, smooth, rotate)
        z = self._readers.plain(self, x)
        if factor is not None:
            z = z * factor
        if shift is not None:
            z = z + shift
        return z if differentiated else QuantizedRows.of(z, smooth, rotate)


class DeferredNorm:
    """norm(x), or norm(x) * factor, before it is computed: the sum with a shift computes it.

    The operators come through `__torch_function__`, which torch.compile follows for objects that
    are no tensors.
    """

    def __init__(self, norm: QuantizingNorm, x: Tensor, factor: Tensor | None = None) -> None:
        self.norm, self.x, self.factor = norm, x, factor

    def times(self, factor: Tensor) -> DeferredNorm:
        """Return norm(x) * factor."""
        if self.factor is not None:
            raise TypeError("expected one product with a norm's output before the sum, got two")
        return DeferredNorm(self.norm, self.x, factor)

    def plus(self, shift: Tensor) -> QuantizedRows | Tensor:
        """Return norm(x) * factor + shift, quantised."""
        return self.norm.finish(self.x, self.factor, shift)

    def __mul__(self, factor: Tensor) -> DeferredNorm:
        return self.times(factor)

    __rmul__ = __mul__

    def __add__(self, shift: Tensor) -> QuantizedRows | Tensor:
        return self.plus(shift)

    __radd__ = __add__

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function in _PRODUCTS or function in _SUMS:
            first, second = args
            deferred, other = (first, second) if isinstance(first, cls) else (second, first)
            return deferred.times(other) if function in _PRODUCTS else deferred.plus(other)
        return NotImplemented


_PRODUCTS = (operator.mul, torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
_SUMS = (operator.add, torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)


@dataclass
class FusedNorms:
    """What `fuse_norms` did: the names of the norms, and why others in known blocks were left."""

    fused: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    _slots: list[tuple[nn.Module, str, nn.Module, nn.Module]] = field(
        default_factory=list, repr=False
    )

    def explain(self) -> str:
        """Return how many norms quantise for the layers behind them, and what was left alone."""
        lines = [f"{len(self.fused)} norms quantise for the layers behind them"]
        for reason, count in Counter(self.left.values()).most_common():
            lines.append(f"left alone: {count} norms, {reason}")
        return "\n".join(lines)

    def undo(self) -> None:
        """Put the norms back that were there; one that something else has replaced stays so."""
        while self._slots:
            parent, key, before, fused = self._slots.pop()
            if parent._modules.get(key) is fused:
                parent._modules[key] = before.train(fused.training)
        self.fused.clear()


def _find(model: nn.Module) -> Iterator[tuple[str, nn.Module, _Place]]:
    for name, block in model.named_modules():
        places = _PLACES.get(type(block).__name__)
        if places is not None and type(block).__module__.startswith("diffusers."):
            for place in places(block):
                if _at(block, place.norm) is not None:  # the last block of SD3 has no text left
                    yield name, block, place


def _refuse_norm(norm: nn.Module) -> str | None:
    if isinstance(norm, QuantizingNorm):
        return "done already"
    if type(norm).__name__ not in ("LayerNorm", "FP32LayerNorm"):
        return f"a {type(norm).__name__}"
    if is_wrapped(norm):
        return "it has hooks"
    return None


def expect_places(model: nn.Module) -> None:
    """Refuse a model without blocks that are known.

    Raises:
        ValueError: as said.
    """
    if next(_find(model), None) is None:
        raise ValueError(
            f"norms: expected a model with blocks among {', '.join(_PLACES)}, got "
            f"{type(model).__name__} without"
        )


def fuse_norms(model: nn.Module, how: str = "fuse") -> FusedNorms:
    """Let norms quantise for the quantised layers behind them, in place; see the module.

    Args:
        model: of diffusers, with layers that `fewstep.quantize` or `from_pretrained` quantised.
        how: "share" (the same bits as without) or "fuse" (norm, modulation and quantisation in
            one op).

    Returns:
        The handle: `explain()`, `undo()`.

    Raises:
        ValueError: another `how`, or a model without blocks that are known.
    """
    expect_how(how)
    expect_places(model)
    handle = FusedNorms()
    for name, block, place in _find(model):
        where = f"{name}.{place.norm}" if name else place.norm
        norm = _at(block, place.norm)
        reason = _refuse_norm(norm)
        if reason is None:
            readers = _Readers(Parent(block), place, type(norm).forward, how == "fuse")
            reason = readers.refuse()
        if reason is not None:
            handle.left[where] = reason
            continue
        owner, _, key = place.norm.rpartition(".")
        parent = _at(block, owner) if owner else block
        fused = QuantizingNorm.of(norm, readers)
        parent._modules[key] = fused
        handle._slots.append((parent, key, norm, fused))
        handle.fused.append(where)
    return handle


def expect_how(how: str) -> None:
    """Refuse what `fuse_norms` does not know.

    Raises:
        ValueError: as said.
    """
    if how not in HOW:
        raise ValueError(f"norms: expected one of {', '.join(HOW)}, got {how!r}")
