"""Computed tokens put among those that are kept, with gate and residual, in one pass.

    p = position[b, n]
    y[b, n] = base[b, n]                              where p < 0: kept
    y[b, n] = value[b, p]                             where 0 <= p < M; NaN beyond
    y[b, n] = gate[b] value[b, p]                     with gate
    y[b, n] = base[b, n] + gate[b] value[b, p]        with residual; gate None is one

value        [B, M, C]   float32, bfloat16 or float16; float64 too on the CPU
position     [B, N]      int32 or int64: which row of value a token takes, -1 for none
base, y      [B, N, C]   as value
gate         [B, C]      as value, or None

The map says for every token where its row comes from, not for every row where it goes. So no two
rows can meet on one token: the result is defined whatever the map holds, without a check, an atomic
or an order of writing, and several tokens may take the same row. Of an index [B, M] without
duplicates it is `position.scatter_(1, index, arange(M))`, made once for all layers of a step.

In place only the tokens that take a row are touched; else base is read and y written once. Sums are
taken in float32 (float64) and rounded once. Rows that are only put in place keep their bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..reference.token_scatter import token_scatter as _reference
from ._expect import expect_bool
from ._layout import FLOATS, unit_stride
from ._register import register
from ._select import Implementation, refuse_native, refuse_triton, select
from ._tokens import expect_index, expect_kind, expect_per_sample, expect_tokens, native_dtypes

__all__ = ["token_scatter"]


def _run_reference(
    value: Tensor,
    position: Tensor,
    base: Tensor | None,
    gate: Tensor | None,
    y: Tensor,
    residual: bool,
) -> None:
    kept = y if base is None else base
    y.copy_(_reference(value, position, kept, gate=gate, residual=residual))


def _run_kernel(
    launch: Any,
    value: Tensor,
    position: Tensor,
    base: Tensor | None,
    gate: Tensor | None,
    y: Tensor,
    residual: bool,
) -> None:
    if y.numel() == 0:
        return
    views = unit_stride(value), position.contiguous(), unit_stride(base), unit_stride(gate)
    launch(*views, y, residual)
    # What autograd has saved of it is no longer true, which it finds out by this counter.
    torch.autograd.graph.increment_version([y])


def _run_native(*args: Any) -> None:
    _run_kernel(lambda *views: _native.call("token_scatter", *views), *args)


def _run_triton(*args: Any) -> None:
    from ..kernels.token_scatter import launch_token_scatter

    _run_kernel(launch_token_scatter, *args)


IMPLEMENTATIONS = (
    Implementation(
        "native",
        _run_native,
        lambda x, *args, **kwargs: refuse_native("token_scatter", [x], native_dtypes(x)),
    ),
    Implementation("triton", _run_triton, lambda x, *args, **kwargs: refuse_triton([x], FLOATS)),
    Implementation("reference", _run_reference, lambda *args, **kwargs: None),
)


def _fake(
    value: Tensor,
    position: Tensor,
    base: Tensor | None,
    gate: Tensor | None,
    y: Tensor,
    residual: bool,
    impl: str,
) -> None:
    return None


_op = register(
    "token_scatter",
    "(Tensor value, Tensor position, Tensor? base, Tensor? gate, Tensor(a!) y, bool residual,"
    " str impl) -> ()",
    IMPLEMENTATIONS,
    _fake,
)


def _expect_writable(base: Tensor) -> None:
    """Refuse a base in which the kernels can't write a row, or two tokens share memory."""
    if base.shape[2] > 1 and base.stride(2) != 1:
        raise ValueError(
            f"base: expected unit stride in the last axis with in_place, got {base.stride()}"
        )
    if any(s == 0 and n > 1 for s, n in zip(base.stride(), base.shape, strict=True)):
        raise ValueError(
            f"base: expected memory of its own for every token with in_place, got {base.stride()}"
        )


def token_scatter(
    value: Tensor,
    position: Tensor,
    base: Tensor,
    *,
    gate: Tensor | None = None,
    residual: bool = False,
    in_place: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Return base with rows of value where `position` says so.

    Args:
        value: [B, M, C], floating; any strides.
        position: [B, N], int32 or int64, on value's device: the row of value that a token takes,
            negative for none.
        base: [B, N, C], like value; any strides, but with `in_place` unit stride in C.
        gate: [B, C], like value; multiplies the rows of value.
        residual: add the rows to those of base instead of replacing them.
        in_place: write into base, and return it. It may not share memory with value.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        y [B, N, C]: base itself with `in_place`, else a contiguous tensor.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: a shape, dtype, device or the layout of an argument does not fit.
        UnsupportedError: `impl` can't serve these tensors.
        DerivativeError: an input carries a tangent or requires grad.
    """
    expect_tokens("value", value)
    expect_tokens("base", base)
    shape = (value.shape[0], base.shape[1], value.shape[2])
    if base.shape != shape:
        raise ValueError(
            f"base: expected [B, N, C] with B = {shape[0]} and C = {shape[2]} as value has, got "
            f"{list(base.shape)}"
        )
    expect_kind("base", base, value)
    expect_index("position", position, value, shape[1])
    expect_per_sample("gate", gate, value)
    expect_bool("residual", residual)
    expect_bool("in_place", in_place)
    if in_place:
        _expect_writable(base)
    chosen = select("token_scatter", impl, IMPLEMENTATIONS, value)
    y = base if in_place else base.new_empty(shape)
    _op(value, position, None if in_place else base, gate, y, residual, chosen)
    return y


def gate_cases(device: torch.device) -> list[tuple[tuple[Any, ...], dict[str, Any], float, float]]:
    """Return (args, kwargs, rtol, atol) for the gate on a new machine; see `_gate.check`."""
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], float, float]] = []
    # One rounding of a product and a sum of order one, fused or not.
    bounds = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
    for dtype, bound in bounds.items():
        for kind, (b, n, c) in ((torch.int64, (2, 77, 72)), (torch.int32, (3, 33, 1157))):
            value, base = (
                torch.randn((b, rows, c), generator=generator).to(device, dtype) for rows in (19, n)
            )
            position = torch.randint(-20, 19, (b, n), generator=generator).to(device, kind)
            gate = torch.randn((b, c), generator=generator).to(device, dtype)
            args = value, position, base
            cases.append((args, {"in_place": True}, 0.0, 0.0))
            cases.append((args, {}, 0.0, 0.0))
            cases.append((args, {"gate": gate, "residual": True}, bound, bound))
    return cases
