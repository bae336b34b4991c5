"""What the low-bit products share: operands, the low-rank branch, checks, registration.
What follows the sums - activation, gate, residual, int8 outputs - is in `_epilogue.py`.

    y_mn = sum_k x_mk W_nk + bias_n + sum_r low_mr up_nr           low = x down^T

x     [..., M, K]   floating; or, with integers a and a scale per row, x = a * a_scale
W     [N, K]        what the op's docstring makes of w and w_scale
bias  [N]           floating
up    [N, R]        floating: with it there is a low-rank branch, and one of
down  [R, K]        x's dtype: low is then x down^T, in x's dtype, or
low   [..., M, R]   floating: computed before, as where x is given as integers

smooth [K] and rotate go to the quantisation of a floating x, before its rows share a scale
(`_prologue.py`): the product is then that of x'' = (x / smooth) H with W, so W is what quantises
(weight * smooth) H. The branch takes x as it is.

The branch holds what quantising a weight would lose of its largest directions (SVDQuant, arXiv
2411.05007), or a LoRA. Its products are added in float32: in gemm_w8a8 and gemm_w4a8 one by one to
what the bias leaves, in gemm_w4a16 to partial sums of the product. With the op's own bound e,
before the rounding to out_dtype,

    |y - exact| <= e + (R + 6) 2^-24 (|exact| + sum_r |low_mr up_nr|),

and 2.2 times the last term where tensor cores add the products, cutting off what others round.

The derivatives are in `_gemm_autograd.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native
from . import _prologue
from ._epilogue import expect_epilogue, gate_rows, width
from ._expect import expect_tensors
from ._gemm_autograd import differentiate
from ._gemm_hopper import loadable, refuse_hopper
from ._gemm_rows import quantise_rows
from ._layout import FLOATS, contiguous, matrix, unit_stride
from ._register import register
from ._select import NO_RUN_YET, Implementation, refuse_native, refuse_triton
from .quantize_fp8 import BLOCK
from .quantize_int8 import run_native as quantize_native  # rows, and low beside them
from .quantize_int8 import run_reference as quantize_reference

MAX_K = 1 << 17
SCHEMA = (
    "(Tensor a, Tensor? a_scale, Tensor w, Tensor w_scale, Tensor? bias,"
    " Tensor? smooth, int rotate, Tensor? down, Tensor? up, Tensor? low, str? activation,"
    " Tensor? gate, Tensor? residual, ScalarType out_dtype, str impl) -> Tensor"
)
SCHEMA_INT8 = SCHEMA.replace("-> Tensor", "-> (Tensor, Tensor)")


INT8, E4M3 = torch.int8, torch.float8_e4m3fn  # the forms of activations in 8 bits


def bits(x: Tensor) -> Tensor:
    """Return e4m3 values as bytes, which is how kernels take them; other tensors as they are."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


