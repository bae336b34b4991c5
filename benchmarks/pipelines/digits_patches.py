"""What each patch leaves of the work and of the image, on the trained digits teacher.

    python benchmarks/pipelines/digits_patches.py --record benchmarks/results

50 guided steps, the same labels and noise for every patch. Block evaluations are counted by hooks
and given as a share of the unpatched pipeline's; PSNR and relative L2 are to its images. Counts and
images are the same on an idle and on a busy machine: no time is measured here.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from fewstep.bench.environment import environment, slug
from fewstep.caching import FirstBlock, Interval
from fewstep.cli.demo import prepare
from fewstep.cli.demo_rows import Row, Sampled
from fewstep.metrics import psnr, relative_l2

STEPS = 50
PATCHES: dict[str, dict[str, Any]] = {
    'cache="auto"': {"cache": "auto"},
    'cache="auto", speedup=4': {"cache": "auto", "speedup": 4},
    'cache="auto", target="psnr>=55"': {"cache": "auto", "target": "psnr>=55"},
    'cache="interval"': {"cache": "interval"},
    "cache=Interval(every=4)": {"cache": Interval(every=4)},
    'cache="first-block"': {"cache": "first-block"},
    "cache=FirstBlock(threshold=0.05)": {"cache": FirstBlock(threshold=0.05)},
    'quantize="w8a8"': {"quantize": "w8a8"},
    'cache="first-block", quantize="w8a8"': {"cache": "first-block", "quantize": "w8a8"},
    'cache="auto", quantize="w8a8"': {"cache": "auto", "quantize": "w8a8"},
    "steps=25": {"steps": 25},
    "steps=12": {"steps": 12},
}


def sample(key: str, patch: dict[str, Any], images: int, steps: int) -> Sampled:
    """Draw the images of one patch."""
    row = Row(key, key, "teacher", patch)
    sampled = prepare(row, None, torch.device("cpu"), images, steps)
    if sampled.failure is not None:
        raise RuntimeError(f"{key}: {sampled.failure}")
    sampled.sample(torch.arange(images) % 10, 0, steps)
    return sampled


def measure(images: int, steps: int = STEPS) -> dict[str, Any]:
    """Return the report: one row per patch."""
    machine = environment(torch.device("cpu"))
    base = sample("unpatched", {}, images, steps)
    rows = []
    for key, patch in PATCHES.items():
        found = sample(key, patch, images, steps)
        (own,), (reference,) = found.images, base.images
        decibels = psnr(own, reference, 2.0)
        rows.append(
            {
                "patch": key,
                "evaluations": found.evaluations,
                "block_share": found.full_evaluations / base.full_evaluations,
                "psnr_db": decibels if math.isfinite(decibels) else None,
                "relative_l2": relative_l2(own, reference),
                "identical": decibels == math.inf,
            }
        )
        print(rows[-1], flush=True)
    return {"environment": machine, "steps": steps, "images": images, "rows": rows}


def main(argv: list[str] | None = None) -> None:
    """Measure and write <record>/<device>/patches.json."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args(argv)
    report = measure(args.images, args.steps)
    path = args.record / slug(report["environment"]["device"]) / "patches.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
