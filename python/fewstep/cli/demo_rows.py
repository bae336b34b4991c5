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
from typing import Any

import torch
from torch import Tensor, nn

from ..metrics import class_accuracy, frechet_distance_to_real, psnr

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
    return [
        Row("teacher", f"teacher, {teacher_steps} guided steps", "teacher"),
        Row("teacher-cache", "  + cache", "teacher", {"cache": CACHE}, "teacher"),
        Row("teacher-w8a8", "  + w8a8", "teacher", {"quantize": QUANTIZE}, "teacher"),
        Row(
            "teacher-all",
            "  + cache + w8a8",
            "teacher",
            {"cache": CACHE, "quantize": QUANTIZE},
            "teacher",
        ),
        Row("teacher-8", "teacher, 8 guided steps", "teacher", {"steps": 8}, "teacher"),
        Row("teacher-4", "teacher, 4 guided steps", "teacher", {"steps": 4}, "teacher"),
        Row("student-2", "student, 2 steps", "student", {"steps": 2}, "teacher"),
        Row("student-1", "student, 1 step", "student", {"steps": 1}, "teacher"),
        Row(
            "student-w8a8",
            "student, 2 steps + w8a8",
            "student",
            {"steps": 2, "quantize": QUANTIZE},
            "student-2",
        ),
        Row(
            "student-all",
            "student, 2 steps + w8a8 + cache",
            "student",
            {"steps": 2, "quantize": QUANTIZE, "cache": CACHE},
            "student-2",
        ),
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
        self.images.append(out.images.cpu().float().clamp(-1, 1))


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


def score(sampled: list[Sampled], labels: Tensor) -> list[Score]:
    """Score every row on the images it has; all rows have the same number."""
    base = sampled[0]
    images = {s.row.key: torch.cat(s.images) for s in sampled if s.images}
    base_seconds = statistics.median(base.seconds)
    base_frechet = frechet_distance_to_real(images[base.row.key])
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
        frechet = frechet_distance_to_real(own)
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
                class_accuracy(own, labels[: len(own)]),
                psnr(own, images[against], 2.0) if against else math.nan,
                against,
                row.patch,
                s.explanation,
            )
        )
    return scores


def real_level(samples: int, draws: int = 5) -> float:
    """Return what real images score: training-half subsets of this size, mean over some draws.

    The Frechet distance of few samples is biased upwards, so the level must be taken at the rows'
    own sample count.
    """
    from ..assets.digits import digits_data

    images, _ = digits_data("train")
    generator = torch.Generator().manual_seed(0)
    distances = [
        frechet_distance_to_real(images[torch.randperm(len(images), generator=generator)[:samples]])
        for _ in range(draws)
    ]
    return statistics.fmean(distances)
