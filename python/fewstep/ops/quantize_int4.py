"""Symmetric 4-bit quantisation of a weight in groups of neighbours in a row.

    s = round_to_bf16(max |w| / 7)               over a group of G neighbours
    q = clamp(round(w / s), -8, 7)               to nearest, ties to even

w       [N, K]      float32, bfloat16 or float16 (float64 in the reference); K a multiple of G
q       [N, K / 2]  uint8: two values a byte, the even column in the low half, two's complement
scale   [N, K / G]  bfloat16

q is taken with the rounded scale, so rounding it costs nothing but the grid: 4 + 16 / G bits a
weight. One float32 division, one rounding to bfloat16, one division and one rounding per value, in
this order, so every implementation returns the same bits. A group whose scale is below 2^-126
counts as zero: scale 2^-126, q 0 (a row's largest scale is what the others are folded to, so a zero
group must not be it). A group that holds an infinity or a NaN, or whose scale bfloat16 can't
hold, gets scale NaN and q 0: what it is multiplied into turns NaN and never into plausible numbers.

The same format serves `gemm_w4a8` (8-bit activations) and `gemm_w4a16` (activations as they are).
`rotate` rotates every so many neighbours of w first, as the activations are that it meets
(`_prologue.py`): w'' = w H_B / sqrt(B) is what is quantised. There is no `smooth` here: a weight is
multiplied by it, which is `w * smooth`, once.

Other 4-bit weights with scales of groups along K, such as SVDQuant's (arXiv 2411.05007), are in it
after a permutation; their scales may be float16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..reference.quantize_int4 import pack_nibbles, unpack_nibbles
from ..reference.quantize_int4 import quantize_int4 as _reference
from ._expect import expect_tensor
from ._layout import DTYPES, FLOATS
from ._prologue import ROTATIONS, expect_rotation
from ._register import register
from ._select import Implementation, refuse_native, refuse_triton, select

__all__ = ["GROUPS", "pack_nibbles", "quantize_int4", "unpack_nibbles"]

GROUPS = (32, 64, 128)
SCALES = (torch.bfloat16, torch.float16)


def expect_int4(w: Tensor, w_scale: Tensor) -> int:
    """Check a 4-bit weight and its scales; return the size of a group."""
    expect_tensor("w", w)
    expect_tensor("w_scale", w_scale)
    if w.dim() != 2 or w.dtype != torch.uint8:
        raise ValueError(f"w: expected torch.uint8 [N, K / 2], got {w.dtype} {list(w.shape)}")
    N, K = w.shape[0], 2 * w.shape[1]
    fits = w_scale.dim() == 2 and w_scale.shape[0] == N and w_scale.dtype in SCALES
    group = K // w_scale.shape[1] if fits and w_scale.shape[1] else 0
    if not fits or (K and (group not in GROUPS or group * w_scale.shape[1] != K)):
        raise ValueError(
            f"w_scale: expected bfloat16 or float16 [{N}, {K} / G] with G of {GROUPS}, got "
            f"{w_scale.dtype} {list(w_scale.shape)}"
        )
    if w_scale.device != w.device:
        raise ValueError(f"w_scale: expected the device of w, {w.device}, got {w_scale.device}")
    return group or GROUPS[0]


def _outputs(w: Tensor, group: int) -> tuple[Tensor, Tensor]:
    N, K = w.shape
    return (
        w.new_empty((N, K // 2), dtype=torch.uint8),
        w.new_empty((N, K // group), dtype=torch.bfloat16),
    )


def _run_kernel(launch: Any, w: Tensor, group: int, rotate: int) -> tuple[Tensor, Tensor]:
    q, scale = _outputs(w, group)
    if q.numel():
        launch(w if w.stride(1) == 1 else w.contiguous(), rotate, q, scale)
    return q, scale


def _run_reference(w: Tensor, group: int, rotate: int) -> tuple[Tensor, Tensor]:
    q, scale = _reference(w, group=group, rotate=rotate)
    return q.contiguous(), scale.contiguous()


def _run_native(w: Tensor, group: int, rotate: int) -> tuple[Tensor, Tensor]:
    return _run_kernel(lambda *args: _native.call("quantize_int4", *args), w, group, rotate)


def _run_triton(w: Tensor, group: int, rotate: int) -> tuple[Tensor, Tensor]:
    from ..kernels.quantize_int4 import launch_quantize_int4

    return _run_kernel(launch_quantize_int4, w, group, rotate)


IMPLEMENTATIONS = (
    Implementation(
        "native",
        _run_native,
        lambda w, **kwargs: refuse_native("quantize_int4", [w], FLOATS),
    ),
    Implementation("triton", _run_triton, lambda w, **kwargs: refuse_triton([w], FLOATS)),
    Implementation("reference", _run_reference, lambda w, **kwargs: None),
)


def _fake(w: Tensor, group: int, rotate: int, impl: str) -> tuple[Tensor, Tensor]:
    return _outputs(w, group)


_op = register(
    "quantize_int4",
    "(Tensor w, int group, int rotate, str impl) -> (Tensor, Tensor)",
    IMPLEMENTATIONS,
    _fake,
)


def quantize_int4(
    w: Tensor, *, group: int = 64, rotate: int = 0, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Quantise a weight [N, K] to 4 bits with one scale for each group of neighbours in a row.

    Args:
        w: [N, K], floating; K a multiple of `group`.
        group: 32, 64 or 128.
        rotate: 0, or 16, 32, 64, 128 or 256: every so many neighbours are rotated first.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        (q, scale): uint8 [N, K / 2] and bfloat16 [N, K / group]; w (rotated) is close
        to unpack_nibbles(q) times its group's scale.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: w is not floating [N, K], the group or the rotation is unknown, or K is no
            multiple of it.
        UnsupportedError: `impl` can't serve this tensor.
        DerivativeError: w carries a tangent or requires grad.
    """
    expect_tensor("w", w)
    if w.dim() != 2 or w.dtype not in DTYPES:
        raise ValueError(f"w: expected floating [N, K], got {w.dtype} {list(w.shape)}")
    if group not in GROUPS:
        raise ValueError(f"group: expected one of {GROUPS}, got {group!r}")
    if w.shape[1] % group:
        raise ValueError(f"w: expected K that is a multiple of group {group}, got {w.shape[1]}")
    expect_rotation(rotate, "w", w.shape[1])
    return _op(w, group, rotate, select("quantize_int4", impl, IMPLEMENTATIONS, w))


def gate_cases(device: torch.device) -> list[tuple[tuple[Any, ...], dict[str, Any], float, float]]:
    """Return (args, kwargs, rtol, atol) for the gate on a new machine; bits must agree."""
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], float, float]] = []
    for dtype in FLOATS:
        for group in GROUPS:
            w = torch.randn((37, 3 * group), generator=generator).to(device, dtype)
            cases.append(((w,), {"group": group}, 0.0, 0.0))
        w = torch.randn((37, 768), generator=generator).to(device, dtype)
        cases += [((w,), {"group": 32, "rotate": rotate}, 0.0, 0.0) for rotate in ROTATIONS]
    return cases
