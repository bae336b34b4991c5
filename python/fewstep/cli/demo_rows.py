"""What `fewstep demo` compares, and how a row is sampled, counted and scored.

Every row draws the same batches: same labels, same seed per batch, so the same start noise. Rows
are interleaved batch by batch in shuffled order, and a row's time is the median over its batches.
Network evaluations and the blocks that really ran are counted by hooks, never computed from the
step count.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..metrics import class_accuracy, digit_features, frechet_distance, psnr

CACHE = "first-block"
QUANTIZE = "w8a8"


@dataclass(frozen=True)
class Row:
    """A pipeline and its patch. `against` names the row that PSNR is measured against."""

    key: str
    label: str
    weights: str
    patch: dict[str, Any] = field(default_factory=dict)
    against: str | None = None


def plan(teacher_steps: int) -> list[Row]:
    """Return the rows; the first is the baseline, unpatched."""
    full, eight = f"teacher, {teacher_steps} guided steps", "teacher, 8 guided steps"
    two = "student, 2 steps"
    cache, int8 = {"cache": CACHE}, {"quantize": QUANTIZE}
    return [
        Row("teacher", full, "teacher"),
        Row("teacher-cache", f"{full} + cache", "teacher", cache, "teacher"),
        Row("teacher-all", f"{full} + cache + w8a8", "teacher", cache | int8, "teacher"),
        Row("teacher-8", eight, "teacher", {"steps": 8}, "teacher"),
        Row("teacher-8-w8a8", f"{eight} + w8a8", "teacher", {"steps": 8} | int8, "teacher-8"),
        Row("teacher-4", "teacher, 4 guided steps", "teacher", {"steps": 4}, "teacher"),
        Row("student-2", two, "student", {"steps": 2}, "teacher"),
        Row("student-w8a8", f"{two} + w8a8", "student", {"steps": 2} | int8, "student-2"),
        Row(
            "student-all",
            f"{two} + w8a8 + cache",
            "student",
            {"steps": 2} | int8 | cache,
            "student-2",
        ),
        Row("student-1", "student, 1 step", "student", {"steps": 1}, "teacher"),
    ]


@dataclass
class Count:
    """Calls of the network, and how many of its blocks really ran in them."""

    calls: int = 0
    blocks: int = 0


@contextmanager
def counted(transformer: nn.Module) -> Iterator[Count]:
    """Count with hooks: on the network, and on every block's attention.

    A cache replaces the `forward` of whole blocks, so a block that it skips is still called; the
    attention inside runs only if the block does.
    """
    count = Count()

    def on_call(module: nn.Module, args: Any) -> None:
        count.calls += 1

    def on_block(module: nn.Module, args: Any) -> None:
        count.blocks += 1

    hooks = [transformer.register_forward_pre_hook(on_call)]
    hooks += [
        block.attn1.register_forward_pre_hook(on_block) for block in transformer.transformer_blocks
    ]
    try:
        yield count
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class Sampled:
    """What a row has produced so far."""

    row: Row
    pipe: Any = None
    explanation: str | None = None
    failure: str | None = None
    seconds: list[float] = field(default_factory=list)  # per image, one entry per batch
    count: Count = field(default_factory=Count)
    images: list[Tensor] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    hits: list[float] = field(default_factory=list)  # share of the right class, per batch

    @property
    def evaluations(self) -> float:
        """Network evaluations per image."""
        return self.count.calls / max(len(self.seconds), 1)

    @property
    def full_evaluations(self) -> float:
        """The same in units of all blocks: less than `evaluations` where a cache skipped some."""
        blocks = len(self.pipe.transformer.transformer_blocks)
        return self.count.blocks / blocks / max(len(self.seconds), 1)

    def sample(self, labels: Tensor, seed: int, teacher_steps: int) -> None:
        """Draw one batch, timed and counted."""
        call = {"num_inference_steps": teacher_steps} if self.row.weights == "teacher" else {}
        generator = torch.Generator().manual_seed(seed)
        with counted(self.pipe.transformer) as count:
            start = time.perf_counter()
            out = self.pipe(labels, generator=generator, output_type="latent", **call)
            seconds = time.perf_counter() - start
        self.seconds.append(seconds / len(labels))
        self.count.calls += count.calls
        self.count.blocks += count.blocks
        images = out.images.cpu().float().clamp(-1, 1)
        self.images.append(images)
        self.features.append(digit_features(images))
        self.hits.append(class_accuracy(images, labels))


@dataclass(frozen=True)
class Score:
    """A row's numbers. Ratios are to the first row; PSNR is to the row's own reference."""

    key: str
    label: str
    failure: str | None = None
    evaluations: float = math.nan
    full_evaluations: float = math.nan
    seconds_per_image: float = math.nan
    q1: float = math.nan
    q3: float = math.nan
    speedup: float = math.nan
    frechet: float = math.nan
    frechet_ratio: float = math.nan
    accuracy: float = math.nan
    psnr_db: float = math.nan
    psnr_against: str | None = None
    patch: dict[str, Any] = field(default_factory=dict)
    explanation: str | None = None

    def record(self) -> dict[str, Any]:
        """Return JSON fields: null where there is no number; identical images have no PSNR."""
        fields: dict[str, Any] = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in vars(self).items()
        }
        return fields | {"identical": self.psnr_db == math.inf}


@lru_cache(maxsize=2)
def _real(split: str) -> tuple[Tensor, Tensor]:
    """Return the features and labels of one half of the real digits."""
    from ..assets.digits import digits_data

    images, labels = digits_data(split)  # type: ignore[arg-type]
    return digit_features(images), labels


def score(sampled: list[Sampled]) -> list[Score]:
    """Score every row on the images it has; all rows have the same number."""
    base = sampled[0]
    images = {s.row.key: torch.cat(s.images) for s in sampled if s.images}
    base_seconds = statistics.median(base.seconds)
    real, _ = _real("held_out")
    base_frechet = frechet_distance(torch.cat(base.features), real)
    scores = []
    for s in sampled:
        row = s.row
        if s.failure is not None:
            scores.append(Score(row.key, row.label, s.failure, patch=row.patch))
            continue
        own = images[row.key]
        seconds = statistics.median(s.seconds)
        spread = s.seconds if len(s.seconds) > 1 else 2 * s.seconds
        q1, _, q3 = statistics.quantiles(spread, n=4, method="inclusive")
        frechet = frechet_distance(torch.cat(s.features), real)
        against = row.against if row.against in images else None
        scores.append(
            Score(
                row.key,
                row.label,
                None,
                s.evaluations,
                s.full_evaluations,
                seconds,
                q1,
                q3,
                base_seconds / seconds,
                frechet,
                frechet / base_frechet,
                statistics.fmean(s.hits),
                psnr(own, images[against], 2.0) if against else math.nan,
                against,
                row.patch,
                s.explanation,
            )
        )
    return scores


def real_level(wanted: Tensor, draws: int = 5) -> float:
    """Return what real images score: training-half subsets with these labels, mean over draws.

    The Frechet distance of few samples is biased upwards and sees the mixture of classes, so the
    level must be taken at the rows' own count and labels.
    """
    (train, labels), (held_out, _) = _real("train"), _real("held_out")
    generator = torch.Generator().manual_seed(0)
    distances = []
    for _ in range(draws):
        order = torch.randperm(len(train), generator=generator)
        chosen = [
            order[labels[order] == label][: int((wanted == label).sum())]
            for label in wanted.unique()
        ]
        distances.append(frechet_distance(train[torch.cat(chosen)], held_out))
    return statistics.fmean(distances)
