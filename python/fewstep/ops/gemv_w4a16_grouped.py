"""`gemm_w4a16` of several weights for few rows, in one launch: the modulation layers of a model.

    out_g[m, n] = sum_k x_g[m, k] q_g[n, k] s_g[n, k / G] + bias_g[n]   rounded once to x's dtype

x        [..., K]        one for all G' problems, or a list of one for each, of one shape and dtype
w        G' x [N_g, K / 2]  uint8      w_scale  G' x [N_g, K / G]  bfloat16 or float16, one dtype
bias     G' x [N_g]      float32, bfloat16 or float16, or None
out      G' x [..., N_g] x's dtype, contiguous, side by side in one allocation

x has at most 8 rows, K and G are those of all. In adaLN every block's modulation layer reads the
same silu(temb): FLUX.1 has 76 of them, 3.2 billion weights for one row. One by one each is a launch
that lasts a few microseconds and leaves most of the memory's rate unused at its beginning and end.

The weights stay where they are: kernels get their addresses. CUDA C++ gets them as arguments of the
launch, so nothing on the device can be stale, and a CUDA graph holds them as it holds those of any
kernel. One buffer for all, of which the layers' weights were slices, would be lost or doubled by
what moves, copies or offloads layers one by one (docs/ops/gemv_w4a16_grouped.md).

The error is gemm_w4a16's, and so are the bits, where `same_bits` says so. There is no derivative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native
from ..reference.gemv_w4a16_grouped import gemv_w4a16_grouped as _reference
from ._expect import expect_tensor, expect_tensors
from ._gemm import expect
from ._layout import FLOATS, contiguous, matrix, unit_stride
from ._register import register
from ._select import Implementation, refuse_native, refuse_triton, select
from .quantize_int4 import expect_int4

__all__ = ["MAX_ROWS", "gemv_w4a16_grouped", "same_bits"]

MAX_ROWS = 8


class _Operands(NamedTuple):
    """What an implementation gets, in the order of the op's schema."""

    x: list[Tensor]
    w: list[Tensor]
    w_scale: list[Tensor]
    bias: list[Tensor | None]

    def rows(self) -> int:
        return math.prod(self.x[0].shape[:-1])

    def new_output(self) -> Tensor:
        return self.x[0].new_empty(self.rows() * sum(w.shape[0] for w in self.w))


def _run_reference(*args: Any) -> Tensor:
    p = _Operands(*args)
    outputs = _reference(p.x, p.w, p.w_scale, bias=p.bias)
    return torch.cat([out.reshape(-1) for out in outputs])


def _run_kernel(launch: Any, p: _Operands) -> Tensor:
    out = p.new_output()
    if out.numel():
        rows = [matrix(x) for x in p.x]
        x = unit_stride(rows[0][None] if len(rows) == 1 else torch.stack(rows))
        w, w_scale, bias = (list(map(contiguous, given)) for given in (p.w, p.w_scale, p.bias))
        if x.device.type == "cuda":
            w = list(map(_native.aligned, w))  # as it mostly is
        if len({b.dtype for b in bias if b is not None}) > 1:
            bias = [None if b is None else b.float() for b in bias]
        launch(x, w, w_scale, bias, out)
    return out


def _launch_native(x: Any, w: Any, w_scale: Any, bias: Any, out: Tensor) -> None:
    absent = out.new_empty(0)
    bias = [absent if b is None else b for b in bias]
    _native.call("gemv_w4a16_grouped", x, w, w_scale, bias, out)


def _run_native(*args: Any) -> Tensor:
    return _run_kernel(_launch_native, _Operands(*args))


def _run_triton(*args: Any) -> Tensor:
    from ..kernels.gemv_w4a16_grouped import launch_gemv_w4a16_grouped

    def launch(x: Tensor, w: Any, w_scale: Any, bias: Any, out: Tensor) -> None:
        memory = _native.addresses([*w, *w_scale, *bias])
        launch_gemv_w4a16_grouped(x, w, w_scale, bias, memory, out)

    return _run_kernel(launch, _Operands(*args))


def _first(x: Tensor | Sequence[Tensor]) -> Tensor:
    return x if isinstance(x, Tensor) else x[0]


