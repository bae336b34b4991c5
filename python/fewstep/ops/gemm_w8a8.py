"""int8 x int8 product with exact integer accumulation, scaled per row and per column.

    acc_mn = sum_k a_mk w_nk                                  exact in int32, K < 131,072
    out_mn = float(acc_mn) * a_scale_m * w_scale_n + bias_n   rounded once to out_dtype

a        [..., M, K]  int8             a_scale  [..., M]  float32
w        [N, K]       int8             w_scale  [N]       float32
bias     [N]          float32, bfloat16 or float16
out      [..., M, N]  float32, bfloat16 or float16

The scaling runs in float32 in the order written; the last product and the bias are one fused
multiply-add in native code, and may be two operations in Triton. Each of the at most four
roundings is relative 2^-24, so before the rounding to out_dtype

    |out - exact| <= 3 * 2^-24 |acc a_scale w_scale| + 2^-24 |exact|.

Without `a_scale`, `a` is floating and is quantised first, exactly as by `quantize_int8`, in the
same call: a whole linear layer costs one dispatch. out_dtype is then a's dtype unless given.

`pack_w8(w)` rearranges a weight once for the CPU kernel (csrc/include/fewstep/ops/gemm_w8a8.h has
the layout); without `packed` that kernel packs w in every call.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native
from ..reference.gemm_w8a8 import gemm_w8a8 as _reference
from ._register import register
from ._select import Implementation, refuse_native, refuse_triton, select
from .quantize_int8 import run_triton as _quantize_triton

__all__ = ["gemm_w8a8", "pack_w8"]

MAX_K = 1 << 17
PANEL = 64
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INPUTS = (torch.int8, *_FLOATS)


def packed_shape(w: Tensor) -> tuple[int, int]:
    """Return the shape of `pack_w8(w)`: N padded to 16, K padded to 4."""
    return -(-w.shape[0] // 16) * 16, -(-w.shape[1] // 4) * 4


def _expect_weight(w: Tensor) -> None:
    if len(w.shape) != 2 or w.dtype != torch.int8:
        raise ValueError(f"w: expected torch.int8 [N, K], got {w.dtype} {list(w.shape)}")


def pack_w8(w: Tensor) -> Tensor:
    """Return the weight [N, K] int8 as the CPU kernel reads it, uint8; opaque otherwise.

    w + 128 in panels of 64 columns of the product, the four k of a group side by side:
    [ceil(N / 64)][K / 4][64][4], the last panel only as wide as N needs in steps of 16.

    Raises:
        ValueError: w is not int8 [N, K].
    """
    _expect_weight(w)
    rows, columns = packed_shape(w)
    padded = w.new_zeros((rows, columns))
    padded[: w.shape[0], : w.shape[1]] = w
    if padded.numel() == 0:
        return padded.view(torch.uint8)
    words = padded.view(torch.int32).bitwise_xor_(-0x7F7F7F80)  # 0x80808080: adds 128 to each byte
    full = rows // PANEL * PANEL
    panels = words[:full].view(-1, PANEL, columns // 4).transpose(1, 2).reshape(-1)
    packed = torch.cat([panels, words[full:].t().reshape(-1)])
    return packed.view(torch.uint8).view(rows, columns)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


class _Operands(NamedTuple):
    """What an implementation gets, in the order of the op's schema."""

    a: Tensor
    a_scale: Tensor | None
    w: Tensor
    w_scale: Tensor
    bias: Tensor | None
    packed: Tensor | None
    out_dtype: torch.dtype

    def new_output(self) -> Tensor:
        return self.a.new_empty((*self.a.shape[:-1], self.w.shape[0]), dtype=self.out_dtype)

    def flat(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Return a as [M, K], a_scale as [M], and a new output with a view of it as [M, N]."""
        a, a_scale, out = self.a, self.a_scale, self.new_output()
        if len(a.shape) == 2:  # saves calls, which are dear once the caches are full of matrices
            return _unit_stride(a), _contiguous(a_scale), out, out
        if a_scale is not None:
            a_scale = a_scale.reshape(-1).contiguous()
        rows = math.prod(a.shape[:-1])
        a = a.reshape(rows, a.shape[-1])
        return _unit_stride(a), a_scale, out, out.view(rows, out.shape[-1])


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _run_reference(*args: Any) -> Tensor:
    p = _Operands(*args)
    return _reference(p.a, p.a_scale, p.w, p.w_scale, bias=p.bias, out_dtype=p.out_dtype)


def _run_native(*args: Any) -> Tensor:
    p = _Operands(*args)
    a, a_scale, out, rows = p.flat()
    packed = pack_w8(p.w) if p.packed is None else p.packed.contiguous()
    bias, w_scale = _contiguous(p.bias), p.w_scale.contiguous()
    _native.call("gemm_w8a8", a, a_scale, packed, w_scale, bias, rows)
    return out


def _run_triton(*args: Any) -> Tensor:
    from ..kernels.gemm_w8a8 import launch_gemm_w8a8

    p = _Operands(*args)
    if p.a_scale is None:
        a, a_scale = _quantize_triton(p.a)
        p = p._replace(a=a, a_scale=a_scale)
    a, a_scale, out, rows = p.flat()
    if out.numel():
        launch_gemm_w8a8(a, a_scale, p.w, p.w_scale.contiguous(), _contiguous(p.bias), rows)
    return out


IMPLEMENTATIONS = (
    Implementation(
        "native",
        _run_native,
        lambda a, *args, **kwargs: refuse_native("gemm_w8a8", [a], _INPUTS),
    ),
    Implementation("triton", _run_triton, lambda a, *args, **kwargs: refuse_triton([a], _INPUTS)),
    Implementation("reference", _run_reference, lambda *args, **kwargs: None),
)


def _fake(*args: Any) -> Tensor:
    return _Operands(*args[:-1]).new_output()


_op = register(
    "gemm_w8a8",
    "(Tensor a, Tensor? a_scale, Tensor w, Tensor w_scale, Tensor? bias, Tensor? packed,"
    " ScalarType out_dtype, str impl) -> Tensor",
    IMPLEMENTATIONS,
    _fake,
)


def _expect(
    name: str,
    x: Tensor | None,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    if x is None:
        return
    if x.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(x.shape)}")
    if x.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name}: expected {wanted}, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name}: expected the device of a, {device}, got {x.device}")


def _validate(p: _Operands) -> None:
    a, a_scale, w, w_scale, bias, packed, out_dtype = p
    if not a.shape or a.dtype not in (_FLOATS if a_scale is None else (torch.int8,)):
        wanted = "floating" if a_scale is None else "torch.int8"
        raise ValueError(f"a: expected {wanted} [..., M, K], got {a.dtype} {list(a.shape)}")
    _expect_weight(w)
    (*rows, K), N, device = a.shape, w.shape[0], a.device
    _expect("w", w, (N, K), (torch.int8,), device)
    _expect("a_scale", a_scale, tuple(rows), (torch.float32,), device)
    _expect("w_scale", w_scale, (N,), (torch.float32,), device)
    _expect("bias", bias, (N,), _FLOATS, device)
    _expect("packed", packed, packed_shape(w), (torch.uint8,), device)
    if K >= MAX_K:
        raise ValueError(f"a: expected K below {MAX_K} for exact int32 sums, got {K}")
    if out_dtype not in _FLOATS:
        raise ValueError(f"out_dtype: expected float32, bfloat16 or float16, got {out_dtype}")


def gemm_w8a8(
    a: Tensor,
    a_scale: Tensor | None,
    w: Tensor,
    w_scale: Tensor,
    *,
    bias: Tensor | None = None,
    packed: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """Return (a * a_scale) @ (w * w_scale).T + bias for int8 a and w.

    Args:
        a: int8 [..., M, K], as from `quantize_int8`; K < 131,072. Floating without `a_scale`.
        a_scale: float32 [..., M], or None to quantise `a` here.
        w: int8 [N, K].
        w_scale: float32 [N].
        bias: floating [N], added in float32.
        packed: `pack_w8(w)`, to save packing in every call on the CPU; others ignore it.
        out_dtype: float32, bfloat16 or float16; a's dtype if floating, else float32 by default.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        [..., M, N] in out_dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
        UnsupportedError: `impl` can't serve these tensors.
        DerivativeError: an input carries a tangent or requires grad.
    """
    if out_dtype is None:
        out_dtype = a.dtype if a.is_floating_point() else torch.float32
    operands = _Operands(a, a_scale, w, w_scale, bias, packed, out_dtype)
    _validate(operands)
    return _op(*operands, select("gemm_w8a8", impl, IMPLEMENTATIONS, a))


def gate_cases(device: torch.device) -> list[tuple[tuple[Any, ...], dict[str, Any], float, float]]:
    """Return (args, kwargs, rtol, atol) for the gate on a new machine; see `_gate.check`."""
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], float, float]] = []
    for M, N, K in ((1, 64, 64), (77, 130, 96), (300, 257, 1031)):
        a = torch.randint(-128, 128, (M, K), generator=generator, dtype=torch.int8).to(device)
        w = torch.randint(-128, 128, (N, K), generator=generator, dtype=torch.int8).to(device)
        a_scale, w_scale, bias = (torch.rand(n, generator=generator).to(device) for n in (M, N, N))
        # Positive bias, product of either sign: cancellation is covered by the absolute term,
        # 4 * 2^-24 of the largest |acc| of these shapes, 2^14 * 1031.
        atol = 4 * 2.0**-24 * 2**14 * K
        cases.append(((a, a_scale, w, w_scale), {"bias": bias}, 2.0**-22, atol))
    return cases
