"""Train the model of photograph crops (photos.py): a teacher of 50 steps, by flow matching.

    python benchmarks/models/train_photos.py          # into out/photos

The trainer and its command line are those of the digits (examples/digits/trainer.py); only data,
network and length differ. At the end it is measured and the card is written. The repository keeps
what `--output benchmarks/models/photos` wrote.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "examples" / "digits")]

import trainer  # noqa: E402
from evaluate import sample, spread, training_table  # noqa: E402
from photos import frechet_distance_to_photos, photos_data, photos_transformer  # noqa: E402
from trainer import StageConfig, Task  # noqa: E402

from fewstep.assets.digits import DigitsPipeline  # noqa: E402

# No guidance: the two photographs are told apart without.
STAGES = {"teacher": StageConfig(steps=1600, guidance=1.0)}
IMAGES, CARD_SEEDS = 128, 3

CARD = """\
---
license: cc-by-2.0
library_name: diffusers
---
# Crops of two photographs

A class-conditional DiT (36 tokens, 3 blocks of width 192, 2.4 M parameters, stored in fp16) that
generates 24x24 crops of scikit-learn's sample photographs. Made by
`benchmarks/models/train_photos.py`. It stands beside the digits models where a figure of quality is
taken, so that it does not rest on one kind of image; it is no part of the installed package.

```python
from photos import load_photos_pipeline     # benchmarks/models/photos.py

pipe = load_photos_pipeline()               # 50 steps; labels: 0 china.jpg, 1 flower.jpg
images = pipe(class_labels=[0, 1]).images
```

## Measured

{images} images per seed, mean ± standard deviation over {seeds} seeds, fp32.

| images | network evaluations | Frechet distance |
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

There is no few-step student: consistency distillation of this teacher diverged within minutes of
training. Along its flow t dF/dt has a mean square of 13 at t = 1, ten times that of its velocity,
and of 0.05 at t = 1/2.
"""


def measure(folder: Path, seeds: int, images: int, teacher_steps: int) -> dict[str, list]:
    """Each step count's network evaluations and Frechet distance, mean and deviation over seeds."""
    labels = torch.arange(images) % 2
    crops = photos_data("train")[0]
    parts = [crops[s * images :][:images] for s in range(seeds)]
    rows = {"real crops": [0, spread([frechet_distance_to_photos(part) for part in parts])]}
    pipeline = DigitsPipeline.from_pretrained(folder / "teacher", dtype=torch.float32)
    for steps in (teacher_steps, 2, 4, 8):
        distances = [
            frechet_distance_to_photos(
                sample(pipeline, labels, 1000 + seed, num_inference_steps=steps)
            )
            for seed in range(seeds)
        ]
        rows[f"{steps} steps"] = [steps, spread(distances)]
        print(f"{steps} steps: {distances}", flush=True)
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


TASK = Task(
    output=Path("out/photos"),
    stages=STAGES,
    data=partial(photos_data, "train"),
    network=photos_transformer,
    report=report,
)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    trainer.main(TASK, argv)


if __name__ == "__main__":
    main()
