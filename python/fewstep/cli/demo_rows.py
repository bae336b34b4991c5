"""What `fewstep demo` compares, and how a row is sampled, counted and scored.

Every row draws the same batches: same labels, same seed per batch, so the same start noise. Rows
are interleaved batch by batch in shuffled order, and a row's time is the median over its batches.
Network evaluations and the blocks that really ran are counted by hooks, never computed from the
step count.

A row that adds a patch to another names it in `adds_to`, and is given a speed-up only where the two
can be told apart: other images, and times whose quartile ranges don't overlap.
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

from ..metrics import class_accuracy, digit_features, frechet_distance, psnr, relative_l2

QUANTIZE = "w8a8"


@dataclass(frozen=True)
class Row:
    """A pipeline and its patch.

    `against` names the row whose images these are compared with (PSNR, relative L2), `adds_to` the
    row just above where this one differs from it by one patch.
    """

    key: str
    label: str
    weights: str
    patch: dict[str, Any] = field(default_factory=dict)
    against: str | None = None
    adds_to: str | None = None


def plan(teacher_steps: int, planned: frozenset[int] = frozenset()) -> list[Row]:
    """Return the rows; the first is the baseline, unpatched.

    Args:
        teacher_steps: of the baseline.
        planned: step counts that cache="auto" finds a calibrated plan for.
    """
    full, eight = f"teacher, {teacher_steps} guided steps", "teacher, 8 guided steps"
    two, one = "student, 2 steps", "student, 1 step"
    cache = {"cache": "auto" if teacher_steps in planned else "first-block"}
    int8 = {"quantize": QUANTIZE}
    # Without a plan neighbours differ too much at 8 steps to leave one out.
    cached_eight = [
        Row(
            "teacher-8-cache",
            f"{eight} + cache",
            "teacher",
            {"steps": 8, "cache": "auto"},
            "teacher-8",
        )
    ]
    return [
        Row("teacher", full, "teacher"),
        Row("teacher-cache", f"{full} + cache", "teacher", cache, "teacher", "teacher"),
        Row(
            "teacher-all",
            f"{full} + cache + w8a8",
            "teacher",
            cache | int8,
            "teacher",
            "teacher-cache",
        ),
        Row("teacher-8", eight, "teacher", {"steps": 8}, "teacher"),
        Row(
            "teacher-8-w8a8",
            f"{eight} + w8a8",
            "teacher",
            {"steps": 8} | int8,
            "teacher-8",
            "teacher-8",
        ),
        *(cached_eight if 8 in planned else []),
        Row("teacher-4", "teacher, 4 guided steps", "teacher", {"steps": 4}, "teacher"),
        Row("student-2", two, "student", {"steps": 2}, "teacher"),
        Row(
            "student-w8a8",
            f"{two} + w8a8",
            "student",
            {"steps": 2} | int8,
            "student-2",
            "student-2",
        ),
        Row("student-1", one, "student", {"steps": 1}, "teacher"),
        Row(
            "student-1-w8a8",
            f"{one} + w8a8",
            "student",
            {"steps": 1} | int8,
            "student-1",
            "student-1",
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


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU still has to do; a CPU has nothing left."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
    def quartiles(self) -> tuple[float, float, float]:
        """Seconds per image: first quartile, median, third quartile of the batches."""
        spread = self.seconds if len(self.seconds) > 1 else 2 * self.seconds
        q1, median, q3 = statistics.quantiles(spread, n=4, method="inclusive")
        return q1, median, q3

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
        device = self.pipe.device
        generator = torch.Generator().manual_seed(seed)  # the CPU's: one noise on every device
        with counted(self.pipe.transformer) as count:
            synchronize(device)
            start = time.perf_counter()
            out = self.pipe(labels, generator=generator, output_type="latent", **call)
            synchronize(device)
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
    """A row's numbers.

    Ratios are to the first row; PSNR and relative L2 to the images of row `against`.
    `distinct` says whether the row can be told apart from the one it adds a patch to; None where it
    adds to none. A time that can't be told apart is no gain.
    """

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
    relative_l2: float = math.nan
    against: str | None = None
    adds_to: str | None = None
    distinct: bool | None = None
    patch: dict[str, Any] = field(default_factory=dict)
    explanation: str | None = None

    @property
    def speedup_text(self) -> str:
        """The speed-up for people: no figure of its own where the row above is as fast."""
        return "as above" if self.distinct is False else f"{self.speedup:.2f}x"

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


def told_apart(row: Sampled, other: Sampled) -> bool:
    """Return whether two rows differ: other images, and quartile ranges that don't overlap."""
    if all(torch.equal(x, y) for x, y in zip(row.images, other.images, strict=True)):
        return False
    (q1, _, q3), (other_q1, _, other_q3) = row.quartiles, other.quartiles
    return q3 < other_q1 or other_q3 < q1


def score(sampled: list[Sampled]) -> list[Score]:
    """Score every row on the images it has; all rows have the same number."""
    base = sampled[0]
    rows = {s.row.key: s for s in sampled if s.images}
    base_seconds = base.quartiles[1]
    real, _ = _real("held_out")
    base_frechet = frechet_distance(torch.cat(base.features), real)
    scores = []
    for s in sampled:
        row = s.row
        if s.failure is not None:
            scores.append(Score(row.key, row.label, s.failure, patch=row.patch))
            continue
        own = torch.cat(s.images)
        against = torch.cat(rows[row.against].images) if row.against in rows else None
        q1, seconds, q3 = s.quartiles
        frechet = frechet_distance(torch.cat(s.features), real)
        scores.append(
            Score(
                key=row.key,
                label=row.label,
                evaluations=s.evaluations,
                full_evaluations=s.full_evaluations,
                seconds_per_image=seconds,
                q1=q1,
                q3=q3,
                speedup=base_seconds / seconds,
                frechet=frechet,
                frechet_ratio=frechet / base_frechet,
                accuracy=statistics.fmean(s.hits),
                psnr_db=math.nan if against is None else psnr(own, against, 2.0),
                relative_l2=math.nan if against is None else relative_l2(own, against),
                against=None if against is None else row.against,
                adds_to=row.adds_to if row.adds_to in rows else None,
                distinct=told_apart(s, rows[row.adds_to]) if row.adds_to in rows else None,
                patch=row.patch,
                explanation=s.explanation,
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