class Operands(NamedTuple):
    """What an implementation of a product with 8-bit activations gets, in the schema's order."""

    a: Tensor
    a_scale: Tensor | None
    w: Tensor
    w_scale: Tensor
    bias: Tensor | None
    smooth: Tensor | None
    rotate: int
    down: Tensor | None
    up: Tensor | None
    low: Tensor | None
    activation: str | None
    gate: Tensor | None
    residual: Tensor | None
    out_dtype: torch.dtype

    def new_output(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return an output [..., M, N'], in out_dtype unless told."""
        N = width(self.w.shape[0], self.activation)
        return self.a.new_empty((*self.a.shape[:-1], N), dtype=dtype or self.out_dtype)

    def new_scale(self) -> Tensor:
        """Return an output [..., M] for the scales of int8 rows."""
        return self.a.new_empty(self.a.shape[:-1], dtype=torch.float32)

    def flat(self) -> tuple[Tensor, Tensor | None]:
        """Return a as [M, K] and a_scale as [M], or as [M, ceil(K / 128)] where it is of blocks."""
        a, a_scale = bits(self.a), self.a_scale
        if len(a.shape) == 2:  # saves calls, which are dear once the caches are full of matrices
            return unit_stride(a), contiguous(a_scale)
        if a_scale is not None:
            blocks = a_scale.dim() == a.dim()
            a_scale = (matrix(a_scale) if blocks else a_scale.reshape(-1)).contiguous()
        return unit_stride(matrix(a)), a_scale

    def branch(self) -> tuple[Tensor | None, Tensor | None]:
        """Return low as [M, R] and up, both contiguous, or (None, None) without a branch."""
        if self.up is None:
            return None, None
        low = _prologue.project(self.a, self.down, self.low)
        return matrix(low).contiguous(), self.up.contiguous()

    def epilogue(self) -> tuple[str | None, Tensor | None, Tensor | None]:
        """Return the activation, the gate as [G, N'] (see `gate_rows`), the residual as [M, N']."""
        return epilogue_rows(self.activation, self.gate, self.residual, self.a.shape[:-1])


def epilogue_rows(
    activation: str | None, gate: Tensor | None, residual: Tensor | None, rows: tuple[int, ...]
) -> tuple[str | None, Tensor | None, Tensor | None]:
    """Return what follows the sums as kernels take it: matrices with neighbours side by side."""
    if gate is not None:
        gate = unit_stride(gate_rows(gate, rows))
    if residual is not None:
        residual = unit_stride(matrix(residual))
    return activation, gate, residual


def expect(
    name: str,
    x: Tensor | None,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """Refuse a tensor of another shape, dtype or device than the first operand asks for."""
    if x is None:
        return
    if x.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(x.shape)}")
    if x.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name}: expected {wanted}, got {x.dtype}")
    if x.device != device:
        raise ValueError(
            f"{name}: expected the device of the activations, {device}, got {x.device}"
        )


def expect_branch(
    x: Tensor, N: int, down: Tensor | None, up: Tensor | None, low: Tensor | None
) -> None:
    """Refuse a low-rank branch that is not whole or does not fit."""
    expect_tensors(down=down, up=up, low=low)
    if up is None:
        for name, given in (("down", down), ("low", low)):
            if given is not None:
                raise ValueError(f"{name}: expected none without up, got {list(given.shape)}")
        return
    if up.dim() != 2:
        raise ValueError(f"up: expected [N, R], got {list(up.shape)}")
    if (down is None) == (low is None):
        raise ValueError(
            f"down, low: expected one of them with up, got {'none' if low is None else 'both'}"
        )
    R, device = up.shape[1], x.device
    expect("up", up, (N, R), FLOATS, device)
    expect("low", low, (*x.shape[:-1], R), FLOATS, device)
    if down is not None and x.dtype not in FLOATS:
        raise ValueError(f"down: expected low instead, because a is {x.dtype}, got down")
    expect("down", down, (R, x.shape[-1]), (x.dtype,), device)


def expect_operands(
    p: Operands,
    weight_shape: tuple[int, ...],
    form: torch.dtype = INT8,
    blocks: tuple[int, ...] = (),
) -> None:
    """Check everything but w and its scale: their op does. A row of a has one, or `blocks`."""
    a, a_scale, w, bias = p.a, p.a_scale, p.w, p.bias
    expect_tensors(a_scale=a_scale, bias=bias)
    if not a.shape or a.dtype not in (FLOATS if a_scale is None else (form,)):
        wanted = "floating" if a_scale is None else form
        raise ValueError(f"a: expected {wanted} [..., M, K], got {a.dtype} {list(a.shape)}")
    (*rows, K), N, device = a.shape, w.shape[0], a.device
    expect("w", w, weight_shape, (w.dtype,), device)
    expect("a_scale", a_scale, (*rows, *blocks), (torch.float32,), device)
    expect("bias", bias, (N,), FLOATS, device)
    if a_scale is None:
        _prologue.expect_prologue("a", a, p.smooth, p.rotate)
    elif p.smooth is not None or p.rotate:
        name = "rotate" if p.smooth is None else "smooth"
        raise ValueError(f"{name}: expected none, because a is quantised already, got one")
    expect_branch(a, N, p.down, p.up, p.low)
    expect_epilogue(tuple(rows), N, device, p.activation, p.gate, p.residual)
    if form is INT8 and K >= MAX_K:
        raise ValueError(f"a: expected K below {MAX_K} for exact int32 sums, got {K}")
    if p.out_dtype not in FLOATS:
        raise ValueError(
            f"out_dtype: expected float32, bfloat16, float16 or int8, got {p.out_dtype}"
        )


def rounding_dtype(a: Tensor, out_dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype that outputs are rounded to, before int8 ones are quantised."""
    if out_dtype == torch.int8:
        return a.dtype if a.dtype in FLOATS else torch.bfloat16
    if out_dtype is None:
        return a.dtype if a.dtype in FLOATS else torch.float32
    return out_dtype


def quantised(p: Operands, form: torch.dtype) -> Operands:
    """Return p with rows in 8 bits and low beside them, as kernels on GPUs take them."""
    if p.a_scale is not None:
        return p
    block = BLOCK if form is E4M3 and p.w_scale.dim() == 2 else None
    a, a_scale, *low = quantise_rows(form, p.a, block, p.smooth, p.rotate, p.down)
    low = low[0] if low else p.low
    return p._replace(a=a, a_scale=a_scale, smooth=None, rotate=0, down=None, low=low)


def native_operands(p: Operands, form: torch.dtype, scale: Tensor | None = None) -> tuple[Any, ...]:
    """Return a native product's arguments but for its outputs, which are int8 with `scale`."""
    on_gpu = p.a.device.type == "cuda"
    if on_gpu:
        p = quantised(p, form)
    # With integers the kernel rounds to bfloat16 before it quantises.
    alike = scale is None or p.a.dtype == torch.bfloat16
    if p.down is not None and form is INT8 and alike:  # low while the rows are in cache
        q, a_scale, low = quantize_native(p.a, p.smooth, p.rotate, p.down)
        p = p._replace(a=q, a_scale=a_scale, smooth=None, rotate=0, down=None, low=low)
    a, a_scale = p.flat()
    w, branch = bits(unit_stride(p.w)), p.branch()
    if on_gpu:  # for the copy engine; they mostly are
        a, w, *branch = *map(_native.aligned, (a, w)), *map(loadable, branch)
    weight = (w, p.w_scale.contiguous(), contiguous(p.bias))
    activation, *blended = p.epilogue()
    first = (a, a_scale, *weight, *branch, contiguous(p.smooth), p.rotate)
    return *first, activation or "", *blended


def triton_operands(p: Operands, form: torch.dtype) -> tuple[Any, ...]:
    """Return a Triton product's arguments but for its output."""
    p = quantised(p, form)
    weight = (bits(p.w.contiguous()), p.w_scale.contiguous(), contiguous(p.bias))
    return *p.flat(), *weight, *p.branch(), *p.epilogue()


def launch_group(
    form: torch.dtype,
    problems: Sequence[Operands],
    outs: Sequence[Tensor],
    limits: Sequence[tuple[Tensor, ...]] = (),
) -> None:
    """Fill the outputs of products with one N, K and activation, in one launch on Hopper.

    `limits`: for outputs in 8 bits (`_requantize.py`) each product's limit, scale, amax, exceeded.
    """
    given = [native_operands(p, form) for p in problems]
    a, a_scale, w, w_scale, *rest = map(list, zip(*given, strict=True))
    bias, low, up, smooth, rotate, (activation, *_), gate, residual = rest
    first, flat = (a, a_scale, w, w_scale, bias, low, up), [matrix(bits(out)) for out in outs]
    if outs[0].device.type == "cuda":
        vectors = [
            [x.contiguous().view(-1) for x in column] for column in zip(*limits, strict=True)
        ]
        end = (activation, gate, residual, *(vectors or [[]] * 4), flat)
        _native.call("gemm_grouped", *first, *end)
    else:
        _native.call("gemm_grouped", *first, smooth, rotate, activation, gate, residual, flat)


def register_product(
    name: str,
    *,
    form: torch.dtype = INT8,
    reference: Callable[..., Tensor],
    launcher: Callable[[], Callable[..., None]],
    weight: Callable[[Operands], Tensor],
) -> tuple[tuple[Implementation, ...], Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]]]:
    """Return the implementations of a product with 8-bit activations, and the registered ops.

    The second op, `<name>_int8`, returns (q, scale) of what the first returns, and has no
    derivative: its inputs' out_dtype is what outputs are rounded to before they are quantised.

    Args:
        name: of the op and of its native kernel.
        form: of the 8-bit activations.
        reference: the formula, with the public function's arguments.
        launcher: imports and returns the Triton kernel's launch function.
        weight: W in float32, for the derivatives.
    """

    def run_reference(*args: Any) -> Tensor:
        p = Operands(*args)
        options = p._asdict()
        first = [options.pop(key) for key in ("a", "a_scale", "w", "w_scale")]
        return reference(*first, **options).contiguous()

    def launch_native(p: Operands, scale: Tensor | None, out: Tensor) -> None:
        if out.numel():
            _native.call(name, *native_operands(p, form, scale), scale, matrix(out))

    def run_native(*args: Any) -> Tensor:
        p = Operands(*args)
        out = p.new_output()
        launch_native(p, None, out)
        return out

    def run_native_int8(*args: Any) -> tuple[Tensor, Tensor]:
        p = Operands(*args)
        if p.a.device.type == "cuda":
            return quantise_rows(torch.int8, run_native(*args))
        # The kernel takes integer rows, which `low` is made beside, for bfloat16's.
        if form is INT8 and p.down is not None and p.out_dtype != torch.bfloat16:
            return quantize_native(run_native(*args))
        q, scale = p.new_output(torch.int8), p.new_scale()
        launch_native(p, scale.view(-1), q)
        return q, scale if q.numel() else scale.fill_(1)

    def run_triton(*args: Any) -> Tensor:
        p = Operands(*args)
        out = p.new_output()
        if out.numel():
            launcher()(*triton_operands(p, form), matrix(out))
        return out

    def fake(*args: Any) -> Tensor:
        return Operands(*args[:-1]).new_output()

    def fake_int8(*args: Any) -> tuple[Tensor, Tensor]:
        p = Operands(*args[:-1])
        return p.new_output(torch.int8), p.new_scale()

    def weight_of(*inputs: Any) -> Tensor:
        p = Operands._make(inputs[: len(Operands._fields)])
        # H is symmetric: x'' W^T = x (W H / smooth)^T.
        W = _prologue.rotate_blocks(weight(p), p.rotate)
        return W if p.smooth is None else W / p.smooth.float()

    inputs = (form, *FLOATS)

    def refuse(a: Tensor, *rest: Any, **options: Any) -> str | None:
        reason = refuse_native(name, [a], inputs)
        if reason is not None or a.device.type != "cuda":
            return reason
        return refuse_hopper(**dict(zip(Operands._fields, (a, *rest), strict=False)), **options)

    ways = (
        Implementation("native", run_native, refuse, held_back=NO_RUN_YET),
        Implementation("triton", run_triton, lambda a, *_, **__: refuse_triton([a], inputs)),
        Implementation("reference", run_reference, lambda *_, **__: None),
    )
    ways_int8 = (
        replace(ways[0], run=run_native_int8),
        replace(ways[1], run=lambda *args: quantise_rows(torch.int8, run_triton(*args))),
        replace(ways[2], run=lambda *args: quantize_reference(run_reference(*args))),
    )
    names = " ".join(Operands._fields[:-1])
    op = register(name, SCHEMA, ways, fake, differentiate(names, weight_of, lambda: op))
    op_int8 = register(f"{name}_int8", SCHEMA_INT8, ways_int8, fake_int8)
    return ways, op, op_int8