def launch_few_rows(x: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, *rest: Any) -> None:
    """Fill the last argument, [M, N], by the CUDA kernel: gemm_w4a16 where it is native there."""
    out = rest[-1]
    for begin in range(0, x.shape[0], MAX_ROWS):  # more than one of them under vmap
        rows = slice(begin, begin + MAX_ROWS)
        _launch_native(x[None, rows], [_native.aligned(w)], [w_scale], [bias], out[rows].view(-1))


def _refuse_native(x: Tensor | Sequence[Tensor], *args: Any, **kwargs: Any) -> str | None:
    first = _first(x)
    if first.device.type == "cuda":
        return refuse_few_rows(first)
    return refuse_native("gemv_w4a16_grouped", [first], FLOATS)


def refuse_few_rows(x: Tensor) -> str | None:
    """Return why the CUDA kernel can't take x (cuda/gemv_w4a16_launch.cuh), or None."""
    reason = refuse_native("gemv_w4a16_grouped", [x], FLOATS[1:])  # tensor cores take 16 bits
    if reason is not None:
        return reason
    M, K = math.prod(x.shape[:-1]), x.shape[-1]
    if K == 0 or M > MAX_ROWS:
        return f"the CUDA kernel: expected up to {MAX_ROWS} rows and K above 0, got {M} x {K}"
    needs = 512 + M * (-(-K // 128) * 256 + 64)
    properties = torch.cuda.get_device_properties(x.device)
    most = getattr(properties, "shared_memory_per_block_optin", 99 << 10)
    if needs <= most:
        return None
    return f"the CUDA kernel: expected rows in {most} bytes of shared memory, got {needs}"


NO_RUN_YET = "the CUDA kernel was not run on a GPU yet; ask for impl='native' to use it"
IMPLEMENTATIONS = (
    Implementation("native", _run_native, _refuse_native, held_back=NO_RUN_YET),
    Implementation(
        "triton", _run_triton, lambda x, *args, **kwargs: refuse_triton([_first(x)], FLOATS)
    ),
    Implementation("reference", _run_reference, lambda *args, **kwargs: None),
)


def _fake(*args: Any) -> Tensor:
    return _Operands(*args[:-1]).new_output()


_op = register(
    "gemv_w4a16_grouped",
    "(Tensor[] x, Tensor[] w, Tensor[] w_scale, Tensor?[] bias, str impl) -> Tensor",
    IMPLEMENTATIONS,
    _fake,
)


def gemv_w4a16_grouped(
    x: Tensor | Sequence[Tensor],
    w: Sequence[Tensor],
    w_scale: Sequence[Tensor],
    *,
    bias: Sequence[Tensor | None] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    """Return x @ W.T + bias for each of several 4-bit weights W, in one launch.

    Args:
        x: floating [..., K] with at most 8 rows, for all weights or one for each.
        w: uint8 [N_g, K / 2] each, as from `quantize_int4`.
        w_scale: [N_g, K / G] each, all bfloat16 or all float16, with one G of 32, 64 or 128.
        bias: floating [N_g] or None each, added in float32.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        [..., N_g] for each weight, in x's dtype, contiguous. They share an allocation, which lives
        as long as one of them and which `torch.save` writes whole, and nothing else: each may be
        written to as if it were alone.

    Raises:
        ValueError: a shape, dtype, device or number of tensors does not fit; the message names the
            argument and the problem.
        TypeError: an argument is no tensor, or no list of them.
        UnsupportedError: `impl` can't serve these tensors.
        DerivativeError: a tensor carries a tangent or requires grad.
    """
    p = _expect(x, w, w_scale, bias)
    flat = _op(*p, select("gemv_w4a16_grouped", impl, IMPLEMENTATIONS, p.x[0]))
    shape, M = p.x[0].shape[:-1], p.rows()
    parts = flat.split([M * w.shape[0] for w in p.w])
    outs = tuple(part.view(*shape, w.shape[0]) for part, w in zip(parts, p.w, strict=True))
    if torch.compiler.is_compiling():  # which has no views with a common history
        return outs
    return tuple(out.data for out in outs)  # views no more, each with a version of its own


def _tensors(name: str, given: Any) -> list[Any]:
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"{name}: expected a list of tensors, got {type(given).__name__}")
    return list(given)


def _expect(x: Any, w: Any, w_scale: Any, bias: Any) -> _Operands:
    """Return the operands as lists; refuse what does not fit."""
    inputs = [x] if isinstance(x, Tensor) else _tensors("x", x)
    w, w_scale = _tensors("w", w), _tensors("w_scale", w_scale)
    count = len(w)
    biases = [None] * count if bias is None else _tensors("bias", bias)
    if not w:
        raise ValueError("w: expected at least one weight, got none")
    for name, given in (("w_scale", w_scale), ("bias", biases)):
        if len(given) != count:
            raise ValueError(f"{name}: expected {count} tensors, one for each w, got {len(given)}")
    if not isinstance(x, Tensor) and len(inputs) != count:
        raise ValueError(f"x: expected one tensor, or {count} in a list, got {len(inputs)}")
    for value in inputs:
        expect_tensor("x", value)
    first = inputs[0]
    if not first.shape or first.dtype not in FLOATS:
        raise ValueError(f"x: expected floating [..., K], got {first.dtype} {list(first.shape)}")
    (*rows, K), device = first.shape, first.device
    if math.prod(rows) > MAX_ROWS:
        raise ValueError(f"x: expected at most {MAX_ROWS} rows, got {math.prod(rows)}")
    if K % 2:
        raise ValueError(f"x: expected an even K, got {K}")
    for i, value in enumerate(inputs):
        expect(f"x[{i}]", value, tuple(first.shape), (first.dtype,), device)
    for i in range(count):
        expect_tensors(**{f"bias[{i}]": biases[i]})
        try:
            expect_int4(w[i], w_scale[i])
        except (TypeError, ValueError) as error:
            raise type(error)(f"problem {i}: {error}") from None
        N = w[i].shape[0]
        groups = w_scale[0].shape[1]
        expect(f"w[{i}]", w[i], (N, K // 2), (torch.uint8,), device)
        expect(f"w_scale[{i}]", w_scale[i], (N, groups), (w_scale[0].dtype,), device)
        expect(f"bias[{i}]", biases[i], (N,), FLOATS, device)
    return _Operands(inputs, w, w_scale, biases)


def same_bits(x: Tensor) -> bool:
    """Return whether `auto` gives an x the bits here that `gemm_w4a16` gives it for each weight.

    Both have to run by one implementation; natively they share a kernel. On GPUs Triton's
    gemm_w4a16 takes tensor cores for more than two rows of 16 bits, and sums in another order.
    """
    from .gemm_w4a16 import IMPLEMENTATIONS as APART

    names = [
        select(op, "auto", ways, x)
        for op, ways in (("gemm_w4a16", APART), ("gemv_w4a16_grouped", IMPLEMENTATIONS))
    ]
    few = MAX_ROWS
    if names[0] == "triton" and x.dtype != torch.float32:
        few = 2
    return names[0] == names[1] and math.prod(x.shape[:-1]) <= few


def gate_cases(device: torch.device) -> list[tuple[tuple[Any, ...], dict[str, Any], float, float]]:
    """Return (args, kwargs, rtol, atol) for the gate on a new machine; see `_gate.check`."""
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], float, float]] = []
    for dtype in FLOATS:
        # Parts of a chunk of 128 k, many chunks, widths that end anywhere; every group and as many
        # rows as fit one, two and four passes of the tensor cores.
        shapes = ((1, 96, 32), (8, 1152, 32), (4, 3072, 64), (7, 1152, 64), (8, 640, 128))
        for M, K, group in shapes:
            widths = (130, 16, 65)

            def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
                return torch.randn(shape, generator=generator).to(device, dtype)

            w = [
                torch.randint(0, 256, (N, K // 2), generator=generator, dtype=torch.uint8)
                for N in widths
            ]
            w = [x.to(device) for x in w]
            w_scale = [
                torch.rand((N, K // group), generator=generator).bfloat16().to(device)
                for N in widths
            ]
            bias = [draw(widths[0]), None, draw(widths[2], dtype=torch.float32)]
            # As gemm_w4a16's.
            bounds = torch.finfo(dtype).eps, 2.0**-20 * K
            cases.append(((draw(M, K), w, w_scale), {"bias": bias}, *bounds))
            several = [draw(M, K) for _ in widths]
            cases.append(((several, w, w_scale), {"bias": bias}, *bounds))
    return cases
