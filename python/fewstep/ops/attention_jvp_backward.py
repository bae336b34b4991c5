"""Gradients through attention and its directional derivative: the dual of attention's backward.

    D0 = sum dt_o o - d_mu                  D1 = sum (d_o o + dt_o t_o) - d_lse
    X0 = dt_o v^T                           X1 = d_o v^T + dt_o t_v^T
    tP = P (tS - mu)                        P = exp(S - lse)
    dS0 = P (X0 - D0)                       dS1 = P (X1 - D1) + tP (X0 - D0)
    dt_q = scale dS0 k                      d_q = scale (dS1 k + dS0 t_k)
    dt_k = scale dS0^T q                    d_k = scale (dS1^T q + dS0^T t_q)
    dt_v = P^T dt_o                         d_v = P^T d_o + tP^T dt_o

d_x: cotangent of x; dt_x: cotangent of t_x. Evaluate the backward of attention on dual numbers with
the cotangent dt_o + eps d_o: its real part is the gradient of the tangents, its dual part that of
the primals. lse and mu are such a pair too (mu is the derivative of lse), so their cotangents enter
D1 and D0 and merged results are differentiable. One direction; several are summed by the caller.

d_o, dt_o       [B, H, Nq, Dv], q's dtype       None is zero and costs nothing
delta0, delta1  [B, H, Nq], the dtype of lse    D0 and D1 above; delta0 None: t_o and mu have no
                                                cotangent, and what is left is attention's backward
q ... t_v       as in attention_jvp, one direction: t_x has the shape of x
lse, mu         [B, H, Nq], from attention_jvp; mu None: no tangents
lse_rest        like lse: log l - (lse - m), with m the largest score of a row and l the sum of
                exp(S - m); P = exp((S - lse) - lse_rest). None is zero, which is right to the
                rounding of lse: not where an additive mask leaves a row nothing but -1e6 or less

Returns (d_q, d_k, d_v, dt_q, dt_k, dt_v), in the shapes and dtype of q, k, v; those that `needs`
doesn't name are empty. 15 matmuls for all of them; 5 (and the scores) where only d_o is given.

Every sum has one order that depends on shapes alone: bits repeat from run to run. With
`deterministic=False` d_q and dt_q may be added up in any order, where a kernel is faster for it.
Derivation, layout and error: docs/ops/attention_jvp_backward.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..reference.attention_jvp_backward import attention_jvp_backward as _reference
from ._attention import (
    Masking,
    count_directions,
    new_rows,
    refuse_hopper,
    resolve_scale,
    stat_dtype,
    triton_dtypes,
    validate_masking,
    validate_primals,
    warn_of_scores,
)
from ._expect import expect_tensor, expect_tensors
from ._layout import DTYPES, unit_stride
from ._register import register
from ._select import NO_RUN_YET, Implementation, refuse_native, refuse_triton, select

__all__ = ["NAMES", "attention_jvp_backward"]

_MAX_HOPPER_DIM = 128
NAMES = ("q", "k", "v", "t_q", "t_k", "t_v")
"""Gradients in the order returned; `needs` has bit i set for NAMES[i]."""
_Q_BITS = 0b001001


def _outputs(primals: tuple[Tensor, ...], needs: int) -> tuple[Tensor, ...]:
    """Allocate the gradients asked for, in their primal's axis order; the others are empty."""
    return tuple(
        new_rows(x, x.shape[-1]) if needs >> i & 1 else x.new_empty(0)
        for i, x in enumerate((*primals, *primals))
    )


