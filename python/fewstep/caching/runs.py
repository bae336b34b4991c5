"""Runs of all calls that a plan is calibrated on, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .record import Run, takeovers

__all__ = ["Runs", "expect_alike", "expect_finite", "gram_matrices", "mean_squares"]


@dataclass
class Runs:
    """All calls of one kind: outputs and latents [S, N, P], images if the pipeline makes any."""

    outputs: Tensor
    latents: Tensor
    images: list[Any]
    errors: dict[int, list[float]]  # of what full steps were forecast to be, all branches
    # The guided pass and its difference to the unguided one, where they are looked at.
    passes: tuple[Tensor, Tensor] | None = None


def expect_alike(first: Run, run: Run, index: int) -> None:
    """Raise ValueError where a call can't be counted together with the first one."""
    if run.times != first.times:
        raise ValueError(
            f"calls: expected one grid in all calls, {len(first.times)} steps from "
            f"{first.times[0]:g}, got {len(run.times)} from {run.times[0]:g} in call {index}"
        )
    if run.start != first.start:
        raise ValueError(
            f"calls: expected one start in all calls, step {first.start}, got {run.start} in call "
            f"{index}; a plan of the whole grid serves runs that start anywhere"
        )
    if len(run.outputs) != len(first.outputs):
        raise ValueError(
            f"calls: expected as many steps in all calls, {len(first.outputs)}, got "
            f"{len(run.outputs)} in call {index}"
        )
    if takeovers(run.models) != takeovers(first.models):
        raise ValueError(
            f"calls: expected the second model to take over at one step in all calls, "
            f"{takeovers(first.models)}, got {takeovers(run.models)} in call {index}"
        )
    if run.size != first.size:
        raise ValueError(
            f"calls: expected one size of latents, {list(first.size)}, got {list(run.size)} in "
            f"call {index}"
        )


def expect_finite(run: Run, index: int) -> None:
    """Raise ValueError where a call's outputs or latents are not all numbers."""
    for step, (output, latents) in enumerate(zip(run.outputs, run.latents, strict=True)):
        for what, found in (("outputs", output), ("latents", latents)):
            if not found.isfinite().all():
                got = "NaN" if found.isnan().any() else "infinity"
                raise ValueError(
                    f"calls: expected finite {what}, got {got} at step {step} of call {index}"
                )


def gram_matrices(values: Tensor) -> NDArray[np.float64]:
    """Return each image's mean products [N, S, S] of values [S, N, P]: one float64 copy at once."""
    found = [own @ own.T / own.shape[1] for own in map(Tensor.double, values.unbind(1))]
    return torch.stack(found).numpy()


def mean_squares(values: Tensor, others: Tensor | None = None) -> Tensor:
    """Return the mean square [S] of values [S, N, P], or of how far they are from others."""
    both = zip(values, values if others is None else others, strict=True)
    differences = (
        own.double() if others is None else (own - other).double() for own, other in both
    )
    return torch.stack([x.square().mean() for x in differences])
