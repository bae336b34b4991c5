"""Measure the packaged digits models and write the card beside the weights.

    python examples/digits/evaluate.py                # three seeds, the table of the card
    python examples/digits/evaluate.py --seeds 5

A measurement that was stopped goes on where it was.

Per seed and sampler: as many images as the real held-out half has, with the same labels, so that
the Frechet distance's finite-sample bias is the same in every row, the real row included.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

from fewstep.assets.digits import DIGITS_PATH, DigitsPipeline, digits_data
from fewstep.metrics import (
    DigitClassifier,
    class_accuracy,
    frechet_distance_to_real,
    load_classifier,
    reference_labels,
)

_BATCH = 128


def sample(pipeline: DigitsPipeline, labels: Tensor, seed: int, **call: object) -> Tensor:
    """One image per label, [n, C, H, W] in [-1, 1]; start noise depends on seed and row only."""
    generator = torch.Generator().manual_seed(seed)
    config = pipeline.transformer.config
    shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
    noise = torch.randn(shape, generator=generator)
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(labels), _BATCH):
        rows = slice(start, start + _BATCH)
        out = pipeline(
            labels[rows], latents=noise[rows], generator=generator, output_type="latent", **call
        )
        images.append(out.images.cpu().clamp(-1, 1))
    return torch.cat(images)


def nearest_distance(images: Tensor, others: Tensor) -> Tensor:
    """[n] distance of every image to the nearest of `others`, per pixel RMS."""
    distances = torch.cdist(images.flatten(1), others.flatten(1)) / images[0].numel() ** 0.5
    return distances.min(1).values


def measure(images: Tensor, labels: Tensor, classifier: DigitClassifier) -> dict[str, float]:
    """Frechet distance to the held-out half, class accuracy, nearest training image."""
    return {
        "frechet": frechet_distance_to_real(images, classifier),
        "accuracy": class_accuracy(images, labels, classifier),
        "nearest": nearest_distance(images, digits_data("train")[0]).mean().item(),
    }


def spread(values: list[float]) -> list[float]:
    """[mean, standard deviation]; no deviation of a single value."""
    return [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0]


def digest(folder: Path) -> str:
    """Changes with any weight or setting of the models in this folder."""
    models = [folder / "classifier.safetensors", folder / "teacher", folder / "student"]
    files = sorted(f for model in models for f in [model, *model.rglob("*")] if f.is_file())
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:12]


def evaluate(folder: Path, seeds: int, teacher_steps: int = 50, limit: int | None = None) -> dict:
    """All rows of the table: name -> network evaluations, and mean and spread of each number."""
    classifier = load_classifier(folder / "classifier.safetensors")
    train, train_labels = digits_data("train")
    held_out, held_out_labels = digits_data("held_out")
    real = measure(train, train_labels, classifier)
    real["nearest"] = nearest_distance(held_out, train).mean().item()
    real["accuracy"] = class_accuracy(held_out, held_out_labels, classifier)
    rows = {"real": {"evaluations": 0, **{key: [value, 0.0] for key, value in real.items()}}}
    teacher = DigitsPipeline.from_pretrained(folder / "teacher", dtype=torch.float32)
    student = DigitsPipeline.from_pretrained(folder / "student", dtype=torch.float32)
    guided = teacher.config.default_guidance > 1
    plan = [
        (f"student, {n} step{'s' * (n > 1)}", student, n, {"num_inference_steps": n})
        for n in (1, 2, 4)
    ] + [
        (f"teacher, {n} steps", teacher, n * (1 + guided), {"num_inference_steps": n})
        for n in (teacher_steps, 2, 4, 8)
    ]
    labels, version = reference_labels()[:limit], digest(folder)
    # Every finished run is kept: measuring the teacher takes minutes, and may be stopped.
    cache = folder / "checkpoints" / "measured.json"
    cache.parent.mkdir(exist_ok=True)
    done = json.loads(cache.read_text()) if cache.exists() else {}
    with Progress() as progress:
        task = progress.add_task("measuring", total=seeds * sum(row[2] for row in plan))
        for name, pipeline, evaluations, call in plan:
            runs = []
            for seed in range(seeds):
                key = f"{version}: {name}, seed {seed}, {len(labels)} images"
                if key not in done:
                    images = sample(pipeline, labels, 1000 + seed, **call)
                    done[key] = measure(images, labels, classifier)
                    cache.write_text(json.dumps(done, indent=2))
                runs.append(done[key])
                progress.update(task, advance=evaluations)
            rows[name] = {
                "evaluations": evaluations,
                **{key: spread([run[key] for run in runs]) for key in runs[0]},
            }
    return {"seeds": seeds, "images_per_seed": len(labels), "rows": rows}


def table(result: dict) -> str:
    """The measured rows as Markdown."""
    lines = [
        "| images | network evaluations | Frechet distance | class accuracy | nearest trained |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        if name == "real":
            name = "real digits: training half against held-out half"
        frechet, deviation = row["frechet"]
        accuracy, _ = row["accuracy"]
        lines.append(
            f"| {name} | {row['evaluations'] or '-'} | {frechet:.2f} ± {deviation:.2f} "
            f"| {100 * accuracy:.1f} % | {row['nearest'][0]:.3f} |"
        )
    return "\n".join(lines)


CARD = """\
---
license: cc-by-4.0
library_name: diffusers
---
# Handwritten digits, teacher and few-step student

