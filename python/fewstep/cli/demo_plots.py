"""The demo's two pictures: rows of the same seeds, and speed against quality."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from .demo_rows import Score

matplotlib.use("Agg")
from matplotlib import pyplot as plt

TEACHER, STUDENT, REAL = "#2563eb", "#ea580c", "#6b7280"


def _strip(images: Tensor) -> Tensor:
    """[n, 1, 16, 16] -> [16, 17 n - 1]: side by side, one column of white between."""
    padded = torch.nn.functional.pad(images[:, 0], (0, 1), value=1.0)
    return padded.permute(1, 0, 2).reshape(images.shape[2], -1)[:, :-1]


def samples_picture(
    path: Path, rows: Sequence[tuple[Score, Tensor]], real: Tensor, columns: int = 20
) -> None:
    """Write one strip per row, the same label and seed in every column; real images on top."""
    strips = [("real digits, held out", real[:columns])]
    for score, images in rows:
        about = f"{score.evaluations:.0f} evaluations, {score.speedup:.1f}x"
        strips.append((f"{score.label}\n{about}", images[:columns]))
    figure, axes = plt.subplots(
        len(strips), 1, figsize=(11, 0.52 * len(strips) + 0.3), layout="constrained"
    )
    for axis, (label, images) in zip(axes, strips, strict=True):
        axis.imshow(_strip(images), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_axis_off()
        axis.text(
            -0.01,
            0.5,
            label,
            transform=axis.transAxes,
            ha="right",
            va="center",
            fontsize=7.5,
        )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def tradeoff_picture(path: Path, scores: Sequence[Score], real: float) -> None:
    """Write seconds per image (log) against the Frechet distance; left and low is good."""
    figure, axis = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    axis.axhline(real, color=REAL, linestyle="--", linewidth=1)
    axis.annotate(
        "real digits (training half)",
        (0.99, real),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=REAL,
    )
    for index, score in enumerate(scores):
        color = STUDENT if score.key.startswith("student") else TEACHER
        milliseconds = 1e3 * score.seconds_per_image
        axis.errorbar(
            milliseconds,
            score.frechet,
            xerr=[[milliseconds - 1e3 * score.q1], [1e3 * score.q3 - milliseconds]],
            fmt="o",
            color=color,
            markersize=6,
            linewidth=1,
        )
        axis.annotate(
            score.label,
            (milliseconds, score.frechet),
            xytext=(6, 6 if index % 2 else -12),
            textcoords="offset points",
            fontsize=8,
            color=color,
        )
    axis.set_xscale("log")
    axis.set_ylim(bottom=0)
    axis.margins(x=0.2)
    axis.set_xlabel("milliseconds per image (median of batches, bars: quartiles)")
    axis.set_ylabel("Frechet distance to held-out real digits")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
