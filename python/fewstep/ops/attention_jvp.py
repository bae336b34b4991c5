"""Softmax attention and its directional derivative, in one pass over the keys.

    S  = scale q k^T + M                    tS = scale (t_q k^T + q t_k^T) + tM
    P  = softmax(S)                         mu = sum_j P tS
    o  = P v                                t_o = P (tS - mu) v + P t_v
    lse = log sum_j exp S

q, t_q          [B, H, Nq, D] or [B, Nq, D]     t_x: tangent of x
k, t_k          [B, G, Nk, D]                   G divides H: query head h reads head h // (H / G)
v, t_v          [B, G, Nk, Dv]
M, tM           attn_mask and its tangent, anything that broadcasts to [B, H, Nq, Nk]
o, t_o          [B, H, Nq, Dv], in q's dtype and its axis order (heads inside tokens stay inside)
lse, mu         [B, H, Nq], float32 (float64 for float64)

Tangents may all have one more axis in front, [R, ...]: R directions that share the primal's work;
t_o and mu then have it too. A tangent that is None is zero and its matmuls are not done: 6 with all
three, 4 with a static k and v, 2 with none (t_o is then zeros).

bfloat16, float16; float32 and float64 too on the CPU and in the reference (which on a GPU is what
runs for them: it stores Nq x Nk matrices and warns where they are large). D and Dv multiples of 8
up to 256, any Nq and Nk. A query that meets no key gets o = t_o = mu = 0 and lse = -inf. Any
strides with unit stride in the last axis, without a copy; masks are read where they lie, broadcast
or not. Sums are in float32 (float64 for float64).

`score_dtype` rounds q, k and their tangents, keys about their mean and each row with a scale, to 8
bits for the products in S and tS, which tensor cores do at twice the rate. With int8 t_o is then
off by about 1.3 % where scores are of order one, more where they are larger; with float8_e4m3fn by
5 % and more (8-bit scores in docs/ops/attention_jvp.md). The rounding depends on the tangents, so o
does too. In derivatives it counts as the identity: the backward takes exact scores beside this lse
and mu.

Differentiable through all outputs with respect to q, k, v and their tangents, in reverse and in
forward mode (`_attention_autograd.py`). Tangents as arguments share one pass with the primal; one
that an input carries costs a second pass, which `fewstep.scaled_dot_product_attention` avoids.
Recurrence, reason for its centring, error and cost: docs/ops/attention_jvp.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..reference._scores8 import LARGEST as SCORE_DTYPES
from ..reference.attention_jvp import attention_jvp as _reference
from ._attention import (
    HEAD_DIMS,
    Masking,
    count_directions,
    memory_for_scores,
    new_rows,
    refuse_hopper,
    resolve_scale,
    stat_dtype,
    triton_dtypes,
    validate_masking,
    validate_primals,
    warn_of_scores,
)
from ._attention_autograd import RULES, refuse_mask_gradient
from ._expect import expect_tensor
from ._layout import DTYPES, unit_stride
from ._register import register
from ._select import NO_RUN_YET, Implementation, refuse_native, refuse_triton, select

__all__ = ["HEAD_DIMS", "attention_jvp", "merge_partials"]


def _directions(tangents: Sequence[Tensor | None]) -> int:
    """Return R of the op's tangents, which always have that axis; 0 without tangents."""
    return next((t.shape[0] for t in tangents if t is not None), 0)