def _run_reference(d_o: Tensor | None, dt_o: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    *arguments, scale, needs, _ = rest
    *tensors, lse_rest = arguments[:11]
    masking = Masking(*arguments[11:])
    # S, tS, P, tP, X0, X1, dS0, dS1.
    warn_of_scores("attention_jvp_backward", 8, tensors[2], tensors[3])
    values = _reference(
        d_o, dt_o, *tensors, lse_rest=lse_rest, scale=scale, **masking.keywords()
    )  # fmt: skip
    outputs = _outputs(tuple(tensors[2:5]), needs)
    for i, (out, value) in enumerate(zip(outputs, values, strict=True)):
        if needs >> i & 1:
            out.copy_(value)
    return outputs


def _run_native(d_o: Tensor | None, dt_o: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    *arguments, scale, needs, deterministic = rest
    (delta0, delta1, *inputs, lse, mu, rest), masking = arguments[:11], arguments[11:]
    outputs = _outputs(tuple(inputs[:3]), needs)
    # One more argument for the kernel on CUDA, which alone has a form with another order of sums.
    workspace = []
    if inputs[0].device.type == "cuda":
        fused = not deterministic and _can_fuse(inputs, needs)
        workspace.append(_query_sums(inputs[0], inputs[2], masking[2]) if fused else None)
    _native.call(
        "attention_jvp_backward",
        *map(unit_stride, (d_o, dt_o)),
        *(x if x is None else x.contiguous() for x in (delta0, delta1)),
        *map(unit_stride, inputs),
        *(x if x is None else x.contiguous() for x in (lse, mu, rest)),
        *masking,
        *(out if needs >> i & 1 else None for i, out in enumerate(outputs)),
        *workspace,
        scale,
    )
    return outputs


def _can_fuse(inputs: Sequence[Tensor | None], needs: int) -> bool:
    """Return whether the Hopper kernel can add up d_q and dt_q in a pass that runs for keys."""
    q, _, v, _, t_k, _ = inputs
    # Above 64 columns values have a pass of their own, which has no dS0 and dS1.
    owners = 0b110110 if _width(q, v) == 64 else 0b010010
    return t_k is not None and bool(needs & _Q_BITS) and bool(needs & owners)


def _width(q: Tensor, v: Tensor) -> int:
    """Return the columns that the Hopper kernel pads head dims to."""
    return 64 if max(q.shape[-1], v.shape[-1]) <= 64 else 128


def _query_sums(q: Tensor, v: Tensor, cu_seqlens_q: Tensor | None) -> Tensor:
    """Allocate what the Hopper kernel adds up d_q and dt_q in, as its header describes it."""
    sequences = 1 if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    rows = q.shape[2] + 64 * sequences
    return q.new_zeros((2, *q.shape[:2], rows, _width(q, v)), dtype=torch.float32)


def _run_triton(d_o: Tensor | None, dt_o: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    from ..kernels._attention import Masks
    from ..kernels.attention_jvp_backward import launch_attention_jvp_backward

    *arguments, scale, needs, _ = rest
    delta0, delta1, *tensors, lse, mu, rest = arguments[:11]
    primals, tangents = tensors[:3], tensors[3:]
    outputs = _outputs(tuple(primals), needs)
    launch_attention_jvp_backward(
        [unit_stride(x) for x in (d_o, dt_o)],
        [unit_stride(x) for x in primals],
        [unit_stride(x) for x in tangents],
        [None if x is None else x.contiguous() for x in (lse, mu, rest, delta0, delta1)],
        Masks(*arguments[11:]),
        [x if needs >> i & 1 else None for i, x in enumerate(outputs)],
        scale,
    )
    return outputs


def _refuse_native(*args: Any, **options: Any) -> str | None:
    """Return why the native kernel can't run; the one for Hopper does not take everything.

    Arguments are those of the op up to lse_rest, then a Masking; or the public function's.
    """
    q = args[_Q]
    if q.device.type != "cuda":
        return refuse_native("attention_jvp_backward", [q], DTYPES)
    reason = refuse_native("attention_jvp_backward", [q], triton_dtypes(q))
    if reason is not None:
        return reason
    names = ("d_o", "dt_o", "delta0", "delta1", "q", "k", "v", "t_q", "t_k", "t_v", "lse", "mu")
    inputs = dict(zip(names, args[: len(names)], strict=True))
    if (inputs["t_k"] is None) != (inputs["t_v"] is None):
        return "t_k, t_v: expected both or none"
    absent = [name for name, x in inputs.items() if x is None and name not in ("t_k", "t_v")]
    if absent:
        return f"{absent[0]}: expected a tensor, got None"
    mask = next((x.attn_mask for x in args if isinstance(x, Masking)), options.get("attn_mask"))
    additive = mask is not None and mask.dtype != torch.bool
    if additive and inputs["t_k"] is not None:
        return f"attn_mask: expected a boolean one where t_k and t_v are given, got {mask.dtype}"
    if not additive and any(
        x is not None for x in (*args[len(names) :][:1], options.get("lse_rest"))
    ):
        return "lse_rest: expected None without an additive attn_mask"
    matrices = {name: x for name, x in inputs.items() if x is not None and x.dim() == 4}
    return refuse_hopper(matrices, max_dim=_MAX_HOPPER_DIM)


_Q = 4  # the position of q among the arguments

IMPLEMENTATIONS = (
    Implementation(
        "native",
        _run_native,
        _refuse_native,
        held_back=NO_RUN_YET,
    ),
    Implementation(
        "triton",
        _run_triton,
        lambda *args, **kwargs: refuse_triton([args[_Q]], triton_dtypes(args[_Q])),
    ),
    Implementation("reference", _run_reference, lambda *args, **kwargs: None),
)


def _fake(d_o: Tensor | None, dt_o: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return _outputs(rest[2:5], rest[-3])


_op = register(
    "attention_jvp_backward",
    "(Tensor? d_o, Tensor? dt_o, Tensor? delta0, Tensor delta1, Tensor q, Tensor k, Tensor v,"
    " Tensor? t_q, Tensor? t_k, Tensor? t_v, Tensor lse, Tensor? mu, Tensor? lse_rest,"
    " Tensor? attn_mask, Tensor? t_attn_mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k,"
    " bool is_causal, float scale, int needs, bool deterministic, str impl)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    IMPLEMENTATIONS,
    _fake,
)


def _validate(
    outputs: dict[str, Tensor | None], stats: dict[str, Tensor | None], q: Tensor, v: Tensor
) -> None:
    rows = tuple(q.shape[:-1])
    for name in ("delta1", "lse"):
        expect_tensor(name, stats[name])
    expect_tensors(**outputs, **stats)
    for name, x in (*outputs.items(), *stats.items()):
        if x is not None and x.device != q.device:
            raise ValueError(f"{name}: expected the device of q, {q.device}, got {x.device}")
    for name, x in outputs.items():
        if x is not None and (x.shape != (*rows, v.shape[-1]) or x.dtype != q.dtype):
            raise ValueError(
                f"{name}: expected {q.dtype} {[*rows, v.shape[-1]]}, got {x.dtype} {list(x.shape)}"
            )
    for name, x in stats.items():
        if x is not None and (x.shape != rows or x.dtype != stat_dtype(q)):
            raise ValueError(
                f"{name}: expected {stat_dtype(q)} {list(rows)}, got {x.dtype} {list(x.shape)}"
            )


def attention_jvp_backward(
    d_o: Tensor | None,
    dt_o: Tensor | None,
    delta0: Tensor | None,
    delta1: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t_q: Tensor | None,
    t_k: Tensor | None,
    t_v: Tensor | None,
    lse: Tensor,
    mu: Tensor | None,
    *,
    lse_rest: Tensor | None = None,
    attn_mask: Tensor | None = None,
    t_attn_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    needs: str | tuple[str, ...] = NAMES,
    deterministic: bool = True,
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    """Return the gradients (d_q, d_k, d_v, dt_q, dt_k, dt_v) of a function of (o, t_o, lse, mu).

    Args:
        d_o: cotangent of o [B, H, Nq, Dv], or None for zero.
        dt_o: cotangent of t_o, or None for zero.
        delta0: sum(dt_o * o) - d_mu [B, H, Nq]; None if neither t_o nor mu has a cotangent.
        delta1: sum(d_o * o + dt_o * t_o) - d_lse [B, H, Nq].
        q: queries [B, H, Nq, D].
        k: keys [B, G, Nk, D].
        v: values [B, G, Nk, Dv].
        t_q: tangent of q, or None for zero; of one direction.
        t_k: tangent of k, likewise.
        t_v: tangent of v, likewise.
        lse: from `attention_jvp` [B, H, Nq].
        mu: from `attention_jvp`; None without tangents.
        lse_rest: what rounding took from lse, as described above; None for zero.
        attn_mask: as in `attention_jvp`.
        t_attn_mask: as in `attention_jvp`, of one direction.
        cu_seqlens_q: as in `attention_jvp`.
        cu_seqlens_k: as in `attention_jvp`.
        is_causal: as in `attention_jvp`.
        scale: as in `attention_jvp`.
        needs: names of the gradients wanted, from "q", "k", "v", "t_q", "t_k", "t_v".
        deterministic: False allows forms whose last bits differ from run to run, unless
            `torch.use_deterministic_algorithms(True)` is set. The Hopper kernel has one: 15
            products instead of 21 for head dims up to 64, 18 instead of 24 up to 128.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        Six tensors; those not in `needs` are empty.

    Raises:
        ValueError: shapes, dtypes or devices differ; the message names the argument.
        TypeError: an argument is of the wrong kind: no tensor, or a tensor as scale.
        UnsupportedError: `impl` can't serve these tensors.
        DerivativeError: an input carries a tangent or requires grad.
    """
    masking = Masking(attn_mask, t_attn_mask, cu_seqlens_q, cu_seqlens_k, is_causal)
    validate_primals(q, k, v)
    if q.dim() != 4:
        raise ValueError(f"q: expected [B, H, Nq, D], got shape {tuple(q.shape)}")
    tangents = {"t_q": t_q, "t_k": t_k, "t_v": t_v}
    if count_directions({"q": q, "k": k, "v": v}, tangents) is not None:
        raise ValueError("t_q, t_k, t_v: expected one direction, got an axis of directions")
    validate_masking(q, k, masking, None)
    _validate(
        {"d_o": d_o, "dt_o": dt_o},
        {"delta0": delta0, "delta1": delta1, "lse": lse, "mu": mu, "lse_rest": lse_rest},
        q, v,
    )  # fmt: skip
    if dt_o is not None and delta0 is None:
        raise ValueError("delta0: expected a tensor where dt_o is given, got None")
    needs = (needs,) if isinstance(needs, str) else tuple(needs)
    unknown = set(needs) - set(NAMES)
    if unknown:
        raise ValueError(f"needs: expected names from {', '.join(NAMES)}, got {sorted(unknown)[0]}")
    bits = sum(1 << i for i, name in enumerate(NAMES) if name in needs)
    scale = resolve_scale(scale, q)
    masking = masking.expanded(q, k, None).one_direction(0)
    tensors = (d_o, dt_o, delta0, delta1, q, k, v, t_q, t_k, t_v, lse, mu, lse_rest)
    chosen = select("attention_jvp_backward", impl, IMPLEMENTATIONS, *tensors, masking)
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    return tuple(_op(*tensors, *masking.kernel_arguments(), scale, bits, deterministic, chosen))


def gate_cases(device: torch.device) -> list[tuple[Any, ...]]:
    """Return (args, kwargs, bound) for the gate on a new machine; see `_gate.check`."""
    from ..reference.attention_jvp import attention_jvp as forward

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    boolean = draw(2, 1, 77, 130) > -0.5
    boolean[0, :, 3], boolean[1, :, 4, :70] = False, False  # rows without a key at all, or at first
    additive = {"attn_mask": draw(77, 130), "t_attn_mask": draw(77, 130)}
    offsets = torch.tensor([[0, 5, 40, 77], [0, 70, 70, 130]], device=device).int()
    packed = {"cu_seqlens_q": offsets[0], "cu_seqlens_k": offsets[1]}
    # Whole tiles of queries that meet fewer keys than a block owns: the next sequence's are beside.
    offsets = torch.tensor([[0, 100, 150], [0, 70, 140]], device=device).int()
    beside = {"cu_seqlens_q": offsets[0], "cu_seqlens_k": offsets[1]}
    plain, wide = (2, 2, 77, 130, 64, 64), (2, 2, 33, 65, 72, 40)  # B, G, Nq, Nk, D, Dv
    masked: list[tuple[Any, ...]] = [
        (plain, {"is_causal": True}),
        (plain, {"attn_mask": boolean}),
        (plain, additive),
        ((1, *plain[1:]), packed),
        ((1, 2, 150, 140, 64, 64), beside),
        ((1, 2, 150, 140, 128, 128), beside),
        ((2, 1, *plain[2:]), {}),  # shared heads
    ]
    dtypes = triton_dtypes(torch.empty(0, device=device))
    cases: list[tuple[Any, ...]] = []
    for dtype in dtypes:
        # P, tP, dS0, dS1 and the result are rounded once each, and dS1 and tP are differences of
        # terms larger than they are: 0.6 units in norm; twice that. In float32 some tens of units.
        bound = (64 if dtype == torch.float32 else 1.3) * torch.finfo(dtype).eps
        # Each kind of masking once: what they do does not depend on the dtype.
        for (b, g, nq, nk, d, dv), masks in [
            (plain, {}),
            (wide, {}),
            *(masked if dtype == dtypes[0] else []),
        ]:
            shapes = [(b, 2, nq, d), (b, g, nk, d), (b, g, nk, dv)] * 2 + [(b, 2, nq, dv)] * 2
            *inputs, d_o, dt_o = (draw(*shape).to(dtype) for shape in shapes)
            kwargs = {
                name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
                for name, x in masks.items()
            }
            o, t_o, lse, mu = forward(*inputs, **kwargs)
            delta0, delta1 = (dt_o * o).sum(-1), (d_o * o + dt_o * t_o).sum(-1)
            stats = (delta0.to(lse.dtype), delta1.to(lse.dtype))
            args = (d_o, dt_o, *stats, *inputs, lse, mu)
            cases.append((args, kwargs, bound))
            cases.append((args, {**kwargs, "deterministic": False}, bound))
            static = (*inputs[:4], None, None)
            _, t_o, _, mu = forward(*static, **kwargs)
            stats = (stats[0], (d_o * o + dt_o * t_o).sum(-1).to(lse.dtype))
            cases.append(((d_o, dt_o, *stats, *static, lse, mu), kwargs, bound))
    return cases
