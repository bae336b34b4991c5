"""Calibrate the cache plans that lie beside the digits teacher, for patch(pipe, cache="auto").

    python examples/digits/calibrate_cache.py

For every grid (50, 8 and 4 guided steps) plans of several numbers of full steps, each from four
calls of ten images. The images that the plans were measured on are the calibration's own; those of
other seeds are measured by benchmarks/pipelines/cache_quality.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fewstep.assets.digits import DIGITS_PATH, NUM_CLASSES, load_digits_pipeline
from fewstep.caching import calibrate
from fewstep.caching.plans import FOLDER

# Steps of the grid, full ones of each plan.
PLANS = {50: (17, 12, 8, 6), 8: (5, 4), 4: (3,)}
CALLS = 4
SEED = 1000


def main() -> None:
    """Write the plans."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, default=DIGITS_PATH / "teacher" / FOLDER)
    parser.add_argument("--steps", type=int, nargs="+", choices=PLANS, default=list(PLANS))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    pipe = load_digits_pipeline("teacher")
    pipe.set_progress_bar_config(disable=True)
    for steps in options.steps:
        calls = [
            {
                "class_labels": list(range(NUM_CLASSES)),
                "num_inference_steps": steps,
                "generator": torch.Generator().manual_seed(SEED + index),
                "output_type": "pt",
            }
            for index in range(CALLS)
        ]
        for full in PLANS[steps]:
            plan = calibrate(pipe, calls, full_steps=full)
            plan.save(options.folder / f"{steps:02d}-{full:02d}.json")
            print(f"{plan!r}, worst image {plan.predicted['psnr_min']:.1f} dB", flush=True)


if __name__ == "__main__":
    main()
