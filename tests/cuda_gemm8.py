"""The Hopper kernel of products with 8-bit rows: called on the host or on a GPU, and its bounds."""

import ctypes

import pytest
import torch

from cuda_emulation import View, targets, to_device
from epilogue_rules import finished, sums
from fewstep import _native, ops
from fewstep.bench.products import asked_tiling
from helpers import padded, padding_intact
from product_rules import within

TILINGS = range(3)
# On GPUs only: every multiprocessor and many tiles each; less than one each; many slabs.
AT_SIZE = [(4096, 3072, 3072), (2048, 1280, 1280), (512, 640, 131056)]
NAMES = ["a", "a_scale", "w", "w_scale", "bias", "low", "up", "gate", "residual", "out"]


def needs_hopper(test):
    """Mark a test of what only a Hopper GPU runs."""
    there = "device" in str(targets())
    skip = pytest.mark.skipif(not there, reason="needs a GPU of capability 9.0")
    return pytest.mark.gpu(skip(test))


def call_on_host(library, tensors, activation, tiling):
    """Run the emulated kernel on tensors by name; -1 leaves the tiling to it."""
    tensors = [tensors.get(name) for name in NAMES]
    views = (View * len(tensors))(*map(View.of, tensors))
    present = (ctypes.c_bool * len(tensors))(*(x is not None for x in tensors))
    error = library.run(views, present, activation.encode(), tiling)
    if error:
        raise ValueError(error.decode())


def call_on_device(op, tensors, activation, tiling):
    """Run the kernel on a Hopper GPU; -1 leaves the tiling to it."""
    moved, copy_back = to_device([tensors.get(name) for name in NAMES])
    *start, gate, residual, out = moved
    stream = torch.cuda.current_stream().cuda_stream
    kernel = getattr(_native._C.cuda, f"{op}_sm90")
    with asked_tiling(tiling):
        kernel(*start, None, 0, activation, gate, residual, None, out, stream)
    copy_back()


def operands(op, M, N, K, group=32):
    """Return a, a_scale, w, w_scale of outputs of order one, as the kernel takes them."""
    if op == "gemm_fp8":
        (a, a_scale), (w, w_scale) = (ops.quantize_fp8(torch.randn(n, K)) for n in (M, N))
        w_scale = w_scale * K**-0.5
    else:
        a, w = (torch.randint(-128, 128, (n, K), dtype=torch.int8) for n in (M, N))
        a_scale, w_scale = (torch.rand(M) + 0.5) / 64, (torch.rand(N) + 0.5) * K**-0.5 / 64
        if op == "gemm_w4a8":
            w = w.view(torch.uint8)[:, : K // 2].clone()
            w_scale = ((torch.rand(N, K // group) + 0.01) * K**-0.5 / 4).bfloat16()
    return dict(zip(NAMES, (a, a_scale, w, w_scale), strict=False))


def with_end(tensors, width, gate_rows, dtypes):
    """Add a bias, a gate and a residual, in these dtypes."""
    M, N = tensors["a"].shape[0], tensors["w"].shape[0]
    tensors["bias"] = torch.randn(N).to(dtypes[0])
    tensors["gate"] = torch.randn(gate_rows, width).to(dtypes[1])
    tensors["residual"] = torch.randn(M, width).to(dtypes[2])
    return tensors


def run(target, op, tensors, *, activation="", out_dtype=torch.float32, tiling=-1):
    """Return the kernel's output; nothing around it is written."""
    M, N = tensors["a"].shape[0], tensors["w"].shape[0]
    out = padded(torch.zeros(M, N // 2 if "glu" in activation else N, dtype=out_dtype), 64)
    given = {name: x.view(torch.uint8) if is_e4m3(x) else x for name, x in tensors.items()}
    given = {**given, "out": out}
    if target is None:
        call_on_device(op, given, activation, tiling)
    else:
        call_on_host(target, given, activation, tiling)
    assert padding_intact(out, 64)
    return out


def is_e4m3(x):
    """Return whether a tensor, or None, is of e4m3 values."""
    return x is not None and x.dtype == torch.float8_e4m3fn


def check(target, op, tensors, *, activation="", out_dtype=torch.float32, tiling=-1):
    """Compare with the float64 formula, to the bounds of ops/_gemm.py and ops/_epilogue.py."""
    out = run(target, op, tensors, activation=activation, out_dtype=out_dtype, tiling=tiling)
    args = [tensors[name] for name in NAMES[:4]]
    bias = tensors.get("bias", torch.zeros(tensors["w"].shape[0]))
    branch = {name: tensors[name] for name in ("low", "up") if name in tensors}
    y, before = sums(op, args, bias, branch)
    if branch:  # tensor cores cut where other units round: R + R / 16 cuts of 2^-23, not 2^-24
        before = 2.2 * before
    gate = tensors.get("gate")
    if gate is not None:  # each of its rows serves neighbours
        gate = gate.repeat_interleave(out.shape[0] // gate.shape[0], 0)
    before = before + 1e-12  # the float64 sums' own
    exact, bound = finished(y, before, activation or None, gate, tensors.get("residual"))
    assert within(out, exact, bound)
    return out
