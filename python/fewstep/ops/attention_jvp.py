"""Softmax attention and its directional derivative, in one pass over the keys.

    S  = scale q k^T                        tS = scale (t_q k^T + q t_k^T)
    P  = softmax(S)                         mu = sum_j P tS
    o  = P v                                t_o = P (tS - mu) v + P t_v
    lse = log sum_j exp S

q, t_q          [B, H, Nq, D] or [B, Nq, D]     t_x: tangent of x
k, t_k          [B, H, Nk, D]
v, t_v          [B, H, Nk, Dv]
o, t_o          [B, H, Nq, Dv], in q's dtype and its axis order (heads inside tokens stay inside)
lse, mu         [B, H, Nq], float32 (float64 for float64)

bfloat16, float16; float32 and float64 too on the CPU and in the reference. D and Dv multiples of 8
up to 256, any Nq and Nk; Nk = 0 gives zeros. Any strides with unit stride in the last axis, without
a copy. Sums are in float32 (float64 for float64). A tangent that is None is zero and its matmuls
are not done: 6 with all three, 4 with a static k and v, 2 with none (t_o is then zeros).

Recurrence, reason for its centring, error and cost: docs/ops/attention_jvp.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..reference.attention_jvp import attention_jvp as _reference
from ._register import register
from ._select import Implementation, refuse_native, refuse_triton, select

__all__ = ["attention_jvp"]

HEAD_DIMS = range(8, 257, 8)
# Triton 3.9's compiler aborts the process on exact float32 products of some of these head dims.
_GPU_DTYPES = (torch.bfloat16, torch.float16)
_INTERPRETER_DTYPES = (torch.float32, *_GPU_DTYPES)
_DTYPES = (*_INTERPRETER_DTYPES, torch.float64)


def _stat_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _new_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate (o, t_o, lse, mu) for 4-d q and v; o follows the order of q's heads and tokens."""
    b, h, n, _ = q.shape
    if q.stride(1) < q.stride(2):
        o, t_o = (q.new_empty((b, n, h, v.shape[-1])).transpose(1, 2) for _ in range(2))
    else:
        o, t_o = (q.new_empty((b, h, n, v.shape[-1])) for _ in range(2))
    lse, mu = (q.new_empty((b, h, n), dtype=_stat_dtype(q)) for _ in range(2))
    return o, t_o, lse, mu


