"""norm_jvp_backward: gradients of adaLN and its directional derivative, all eight of them.

One pass reads both cotangents, x and its tangent, and writes two gradients; the others are sums.
The baseline is torch's: reverse mode through forward mode, op by op, on a graph built beforehand.
The norm is spelled out in it: through F.layer_norm that gradient is wrong (torch 2.13; see
docs/ops/norm_jvp_backward.md).
"""

from typing import Any

import torch
from torch import Tensor

from fewstep import ops
from fewstep.bench import Benchmark, Case, baseline, copy_limit, implementations

GPU = ("cuda",)
LOW, FULL = torch.bfloat16, torch.float32

CASES = [
    Case("DiT-XL/2 256px", {"B": 2, "N": 256, "C": 1152}, FULL, quick=True),
    Case("FLUX.1 1024px", {"B": 1, "N": 4608, "C": 3072}, LOW, quick=True),
    Case("Wan 2.1 14B 480p", {"B": 1, "N": 32760, "C": 5120}, LOW, GPU),
]
NAMES = ("x", "t_x", "weight", "bias", "scale", "shift", "t_scale", "t_shift")


def inputs(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """d_y, dt_y, and the inputs of norm_jvp."""
    whole, shared = ((case["B"], n, case["C"]) for n in (case["N"], 1))
    shapes = [whole] * 4 + [(case["C"],)] * 2 + [shared] * 4
    return tuple(torch.randn(shape, device=device).to(case.dtype) for shape in shapes)


def with_stats(case: Case, *tensors: Tensor) -> tuple[Any, ...]:
    primals = dict(zip(NAMES, tensors[2:], strict=True))
    stats = ops.norm_jvp(**primals, return_stats=True)[2]
    return (*tensors[:2], primals, stats)


def fused(d_y: Tensor, dt_y: Tensor, primals: dict[str, Tensor], stats: Tensor, impl: str) -> Any:
    return ops.norm_jvp_backward(d_y, dt_y, **primals, stats=stats, impl=impl)


def with_graph(case: Case, *tensors: Tensor) -> tuple[Any, ...]:
    x, t_x, weight, bias, scale, shift, t_scale, t_shift = leaves = [
        v.clone().requires_grad_() for v in tensors[2:]
    ]

    def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        u = x - x.mean(-1, keepdim=True)
        n = u * (u.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return (n * weight + bias) * (1 + scale) + shift

    outputs = torch.func.jvp(modulated, (x, scale, shift), (t_x, t_scale, t_shift))
    return outputs, leaves, tensors[:2]


def unfused(outputs: Any, leaves: Any, cotangents: Any) -> Any:
    return torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)


def flops(case: Case) -> float:
    return 60.0 * case["B"] * case["N"] * case["C"]


def bytes_moved(case: Case) -> float:
    return 6.0 * case["B"] * case["N"] * case["C"] * case.dtype.itemsize


BENCHMARK = Benchmark(
    "norm_jvp_backward",
    CASES,
    inputs,
    [
        *implementations("norm_jvp_backward", fused, with_stats),
        baseline("autograd of torch.func.jvp", unfused, with_graph),
        copy_limit(),
    ],
    flops,
    bytes_moved,
)