Two class-conditional DiTs (64 tokens, 8 blocks of width 128, 2.8 M parameters each, stored in fp16)
and the classifier whose features score them. Made by `examples/digits/train.py` from nothing but
scikit-learn's digits.

```python
from fewstep.assets.digits import load_digits_pipeline

teacher = load_digits_pipeline("teacher")   # 50 steps, guidance {guidance}
student = load_digits_pipeline("student")   # 2 steps, no guidance needed
images = student(class_labels=[3, 1, 4]).images
```

## Measured

`python examples/digits/evaluate.py --seeds {seeds}`: {images} images per seed, labels as in the
real held-out half, mean ± standard deviation over {seeds} seeds, fp32.

{table}

The Frechet distance is taken to the held-out half of the real digits, in 32 features of the
classifier. The first row is the perfect score: the real training half against the same reference
(its accuracy is the classifier's on the held-out half; its last column is held-out to training).
The last column is the mean RMS distance per pixel to the nearest training image, on a scale of
[-1, 1]: a value far below the first row's would mean copies of the training set.

## Data

`sklearn.datasets.load_digits`: 1,797 images of 8x8, the test part of the UCI set "Optical
Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, 1998, doi 10.24432/C50P49, CC BY 4.0),
upsampled once to 16x16 (bicubic). One stratified half trains all three models, the other is only
the reference.

## Training

{training}

Minutes are wall time on shared cores; CPU minutes are the sum over cores.
Student: continuous-time consistency distillation of the guided teacher
(`fewstep.distillation.consistency_loss`, exact JVP), two-step grid {knots}.
All seeds and settings are in `training.json`, the numbers above in `metrics.json`.
"""


def training_table(record: dict) -> str:
    """Steps, batch, seed and time of every stage as Markdown."""
    lines = [
        "| stage | steps | batch | seed | minutes | CPU minutes |",
        "|---|---|---|---|---|---|",
    ]
    for name, stage in record.items():
        config = stage["config"]
        lines.append(
            f"| {name} | {config['steps']} | {config['batch']} | {config['seed']} "
            f"| {stage['seconds'] / 60:.1f} | {stage['cpu_seconds'] / 60:.1f} |"
        )
    notes = [f"{name}: {stage['note']}" for name, stage in record.items() if "note" in stage]
    return "\n".join(lines) + "".join(f"\n\n{note}" for note in notes)


def write_card(folder: Path) -> None:
    """README.md from metrics.json, training.json and the pipelines' configs."""
    result = json.loads((folder / "metrics.json").read_text())
    record = json.loads((folder / "training.json").read_text())
    scheduler = json.loads((folder / "student/scheduler/scheduler_config.json").read_text())
    card = CARD.format(
        guidance=json.loads((folder / "teacher/model_index.json").read_text())["default_guidance"],
        seeds=result["seeds"],
        images=result["images_per_seed"],
        table=table(result),
        training=training_table(record),
        knots=scheduler["knots"]["2"],
    )
    (folder / "README.md").write_text(card)


def report(folder: Path, seeds: int, teacher_steps: int = 50, limit: int | None = None) -> None:
    """Measure, print the table, write metrics.json and the card README.md."""
    result = evaluate(folder, seeds, teacher_steps, limit)
    (folder / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")
    write_card(folder)
    print(table(result))


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=DIGITS_PATH)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--teacher-steps", type=int, default=50)
    parser.add_argument("--limit", type=int, default=None, help="fewer images, for a quick look")
    parser.add_argument("--card-only", action="store_true", help="from the numbers at hand")
    args = parser.parse_args(argv)
    if args.card_only:
        write_card(args.folder)
    else:
        report(args.folder, args.seeds, args.teacher_steps, args.limit)


if __name__ == "__main__":
    main()
