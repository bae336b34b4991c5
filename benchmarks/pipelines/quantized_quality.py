"""What low-bit layers cost in quality: Frechet distance of trained models, per scheme.

    python benchmarks/pipelines/quantized_quality.py --model digits --record benchmarks/results
    python benchmarks/pipelines/quantized_quality.py --model photos --record benchmarks/results

    ratio = F_q / F,   F, F_q: Frechet distance to the real images, of the model as it is, quantised
    error = sqrt((S - 1) / S * sum_s (ratio_s - mean)^2)     ratio_s: without seed s (jackknife)

Digits: the 50-step teacher and the 2-step student. Photos: one model at 50 and at 2 steps. The same
labels and noise for every scheme, so that F_q and F share their luck and the ratio's error is far
below F's. A scheme is without data, or its layers are smoothed, or their rounding is compensated,
with a calibration of four calls on other noise. PSNR is to the images of the model as it is. No
time is measured here: an idle and a busy machine give the same figures.

Quantised as `fewstep.quantize` does by default: the activations of feed-forward layers are part of
the product before them. The report says which fusions were on.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep
from fewstep.assets.digits import digits_data, load_digits_pipeline
from fewstep.bench.environment import environment, slug
from fewstep.metrics import digit_features, frechet_distance, psnr
from fewstep.quantization import Calibration, calibrate

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))
import photos

# What calibration does is part of a scheme's name: quantize's arguments, as adjectives.
CALIBRATED = {"smoothed": "smooth", "compensated": "compensate"}
# The schemes of 50 steps are those that have a bound to keep; the others cost as much time again.
BOUND = ("w8a8", "w4a8-r16", "w4a8-r16, smoothed", "w4a8-r16, compensated")
EVERY = (
    *(s + e for s in ("w8a8", "w4a8", "w4a16") for e in ("", ", smoothed", ", compensated")),
    *("w4a8-r16", *BOUND[2:], "w4a8-r16, smoothed, compensated"),
)
FUSIONS: dict[str, str | None] = {"norms": None, "activations": "fuse"}
CALIBRATION_SEEDS, CALIBRATION_ROWS = range(1000, 1004), 1024
SEEDS = 8


@dataclass(frozen=True)
class Model:
    """Pipelines of one kind of image, and how their images are scored."""

    rows: dict[str, tuple[Callable[[], Any], int, tuple[str, ...]]]
    """Title -> how to load the pipeline, its steps, the schemes to measure."""
    features: Callable[[Tensor], Tensor]
    real: Callable[[], Tensor]
    """Features of the real images."""
    images: int
    """For each seed, so that both models take about the same time."""


MODELS = {
    "digits": Model(
        {
            "teacher, 50 steps": (lambda: load_digits_pipeline("teacher"), 50, BOUND),
            "student, 2 steps": (lambda: load_digits_pipeline("student"), 2, EVERY),
        },
        digit_features,
        lambda: digit_features(digits_data("held_out")[0]),
        24,
    ),
    "photos": Model(
        {
            "50 steps": (photos.load_photos_pipeline, 50, BOUND),
            "2 steps": (photos.load_photos_pipeline, 2, EVERY),
        },
        photos.photo_features,
        photos.reference_features,
        64,
    ),
}


@torch.no_grad()
def sample(pipe: Any, seeds: int, images: int, steps: int) -> Tensor:
    """Draw images [seeds, images, C, H, W] in [-1, 1]; what is drawn depends on seed and row."""
    pipe.set_progress_bar_config(disable=True)
    config, drawn = pipe.transformer.config, []
    shape = (images, config.in_channels, config.sample_size, config.sample_size)
    labels = torch.arange(images) % pipe.num_classes
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(shape, generator=generator)
        out = pipe(
            labels, steps, latents=noise, generator=generator, output_type="latent"
        ).images  # fmt: skip
        drawn.append(out.clamp(-1, 1))
    return torch.stack(drawn)


def calibrated(pipe: Any, steps: int) -> Calibration:
    """Return what a few calls on other noise show."""
    labels = list(range(pipe.num_classes)) * (10 // pipe.num_classes)
    calls = [
        {
            "class_labels": labels,
            "num_inference_steps": steps,
            "generator": torch.Generator().manual_seed(seed),
        }
        for seed in CALIBRATION_SEEDS
    ]
    return calibrate(pipe, calls, rows=CALIBRATION_ROWS)


def distance(features: Tensor, real: Tensor) -> float:
    """Return the Frechet distance of features [seeds, images, D] to real ones [n, D]."""
    return frechet_distance(features.flatten(0, 1), real)


def ratio_and_error(own: Tensor, plain: Tensor, real: Tensor) -> tuple[float, float]:
    """Return the ratio of the module's header and its standard error; features by seed."""
    seeds, found = len(own), []
    for left_out in range(seeds):
        kept = torch.arange(seeds) != left_out
        found.append(distance(own[kept], real) / distance(plain[kept], real))
    error = math.sqrt((seeds - 1) * statistics.pvariance(found))
    return distance(own, real) / distance(plain, real), error


def measure(name: str, seeds: int, images: int | None) -> dict[str, Any]:
    """Return the report of a model: one row per pipeline and scheme."""
    model, rows = MODELS[name], []
    images = images or model.images
    real = model.real()
    machine = environment(torch.device("cpu"))

    def features(drawn: Tensor) -> Tensor:
        return model.features(drawn.flatten(0, 1)).unflatten(0, (seeds, images))

    for title, (load, steps, schemes) in model.rows.items():
        pipe = load()
        draw = functools.partial(sample, pipe, seeds, images, steps)
        reference = draw()
        plain = features(reference)
        calibration = calibrated(pipe, steps)
        for scheme in schemes:
            form, *ends = scheme.split(", ")
            given = {CALIBRATED[end]: calibration for end in ends}
            with fewstep.quantize(pipe.transformer, form, **given, **FUSIONS) as handle:
                own = draw()
                layers = handle.count()
                smoothed = sum(layer.scheme.smooth for layer in handle.replaced.values())
            ratio, error = ratio_and_error(features(own), plain, real)
            decibels = psnr(own, reference, 2.0)
            rows.append(
                {
                    "model": title,
                    "scheme": scheme,
                    "layers": layers,
                    "smoothed_layers": smoothed,
                    "plain_frechet": distance(plain, real),
                    "frechet": distance(features(own), real),
                    "ratio": ratio,
                    "ratio_error": error,
                    "psnr_db": decibels if math.isfinite(decibels) else None,
                }
            )
            print(rows[-1], flush=True)
    report = {"environment": machine, "seeds": seeds, "images": seeds * images}
    return report | FUSIONS | {"rows": rows}


def main(argv: list[str] | None = None) -> None:
    """Measure and write <record>/<device>/quantized_<model>.json."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--images", type=int, help="for each seed; by default the model's")
    args = parser.parse_args(argv)
    report = measure(args.model, args.seeds, args.images)
    folder = args.record / slug(report["environment"]["device"])
    path = folder / f"quantized_{args.model}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