def _run_reference(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *tangents, scale = rest
    outputs = _new_outputs(q, v)
    for out, value in zip(outputs, _reference(q, k, v, *tangents, scale=scale), strict=True):
        out.copy_(value)
    return outputs


def _unit_stride(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _run_native(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *tangents, scale = rest
    outputs = _new_outputs(q, v)
    inputs = [_unit_stride(x) for x in (q, k, v, *tangents)]
    _native.call("attention_jvp", *inputs, *outputs, scale)
    return outputs


def _run_triton(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    from ..kernels.attention_jvp import launch_attention_jvp

    *tangents, scale = rest
    outputs = _new_outputs(q, v)
    inputs = [_unit_stride(x) for x in (q, k, v, *tangents)]
    launch_attention_jvp(*inputs, *outputs, scale)
    return outputs


def _triton_dtypes(q: Tensor) -> tuple[torch.dtype, ...]:
    return _GPU_DTYPES if q.device.type == "cuda" else _INTERPRETER_DTYPES


IMPLEMENTATIONS = (
    Implementation(
        "native",
        _run_native,
        lambda q, *args, **kwargs: refuse_native("attention_jvp", [q], _DTYPES),
    ),
    Implementation(
        "triton", _run_triton, lambda q, *args, **kwargs: refuse_triton([q], _triton_dtypes(q))
    ),
    Implementation("reference", _run_reference, lambda *args, **kwargs: None),
)


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _new_outputs(q, v)


_op = register(
    "attention_jvp",
    "(Tensor q, Tensor k, Tensor v, Tensor? t_q, Tensor? t_k, Tensor? t_v, float scale, str impl)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    IMPLEMENTATIONS,
    _fake,
)


def _validate(q: Tensor, k: Tensor, v: Tensor, tangents: dict[str, Tensor | None]) -> None:
    if q.dtype not in _DTYPES:
        raise ValueError(f"q: expected a floating dtype, got {q.dtype}")
    if q.dim() not in (3, 4):
        raise ValueError(f"q: expected [B, H, N, D] or [B, N, D], got shape {tuple(q.shape)}")
    tensors = {"k": k, "v": v, **tangents}
    for name, x in tensors.items():
        if x is None:
            continue
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: expected the dtype of q, {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected the device of q, {q.device}, got {x.device}")
        if x.dim() != q.dim():
            raise ValueError(f"{name}: expected {q.dim()} axes as q has, got {x.dim()}")
        if x.shape[:-2] != q.shape[:-2]:
            raise ValueError(
                f"{name}: expected the batch and heads of q, {tuple(q.shape[:-2])}, got "
                f"{tuple(x.shape[:-2])}"
            )
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k: expected the head dim of q, {q.shape[-1]}, got {k.shape[-1]}")
    if v.shape[-2] != k.shape[-2]:
        raise ValueError(f"v: expected as many rows as k, {k.shape[-2]}, got {v.shape[-2]}")
    for name, x in (("q", q), ("v", v)):
        if x.shape[-1] not in HEAD_DIMS:
            raise ValueError(
                f"{name}: expected a head dim that is a multiple of 8 from 8 to 256, got "
                f"{x.shape[-1]}"
            )
    for name, primal in (("t_q", q), ("t_k", k), ("t_v", v)):
        tangent = tangents[name]
        if tangent is not None and tangent.shape != primal.shape:
            raise ValueError(
                f"{name}: expected the shape of {name[2:]}, {tuple(primal.shape)}, got "
                f"{tuple(tangent.shape)}"
            )


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t_q: Tensor | None = None,
    t_k: Tensor | None = None,
    t_v: Tensor | None = None,
    *,
    scale: float | None = None,
    return_stats: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    """Return (o, t_o): attention of q, k, v and its derivative along the tangents.

    Args:
        q: queries [B, H, Nq, D] or [B, Nq, D].
        k: keys [B, H, Nk, D].
        v: values [B, H, Nk, Dv].
        t_q: tangent of q, its shape, dtype and device; None is zero and costs nothing.
        t_k: tangent of k, likewise.
        t_v: tangent of v, likewise.
        scale: factor on q k^T; D**-0.5 if None.
        return_stats: also return lse and mu, which merge results over parts of the keys.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        (o, t_o), or (o, t_o, lse, mu). o has the same bits whatever the tangents are.

    Raises:
        ValueError: shapes, dtypes or devices differ, or a head dim is not offered.
        UnsupportedError: `impl` can't serve these tensors.
        DerivativeError: an input carries a tangent or requires grad.
    """
    _validate(q, k, v, {"t_q": t_q, "t_k": t_k, "t_v": t_v})
    chosen = select("attention_jvp", impl, IMPLEMENTATIONS, q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    inputs = (q, k, v, t_q, t_k, t_v)
    if q.dim() == 3:
        inputs = tuple(None if x is None else x.unsqueeze(1) for x in inputs)
    outputs = _op(*inputs, scale, chosen)
    if q.dim() == 3:
        outputs = tuple(x.squeeze(1) for x in outputs)
    return tuple(outputs) if return_stats else tuple(outputs[:2])


def gate_cases(device: torch.device) -> list[tuple[tuple[Any, ...], dict[str, Any], float, float]]:
    """Return (args, kwargs, rtol, atol) for the gate on a new machine; see `_gate.check`."""
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], float, float]] = []
    # P and H are rounded to the storage type: with unit-normal inputs an element of t_o is a sum of
    # terms of about 1, each off by half a unit in the last place, and o(1) itself.
    bounds = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 6e-3}
    for dtype in _GPU_DTYPES if device.type == "cuda" else _INTERPRETER_DTYPES:
        for nq, nk, d, dv in ((77, 130, 64, 64), (33, 65, 128, 128), (130, 33, 72, 40)):
            shapes = [(2, 2, nq, d), (2, 2, nk, d), (2, 2, nk, dv)] * 2
            args = tuple(
                torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes
            )
            bound = bounds[dtype]
            cases.append((args, {"return_stats": True}, bound, bound))
            cases.append(((*args[:4], None, None), {}, bound, bound))
    return cases
