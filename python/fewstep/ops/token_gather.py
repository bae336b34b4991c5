"""Chosen tokens of every sample side by side, and the norm and modulation that follow, in one pass.

    n = x[b, index[b, m]]                             a copy, bit by bit
    n = (n - mean(n)) (mean((n - mean(n))^2) + eps)^-1/2       where eps is given,
    y[b, m] = n (1 + scale[b]) + shift[b]                      and then this

x             [B, N, C]   float32, bfloat16 or float16; float64 too on the CPU
index         [B, M]      int32 or int64: any order, the same token as often as one likes
scale, shift  [B, C]      as x, or None
y             [B, M, C]

An index outside of 0 to N - 1 makes its row NaN: on a GPU there is no host to raise. Statistics are
taken in float32 (float64); the norm is that of `norm_jvp` without weight and bias. A step that
computes some of the tokens starts with the copy; where the first block's norm is all that reads
these tokens, it can start with both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..reference.token_gather import token_gather as _reference
from ._expect import expect_number
from ._layout import unit_stride
from ._norm import refuse_triton_rows
from ._register import register
from ._select import Implementation, refuse_native, select
from ._tokens import expect_index, expect_per_sample, expect_tokens, native_dtypes

__all__ = ["token_gather"]


def _output(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty((*index.shape, x.shape[2]))


def _run_reference(
    x: Tensor, index: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float | None
) -> Tensor:
    return _reference(x, index, scale=scale, shift=shift, eps=eps).to(x.dtype).contiguous()


def _run_kernel(
    launch: Any,
    x: Tensor,
    index: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float | None,
) -> Tensor:
    y = _output(x, index)
    if y.numel():
        scale, shift = unit_stride(scale), unit_stride(shift)
        launch(unit_stride(x), index.contiguous(), scale, shift, y, eps is not None, eps or 0.0)
    return y


def _run_native(*args: Any) -> Tensor:
    return _run_kernel(lambda *views: _native.call("token_gather", *views), *args)


def _run_triton(*args: Any) -> Tensor:
    from ..kernels.token_gather import launch_token_gather

    return _run_kernel(launch_token_gather, *args)


IMPLEMENTATIONS = (
    Implementation(
        "native",
        _run_native,
        lambda x, *args, **kwargs: refuse_native("token_gather", [x], native_dtypes(x)),
    ),
    Implementation("triton", _run_triton, lambda x, *args, **kwargs: refuse_triton_rows(x)),
    Implementation("reference", _run_reference, lambda *args, **kwargs: None),
)


def _fake(
    x: Tensor,
    index: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float | None,
    impl: str,
) -> Tensor:
    return _output(x, index)


_op = register(
    "token_gather",
    "(Tensor x, Tensor index, Tensor? scale, Tensor? shift, float? eps, str impl) -> Tensor",
    IMPLEMENTATIONS,
    _fake,
)


def token_gather(
    x: Tensor,
    index: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Return the tokens that `index` names, normed and modulated where `eps` is given.

    Args:
        x: [B, N, C], floating; any strides.
        index: [B, M], int32 or int64, on x's device.
        scale: [B, C], like x; the norm is multiplied by 1 + scale. Needs `eps`.
        shift: [B, C], like x; added to that. Needs `eps`.
        eps: of the norm, over C without weight and bias; None leaves the tokens as they are.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        y [B, M, C], contiguous.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: a shape, dtype or device does not fit.
        UnsupportedError: `impl` can't serve these tensors.
        DerivativeError: an input carries a tangent or requires grad.
    """
    expect_tokens("x", x)
    expect_index("index", index, x)
    expect_per_sample("scale", scale, x)
    expect_per_sample("shift", shift, x)
    if eps is not None:
        expect_number("eps", eps)
        if not eps >= 0:
            raise ValueError(f"eps: expected at least 0, got {eps}")
    else:
        for name, v in (("scale", scale), ("shift", shift)):
            if v is not None:
                raise ValueError(f"{name}: expected None without eps, which asks for the norm")
    chosen = select("token_gather", impl, IMPLEMENTATIONS, x)
    return _op(x, index, scale, shift, eps, chosen)


def gate_cases(device: torch.device) -> list[tuple[tuple[Any, ...], dict[str, Any], float, float]]:
    """Return (args, kwargs, rtol, atol) for the gate on a new machine; see `_gate.check`."""
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], float, float]] = []
    # One rounding of a norm of order one, which float32's own error may push to either side.
    bounds = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
    for dtype, bound in bounds.items():
        for kind, (b, n, c) in ((torch.int64, (2, 77, 72)), (torch.int32, (3, 33, 1157))):
            x = torch.randn((b, n, c), generator=generator).to(device, dtype)
            index = torch.randint(0, n, (b, 19), generator=generator).to(device, kind)
            table = torch.randn((b, 2 * c), generator=generator).to(device, dtype)
            scale, shift = table.chunk(2, -1)
            cases.append(((x, index), {}, 0.0, 0.0))
            options = {"scale": scale, "shift": shift, "eps": 1e-6}
            cases.append(((x, index), options, bound, bound))
    return cases
