"""LayerNorm or RMSNorm with its modulation, quantised to int8 per row, in one pass over memory.

    y = norm(x) * weight + bias               u / sqrt(mean(u^2) + eps), u = x - mean(x) or x
    z = y (1 + scale) + shift                 rounded to x's dtype
    q_scale = max_c |z_c| / 127
    q = round(z * (127 / max_c |z_c|))        to nearest, ties to even

x, q              [..., C]   x float32, bfloat16 or float16 (float64 in the reference); q int8
weight, bias      [C]
scale, shift      [..., C], broadcast against x; not expanded in memory
q_scale           [...]      float32 (float64 for float64)

This is what stands before the projections of an adaLN block whose layers multiply in int8: x is
read once and a quarter or half of it written, z never reaches memory. It is `quantize_int8` of the
y of `norm_jvp` in the same dtype: to the bit in the reference and in native code on CPUs, and
within the float32 rounding of y on GPUs, where kernels take sums in orders of their own and Triton
contracts products and sums differently in the two (where z is next to a tie of its dtype it may
round to the other side). Zero, tiny and non-finite rows are those of `quantize_int8`; so are
`smooth` and `rotate`, which change what is quantised (`_prologue.py`). What is None is as in
`norm_jvp`. There are no derivatives: q is an integer. Layout and error:
docs/ops/norm_quantize_int8.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..reference.norm_quantize_int8 import norm_quantize_int8 as _reference
from ._expect import expect_number
from ._layout import contiguous
from ._norm import NAMES, parameter, refuse_triton_rows, validate
from ._prologue import expect_prologue
from ._register import register
from ._rows import acc_dtype, choose_split, fold, fold_broadcast
from ._select import KERNEL_NOT_RUN_YET, Implementation, select
from .quantize_int8 import refuse_native_rows

__all__ = ["norm_quantize_int8"]

_OPERANDS = ("weight", "bias", "scale", "shift", "smooth", "rotate")


def _new_outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    q_scale = x.new_empty(x.shape[:-1], dtype=acc_dtype(x))
    return x.new_empty(x.shape, dtype=torch.int8), q_scale


def _run_kernel(
    launch: Callable[..., None],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    smooth: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    q, q_scale = _new_outputs(x)
    if x.numel():
        split = choose_split(x, [], scale, shift)
        rows = fold(x, split)
        modulation = (fold_broadcast(v, x, split) for v in (scale, shift))
        parameters = (parameter(v, x) for v in (weight, bias))
        rotate, *options = rest
        outputs = q.view(rows.shape), q_scale.view(rows.shape[:-1])
        launch(rows, *parameters, *modulation, contiguous(smooth), rotate, *outputs, *options)
    return q, q_scale


def _run_native(*args: Any) -> tuple[Tensor, Tensor]:
    return _run_kernel(lambda *views: _native.call("norm_quantize_int8", *views), *args)


def _run_triton(*args: Any) -> tuple[Tensor, Tensor]:
    from ..kernels.norm_quantize_int8 import launch_norm_quantize_int8

    return _run_kernel(launch_norm_quantize_int8, *args)


def _run_reference(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *operands, centred, eps = rest
    named = dict(zip(_OPERANDS, operands, strict=True))
    q, q_scale = _reference(x, **named, kind="layer" if centred else "rms", eps=eps)
    return q.contiguous(), q_scale.contiguous()


IMPLEMENTATIONS = (
    Implementation(
        "native",
        _run_native,
        lambda x, *rest, **kwargs: refuse_native_rows("norm_quantize_int8", x),
        held_back=KERNEL_NOT_RUN_YET,
    ),
    Implementation("triton", _run_triton, refuse_triton_rows),
    Implementation("reference", _run_reference, lambda *args, **kwargs: None),
)


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _new_outputs(x)


_op = register(
    "norm_quantize_int8",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? smooth,"
    " int rotate, bool centred, float eps, str impl) -> (Tensor, Tensor)",
    IMPLEMENTATIONS,
    _fake,
)


def norm_quantize_int8(
    x: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    smooth: Tensor | None = None,
    rotate: int = 0,
    kind: str = "layer",
    eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return (q, q_scale): each row of the modulated norm of x in int8, with one scale.

    Args:
        x: [..., C], floating.
        weight: [C], x's dtype or float32; None is one.
        bias: [C], likewise; None is zero.
        scale: broadcasts against x, as [C], [B, 1, C] or [B, N, C]; x's dtype; 1 is added to it.
        shift: likewise.
        smooth: floating [C], positive: columns of z are divided by it before they are quantised.
        rotate: 0, or 16, 32, 64, 128 or 256: every so many neighbours are rotated after that.
        kind: "layer" (subtracts the mean) or "rms".
        eps: added to the mean square.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        (q, q_scale): int8 [..., C] and float32 [...], the modulated norm (smoothed and rotated)
        close to q * q_scale[..., None]; what `gemm_w8a8` and `gemm_w4a8` take as a and a_scale.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
        TypeError: an argument is no tensor, or eps is no number.
        UnsupportedError: `impl` can't serve these tensors.
        DerivativeError: an input carries a tangent or requires grad.
    """
    given = {"weight": weight, "bias": bias, "scale": scale, "shift": shift}
    validate(x, dict.fromkeys(NAMES) | given, kind)
    expect_prologue("x", x, smooth, rotate)
    expect_number("eps", eps)
    chosen = select("norm_quantize_int8", impl, IMPLEMENTATIONS, x)
    q, q_scale = _op(*(x, *given.values(), smooth, rotate), kind == "layer", eps, chosen)
    return q, q_scale


def gate_cases(device: torch.device) -> list[tuple[tuple[Any, ...], dict[str, Any], float]]:
    """Return (args, kwargs, bound in norm) for the gate on a new machine; see `_gate.check`."""
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], float]] = []
    # Rounding z to a dtype of unit u moves v = z / q_scale by at most u |v|, its own half unit and
    # that of the largest z, and so one q in 1 / (u |v|) by one: in norm, against an oracle that
    # rounds nothing but q, sqrt(u mean|v| / mean(v^2)). With v of 28 in the mean square, 4.5
    # deviations to a row's largest, that is 1.5e-2 and 5e-3; in float32, errors of sums, 1e-6.
    bounds = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 8e-3}
    for dtype, bound in bounds.items():
        for b, n, c, kind in ((2, 77, 72, "rms"), (3, 33, 1152, "layer"), (1, 5, 3000, "layer")):

            def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
                return torch.randn(shape, generator=generator).to(device, dtype)

            options: dict[str, Any] = {"scale": draw(b, 1, c), "shift": draw(b, 1, c)}
            prepared = {"smooth": draw(c).abs() + 0.1, "rotate": 128 if c % 128 == 0 else 0}
            for more in ({}, {"weight": draw(c), "bias": draw(c)}, prepared):
                cases.append(((draw(b, n, c),), options | more | {"kind": kind}, bound))
    return cases
