"""Train the models of photograph crops (photos.py): a DiT and a UNet of 50 steps, flow matching.

    python benchmarks/models/train_photos.py                 # both, into out/photos
    python benchmarks/models/train_photos.py --stage unet    # one of them

The trainer and its command line are those of the digits (examples/digits/trainer.py); only data,
network and length differ. At the end it is measured and the card is written. The repository keeps
what `--output benchmarks/models/photos` wrote.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "examples" / "digits")]

import trainer  # noqa: E402
from evaluate import sample, spread, training_table  # noqa: E402
from photos import (  # noqa: E402
    frechet_distance_to_photos,
    photos_data,
    photos_transformer,
    photos_unet,
)
from trainer import Run, StageConfig, Task  # noqa: E402

from fewstep.assets.digits import DigitsPipeline  # noqa: E402

# No guidance: the two photographs are told apart without.
STAGES = {
    "teacher": StageConfig(steps=1600, guidance=1.0),
    "unet": StageConfig(steps=1200, guidance=1.0),
}
NETWORKS = {"DiT": "teacher", "UNet": "unet"}
IMAGES, CARD_SEEDS = 128, 3

CARD = """\
---
license: cc-by-2.0
library_name: diffusers
---
# Crops of two photographs

Two class-conditional models that generate 24x24 crops of scikit-learn's sample photographs, stored
in fp16: a DiT (`teacher`; 36 tokens, 3 blocks of width 192, 2.4 M parameters) and a UNet (`unet`;
24 -> 12 -> 6, widths 32, 64 and 96, one layer each, attention at 6x6, 1.8 M parameters). Made by
`benchmarks/models/train_photos.py`. They stand beside the digits models where a figure of quality
is taken, so that it does not rest on one kind of image or network; they are no part of the
installed package.

```python
from photos import load_photos_pipeline     # benchmarks/models/photos.py

pipe = load_photos_pipeline()               # 50 steps; labels: 0 china.jpg, 1 flower.jpg
pipe = load_photos_pipeline("unet")
images = pipe(class_labels=[0, 1]).images
```

## Measured

{images} images per seed, mean ± standard deviation over {seeds} seeds, fp32.

| images of | network evaluations | Frechet distance |
|---|---|---|
{rows}

The Frechet distance is taken to 8,192 crops at other places than those trained on, in the 54
wavelet features that `photos.py` defines; its bias falls with the number of images, so compare
equal numbers only. The first row is the perfect score: as many crops of the training set.

## Data

`sklearn.datasets.load_sample_images`, both "some rights reserved" under CC BY 2.0: china.jpg by
danielbuechele (flickr.com/photos/danielbuechele/6061409035), flower.jpg by vultilion
(flickr.com/photos/vultilion/6056698931). 16,384 square crops, sides from 48 to 192 pixels
(log-uniform) at uniform places, half from each, scaled to 24x24. Training and reference crops come
from the same photographs: the distance says how near the distribution of crops is, not how the
models would do on other photographs.

## Training

{training}

Minutes are wall time on a shared machine; CPU minutes are one thread's. All seeds and settings are
in `training.json`, the numbers above in `metrics.json`.

There is no few-step student: consistency distillation of the DiT diverged within minutes of
training. Along its flow t dF/dt has a mean square of 13 at t = 1, ten times that of its velocity,
and of 0.05 at t = 1/2.
"""


def measure(folder: Path, seeds: int, images: int, teacher_steps: int) -> dict[str, list]:
    """Each step count's network evaluations and Frechet distance, mean and deviation over seeds."""
    labels = torch.arange(images) % 2
    crops = photos_data("train")[0]
    parts = [crops[s * images :][:images] for s in range(seeds)]
    rows = {"real crops": [0, spread([frechet_distance_to_photos(part) for part in parts])]}
    for name, part in NETWORKS.items():
        pipeline = DigitsPipeline.from_pretrained(folder / part, dtype=torch.float32)
        for steps in (teacher_steps, 2, 4, 8):
            distances = [
                frechet_distance_to_photos(
                    sample(pipeline, labels, 1000 + seed, num_inference_steps=steps)
                )
                for seed in range(seeds)
            ]
            rows[f"{name}, {steps} steps"] = [steps, spread(distances)]
            print(f"{name}, {steps} steps: {distances}", flush=True)
    return rows


def report(output: Path, smoke: bool) -> None:
    """Measure, and write metrics.json and the card."""
    # A smoke run only shows that measuring works.
    seeds, images, teacher_steps = (1, 64, 2) if smoke else (CARD_SEEDS, IMAGES, 50)
    rows = measure(output, seeds, images, teacher_steps)
    result = {"seeds": seeds, "images_per_seed": images, "rows": rows}
    (output / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")
    lines = [
        f"| {name} | {evaluations or '-'} | {mean:.2f} ± {deviation:.2f} |"
        for name, (evaluations, (mean, deviation)) in rows.items()
    ]
    card = CARD.format(
        images=images,
        seeds=seeds,
        rows="\n".join(lines),
        training=training_table(json.loads((output / "training.json").read_text())),
    )
    (output / "README.md").write_text(card)


def train_unet(config: StageConfig, run: Run) -> bool:
    """Train the UNet as the DiT is trained; False if it was stopped early."""
    task = replace(TASK, network=photos_unet)
    model = trainer.train_teacher(config, run, task, name="unet")
    if model is not None:
        trainer.save_pipeline("unet", model.cpu(), config, task, run.output)
    return model is not None


TASK = Task(
    output=Path("out/photos"),
    stages=STAGES,
    data=partial(photos_data, "train"),
    network=photos_transformer,
    report=report,
    extra={"unet": train_unet},
)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    trainer.main(TASK, argv)


if __name__ == "__main__":
    main()
