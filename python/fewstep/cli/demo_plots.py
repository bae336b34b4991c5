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


def _times(count: float, noun: str) -> str:
    return f"{count:.4g} {noun}{'s' * (count != 1)}"


def samples_picture(
    path: Path, rows: Sequence[tuple[Score, Tensor]], real: Tensor, columns: int = 20
) -> None:
    """Write one strip per row, the same label and seed in every column; real images on top."""
    strips = [("real digits, held out", real[:columns])]
    for score, images in rows:
        about = f"{_times(score.evaluations, 'evaluation')}, {score.speedup_text}"
        strips.append((f"{score.label}\n{about}", images[:columns]))
    figure, axes = plt.subplots(len(strips), 1, figsize=(10.5, 0.4 * len(strips)))
    figure.subplots_adjust(left=0.23, right=0.995, top=0.995, bottom=0.005, hspace=0.06)
    for axis, (label, images) in zip(axes, strips, strict=True):
        axis.imshow(_strip(images), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_axis_off()
        place = {"transform": axis.transAxes, "ha": "right", "va": "center"}
        axis.text(-0.01, 0.5, label, fontsize=7, **place)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _marker(score: Score) -> str:
    quantized, cached = "quantize" in score.patch, "cache" in score.patch
    return "*" if quantized and cached else "D" if quantized else "s" if cached else "o"


def tradeoff_picture(path: Path, scores: Sequence[Score], real: float) -> None:
    """Write seconds per image (log) against the Frechet distance; left and low is good."""
    figure, axis = plt.subplots(figsize=(9, 4.6), layout="constrained")
    axis.axhline(real, color=REAL, linestyle="--", linewidth=1, label="real digits (training half)")
    for score in scores:
        milliseconds = 1e3 * score.seconds_per_image
        bars = [[milliseconds - 1e3 * score.q1], [1e3 * score.q3 - milliseconds]]
        marker = _marker(score)
        axis.errorbar(
            milliseconds,
            score.frechet,
            xerr=bars,
            fmt=marker,
            color=STUDENT if score.key.startswith("student") else TEACHER,
            markersize=11 if marker == "*" else 7,
            markeredgecolor="white",
            linewidth=1,
            label=f"{score.label} ({score.speedup_text})",
        )
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("milliseconds per image (median of batches, bars: quartiles)")
    axis.set_ylabel("Frechet distance to held-out real digits")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