def _new_outputs(
    q: Tensor, v: Tensor, directions: int, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate (o, t_o, lse, mu, lse_rest); the last is empty without an additive mask."""
    o, t_o = new_rows(q, v.shape[-1]), new_rows(q, v.shape[-1], directions)
    lse, mu = (
        q.new_empty((*lead, *q.shape[:3]), dtype=stat_dtype(q)) for lead in ((), (directions,))
    )
    additive = mask is not None and mask.dtype != torch.bool
    return o, t_o, lse, mu, torch.empty_like(lse) if additive else lse.new_empty(0)


def _run_reference(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *arguments, scale, score_dtype = rest
    tangents, masking = arguments[:3], Masking(*arguments[3:])
    directions = _directions((*tangents, masking.t_attn_mask))
    outputs = _new_outputs(q, v, directions, masking.attn_mask)
    # S and P, and for each direction tS and H.
    warn_of_scores("attention_jvp", 4, q, k, directions)
    values = _reference(
        q, k, v, *tangents, scale=scale, score_dtype=score_dtype, return_rest=True,
        **masking.keywords(),
    )  # fmt: skip
    for out, value in zip(outputs, values, strict=True):
        if out.numel():
            out.copy_(value)
    return outputs


def _run_native(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *arguments, scale, score_dtype = rest
    tangents, masking = arguments[:3], Masking(*arguments[3:])
    directions = _directions((*tangents, masking.t_attn_mask))
    outputs = _new_outputs(q, v, directions, masking.attn_mask)
    inputs = [unit_stride(x) for x in (q, k, v, *tangents)]
    memory: tuple[Tensor | None, ...] = ()
    if q.device.type == "cuda":
        memory = memory_for_scores(q, k, v, tangents[1], score_dtype)
    _native.call(
        "attention_jvp", *inputs, *masking.kernel_arguments(), *_wanted(outputs), *memory, scale
    )
    return outputs


def _wanted(outputs: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """Return the outputs with None for an lse_rest that nobody needs."""
    *others, rest = outputs
    return (*others, rest if rest.dim() > 1 else None)


def _run_triton(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    from ..kernels._attention import Masks
    from ..kernels.attention_jvp import launch_attention_jvp

    *arguments, scale, _ = rest
    tangents, masks = arguments[:3], Masks(*arguments[3:])
    outputs = _new_outputs(q, v, _directions((*tangents, masks.t_attn_mask)), masks.attn_mask)
    primals = [unit_stride(x) for x in (q, k, v)]
    tangents = [unit_stride(x) for x in tangents]
    launch_attention_jvp(primals, tangents, masks, _wanted(outputs), scale)
    return outputs


def _refuse_native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t_q: Tensor | None = None,
    t_k: Tensor | None = None,
    t_v: Tensor | None = None,
    *masking: Any,
    score_dtype: torch.dtype | None = None,
    **options: Any,
) -> str | None:
    """Return why the native kernel can't run; the one for Hopper does not take everything."""
    if q.device.type != "cuda":
        if score_dtype is not None:
            return f"score_dtype: expected None on the CPU, got {score_dtype}"
        return refuse_native("attention_jvp", [q], DTYPES)
    reason = refuse_native("attention_jvp", [q], triton_dtypes(q))
    if reason is not None:
        return reason
    if t_q is None or (t_k is None) != (t_v is None):
        return "expected t_q, and both or none of t_k and t_v"
    if t_q.dim() > q.dim() and t_q.shape[0] != 1:
        return f"expected one direction, got {t_q.shape[0]}"
    if score_dtype is not None:
        reason = _refuse_scores(masking, options)
        if reason is not None:
            return reason
    inputs = {"q": q, "k": k, "v": v, "t_q": t_q, "t_k": t_k, "t_v": t_v}
    most = HEAD_DIMS[-1] if score_dtype is None else MAX_SCORES_DIM
    return refuse_hopper({name: x for name, x in inputs.items() if x is not None}, most)


def _refuse_scores(masking: Sequence[Any], options: dict[str, Any]) -> str | None:
    """Return why Hopper's 8-bit scores can't serve these masks; `options` of either caller."""
    mask = next((x.attn_mask for x in masking), options.get("attn_mask"))
    if mask is not None and mask.dtype != torch.bool:
        return f"attn_mask: expected a boolean one beside score_dtype, got {mask.dtype}"
    scale = options.get("scale")
    if scale is not None and scale <= 0:
        return f"scale: expected more than 0 beside score_dtype, got {scale}"
    return None


def _refuse_triton(
    q: Tensor, *args: Any, score_dtype: torch.dtype | None = None, **options: Any
) -> str | None:
    if score_dtype is not None:
        return f"score_dtype: expected None, got {score_dtype}"
    return refuse_triton([q], triton_dtypes(q))


MAX_SCORES_DIM = 128  # head dims of Hopper's 8-bit scores

IMPLEMENTATIONS = (
    Implementation(
        "native",
        _run_native,
        _refuse_native,
        held_back=NO_RUN_YET,
    ),
    Implementation("triton", _run_triton, _refuse_triton),
    Implementation("reference", _run_reference, lambda *args, **kwargs: None),
)


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _new_outputs(q, v, _directions((*rest[:3], rest[4])), rest[3])


_op = register(
    "attention_jvp",
    "(Tensor q, Tensor k, Tensor v, Tensor? t_q, Tensor? t_k, Tensor? t_v, Tensor? attn_mask,"
    " Tensor? t_attn_mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, bool is_causal,"
    " float scale, ScalarType? score_dtype, str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    IMPLEMENTATIONS,
    _fake,
    RULES,
)


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t_q: Tensor | None = None,
    t_k: Tensor | None = None,
    t_v: Tensor | None = None,
    *,
    attn_mask: Tensor | None = None,
    t_attn_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    score_dtype: torch.dtype | None = None,
    return_stats: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    """Return (o, t_o): attention of q, k, v and its derivative along the tangents.

    Args:
        q: queries [B, H, Nq, D] or [B, Nq, D].
        k: keys [B, G, Nk, D]; G divides H.
        v: values [B, G, Nk, Dv].
        t_q: tangent of q, its shape, dtype and device; None is zero and costs nothing. Tangents may
            all have one axis of directions in front, [R, ...].
        t_k: tangent of k, likewise.
        t_v: tangent of v, likewise.
        attn_mask: bool (True: the pair meets) or of q's dtype (added to the scores), broadcastable
            to [B, H, Nq, Nk], as in `torch.nn.functional.scaled_dot_product_attention`.
        t_attn_mask: tangent of an additive attn_mask; with R in front if the other tangents have.
        cu_seqlens_q: int32 [S + 1]: sequence s is rows cu[s] ... cu[s + 1] of q, and sees only
            itself. B must be 1.
        cu_seqlens_k: the same for k and v.
        is_causal: key j is seen by query i if j <= i, counted from the start of their sequence.
        scale: factor on q k^T; D**-0.5 if None.
        score_dtype: torch.int8 or torch.float8_e4m3fn: what S and tS are computed from, at a loss
            described above. None: the tensors as they are.
        return_stats: also return lse and mu, which `merge_partials` needs.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        (o, t_o), or (o, t_o, lse, mu). Without score_dtype o has the same bits whatever the
        tangents are. Without any tangent t_o and mu are a single zero, expanded: clone them before
        writing to them.

    Raises:
        ValueError: shapes, dtypes or devices differ, or a head dim is not offered; the message
            names the argument.
        TypeError: an argument is of the wrong kind: no tensor, or a tensor as scale or is_causal.
        UnsupportedError: `impl` can't serve these tensors.
        DerivativeError: attn_mask or t_attn_mask requires grad: no kernel has its gradient. Or a
            torch.func transform reaches the op inside torch.compile.
    """
    masking = Masking(attn_mask, t_attn_mask, cu_seqlens_q, cu_seqlens_k, is_causal)
    validate_primals(q, k, v)
    tangents = {"t_q": t_q, "t_k": t_k, "t_v": t_v}
    directions = count_directions({"q": q, "k": k, "v": v}, tangents)
    validate_masking(q, k, masking, directions)
    refuse_mask_gradient(attn_mask, t_attn_mask)
    scale = resolve_scale(scale, q)
    _validate_score_dtype(score_dtype)
    inputs = [q, k, v, t_q, t_k, t_v]
    if q.dim() == 3:
        inputs = [None if x is None else x.unsqueeze(-3) for x in inputs]
        masking = _with_head_axis(masking, directions)
    masking = masking.expanded(inputs[0], inputs[1], directions)
    if directions is None:
        inputs[3:] = [None if x is None else x.unsqueeze(0) for x in inputs[3:]]
    kinds = {"scale": scale, "score_dtype": score_dtype}
    chosen = select("attention_jvp", impl, IMPLEMENTATIONS, *inputs, masking, **kinds)
    o, t_o, lse, mu, _ = _op(*inputs, *masking.kernel_arguments(), scale, score_dtype, chosen)
    if directions is None:  # one, or no tangent at all
        none = t_o.shape[0] == 0
        # A zero seen everywhere: nobody should pay for a tangent that isn't there.
        zeros = (x.new_zeros(()).expand(x.shape) for x in (o, lse))
        t_o, mu = zeros if none else (t_o[0], mu[0])
    if q.dim() == 3:
        o, t_o, lse, mu = o.squeeze(-3), t_o.squeeze(-3), lse.squeeze(-2), mu.squeeze(-2)
    return (o, t_o, lse, mu) if return_stats else (o, t_o)


def _validate_score_dtype(score_dtype: torch.dtype | None) -> None:
    if score_dtype is None or score_dtype in SCORE_DTYPES:
        return
    expected = " or ".join(map(str, SCORE_DTYPES))
    if not isinstance(score_dtype, torch.dtype):
        got = type(score_dtype).__name__
        raise TypeError(f"score_dtype: expected {expected} or None, got {got}")
    raise ValueError(f"score_dtype: expected {expected} or None, got {score_dtype}")


def _with_head_axis(masking: Masking, directions: int | None) -> Masking:
    """Return masking for [B, N, D] tensors as it is for [B, 1, N, D]."""

    def widen(mask: Tensor | None, batched: int) -> Tensor | None:
        return mask if mask is None or mask.dim() < batched else mask.unsqueeze(-3)

    return replace(
        masking,
        attn_mask=widen(masking.attn_mask, 3),
        t_attn_mask=widen(masking.t_attn_mask, 3 if directions is None else 4),
    )


_PARTS = ("o", "t_o", "lse", "mu")


def merge_partials(parts: Iterable[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """Join attention over disjoint sets of keys exactly; what ring and split-key schemes need.

        lse = log sum_a exp lse_a        w_a = exp(lse_a - lse)        o = sum_a w_a o_a
        mu = sum_a w_a mu_a              t_o = sum_a w_a (t_o_a + (mu_a - mu) o_a)

    Args:
        parts: (o, t_o, lse, mu) of each set, from `attention_jvp(..., return_stats=True)` with the
            same queries, in any order. A row that met no key in a part has weight 0 there; one that
            met none in any part gets o = t_o = mu = 0 and lse = -inf, and zero gradients.

    Returns:
        (o, t_o, lse, mu) over the union, in the dtypes of the parts; differentiable.

    Raises:
        ValueError: there are no parts, or they don't fit together; the message names the tensor.
        TypeError: a part is no such tuple.
    """
    parts = _checked_parts(parts)
    o, t_o, lse, mu = (torch.stack(x) for x in zip(*parts, strict=True))
    # logsumexp of nothing but -inf has no derivative: such a row is taken out before it.
    nowhere = (lse == -torch.inf).all(0)
    total = torch.logsumexp(lse.masked_fill(nowhere, 0), 0)
    weight = (lse - total).exp().masked_fill(nowhere, 0)
    merged_o = (weight[..., None] * o).sum(0)
    if mu.dim() > lse.dim():  # directions
        weight = weight.unsqueeze(1)
        o = o.unsqueeze(1)
    merged_mu = (weight * mu).sum(0)
    # mu_a - mu: what all mu_a share would else be lost to the rounding of o.
    merged_t_o = (weight[..., None] * (t_o + (mu - merged_mu)[..., None] * o)).sum(0)
    dtype = parts[0][0].dtype
    merged_lse = total.masked_fill(nowhere, -torch.inf)
    return merged_o.to(dtype), merged_t_o.to(dtype), merged_lse, merged_mu


def _checked_parts(parts: Iterable[Sequence[Tensor]]) -> list[tuple[Tensor, ...]]:
    """Return the parts as a list, or raise an error naming what doesn't fit."""
    checked: list[tuple[Tensor, ...]] = []
    for i, part in enumerate(parts):
        if isinstance(part, Tensor) or not isinstance(part, Sequence) or len(part) != len(_PARTS):
            got = type(part).__name__
            if isinstance(part, Sequence):
                got += f" of {len(part)}"
            raise TypeError(
                f"parts[{i}]: expected (o, t_o, lse, mu) from attention_jvp(..., "
                f"return_stats=True), got {got}"
            )
        for name, x in zip(_PARTS, part, strict=True):
            expect_tensor(f"parts[{i}].{name}", x)
        o, t_o = part[:2]
        lead = t_o.shape[: max(0, t_o.dim() - o.dim())]  # directions
        rows = o.shape[:-1]
        kinds = [
            (tuple(shape), dtype, o.device)
            for shape, dtype in (
                (o.shape, o.dtype),
                ((*lead, *o.shape), o.dtype),
                (rows, stat_dtype(o)),
                ((*lead, *rows), stat_dtype(o)),
            )
        ]
        source = "to go with its o"
        if checked:
            kinds, source = [_kind(x) for x in checked[0]], "as parts[0] has"
        for name, x, kind in zip(_PARTS, part, kinds, strict=True):
            if _kind(x) != kind:
                raise ValueError(
                    f"parts[{i}].{name}: expected {_in_words(kind)} {source}, got "
                    f"{_in_words(_kind(x))}"
                )
        checked.append(tuple(part))
    if not checked:
        raise ValueError("parts: expected at least one (o, t_o, lse, mu), got none")
    return checked


def _kind(x: Tensor) -> tuple[tuple[int, ...], torch.dtype, torch.device]:
    return tuple(x.shape), x.dtype, x.device


def _in_words(kind: tuple[tuple[int, ...], torch.dtype, torch.device]) -> str:
    shape, dtype, device = kind
    return f"{dtype} {list(shape)} on {device}"


def gate_cases(device: torch.device) -> list[tuple[Any, ...]]:
    """Return (args, kwargs, bound) for the gate on a new machine; see `_gate.check`."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    cases: list[tuple[Any, ...]] = []
    for dtype in triton_dtypes(torch.empty(0, device=device)):

        def inputs(nq: int, nk: int, d: int, dv: int, *lead: int, b: int = 2, g: int = 2) -> Any:
            shapes = [(b, 2, nq, d), (b, g, nk, d), (b, g, nk, dv)]
            shapes += [(*lead, *shape) for shape in shapes]
            return tuple(draw(*shape, dtype=dtype) for shape in shapes)  # noqa: B023

        # P, H and the result are rounded once each, which leaves 0.3 units in norm: twice that. In
        # float32 sums of some hundred terms leave some units.
        bound = (16 if dtype == torch.float32 else 0.75) * torch.finfo(dtype).eps
        for shape in ((77, 130, 64, 64), (33, 65, 128, 128), (130, 33, 72, 40), (33, 65, 256, 160)):
            args = inputs(*shape)
            cases.append((args, {"return_stats": True}, bound))
            cases.append(((*args[:4], None, None), {}, bound))
            # To the bounds of the kernels without it: the reference rounds what they round.
            rounded: dict[str, Any] = {"score_dtype": torch.int8, "return_stats": True}
            cases.append((args, rounded, bound))
            rounded = {"score_dtype": torch.float8_e4m3fn, "return_stats": True}
            cases.append(((*args[:4], None, None), rounded, bound))
        # Each kind of masking once: what they do does not depend on the dtype.
        if dtype == triton_dtypes(torch.empty(0, device=device))[0]:
            cases += _masked_gate_cases(inputs, draw, dtype, bound)
    return cases


def _masked_gate_cases(
    inputs: Callable[..., Any], draw: Callable[..., Tensor], dtype: torch.dtype, bound: float
) -> list[tuple[Any, ...]]:
    shape = (77, 130, 64, 64)
    boolean = draw(2, 1, 77, 130) > -0.5
    boolean[0, :, 3], boolean[1, :, 4, :70] = False, False  # rows without a key at all, or at first
    additive = draw(77, 130, dtype=dtype).masked_fill(boolean[0, 0].logical_not(), -torch.inf)
    offsets = torch.tensor([[0, 5, 40, 77], [0, 70, 70, 130]], device=boolean.device).int()
    options: list[dict[str, Any]] = [
        {"is_causal": True},
        {"attn_mask": boolean},
        {"attn_mask": additive, "t_attn_mask": draw(77, 130, dtype=dtype)},
    ]
    cases = [(inputs(*shape), {**o, "return_stats": True}, bound) for o in options]
    packed = {"cu_seqlens_q": offsets[0], "cu_seqlens_k": offsets[1], "return_stats": True}
    cases.append((inputs(*shape, b=1), packed, bound))
    for args, kwargs, _ in (cases[1], cases[-1]):  # a boolean mask, sequences
        cases.append((args, {**kwargs, "score_dtype": torch.int8}, bound))
    cases.append((inputs(*shape, g=1), {"return_stats": True}, bound))  # shared heads
    for masking in ({}, {"is_causal": True}):  # directions, an odd one left over
        cases.append((inputs(*shape, 3), {**masking, "return_stats": True}, bound))
    return cases
