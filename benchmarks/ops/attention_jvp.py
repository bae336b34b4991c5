"""attention_jvp: attention with its directional derivative, the inner loop of JVP distillation.

FLOPs are those of the exact derivative, six products (two of the primal, four of the tangent); a
row of `torch SDPA, primal only` does two of them. Baselines are what trainers use: forward mode
through unfused SDPA, and a central finite difference with the fused one (primal and two more
evaluations; its truncation and rounding errors are another matter, see docs/ops/attention_jvp.md).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep import ops
from fewstep.bench import Benchmark, Case, baseline, implementations, matmul_limit, needs

GPU, ANY = ("cuda",), ("cpu", "cuda")
LOW, FULL = torch.bfloat16, torch.float32

CASES = [
    Case("8 x 1024 x 64", {"B": 1, "H": 8, "N": 1024, "D": 64}, FULL, ("cpu",), quick=True),
    Case("digits DiT, batch 64", {"B": 64, "H": 4, "N": 64, "D": 32}, FULL, ("cpu",), quick=True),
    Case("DiT-XL/2 256px", {"B": 4, "H": 16, "N": 256, "D": 72}, FULL, ("cpu",)),
    Case("DiT-XL/2 256px", {"B": 32, "H": 16, "N": 256, "D": 72}, LOW, GPU),
    Case("SANA-like wide heads", {"B": 1, "H": 4, "N": 512, "D": 160}, FULL, ("cpu",)),
    Case("8 x 1024 x 64", {"B": 1, "H": 8, "N": 1024, "D": 64}, LOW, ANY),
    Case("32 x 8192 x 64", {"B": 1, "H": 32, "N": 8192, "D": 64}, LOW, GPU, quick=True),
    Case("FLUX.1 1024px", {"B": 1, "H": 24, "N": 4608, "D": 128}, LOW, GPU, quick=True),
    Case("24 x 8192 x 128", {"B": 1, "H": 24, "N": 8192, "D": 128}, LOW, GPU),
    Case("Wan 2.1 1.3B 480p", {"B": 1, "H": 12, "N": 32760, "D": 128}, LOW, GPU),
]
STEP = 5e-3


def inputs(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    # Heads inside tokens, as a projection leaves them.
    shape = (case["B"], case["N"], case["H"], case["D"])
    return tuple(torch.randn(shape, device=device).to(case.dtype).transpose(1, 2) for _ in range(6))


def fused(*tensors: Tensor, impl: str) -> tuple[Tensor, ...]:
    return ops.attention_jvp(*tensors, impl=impl)


def unfused_jvp(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(F.scaled_dot_product_attention, tensors[:3], tensors[3:])


def finite_difference(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    primals, tangents = tensors[:3], tensors[3:]
    ahead, behind = (
        F.scaled_dot_product_attention(
            *(x.add(t, alpha=step) for x, t in zip(primals, tangents, strict=True))
        )
        for step in (STEP, -STEP)
    )
    return F.scaled_dot_product_attention(*primals), (ahead - behind) / (2 * STEP)


def primal(*tensors: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*tensors[:3])


def jvp_flash_attention(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    from jvp_flash_attention.jvp_attention import JVPAttn

    return torch.func.jvp(JVPAttn.fwd_dual, tensors[:3], tensors[3:])


def peer_refuses(case: Case, *tensors: Tensor) -> str | None:
    if case["N"] % 32 or case["D"] not in (32, 64, 128, 256):
        return "it takes N % 32 == 0 and head dims 32, 64, 128, 256"
    return needs("jvp_flash_attention", "cuda")(case, *tensors)


def memory_refuses(case: Case, *tensors: Tensor) -> str | None:
    # Scores, their tangent and temporaries, in float32.
    needed = 6 * 4 * case["B"] * case["H"] * case["N"] ** 2
    return f"it would take {needed / 2**30:.0f} GiB for scores" if needed > 100 * 2**30 else None


def flops(case: Case) -> float:
    return 6 * 2.0 * case["B"] * case["H"] * case["N"] ** 2 * case["D"]


def bytes_moved(case: Case) -> float:
    rows = case["B"] * case["H"] * case["N"]
    return rows * (8.0 * case["D"] * case.dtype.itemsize + 8)


BENCHMARK = Benchmark(
    "attention_jvp",
    CASES,
    inputs,
    [
        *implementations("attention_jvp", fused),
        baseline("torch.func.jvp, math SDPA", unfused_jvp, unless=memory_refuses),
        baseline("finite difference, fused SDPA", finite_difference),
        baseline("torch SDPA, primal only", primal),
        baseline("jvp_flash_attention", jvp_flash_attention, unless=peer_refuses),
        matmul_limit(),
    ],
    flops,
    bytes_moved,
)
