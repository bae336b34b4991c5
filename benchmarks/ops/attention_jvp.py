"""attention_jvp: attention with its directional derivative, the inner loop of JVP distillation.

FLOPs are those of the exact derivative: two products of the primal and four of each direction, two
of these with a static k and v; under a causal mask, of the pairs that meet. A row of `torch SDPA,
primal only` does the primal's. Baselines are what trainers use: forward mode
through unfused SDPA, and a central finite difference with the fused one (primal and two more
evaluations; its truncation and rounding errors are another matter, see docs/ops/attention_jvp.md).
`int8 scores` and `e4m3 scores` are the native kernel with `score_dtype`, which loses accuracy as
that page says; their FLOPs are counted as the others', the time holds the pass that rounds.
Options of a case: `static` (k and v have no tangent), `directions`, `keys` (N unless given), and
the keywords of SDPA.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep import ops
from fewstep.bench import (
    Benchmark,
    Case,
    Provider,
    baseline,
    copy_limit,
    implementations,
    matmul_limit,
    needs,
)

GPU, ANY = ("cuda",), ("cpu", "cuda")
LOW, FULL = torch.bfloat16, torch.float32

EIGHT = {"B": 1, "H": 8, "N": 1024, "D": 64}
CASES = [
    Case("8 x 1024 x 64", EIGHT, FULL, ("cpu",), quick=True),
    Case("  static k, v", EIGHT, FULL, ("cpu",), options={"static": True}),
    Case("  causal", EIGHT, FULL, ("cpu",), options={"is_causal": True}),
    Case("  3 directions", EIGHT, FULL, ("cpu",), options={"directions": 3}),
    Case("digits DiT, batch 64", {"B": 64, "H": 4, "N": 64, "D": 32}, FULL, ("cpu",), quick=True),
    Case("DiT-XL/2 256px", {"B": 4, "H": 16, "N": 256, "D": 72}, FULL, ("cpu",)),
    Case("DiT-XL/2 256px", {"B": 32, "H": 16, "N": 256, "D": 72}, LOW, GPU),
    Case("SANA-like wide heads", {"B": 1, "H": 4, "N": 512, "D": 160}, FULL, ("cpu",)),
    Case("8 x 1024 x 64", EIGHT, LOW, ANY),
    Case("32 x 8192 x 64", {"B": 1, "H": 32, "N": 8192, "D": 64}, LOW, GPU, quick=True),
    Case(
        "  static k, v", {"B": 1, "H": 32, "N": 8192, "D": 64}, LOW, GPU, options={"static": True}
    ),
    Case("  float16", {"B": 1, "H": 32, "N": 8192, "D": 64}, torch.float16, GPU),
    *(
        Case(
            f"  {r} directions",
            {"B": 1, "H": 32, "N": 8192, "D": 64},
            LOW,
            GPU,
            options={"directions": r},
        )
        for r in (2, 3, 4)
    ),
    Case(
        "64 x 8192 x 32, 3 directions",
        {"B": 1, "H": 64, "N": 8192, "D": 32},
        LOW,
        GPU,
        options={"directions": 3},
    ),
    Case("FLUX.1 1024px", {"B": 1, "H": 24, "N": 4608, "D": 128}, LOW, GPU, quick=True),
    Case("24 x 8192 x 128", {"B": 1, "H": 24, "N": 8192, "D": 128}, LOW, GPU),
    Case(
        "  static k, v", {"B": 1, "H": 24, "N": 8192, "D": 128}, LOW, GPU, options={"static": True}
    ),
    Case(
        "  2 directions",
        {"B": 1, "H": 24, "N": 8192, "D": 128},
        LOW,
        GPU,
        options={"directions": 2},
    ),
    Case("Wan 2.1 1.3B 480p", {"B": 1, "H": 12, "N": 32760, "D": 128}, LOW, GPU),
    Case(
        "SANA 1.6B cross 1024px",
        {"B": 8, "H": 20, "N": 1024, "D": 112},
        LOW,
        GPU,
        options={"static": True, "keys": 300},
    ),
    *(
        Case(f"16 x 8192 x {d}", {"B": 1, "H": 16, "N": 8192, "D": d}, LOW, GPU)
        for d in (40, 72, 80, 96, 112, 160, 256)
    ),
    *(
        Case(f"24 x {n} x 128", {"B": 1, "H": 24, "N": n, "D": 128}, LOW, GPU)
        for n in (1024, 2048, 4096, 16384)
    ),
]
STEP = 5e-3


def inputs(case: Case, device: torch.device) -> tuple[Tensor | None, ...]:
    # Heads inside tokens, as a projection leaves them.
    directions = case.options.get("directions")
    lead = () if directions is None else (directions,)

    def new(i: int, *lead: int) -> Tensor:
        shape = (*lead, case["B"], keys(case) if i else case["N"], case["H"], case["D"])
        return torch.randn(shape, device=device).to(case.dtype).transpose(-3, -2)

    primals = [new(i) for i in range(3)]
    static = case.options.get("static", False)
    return (*primals, *(None if static and i else new(i, *lead) for i in range(3)))


def keys(case: Case) -> int:
    return case.options.get("keys", case["N"])


def with_keywords(case: Case, *tensors: Any) -> tuple[Any, ...]:
    return {"is_causal": case.options.get("is_causal", False)}, *tensors


def fused(keywords: dict[str, Any], *tensors: Tensor, impl: str) -> tuple[Tensor, ...]:
    return ops.attention_jvp(*tensors, impl=impl, **keywords)


def with_scores(name: str, score_dtype: torch.dtype) -> Provider:
    def make(case: Case, *tensors: Any) -> Callable[[], Any] | str:
        if tensors[0].device.type != "cuda":
            return "8-bit scores are a kernel for Hopper"
        keywords, *inputs = with_keywords(case, *tensors)
        keywords["score_dtype"] = score_dtype
        return functools.partial(fused, keywords, *inputs, impl="native")

    return Provider(f"fewstep native, {name} scores", make, "op", "native")


def unfused_jvp(keywords: dict[str, Any], *tensors: Tensor) -> tuple[Tensor, Tensor]:
    primals, tangents = tensors[:3], tensors[3:]
    moving = [i for i, t in enumerate(tangents) if t is not None]

    def attention(*some: Tensor) -> Tensor:
        arguments = list(primals)
        for i, x in zip(moving, some, strict=True):
            arguments[i] = x
        return F.scaled_dot_product_attention(*arguments, **keywords)

    def jvp(*some: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(attention, tuple(primals[i] for i in moving), some)

    with sdpa_kernel(SDPBackend.MATH):
        some = [tangents[i] for i in moving]
        if some[0].dim() == primals[0].dim():
            return jvp(*some)
        # The primal is not batched: all directions share it here too.
        return torch.func.vmap(jvp, out_dims=(None, 0))(*some)


def finite_difference(keywords: dict[str, Any], *tensors: Tensor) -> tuple[Tensor, list[Tensor]]:
    primals, tangents = tensors[:3], tensors[3:]
    many = tangents[0].dim() > primals[0].dim()
    differences = []
    for r in range(len(tangents[0]) if many else 1):
        ahead, behind = (
            F.scaled_dot_product_attention(
                *(
                    x if t is None else x.add(t[r] if many else t, alpha=step)
                    for x, t in zip(primals, tangents, strict=True)
                ),
                **keywords,
            )
            for step in (STEP, -STEP)
        )
        differences.append((ahead - behind) / (2 * STEP))
    return F.scaled_dot_product_attention(*primals, **keywords), differences


def primal(keywords: dict[str, Any], *tensors: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*tensors[:3], **keywords)


def primal_by(backend: SDPBackend) -> Callable[..., Tensor]:
    def run(keywords: dict[str, Any], *tensors: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*tensors[:3], **keywords)

    return run


def backend_refuses(case: Case, *tensors: Tensor) -> str | None:
    if tensors[0].device.type != "cuda":
        return "its kernel runs on cuda only"
    return "it takes head dims up to 256" if case["D"] > 256 else None


def jvp_flash_attention(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    from jvp_flash_attention.jvp_attention import JVPAttn

    return torch.func.jvp(JVPAttn.fwd_dual, tensors[:3], tensors[3:])


def peer_refuses(case: Case, *tensors: Tensor) -> str | None:
    if case.options:
        return "only the plain case is compared"
    if case["N"] % 32 or case["D"] not in (32, 64, 128, 256):
        return "it takes N % 32 == 0 and head dims 32, 64, 128, 256"
    return needs("jvp_flash_attention", "cuda")(case, *tensors)


def memory_refuses(case: Case, *tensors: Tensor) -> str | None:
    # Scores, their tangents and temporaries, in float32.
    needed = (
        6 * 4 * case.options.get("directions", 1) * case["B"] * case["H"] * case["N"] * keys(case)
    )
    return f"it would take {needed / 2**30:.0f} GiB for scores" if needed > 100 * 2**30 else None


def flops(case: Case) -> float:
    products = 2 + case.options.get("directions", 1) * (2 if case.options.get("static") else 4)
    pairs = case["N"] * keys(case)
    if case.options.get("is_causal"):
        pairs = case["N"] * (case["N"] + 1) / 2
    return products * 2.0 * case["B"] * case["H"] * pairs * case["D"]


def bytes_moved(case: Case) -> float:
    heads, directions = case["B"] * case["H"], case.options.get("directions", 1)
    # q and o, k and v; for each direction t_q and t_o, and t_k and t_v if they move.
    rows = case["N"] * 2 * (1 + directions)
    rows += keys(case) * 2 * (1 if case.options.get("static") else 1 + directions)
    return heads * (float(rows) * case["D"] * case.dtype.itemsize + 8 * case["N"])


BENCHMARK = Benchmark(
    "attention_jvp",
    CASES,
    inputs,
    [
        *implementations("attention_jvp", fused, with_keywords),
        with_scores("int8", torch.int8),
        with_scores("e4m3", torch.float8_e4m3fn),
        baseline("torch.func.jvp, math SDPA", unfused_jvp, with_keywords, memory_refuses),
        baseline("finite difference, fused SDPA", finite_difference, with_keywords),
        baseline("torch SDPA, primal only", primal, with_keywords),
        *(
            baseline(
                f"torch SDPA {name}, primal only", primal_by(b), with_keywords, backend_refuses
            )
            for name, b in (
                ("flash", SDPBackend.FLASH_ATTENTION),
                ("cuDNN", SDPBackend.CUDNN_ATTENTION),
            )
        ),
        baseline("jvp_flash_attention", jvp_flash_attention, unless=peer_refuses),
        matmul_limit(),
        copy_limit(),
    ],
    flops,
    bytes_moved,
)
