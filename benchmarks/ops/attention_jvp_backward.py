"""attention_jvp_backward: gradients through attention and its directional derivative.

FLOPs are those of one pass: 15 products with everything present, 12 with static keys and values, 5
where only o has a cotangent (scores, d_o v^T and the three gradients); under a causal mask, of the
pairs that meet. The baseline is what a trainer does today: autograd through forward mode through
the unfused attention, of which only the backward is timed here. It keeps several N x N matrices
from its forward.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep import ops
from fewstep.bench import Benchmark, Case, baseline, copy_limit, implementations, matmul_limit

GPU, ANY = ("cuda",), ("cpu", "cuda")
LOW, FULL = torch.bfloat16, torch.float32

EIGHT = {"B": 1, "H": 8, "N": 1024, "D": 64}
LONG = {"B": 1, "H": 24, "N": 8192, "D": 128}
CASES = [
    Case("8 x 1024 x 64", EIGHT, FULL, ("cpu",), quick=True),
    Case("  causal", EIGHT, FULL, ("cpu",), options={"is_causal": True}),
    Case("  through o alone", EIGHT, FULL, ("cpu",), options={"primal": True}),
    Case("digits DiT, batch 64", {"B": 64, "H": 4, "N": 64, "D": 32}, FULL, ("cpu",), quick=True),
    Case("DiT-XL/2 256px", {"B": 4, "H": 16, "N": 256, "D": 72}, FULL, ("cpu",)),
    Case("SANA-like wide heads", {"B": 1, "H": 4, "N": 512, "D": 160}, FULL, ("cpu",)),
    Case("8 x 1024 x 64", EIGHT, LOW, ANY),
    Case("FLUX.1 1024px", {"B": 1, "H": 24, "N": 4608, "D": 128}, LOW, GPU, quick=True),
    Case("24 x 8192 x 128", LONG, LOW, GPU, quick=True),
    Case("  sums in any order", LONG, LOW, GPU, quick=True, options={"deterministic": False}),
    Case("  static keys and values", LONG, LOW, GPU, options={"static": True}),
    Case("24 x 8192 x 64", {**LONG, "D": 64}, LOW, GPU, quick=True),
    Case("  sums in any order", {**LONG, "D": 64}, LOW, GPU, options={"deterministic": False}),
]
NEEDS = ("q", "k", "v", "t_q", "t_k", "t_v")


def inputs(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """q, k, v, t_q, t_k, t_v, d_o, dt_o."""
    # Heads inside tokens, as a projection leaves them.
    shape = (case["B"], case["N"], case["H"], case["D"])
    return tuple(torch.randn(shape, device=device).to(case.dtype).transpose(1, 2) for _ in range(8))


def with_forward(case: Case, *tensors: Tensor) -> tuple[Any, ...]:
    """The arguments of the backward; its forward is not timed."""
    keywords = {"is_causal": case.options.get("is_causal", False)}
    settings = {"deterministic": case.options.get("deterministic", True), **keywords}
    *args, d_o, dt_o = tensors
    if case.options.get("static"):
        args[4:] = None, None
    if case.options.get("primal"):
        args = [*args[:3], None, None, None]
        o, _, lse, _ = ops.attention_jvp(*args, return_stats=True, **keywords)
        delta1 = (d_o.to(lse.dtype) * o).sum(-1)
        return {**settings, "needs": NEEDS[:3]}, d_o, None, None, delta1, *args, lse, None
    o, t_o, lse, mu = ops.attention_jvp(*args, return_stats=True, **keywords)
    wide = [x.to(lse.dtype) for x in (d_o, dt_o)]
    delta0, delta1 = (wide[1] * o).sum(-1), (wide[0] * o + wide[1] * t_o).sum(-1)
    return settings, d_o, dt_o, delta0, delta1, *args, lse, mu


def fused(keywords: dict[str, Any], *arguments: Any, impl: str) -> tuple[Tensor, ...]:
    return ops.attention_jvp_backward(*arguments, impl=impl, **keywords)


def with_graph(case: Case, *tensors: Tensor) -> tuple[Any, ...]:
    """The recorded graph of the unfused forward; what is timed goes back through it."""
    *args, d_o, dt_o = (x.detach() for x in tensors)
    args = [x.requires_grad_() for x in args]

    def attention(*primals: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            *primals, is_causal=case.options.get("is_causal", False)
        )

    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        if case.options.get("primal"):
            return attention(*args[:3]), args[:3], d_o
        if case.options.get("static"):
            q, k, v, t_q, *_ = args
            dual = torch.func.jvp(lambda x: attention(x, k, v), (q,), (t_q,))
            return dual, args[:4], (d_o, dt_o)
        return torch.func.jvp(attention, tuple(args[:3]), tuple(args[3:])), args, (d_o, dt_o)


def unfused(outputs: Any, leaves: list[Tensor], cotangents: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)


def memory_refuses(case: Case, *tensors: Tensor) -> str | None:
    # Scores, probabilities, their tangents and cotangents and temporaries, in float32.
    needed = 16 * 4 * case["B"] * case["H"] * case["N"] ** 2
    return f"it would take {needed / 2**30:.0f} GiB for scores" if needed > 100 * 2**30 else None


def flops(case: Case) -> float:
    products = 5 if case.options.get("primal") else 12 if case.options.get("static") else 15
    pairs = case["N"] * (case["N"] + 1) / 2 if case.options.get("is_causal") else case["N"] ** 2
    return products * 2.0 * case["B"] * case["H"] * pairs * case["D"]


def bytes_moved(case: Case) -> float:
    rows = case["B"] * case["H"] * case["N"]
    # Inputs, cotangents and gradients; lse, mu, delta0 and delta1.
    tensors, stats = (7, 2) if case.options.get("primal") else (14, 4)
    tensors -= 2 if case.options.get("static") else 0
    return rows * (float(tensors) * case["D"] * case.dtype.itemsize + 4 * stats)


BENCHMARK = Benchmark(
    "attention_jvp_backward",
    CASES,
    inputs,
    [
        *implementations("attention_jvp_backward", fused, with_forward),
        baseline("autograd, torch.func.jvp, math SDPA", unfused, with_graph, memory_refuses),
        matmul_limit(),
        copy_limit(),
    ],
    flops,
    bytes_moved,
)
