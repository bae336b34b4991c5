"""PSNR of images against those of full runs.

PSNR = 10 log10(peak^2 / mean squared difference)     in dB, one value per image
peak = 1 for images in [0, 1]; else the range of the full run's values
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["MOST", "images_of", "psnr"]

MOST = 150.0  # dB of images that are equal: means stay finite, files stay JSON


def images_of(result: Any) -> Any:
    """Return the images or videos of what a pipeline's call returned; None where it has none."""
    if isinstance(result, tuple):
        return result[0]
    return getattr(result, "images", getattr(result, "frames", None))


def _arrays(images: Any) -> list[np.ndarray]:
    """Return one float array per image, of what a pipeline's call returns."""
    if isinstance(images, Tensor):
        return list(images.detach().float().cpu().numpy().astype(np.float64))
    if isinstance(images, np.ndarray):
        return list(images.astype(np.float64))
    if isinstance(images, Iterable):  # PIL images, or frames of videos
        return [np.asarray(image, dtype=np.float64) / 255 for image in images]
    raise TypeError(f"images: expected tensors, arrays or PIL images, got {type(images).__name__}")


def psnr(reference: Sequence[Any], images: Sequence[Any]) -> list[float] | None:
    """Return the PSNR of every image in dB, at most 150; None if calls gave no images.

    Args:
        reference: per call what the pipeline returned in full runs: PIL images, an array or tensor.
        images: the same, of other runs.
    """
    if any(entry is None for entry in (*reference, *images)):
        return None
    values = []
    for expected, got in zip(reference, images, strict=True):
        for one, other in zip(_arrays(expected), _arrays(got), strict=True):
            inside = one.min() >= 0 and one.max() <= 1
            peak = 1.0 if inside else float(one.max() - one.min()) or 1.0
            error = float(np.mean((one - other) ** 2))
            level = MOST if error == 0 else 10 * np.log10(peak**2 / error)
            values.append(float(min(level, MOST)))
    return values
