"""One evaluation of a denoiser with `time="cache"` and without: seconds, all in one run.

    python benchmarks/pipelines/time_steps.py --record benchmarks/results

Random weights serve for time and memory only. Models have the widths of the published ones and
fewer blocks (`blocks` says how many of how many), so that a round takes seconds; the share of the
time's path is larger than in the whole model where that path is one layer for all blocks (PixArt,
SANA). Two samples, as guidance has them. Forms take turns, shuffled in every round.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import (
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

import fewstep
from fewstep.bench.environment import environment, slug

BATCH, STEPS, ROUNDS, TEXT = 2, 4, 9, 32
DTYPE = torch.bfloat16
_NO_SIZE = {"resolution": None, "aspect_ratio": None}


class Case(NamedTuple):
    """A pipeline without encoders, the size of its latents, and what its denoiser wants besides."""

    pipe: Any
    side: int
    given: dict[str, Any]
    blocks: str

    @property
    def model(self) -> torch.nn.Module:
        """The denoiser."""
        return self.pipe.unet if hasattr(self.pipe, "unet") else self.pipe.transformer


def _text(width: int) -> dict[str, Any]:
    return {"encoder_hidden_states": torch.randn(BATCH, TEXT, width, dtype=DTYPE)}


def dit(side: int = 32, layers: int = 16) -> Case:
    """DiT-L: each block embeds the time for itself."""
    model = DiTTransformer2DModel(
        num_layers=layers, num_attention_heads=16, attention_head_dim=64, in_channels=4,
        sample_size=side, patch_size=2,
    )  # fmt: skip
    labels = {"class_labels": torch.zeros(BATCH, dtype=torch.long)}
    pipe = DiTPipeline(model.to(DTYPE).eval(), None, FlowMatchEulerDiscreteScheduler())
    return Case(pipe, side, labels, f"{layers} of 24")


def pixart(side: int = 32, layers: int = 8) -> Case:
    """PixArt-alpha: one modulation for all blocks."""
    model = PixArtTransformer2DModel(
        num_layers=layers, sample_size=side, caption_channels=4096, use_additional_conditions=False
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = PixArtAlphaPipeline(None, None, None, model.to(DTYPE).eval(), scheduler)
    return Case(pipe, side, {**_text(4096), "added_cond_kwargs": _NO_SIZE}, f"{layers} of 28")


def sana(side: int = 16, layers: int = 4) -> Case:
    """SANA 1.6B: one modulation for all blocks."""
    model = SanaTransformer2DModel(num_layers=layers, sample_size=side)
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = SanaPipeline(None, None, None, model.to(DTYPE).eval(), scheduler)
    return Case(pipe, side, _text(2304), f"{layers} of 20")


def unet(side: int = 32) -> Case:
    """Stable Diffusion 1.5: one embedding of the time; each ResNet projects it as ever."""
    model = UNet2DConditionModel(sample_size=side, cross_attention_dim=768).to(DTYPE).eval()
    scheduler = FlowMatchEulerDiscreteScheduler()
    parts = (None, None, None, model, scheduler, None, None)
    pipe = StableDiffusionPipeline(*parts, requires_safety_checker=False)
    return Case(pipe, side, _text(768), "all")


CASES: dict[str, Callable[[], Case]] = {
    "DiT-L, 256 tokens": dit,
    "PixArt, 256 tokens": pixart,
    "SANA, 256 tokens": sana,
    "Stable Diffusion 1.5, 32 x 32": unet,
}


@torch.no_grad()
def measure(name: str, case: Case, rounds: int) -> dict[str, Any]:
    """Return a row of the report."""
    twin = copy.deepcopy(case.pipe)
    patch = fewstep.patch(twin, time="cache")
    models = {False: case.model, True: case._replace(pipe=twin).model}
    latents = torch.randn(BATCH, case.model.config.in_channels, case.side, case.side, dtype=DTYPE)
    times = [torch.full((BATCH,), 1000.0 * (i + 1) / STEPS) for i in range(STEPS)]

    def call(cached: bool, step: int) -> tuple[float, torch.Tensor]:
        start = time.perf_counter()
        out = models[cached](latents, timestep=times[step], **case.given, return_dict=False)[0]
        return time.perf_counter() - start, out

    for step in range(STEPS):  # warm up, fill, and the gate: the same bits
        plain = call(False, step)[1]
        for _ in range(2):
            if not torch.equal(call(True, step)[1], plain):
                raise RuntimeError(f"{name}: expected the same bits with time='cache'")
    samples: dict[bool, list[float]] = {False: [], True: []}
    order = [False, True]
    for round_ in range(rounds):
        random.Random(round_).shuffle(order)
        for cached in order:
            samples[cached].append(call(cached, round_ % STEPS)[0])
    plain_s, cached_s = (statistics.median(samples[cached]) for cached in (False, True))
    quartiles = [
        statistics.quantiles([a / b for a, b in zip(*samples.values(), strict=True)], n=4)[i]
        for i in (0, 2)
    ]
    kept = patch.report()["time"]
    return {
        "model": name,
        "blocks": case.blocks,
        "parameters": sum(p.numel() for p in case.model.parameters()),
        "plain": plain_s,
        "cached": cached_s,
        "ratio": plain_s / cached_s,
        "ratio_quartiles": quartiles,
        "bytes_per_step": kept["bytes"] / STEPS,
    }


def main(argv: list[str] | None = None) -> None:
    """Measure and write <record>/<device>/time_steps.json."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", choices=sorted(CASES), help="one model")
    args = parser.parse_args(argv)
    rows = []
    for name, build in CASES.items():
        if args.only in (None, name):
            torch.manual_seed(0)
            rows.append(measure(name, build(), args.rounds))
            print(rows[-1], flush=True)
    report = {"environment": environment(torch.device("cpu")), "rows": rows}
    path = args.record / slug(report["environment"]["device"]) / "time_steps.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