def gate_layers(
    device: torch.device, weight: Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]
) -> list[tuple[tuple[Any, ...], dict[str, Any], float, float]]:
    """Return gate cases as layers call: many rows of floating x, a 16-bit branch, 16-bit outputs;
    and without the branch an activation, a gate and a residual.

    `weight(N, K, generator)` returns values and scales that make outputs of order one.
    """
    generator = torch.Generator().manual_seed(1)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], float, float]] = []
    M, N, K, R = 600, 96, 192, 20  # a rank that is no multiple of 8
    for dtype in FLOATS[1:]:
        w, w_scale = (x.to(device) for x in weight(N, K, generator))

        def draw(*shape: int, size: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
            return (size * torch.randn(shape, generator=generator)).to(device, dtype)

        branch = {"down": draw(R, K, size=K**-0.5), "up": draw(N, R, size=R**-0.5)}
        # Half a unit of the output twice, where sums fall to different sides, and half a unit of
        # each of R products of order R^-1/2: at most 5 of their deviations.
        unit = torch.finfo(dtype).eps
        case = (draw(M, K), None, w, w_scale), {"bias": draw(N), **branch}, unit, 5 * unit
        cases.append(case)
        # A product of two sums of up to 7, each as good as the one above, and a gate below one.
        end = {"activation": "geglu", "residual": draw(M, N // 2)}
        end["gate"] = draw(N // 2).sigmoid()
        cases.append(((draw(M, K), None, w, w_scale), {"bias": draw(N), **end}, unit, 20 * unit))
        # K roundings of x'' to int8 fall as they do in the reference, to the bit.
        prologue = {"smooth": draw(K).abs() + 0.5, "rotate": 64}
        args = (draw(M, K), None, w, w_scale)
        cases.append((args, {"bias": draw(N), **prologue, **branch}, unit, 5 * unit))
    return cases


# (M, N, K) that the Hopper kernel takes with its tilings 0 and 1 (csrc/include/fewstep/cuda/
# gemm8_plan.h), on 114 and on 132 multiprocessors; the cases above are small enough for 2.
TILED_SHAPES = ((1490, 1492, 496), (1094, 1096, 208))


def gate_tilings(
    device: torch.device,
    weight: Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]],
    shapes: Sequence[tuple[int, int, int]] = TILED_SHAPES,
) -> list[tuple[tuple[Any, ...], dict[str, Any], float, float]]:
    """Return gate cases with a branch and all of an end, for the large tiles; as `gate_layers`."""
    generator = torch.Generator().manual_seed(2)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], float, float]] = []
    R = 72  # more than one slab
    for M, N, K in shapes:
        w, w_scale = (x.to(device) for x in weight(N, K, generator))

        def draw(*shape: int, size: float = 1.0) -> Tensor:
            return (size * torch.randn(shape, generator=generator)).to(device, torch.bfloat16)

        options = {"bias": draw(N), "low": draw(M, R), "up": draw(N, R, size=R**-0.5)}
        options |= {"residual": draw(M, N // 2), "gate": draw(N // 2).sigmoid()}
        # As gate_layers' with an activation: low is given, so its products add float32's errors
        # alone. What is not where it belongs is off by one and more.
        unit = torch.finfo(torch.bfloat16).eps
        args = draw(M, K), None, w, w_scale
        cases.append((args, {**options, "activation": "geglu"}, unit, 20 * unit))
    return cases
