"""What forward_mode puts in place of torch's functions, and why each of them needs it.

    attention                    fused kernels have no forward mode (F.scaled_dot_product_attention,
                                 torch.nn.MultiheadAttention, FlexAttention)
    softmax, log_softmax,        of plain dual numbers: torch's rule writes over what a backward
    logsumexp                    through the tangent needs, and that raises (torch 2.13)
    F.layer_norm, F.rms_norm     one pass instead of ten; and a backward through the tangent of
                                 torch's layer_norm is silently wrong (torch 2.13, PyTorch 196700)
    F.glu                        its tangent has no backward
    F.group_norm                 its forward mode views the input and raises on a strided one
    Tensor.numpy                 of integers, which have no tangent to lose: raises in torch.func.
                                 Of what has one: dual numbers lose it
    forward_ad.make_dual         of what torch.inference_mode made: the tangent doesn't stick

Calls that nobody differentiates stay torch's own.
"""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import (
    get_unwrapped,
    is_functorch_wrapped_tensor,
    is_gradtrackingtensor,
)
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

from ..ops._autograd import DerivativeError, is_differentiated, transform
from ..ops._rows import acc_dtype
from . import deferred
from .attention import scaled_dot_product_attention
from .levels import is_forward, is_nested, unpack

Handler = Callable[..., Any]


def _attention(original: Handler, *args: Any, **kwargs: Any) -> Any:
    tensors = [x for x in (*args[:4], *kwargs.values()) if isinstance(x, Tensor)]
    # Nested tensors are torch's business.
    if any(x.is_nested for x in tensors) or not is_differentiated(tensors):
        return original(*args, **kwargs)
    return scaled_dot_product_attention(*args, **kwargs)


@functools.cache
def _multi_head_attention_forward() -> Handler:
    """Return torch's function with fewstep's attention in it.

    It is Python that calls attention, and a mode is not active inside the function it intercepts;
    so this is the same code with two of its globals replaced.
    """
    original = F.multi_head_attention_forward
    names = {
        **original.__globals__,
        "scaled_dot_product_attention": functools.partial(
            _attention, F.scaled_dot_product_attention
        ),
        "has_torch_function": lambda args: False,
    }
    copy = types.FunctionType(
        original.__code__, names, original.__name__, original.__defaults__, original.__closure__
    )
    copy.__kwdefaults__ = original.__kwdefaults__
    return copy


def _multi_head_attention(original: Handler, *args: Any, **kwargs: Any) -> Any:
    del original
    return _multi_head_attention_forward()(*args, **kwargs)


def _has_plain_dual(x: Any) -> bool:
    """Return whether x may be a dual number of forward_ad's own level, outside of torch.func."""
    return isinstance(x, Tensor) and transform() is None and forward_ad._current_level >= 0


