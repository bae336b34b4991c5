"""One evaluation of a denoiser with and without `time="cache"` or `text="cache"`, all in one run.

    python benchmarks/pipelines/time_steps.py --record benchmarks/results
    python benchmarks/pipelines/time_steps.py --feature text --record benchmarks/results

Random weights serve for time and memory only. Models have the widths of the published ones and
fewer blocks (`blocks` says how many of how many), so that a round takes seconds; what there is once
for all blocks has a larger share than in the whole model: PixArt's and SANA's path of the time,
and their projection of the text. For the text, 1,024 tokens of an image and as many of a text as
the pipelines give. Two samples, as guidance has them. Forms take turns, shuffled in every round.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
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


def _text(width: int, tokens: int) -> dict[str, Any]:
    return {"encoder_hidden_states": torch.randn(BATCH, tokens, width, dtype=DTYPE)}


def dit(side: int = 32, layers: int = 16) -> Case:
    """DiT-L: each block embeds the time for itself."""
    model = DiTTransformer2DModel(
        num_layers=layers, num_attention_heads=16, attention_head_dim=64, in_channels=4,
        sample_size=side, patch_size=2,
    )  # fmt: skip
    labels = {"class_labels": torch.zeros(BATCH, dtype=torch.long)}
    pipe = DiTPipeline(model.to(DTYPE).eval(), None, FlowMatchEulerDiscreteScheduler())
    return Case(pipe, side, labels, f"{layers} of 24")


def pixart(side: int = 32, layers: int = 8, text: int = TEXT) -> Case:
    """PixArt-alpha: one modulation for all blocks."""
    model = PixArtTransformer2DModel(
        num_layers=layers, sample_size=side, caption_channels=4096, use_additional_conditions=False
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = PixArtAlphaPipeline(None, None, None, model.to(DTYPE).eval(), scheduler)
    return Case(pipe, side, {**_text(4096, text), "added_cond_kwargs": _NO_SIZE}, f"{layers} of 28")


def sana(side: int = 16, layers: int = 4, text: int = TEXT) -> Case:
    """SANA 1.6B: one modulation for all blocks."""
    model = SanaTransformer2DModel(num_layers=layers, sample_size=side)
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = SanaPipeline(None, None, None, model.to(DTYPE).eval(), scheduler)
    return Case(pipe, side, _text(2304, text), f"{layers} of 20")


def unet(side: int = 32, text: int = TEXT) -> Case:
    """Stable Diffusion 1.5: one embedding of the time; each ResNet projects it as ever."""
    model = UNet2DConditionModel(sample_size=side, cross_attention_dim=768).to(DTYPE).eval()
    scheduler = FlowMatchEulerDiscreteScheduler()
    parts = (None, None, None, model, scheduler, None, None)
    pipe = StableDiffusionPipeline(*parts, requires_safety_checker=False)
    return Case(pipe, side, _text(768, text), "all")


CASES: dict[str, dict[str, Callable[[], Case]]] = {
    "time": {
        "DiT-L, 256 tokens": dit,
        "PixArt, 256 tokens": pixart,
        "SANA, 256 tokens": sana,
        "Stable Diffusion 1.5, 32 x 32": unet,
    },
    "text": {
        "PixArt, 1024 tokens, 120 of text": partial(pixart, 64, 4, 120),
        "SANA, 1024 tokens, 300 of text": partial(sana, 32, 2, 300),
        "Stable Diffusion 1.5, 32 x 32, 77 tokens of text": partial(unet, 32, 77),
    },
}


@torch.no_grad()
def measure(name: str, case: Case, rounds: int, feature: str) -> dict[str, Any]:
    """Return a row of the report."""
    twin = copy.deepcopy(case.pipe)
    patch = fewstep.patch(twin, **{feature: "cache"})
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
                raise RuntimeError(f"{name}: expected the same bits with {feature}='cache'")
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
    kept = patch.report()[feature]["bytes"]
    return {
        "model": name,
        "blocks": case.blocks,
        "parameters": sum(p.numel() for p in case.model.parameters()),
        "plain": plain_s,
        "cached": cached_s,
        "ratio": plain_s / cached_s,
        "ratio_quartiles": quartiles,
        "bytes": kept / (STEPS if feature == "time" else 1),  # time: of each step
    }


def main(argv: list[str] | None = None) -> None:
    """Measure and write <record>/<device>/<feature>_steps.json."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--feature", choices=CASES, default="time")
    parser.add_argument("--only", default="", help="models with this in their name")
    args = parser.parse_args(argv)
    rows = []
    for name, build in CASES[args.feature].items():
        if args.only in name:
            torch.manual_seed(0)
            rows.append(measure(name, build(), args.rounds, args.feature))
            print(rows[-1], flush=True)
    report = {"environment": environment(torch.device("cpu")), "rows": rows}
    path = args.record / slug(report["environment"]["device"]) / f"{args.feature}_steps.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
