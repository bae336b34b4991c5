"""What the tests of the ends of low-bit products share: operands, exact results, bounds.

Bounds are those of `ops/_epilogue.py`, on top of the op's own.
"""

import torch

from fewstep import ops
from fewstep.ops._epilogue import activate, is_glu
from fewstep.reference.gemm_w4a8 import fold_int4
from fewstep.reference.gemm_w4a16 import dequantize_int4
from product_rules import add_branch

OPS = ["gemm_w8a8", "gemm_w4a8", "gemm_w4a16", "gemm_fp8"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNIT = 2.0**-24


def operands(op, rows, N, K=64, dtype=None):
    """Return (args, bias) of outputs of order one; `dtype` is that of floating activations."""
    w, w_scale = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8), torch.rand(N, K // 32) + 0.1
    w_scale = (w_scale * K**-0.5 / 4).bfloat16()
    weight = (w, w_scale)
    if op == "gemm_w8a8":
        weight = fold_int4(*weight)
    if op == "gemm_fp8":
        weight = ops.quantize_fp8(dequantize_int4(*weight).float())
    if op == "gemm_w4a16":
        return (torch.randn(*rows, K).to(dtype or torch.float32), *weight), torch.randn(N)
    if dtype is not None:
        return (torch.randn(*rows, K).to(dtype), None, *weight), torch.randn(N)
    if op == "gemm_fp8":
        return (*ops.quantize_fp8(torch.randn(*rows, K)), *weight), torch.randn(N)
    a = torch.randint(-128, 128, (*rows, K), dtype=torch.int8)
    return (a, (torch.rand(rows) + 0.5) / 64, *weight), torch.randn(N)


def weight_of(op, args):
    """Return W in float64."""
    if op == "gemm_w4a16":
        return dequantize_int4(*args[-2:])
    w, scale = fold_int4(*args[-2:]) if op == "gemm_w4a8" else args[-2:]
    return w.double() * scale.double()[:, None]


def sums(op, args, bias, branch):
    """Return the exact y and the op's bound on it."""
    x, weight = args[0].double(), weight_of(op, args)
    if op != "gemm_w4a16":
        x = x * args[1].double()[..., None]
    product = x @ weight.mT
    y, terms = product + bias.double(), x.abs() @ weight.abs().mT
    before = 3 * UNIT * product.abs()
    if op in ("gemm_w4a16", "gemm_fp8"):
        before = before + (x.shape[-1] + 2) * UNIT * terms
    if op == "gemm_fp8":
        before = before + 2.0**-9 * terms  # tensor cores: test_gemm_fp8.py holds CPUs to less
    before = before + UNIT * y.abs()
    return add_branch(y, before, **branch) if branch else (y, before)


def finished(y, e, activation, gate, residual):
    """Return the exact output and the bound of ops/_epilogue.py."""
    v = activate(y, activation)
    if is_glu(activation):
        (value, switch), (e_value, e_switch) = y.chunk(2, -1), e.chunk(2, -1)
        slope = 1.13 * e_switch + 8 * UNIT * switch.abs()
        act = activate(switch, "gelu" if activation == "geglu" else "silu")
        bound = act.abs() * e_value + (value.abs() + e_value) * slope + UNIT * v.abs()
    else:
        bound = e if activation is None else 1.13 * e + 8 * UNIT * y.abs()
    scaled = v if gate is None else gate.double() * v
    out = scaled if residual is None else residual.double() + scaled
    bound = bound if gate is None else gate.double().abs() * bound
    return out, bound + 2 * UNIT * (scaled.abs() + out.abs())
