"""What low-bit layers cost in quality: Frechet distance of the trained digits models, per scheme.

    python benchmarks/pipelines/digits_quantized.py --record benchmarks/results

The 50-step guided teacher and the 2-step student, the same labels and noise for every scheme; each
scheme without data, and smoothed with a calibration of four calls on other noise. The ratio is to
the same model as it is. PSNR is to its images. No time is measured here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path
from typing import Any

import torch

from fewstep.assets.digits import load_digits_pipeline
from fewstep.bench.environment import environment, slug
from fewstep.metrics import frechet_distance_to_real, load_classifier, psnr
from fewstep.quantization import Calibration, calibrate, quantize

MODELS: dict[str, dict[str, Any]] = {
    "teacher, 50 steps": {"name": "teacher", "call": {"num_inference_steps": 50}},
    "student, 2 steps": {"name": "student", "call": {"num_inference_steps": 2}},
}
SCHEMES = ("w8a8", "w4a8", "w4a8-r16", "w4a16")
CALIBRATION_SEEDS = range(1000, 1004)
BATCH = 60


@torch.no_grad()
def sample(pipe: Any, images: int, call: dict[str, Any]) -> torch.Tensor:
    """Draw images [n, 1, 16, 16] in [-1, 1]; labels and noise depend on the row alone."""
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(images, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(images) % 10
    drawn = []
    for start in range(0, images, BATCH):
        rows = slice(start, start + BATCH)
        generator = torch.Generator().manual_seed(start)
        out = pipe(
            labels[rows], latents=noise[rows], generator=generator, output_type="latent", **call
        )
        drawn.append(out.images.clamp(-1, 1))
    return torch.cat(drawn)


def calibrated(pipe: Any, call: dict[str, Any]) -> Calibration:
    """Return what a few calls on other noise show."""
    labels = list(range(10))
    return calibrate(
        pipe,
        [
            {"class_labels": labels, "generator": torch.Generator().manual_seed(seed), **call}
            for seed in CALIBRATION_SEEDS
        ],
    )


def measure(images: int) -> dict[str, Any]:
    """Return the report: one row per model and scheme."""
    classifier, rows = load_classifier(), []
    for model, how in MODELS.items():
        pipe = load_digits_pipeline(how["name"])
        reference = sample(pipe, images, how["call"])
        plain = frechet_distance_to_real(reference, classifier)
        calibration = calibrated(pipe, how["call"])
        for scheme, smooth in itertools.product(SCHEMES, (None, calibration)):
            with quantize(pipe.transformer, scheme, smooth=smooth) as handle:
                own = sample(pipe, images, how["call"])
                layers = handle.count()
                smoothed = sum(layer.scheme.smooth for layer in handle.replaced.values())
            found, decibels = frechet_distance_to_real(own, classifier), psnr(own, reference, 2.0)
            rows.append(
                {
                    "model": model,
                    "scheme": scheme if smooth is None else f"{scheme}, smoothed",
                    "layers": layers,
                    "smoothed_layers": smoothed,
                    "plain_frechet": plain,
                    "frechet": found,
                    "ratio": found / plain,
                    "psnr_db": decibels if math.isfinite(decibels) else None,
                }
            )
            print(rows[-1], flush=True)
    return {"environment": environment(torch.device("cpu")), "images": images, "rows": rows}


def main(argv: list[str] | None = None) -> None:
    """Measure and write <record>/<device>/quantized.json."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--images", type=int, default=240)
    args = parser.parse_args(argv)
    report = measure(args.images)
    path = args.record / slug(report["environment"]["device"]) / "quantized.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
