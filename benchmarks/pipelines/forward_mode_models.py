"""A whole model's exact derivative at full size: time and peak memory of `fewstep.jvp`.

    python benchmarks/pipelines/forward_mode_models.py --device cuda --output records
    python benchmarks/pipelines/forward_mode_models.py --tiny          # a check of this script

Random weights (time and memory only), bfloat16, no gradients, the tangent of the latents and of the
timestep, as a consistency target needs them. Beside it what torch offers, `torch.func.jvp` over
unfused attention, where its scores fit, and the primal alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fewstep
from fewstep.bench.environment import environment

REPEATS = 5


@dataclass(frozen=True)
class Model:
    """A diffusers class, its configuration at full size and what makes it tiny; its inputs.

    `points` (the latents, then the timestep) get a tangent; `others` don't. Shapes are as for an
    image or clip of the named size; a tiny model has `tiny_points` and `tiny_others`.
    """

    kind: str
    config: dict[str, Any]
    points: dict[str, tuple[int, ...]]
    others: dict[str, tuple[int, ...]]
    tiny: dict[str, Any] = field(default_factory=dict)
    tiny_points: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tiny_others: dict[str, tuple[int, ...]] = field(default_factory=dict)


HEADS = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
MODELS = {
    "FLUX.1 1024px": Model(
        "FluxTransformer2DModel",
        {},
        {"hidden_states": (1, 4096, 64), "timestep": (1,)},
        {
            "encoder_hidden_states": (1, 512, 4096),
            "pooled_projections": (1, 768),
            "img_ids": (4096, 3),
            "txt_ids": (512, 3),
        },
        HEADS | {"num_single_layers": 1, "axes_dims_rope": (4, 6, 6), "joint_attention_dim": 32},
        {"hidden_states": (1, 64, 64)},
        {"encoder_hidden_states": (1, 8, 32), "img_ids": (64, 3), "txt_ids": (8, 3)},
    ),
    "SD3.5 large 1024px": Model(
        "SD3Transformer2DModel",
        {
            "sample_size": 128,
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        {"hidden_states": (1, 16, 128, 128), "timestep": (1,)},
        {"encoder_hidden_states": (1, 333, 4096), "pooled_projections": (1, 2048)},
        HEADS | {"caption_projection_dim": 32, "joint_attention_dim": 32},
        {"hidden_states": (1, 16, 16, 16)},
        {"encoder_hidden_states": (1, 8, 32)},
    ),
    "SANA 1.6B 1024px": Model(
        "SanaTransformer2DModel",
        {},
        {"hidden_states": (1, 32, 32, 32), "timestep": (1,)},
        {"encoder_hidden_states": (1, 300, 2304)},
        HEADS
        | {
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 32,
        },
    ),
    "Wan 2.1 1.3B 480p": Model(
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
        {"hidden_states": (1, 16, 21, 60, 104), "timestep": (1,)},
        {"encoder_hidden_states": (1, 512, 4096)},
        HEADS | {"ffn_dim": 64, "text_dim": 32},
        {"hidden_states": (1, 16, 3, 8, 8)},
        {"encoder_hidden_states": (1, 8, 32)},
    ),
}


def build(model: Model, tiny: bool, device: torch.device) -> nn.Module:
    """Return the model with random weights, made where it will run."""
    config = model.config | (model.tiny if tiny else {})
    with torch.device(device):
        built = getattr(diffusers, model.kind)(**config).to(torch.bfloat16)
    return built.eval().requires_grad_(False)


def measure(call: Callable[[], Any], device: torch.device, repeats: int) -> dict[str, float]:
    """Return the median time of a call and the most memory that it takes beside the weights."""
    cuda = device.type == "cuda"
    call()
    if cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    result = {"median_s": statistics.median(seconds)}
    if cuda:
        result["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    return result


def run(name: str, tiny: bool, device: torch.device, repeats: int) -> dict[str, Any]:
    """Measure one model; what does not fit is recorded with its error."""
    model = MODELS[name]
    built = build(model, tiny, device)
    shapes = model.points | (model.tiny_points if tiny else {})
    points = {key: torch.randn(s, device=device).bfloat16() for key, s in shapes.items()}
    points["timestep"] = torch.full((1,), 0.5, device=device, dtype=torch.bfloat16)
    shapes = model.others | (model.tiny_others if tiny else {})
    others = {key: torch.randn(s, device=device).bfloat16() for key, s in shapes.items()}
    if getattr(built.config, "guidance_embeds", False):
        others["guidance"] = torch.full((1,), 3.5, device=device, dtype=torch.bfloat16)
    primals = tuple(points.values())
    tangents = tuple(torch.randn_like(x) for x in primals)

    def forward(*values: Tensor) -> Tensor:
        named = dict(zip(points, values, strict=True))
        return built(**named, **others, return_dict=False)[0]

    def unfused() -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(forward, primals, tangents)

    calls: dict[str, Callable[[], Any]] = {
        "primal": lambda: forward(*primals),
        "fewstep.jvp": lambda: fewstep.jvp(forward, primals, tangents),
        "torch.func.jvp, math SDPA": unfused,
    }
    rows: dict[str, Any] = {}
    for key, call in calls.items():
        try:
            with torch.no_grad():
                rows[key] = measure(call, device, repeats)
        except torch.OutOfMemoryError:
            rows[key] = {"failed": "out of memory"}
            torch.cuda.empty_cache()
        print(f"{name:22} {key:28} {rows[key]}", flush=True)
    return {"model": name, "tiny": tiny, "rows": rows} | environment(device)


def main(argv: list[str] | None = None) -> None:
    """Measure the models and append a line for each to <output>/forward_mode_models.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny models: checks this script")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--output", type=Path)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(MODELS)}; all by default")
    args = parser.parse_args(argv)
    for name in args.names or MODELS:
        if name not in MODELS:
            parser.error(f"names: expected some of {', '.join(MODELS)}, got {name}")
        record = run(name, args.tiny, torch.device(args.device), args.repeats)
        if args.output is not None:
            args.output.mkdir(parents=True, exist_ok=True)
            with (args.output / "forward_mode_models.jsonl").open("a") as lines:
                lines.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