def _dim(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get("dim")


def _softmax(original: Handler, x: Any, *args: Any, **kwargs: Any) -> Any:
    """t_p = p (t - sum p t)."""
    primal, tangent = unpack(x) if _has_plain_dual(x) else (x, None)
    dim = _dim(args, kwargs)
    if tangent is None or dim is None:
        return original(x, *args, **kwargs)
    p = original(primal, *args, **kwargs)
    tangent = tangent.to(p.dtype)
    return forward_ad.make_dual(p, p * (tangent - (p * tangent).sum(dim, keepdim=True)))


def _log_softmax(original: Handler, x: Any, *args: Any, **kwargs: Any) -> Any:
    """t - sum p t."""
    primal, tangent = unpack(x) if _has_plain_dual(x) else (x, None)
    dim = _dim(args, kwargs)
    if tangent is None or dim is None:
        return original(x, *args, **kwargs)
    y = original(primal, *args, **kwargs)
    tangent = tangent.to(y.dtype)
    return forward_ad.make_dual(y, tangent - (y.exp() * tangent).sum(dim, keepdim=True))


def _logsumexp(original: Handler, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Sum of p t."""
    primal, tangent = unpack(x) if _has_plain_dual(x) else (x, None)
    if tangent is None:
        return original(x, *args, **kwargs)
    dim = _dim(args, kwargs)
    keep = args[1] if len(args) > 1 else kwargs.get("keepdim", False)
    y = original(primal, dim, keepdim=True)
    p = (primal - y.masked_fill(y.isinf(), 0)).exp()
    t_y = (p * tangent).sum(dim, keepdim=True)
    if not keep:
        y, t_y = y.squeeze(dim), t_y.squeeze(dim)
    return forward_ad.make_dual(y, t_y)


def _composite_norm(
    x: Tensor, axes: int, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str
) -> Tensor:
    """Return the norm by torch's operators, whose derivatives of every order are right."""
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    over = tuple(range(-axes, 0))
    if kind == "layer":
        wide = wide - wide.mean(over, keepdim=True)
    y = wide * (wide.square().mean(over, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)


def _norm(
    original: Callable[[], Tensor],
    x: Any,
    shape: Any,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str,
) -> Tensor:
    if not isinstance(x, Tensor) or not is_forward():
        return original()
    if x.device.type != "cpu" and torch.is_autocast_enabled(x.device.type):
        x = x if x.dtype == torch.float64 else x.float()  # as autocast does on GPUs
    primal, tangent = unpack(x)
    parameters = [p for p in (weight, bias) if p is not None]
    constant = all(unpack(p)[1] is None for p in parameters)
    if tangent is None and constant:
        return original()
    served = len(shape) == 1 and all(p.dtype in (x.dtype, acc_dtype(x)) for p in parameters)
    if not served or not constant or tangent is None or is_nested():
        return _composite_norm(x, len(shape), weight, bias, eps, kind)
    return deferred.norm(primal, tangent, weight, bias, kind, eps)


def _layer_norm(
    original: Handler,
    input: Any,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    plain = functools.partial(original, input, normalized_shape, weight, bias, eps)
    return _norm(plain, input, normalized_shape, weight, bias, eps, "layer")


def _rms_norm(
    original: Handler,
    input: Any,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    plain = functools.partial(original, input, normalized_shape, weight, eps)
    if eps is None and isinstance(input, Tensor):
        eps = torch.finfo(input.dtype).eps
    return _norm(plain, input, normalized_shape, weight, None, eps, "rms")  # type: ignore[arg-type]


def _glu(original: Handler, x: Any, dim: int = -1) -> Any:
    if not (isinstance(x, Tensor) and is_forward()):
        return original(x, dim)
    a, b = x.chunk(2, dim)
    return a * torch.sigmoid(b)


def _group_norm(original: Handler, x: Any, *args: Any, **kwargs: Any) -> Any:
    return original(x.contiguous() if is_forward() else x, *args, **kwargs)


def _numpy(original: Handler, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    if _has_plain_dual(x) and unpack(x)[1] is not None:
        raise DerivativeError(
            "Tensor.numpy: expected a tensor without a tangent, got one that would lose it; "
            "x.detach() has none"
        )
    inside = x
    while is_gradtrackingtensor(inside):
        inside = get_unwrapped(inside)
    if x.is_floating_point() or x.is_complex() or is_functorch_wrapped_tensor(inside):
        return original(x, *args, **kwargs)
    with temporarily_clear_interpreter_stack():
        return original(inside, *args, **kwargs)


def _make_dual(original: Handler, *pair: Tensor, **kwargs: Any) -> Any:
    return original(*(x.clone() if x.is_inference() else x for x in pair), **kwargs)


INTERCEPTORS: dict[Handler, Handler] = {
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head_attention,
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax), _softmax),
    **dict.fromkeys(
        (F.log_softmax, torch.log_softmax, Tensor.log_softmax, torch.special.log_softmax),
        _log_softmax,
    ),
    **dict.fromkeys((torch.logsumexp, Tensor.logsumexp, torch.special.logsumexp), _logsumexp),
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.glu: _glu,
    F.group_norm: _group_norm,
    **dict.fromkeys((Tensor.numpy, Tensor.__array__), _numpy),
    torch._VF._make_dual: _make_dual,  # type: ignore[attr-defined]
}
"""torch function -> handler(original, *args, **kwargs). The one place where a fused op enters.

A handler is called with the mode off. It is to return `original(*args, **kwargs)` for what it
doesn't serve; `levels.is_forward` says whether a tangent may be there, `levels.unpack` gives
(primal, tangent) of a tensor at the current level, and `forward_ad.make_dual` puts them together.
"""


_masks: weakref.WeakKeyDictionary[Any, Tensor] = weakref.WeakKeyDictionary()


def _dense(block_mask: Any, rows: int, columns: int) -> Tensor:
    """Return a BlockMask as a bool tensor [B, H, rows, columns], kept as long as the mask lives."""
    known = _masks.get(block_mask)
    if known is not None and known.shape[-2:] == (rows, columns):
        return known
    flex = sys.modules["torch.nn.attention.flex_attention"]
    blocks = block_mask.to_dense().bool()
    for axis, size in zip((-2, -1), block_mask.BLOCK_SIZE, strict=True):
        blocks = blocks.repeat_interleave(size, axis)
    inside = flex.create_mask(
        block_mask.mask_mod, *block_mask.kv_num_blocks.shape[:2], rows, columns, blocks.device
    )
    _masks[block_mask] = mask = blocks[..., :rows, :columns] & inside
    return mask


def flex_attention(original: Handler, *args: Any, **kwargs: Any) -> Any:
    """FlexAttention with its block mask made dense, and without functions of the scores.

    `original` raises in forward mode. It keeps what this can't serve: score_mod, returned lse.
    """
    names = (
        "query",
        "key",
        "value",
        "score_mod",
        "block_mask",
        "scale",
        "enable_gqa",
        "return_lse",
    )
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    q, k, v = (given[name] for name in names[:3])
    unserved = any(given.get(name) for name in ("score_mod", "return_lse", "return_aux"))
    if unserved or not is_differentiated((q, k, v)):
        return original(*args, **kwargs)
    block_mask = given.get("block_mask")
    mask = None if block_mask is None else _dense(block_mask, q.shape[-2], k.shape[-2])
    return scaled_dot_product_attention(
        q, k, v, mask, scale=given.get("scale"), enable_gqa=bool(given.get("enable_gqa"))
    )
