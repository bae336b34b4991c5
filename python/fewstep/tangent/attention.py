"""torch's scaled_dot_product_attention, with every derivative of every order.

    o = softmax(scale q k^T + M) v          q [..., H, L, E], k [..., G, S, E], v [..., G, S, Ev]

Where the innermost derivative being taken is a forward one (torch.func.jvp, jacfwd, dual numbers),
primals and tangents go through one call of `fewstep.ops.attention_jvp`: 6 matmuls with all three
tangents, 4 where k and v have none. Otherwise the op is called without tangents, and its rules
(`ops/_attention_autograd.py`) serve autograd, the other transforms and their nesting.

Dropout, head dims above 256 and gradients of a mask are computed by torch's own operators, which
store [..., L, S] matrices (`composite_attention`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ..ops._expect import expect_bool, expect_number, expect_tensor, expect_tensors
from ..ops.attention_jvp import HEAD_DIMS, attention_jvp
from .levels import is_forward, unpack

_WIDEST = HEAD_DIMS[-1]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return attention as `torch.nn.functional.scaled_dot_product_attention` does.

    Works under torch.func.jvp, vjp, jacfwd, jacrev, vmap and hessian in any nesting, with dual
    numbers, and under plain autograd to any order; what `jvp` returns can be backpropagated.

    Args:
        query: [..., H, L, E]; the axes in front broadcast, and there may be none.
        key: [..., H, S, E].
        value: [..., H, S, Ev].
        attn_mask: broadcastable to [..., H, L, S]; bool (True: the pair meets) or floating (added
            to the scores).
        dropout_p: probability that a weight is set to zero.
        is_causal: query i meets keys 0 to i.
        scale: factor on q k^T; E**-0.5 if None.
        enable_gqa: key and value may have fewer heads, G dividing H.

    Returns:
        [..., H, L, Ev] in the dtype of query. A query that meets no key gets zeros.

    Raises:
        ValueError: the arguments don't fit together; the message names the argument.
        TypeError: an argument is of the wrong kind: no tensor, or a tensor as scale or is_causal.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        expect_tensor(name, x)
    expect_tensors(attn_mask=attn_mask)
    expect_number("dropout_p", dropout_p)
    expect_bool("is_causal", is_causal)
    expect_bool("enable_gqa", enable_gqa)
    if scale is None:
        scale = max(query.shape[-1], 1) ** -0.5  # without columns all scores are zero
    expect_number("scale", scale)
    query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    _validate(query, key, value, attn_mask, is_causal, enable_gqa)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = _mask_in(query.dtype, attn_mask)
    if (
        dropout_p > 0
        or max(query.shape[-1], value.shape[-1]) > _WIDEST
        or 0 in (*query.shape, *key.shape, *value.shape)
        or (attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled())
    ):
        return composite_attention(query, key, value, attn_mask, dropout_p, is_causal, scale)
    lead = tuple(torch.broadcast_shapes(*(_shared(x, query) for x in (query, key, value))))
    rank = len(lead)
    lead = (1,) * (2 - len(lead)) + lead  # [B, H] at least
    q = _four_axes(query, lead, lead[-1])
    k, v = (_four_axes(x, lead, x.shape[-3] if x.dim() > 2 else 1) for x in (key, value))
    if k.shape[1] != v.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    mask = None if attn_mask is None else _four_axes_of_mask(attn_mask, lead)
    o = _attention(*map(_pad, (q, k, v)), mask, is_causal, scale)
    shape = (*lead[2 - min(rank, 2) :], query.shape[-2], value.shape[-1])
    return o[..., : value.shape[-1]].reshape(shape)


def composite_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """Return attention by torch's operators, which all have derivatives of every order."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if query.dim() > 2:
        key, value = (_repeated(x, query.shape[-3]) for x in (key, value))
    s = query.to(dtype) @ key.to(dtype).mT * scale
    if is_causal:
        later = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)
        s = s.masked_fill(later, -torch.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        s = s.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        s = s + attn_mask.to(dtype)
    # softmax has no derivative where all scores are -inf: such a row is taken out before it.
    empty = (s == -torch.inf).all(-1, keepdim=True)
    p = s.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    if dropout_p > 0:
        p = F.dropout(p, dropout_p)
    return (p @ value.to(dtype)).to(query.dtype)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """Call the op on 4-d tensors; on primals and tangents at once if the level is a forward one."""
    if not is_forward():
        return attention_jvp(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale)[0]
    (q, t_q), (k, t_k), (v, t_v) = map(unpack, (q, k, v))
    mask, t_mask = (None, None) if mask is None else unpack(mask)
    tangents = (t_q, t_k, t_v)
    o, t_o = attention_jvp(
        q, k, v, *tangents,
        attn_mask=mask, t_attn_mask=t_mask, is_causal=is_causal, scale=scale,
    )  # fmt: skip
    if all(t is None for t in (*tangents, t_mask)):
        return o
    return forward_ad.make_dual(o, t_o)


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the tensors as autocast would hand them to torch's function."""
    device = tensors[0].device.type  # type: ignore[union-attr]
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x if x is None or not x.is_floating_point() or x.dtype == torch.float64 else x.to(dtype)
        for x in tensors
    )


