"""What a plan of one grid loses on others, and on runs of a part of its own.

    python benchmarks/pipelines/cache_grids.py --record benchmarks/results

PSNR of the digits teacher's held-out images to those of the same grid without a cache; dB, mean and
worst. Plans of as many full steps are compared:

    own          calibrated on that grid, or on runs of that part
    carried      the plan of the whole grid of 50 steps, carried over with its corrections
    gram         the same without its corrections: weights of the interpolated Gram matrix alone
    fewer        no cache, and a grid of as many steps as the plan runs in full

Runs of a part start from held-out digits with noise (image to image): the whole grid's plan, and
what that would be without starting anew there (`waits`: in full until enough snapshots are there).
Nothing is timed, so a busy machine gives the same figures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

import fewstep
from fewstep.assets.digits import DIGITS_PATH, NUM_CLASSES, DigitsPipeline, digits_data
from fewstep.bench.environment import environment, slug
from fewstep.caching import Plan, calibrate
from fewstep.caching.quality import psnr

STEPS = 50
COUNTS = (25, 30, 40, 64, 100)
STRENGTHS = (0.8, 0.6, 0.4)
CALIBRATION_SEED, HELD_OUT_SEED = 1000, 20_000


class ImageToImage(DigitsPipeline):
    """Digits that start from given ones, with as much noise as a share of the grid's steps has."""

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        image: torch.Tensor,
        strength: float,
        num_inference_steps: int,
        generator: torch.Generator,
    ) -> ImagePipelineOutput:
        """Draw one digit per label."""
        self._guidance_scale = self.config.default_guidance
        labels = self._labels(class_labels)
        times = self._set_timesteps(num_inference_steps, torch.device("cpu"), None, None)
        start = round(num_inference_steps * (1 - strength))
        self.scheduler.set_begin_index(start)
        x = randn_tensor(image.shape, generator=generator)
        if start:
            x = self.scheduler.scale_noise(image, times[start : start + 1], x)
        scale = self.config.timestep_scale / self.scheduler.config.num_train_timesteps
        for time in times[start:]:
            v = self._velocity(x, (time.float() * scale).expand(len(labels)), labels)
            x = self.scheduler.step(v, time, x, return_dict=False)[0]
        return ImagePipelineOutput(images=(x / 2 + 0.5).clamp(0, 1))


def pipeline() -> ImageToImage:
    """Return the teacher."""
    pipe = ImageToImage.from_pretrained(DIGITS_PATH / "teacher", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def calls(seed: int, count: int, steps: int, strength: float = 1.0) -> list[dict[str, Any]]:
    """Return calls of ten labels each, from seeds and digits of their own."""
    split = "train" if seed == CALIBRATION_SEED else "held_out"
    images, labels = digits_data(split)
    found = []
    for index in range(count):
        picked = [int((labels == label).nonzero()[index]) for label in range(NUM_CLASSES)]
        found.append(
            {
                "class_labels": list(range(NUM_CLASSES)),
                "image": images[picked],
                "strength": strength,
                "num_inference_steps": steps,
                "generator": torch.Generator().manual_seed(seed + index),
            }
        )
    return found


def draw(pipe: Any, given: list[dict[str, Any]], plan: Plan | None) -> tuple[list[Any], int]:
    """Return the images, and how many steps of a run were full."""
    states = [call["generator"].get_state() for call in given]
    full = 0
    if plan is None:
        images = [pipe(**call).images for call in given]
    else:
        with fewstep.patch(pipe, cache=plan) as patch:
            images = [pipe(**call).images for call in given]
            full = patch.report()["cache"]["branches"]["call 0"].count("full")
    for call, state in zip(given, states, strict=True):
        call["generator"].set_state(state)
    return images, full


def rows(full_steps: int, images: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what was measured for plans of one number of full steps."""
    pipe, count = pipeline(), max(1, images // NUM_CLASSES)
    calibration = options.calls

    def made(steps: int, strength: float, full: int) -> Plan:
        given = calls(CALIBRATION_SEED, calibration, steps, strength)
        return calibrate(pipe, given, full_steps=full)

    whole = made(options.steps, 1.0, full_steps)
    for steps in options.counts:
        held_out = calls(HELD_OUT_SEED, count, steps)
        reference, _ = draw(pipe, held_out, None)
        times = tuple(pipe.scheduler.timesteps.tolist())
        plans = {
            "own": made(steps, 1.0, full_steps),
            "carried": whole.at(times),
            "gram": whole.at(times, corrected=False),
        }
        for name, plan in plans.items():
            found, full = draw(pipe, held_out, plan)
            yield _row(name, steps, 1.0, full, psnr(reference, found))
        found, _ = draw(pipe, calls(HELD_OUT_SEED, count, full_steps), None)
        yield _row("fewer", steps, 1.0, full_steps, psnr(reference, found))
    for strength in options.strengths:
        held_out = calls(HELD_OUT_SEED, count, options.steps, strength)
        reference, _ = draw(pipe, held_out, None)
        found, full = draw(pipe, held_out, whole)
        yield _row("carried", options.steps, strength, full, psnr(reference, found))
        found, waited = draw(pipe, held_out, replace(whole, gram=None))
        yield _row("waits", options.steps, strength, waited, psnr(reference, found))
        found, full = draw(pipe, held_out, made(options.steps, strength, full))
        yield _row("own", options.steps, strength, full, psnr(reference, found))


def _row(plan: str, steps: int, strength: float, full: int, found: list[float]) -> dict[str, Any]:
    return {
        "plan": plan,
        "steps": steps,
        "strength": strength,
        "full_steps": full,
        "psnr": sum(found) / len(found),
        "psnr_min": min(found),
    }


def main(argv: list[str] | None = None) -> None:
    """Measure and write <record>/<device>/cache_grids.json."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the plans that are carried")
    parser.add_argument("--full-steps", type=int, nargs="+", default=[12, 8])
    parser.add_argument("--counts", type=int, nargs="*", default=list(COUNTS))
    parser.add_argument("--strengths", type=float, nargs="*", default=list(STRENGTHS))
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--calls", type=int, default=4, help="of ten images, to calibrate on")
    args = parser.parse_args(argv)
    machine = environment(torch.device("cpu"))
    report: dict[str, Any] = {"environment": machine, "images": args.images, "rows": []}
    path = args.record / slug(machine["device"]) / "cache_grids.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for full_steps in args.full_steps:
        for row in rows(full_steps, args.images, args):
            report["rows"].append({"of": full_steps, **row})
            print(json.dumps(report["rows"][-1]), flush=True)
            path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
