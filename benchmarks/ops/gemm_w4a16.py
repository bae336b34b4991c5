"""gemm_w4a16: 4-bit weights for few rows, as adaLN's modulation layers have.

One pass over the weight is all the work at one row, so bytes are what counts: the limit is the copy
rate. Peers get the same values and scales; ONNX Runtime and OpenVINO float32 activations.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep import ops
from fewstep.bench import Benchmark, Case, baseline, copy_limit, implementations, needs
from fewstep.bench.products import (
    call,
    needs_onnx,
    on_cpu,
    onnx_int4,
    openvino_int4,
    torch_int4,
)

CASES = [
    Case("FLUX.1 adaLN, 1 image", {"M": 1, "N": 9216, "K": 3072, "G": 64}, torch.bfloat16),
    Case("FLUX.1 adaLN, 2 images", {"M": 2, "N": 9216, "K": 3072, "G": 64}, torch.bfloat16),
    Case("FLUX.1 adaLN, 8 images", {"M": 8, "N": 9216, "K": 3072, "G": 64}, torch.bfloat16),
    Case("DiT-XL/2 adaLN", {"M": 2, "N": 6912, "K": 1152, "G": 64}, torch.bfloat16, quick=True),
    Case("DiT-XL/2 adaLN", {"M": 2, "N": 6912, "K": 1152, "G": 64}, torch.float32),
    Case("SDXL 1280 proj, 64 rows", {"M": 64, "N": 1280, "K": 1280, "G": 128}, torch.bfloat16),
]


def inputs(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    shapes = ((case["M"], case["K"]), (case["N"], case["K"]), (case["N"],))
    return tuple(torch.randn(shape, device=device).to(case.dtype) for shape in shapes)


def four_bits(case: Case, x: Tensor, w: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return x, *ops.quantize_int4(w, group=case["G"]), bias


def product(x: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor, *, impl: str) -> Tensor:
    return ops.gemm_w4a16(x, w, w_scale, bias=bias, impl=impl)


def w4a8(case: Case, x: Tensor, w: Tensor, bias: Tensor) -> tuple[Any, ...]:
    q, scale = ops.quantize_int4(w, group=case["G"])

    def layer(x: Tensor) -> Tensor:
        return ops.gemm_w4a8(x, None, q, scale, bias=bias)

    return layer, x


def flops(case: Case) -> float:
    return 2.0 * case["M"] * case["N"] * case["K"]


def bytes_moved(case: Case) -> float:
    M, N, K, size = case["M"], case["N"], case["K"], case.dtype.itemsize
    return N * K * (0.5 + 2.0 / case["G"]) + (M * K + (M + 1.0) * N) * size


BENCHMARK = Benchmark(
    "gemm_w4a16",
    CASES,
    inputs,
    [
        *implementations("gemm_w4a16", product, four_bits),
        baseline("torch linear", F.linear),
        baseline("fewstep gemm_w4a8, from x", call, w4a8),
        baseline("torch weight-only int4", call, torch_int4, on_cpu),
        baseline("ONNX Runtime MatMulNBits", call, onnx_int4, needs_onnx, "onnxruntime"),
        baseline(
            "OpenVINO int4, dynamic", call, openvino_int4, needs("openvino", "cpu"), "openvino"
        ),
        copy_limit(),
    ],
    flops,
    bytes_moved,
)
