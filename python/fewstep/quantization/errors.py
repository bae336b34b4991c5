"""How far outputs are off: signal to noise of a layer, content and quality of a model's output."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

BLOCK = 4


def error_energy(got: Tensor, want: Tensor) -> float:
    """Return the energy of got - want in units of want's; inf where want has none."""
    energy = float(want.double().square().sum())
    error = float((got.double() - want.double()).square().sum())
    if energy:
        return error / energy
    return math.inf if error else 0.0


def row_energy(want: Tensor, counts: Tensor | None = None) -> Tensor:
    """Return the energy of each row [M, N], at least the median, or 1 where that is nothing.

    Rows below the median count in units of that: next to nothing has no relative error.

    Args:
        want: the rows.
        counts: [M], how often each of them came; once by default.
    """
    energy = want.double().square().sum(1)
    all_of_them = energy if counts is None else energy.repeat_interleave(counts.long())
    return energy.clamp(min=float(all_of_them.median()) or 1.0)


def row_error(got: Tensor, want: Tensor, counts: Tensor | None = None) -> float:
    """Return the mean over rows [M, N] of the energy of got - want in units of `row_energy`."""
    errors = (got.double() - want.double()).square().sum(1) / row_energy(want, counts)
    return float(errors.mean() if counts is None else (errors @ counts) / counts.sum())


def decibels(error: float) -> float:
    """Return an error's energy, in units of the signal's, as signal to noise in dB."""
    if error == 0:
        return math.inf
    return -10 * math.log10(error) if error < math.inf else -math.inf


def sqnr(got: Tensor, want: Tensor) -> float:
    """Return 10 log10 of the energies of want and got - want, in dB."""
    return decibels(error_energy(got, want))


def content(y: Tensor) -> Tensor:
    """Return y with each block of 4 along its axes of space or tokens replaced by its mean.

    [B, C, ..., H, W] has two such axes, [B, N, C] one; others have none.
    """
    if y.dim() == 3:
        return content(y.mT[..., None])[..., 0].mT
    if y.dim() < 4:
        return y
    height, width = y.shape[-2:]
    planes = y.flatten(0, -3)[:, None]
    size = (min(BLOCK, height), min(BLOCK, width))
    means = F.avg_pool2d(planes, size, ceil_mode=True, count_include_pad=False)
    grown = means.repeat_interleave(size[0], 2).repeat_interleave(size[1], 3)
    return grown[:, 0, :height, :width].reshape(y.shape)


def split_error(got: Tensor, want: Tensor) -> tuple[float, float]:
    """Return the energies of content and quality of got - want in units of want's.

    A part that want has nothing of counts in units of all of want.
    """
    got, want = got.double(), want.double()
    whole, found = float(want.square().sum()), []
    for noise, signal in zip(_parts(got - want), _parts(want), strict=True):
        energy = float(signal.square().sum()) or whole
        found.append(float(noise.square().sum()) / energy if energy else 0.0)
    return found[0], found[1]


def output_error(got: Tensor, want: Tensor) -> float:
    """Return the energies of content and quality of got - want in units of want's, added."""
    return sum(split_error(got, want))


def _parts(y: Tensor) -> tuple[Tensor, Tensor]:
    mean = content(y)
    return mean, y - mean