def _mask_in(dtype: torch.dtype, mask: Tensor) -> Tensor:
    if mask.dtype == dtype:
        return mask
    # float32's lowest number, a common "don't look", would become -inf in float16: a row of it
    # would then be one without keys, not one that looks at all keys alike.
    lowest = torch.finfo(dtype).min
    return torch.where(mask == -torch.inf, mask, mask.clamp(min=lowest)).to(dtype)


def _shared(x: Tensor, query: Tensor) -> tuple[int, ...]:
    """Return the axes in front of x's rows, with the heads of query in place of shared ones."""
    lead = x.shape[:-2]
    if len(lead) == 0 or query.dim() < 3 or lead[-1] == query.shape[-3]:
        return tuple(lead)
    return (*lead[:-1], query.shape[-3] if query.shape[-3] != 1 else lead[-1])


def _four_axes(x: Tensor, lead: tuple[int, ...], heads: int) -> Tensor:
    """Return [..., G, N, D] as [B, heads, N, D], the axes in front expanded to those of `lead`."""
    x = x.reshape(*[1] * (len(lead) + 2 - x.dim()), *x.shape)
    x = x.expand(*lead[:-1], heads, *x.shape[-2:])
    return x.flatten(0, -4)


def _four_axes_of_mask(mask: Tensor, lead: tuple[int, ...]) -> Tensor:
    """Return a mask as a view that broadcasts to [B, H, L, S], copied only where it must be."""
    if len(lead) == 2 or mask.dim() <= 3:
        return mask
    mask = mask.reshape(*[1] * (len(lead) + 2 - mask.dim()), *mask.shape)
    return mask.expand(*lead[:-1], *mask.shape[-3:]).flatten(0, -4)


def _pad(x: Tensor) -> Tensor:
    """Return x with columns of zeros up to a head dim that the op offers."""
    return x if x.shape[-1] % HEAD_DIMS.step == 0 else F.pad(x, (0, -x.shape[-1] % HEAD_DIMS.step))


def _repeated(x: Tensor, heads: int) -> Tensor:
    if x.dim() < 3 or x.shape[-3] in (1, heads) or heads % x.shape[-3]:
        return x
    return x.repeat_interleave(heads // x.shape[-3], -3)


def _validate(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, gqa: bool
) -> None:
    if mask is not None and causal:
        raise ValueError("is_causal: expected False where attn_mask is given, got True")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() < 2:
            raise ValueError(f"{name}: expected at least 2 axes, got shape {tuple(x.shape)}")
        if x.dtype != query.dtype or x.device != query.device:
            raise ValueError(
                f"{name}: expected the dtype and device of query, {query.dtype} on "
                f"{query.device}, got {x.dtype} on {x.device}"
            )
    if not query.is_floating_point():
        raise ValueError(f"query: expected a floating dtype, got {query.dtype}")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"key: expected the head dim of query, {query.shape[-1]}, got {key.shape[-1]}"
        )
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(
            f"value: expected as many rows as key, {key.shape[-2]}, got {value.shape[-2]}"
        )
    heads = query.shape[-3] if query.dim() > 2 else 1
    for name, x in (("key", key), ("value", value)):
        mine = x.shape[-3] if x.dim() > 2 else 1
        if mine in (1, heads) or heads == 1:
            continue
        if not gqa:
            raise ValueError(
                f"{name}: expected the heads of query, {heads}, got {mine}; enable_gqa=True lets "
                "heads be shared"
            )
        if heads % mine:
            raise ValueError(
                f"{name}: expected heads that divide those of query, {heads}, got {mine}"
            )
    lead = [_shared(x, query) for x in (query, key, value)]
    try:
        shape = (*torch.broadcast_shapes(*lead), query.shape[-2], key.shape[-2])
    except RuntimeError:
        raise ValueError(
            f"key, value: expected axes in front that broadcast with those of query, "
            f"{tuple(query.shape[:-2])}, got {tuple(key.shape[:-2])} and {tuple(value.shape[:-2])}"
        ) from None
    if mask is None:
        return
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise ValueError(
            f"attn_mask: expected torch.bool, torch.float32 or {query.dtype}, got {mask.dtype}"
        )
    fits = mask.dim() <= len(shape) and all(
        have in (1, want) for have, want in zip(reversed(mask.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"attn_mask: expected a shape that broadcasts to {shape}, got {tuple(mask.shape)}"
        )
