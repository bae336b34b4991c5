"""How `quantize` makes each layer: its scheme, and what calibration does for it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from .calibration import Calibration
from .compensation import quantize_compensated
from .errors import decibels
from .linear import QuantLinear, refuse_linear
from .samples import FEWEST, Samples, splits
from .scheme import Scheme
from .smoothing import quantize_smoothed


def expect_calibration(
    name: str,
    given: Calibration | str | Path | None,
    model: nn.Module,
    layers: Collection[str],
) -> Calibration | None:
    """Return the calibration that the argument `name` gives or names a file of.

    Raises:
        TypeError: neither.
        ValueError: it has seen none of the model's linear layers, or the file is no calibration.
    """
    if given is None:
        return None
    if isinstance(given, (str, Path)):
        given = Calibration.load(given)
    if not isinstance(given, Calibration):
        raise TypeError(
            f"{name}: expected a Calibration or a file with one, got {type(given).__name__}"
        )
    if not given.amax.keys() & set(layers):
        raise ValueError(
            f"{name}: expected a calibration of {type(model).__name__}, got one of "
            f"{', '.join([*given.amax][:3]) or 'no layer'}"
        )
    return given


@dataclass(frozen=True)
class Recipe:
    """How each layer is quantised.

    schemes      name -> scheme
    smooth       calibration to smooth with, or None
    compensate   calibration to compensate rounding with, or None
    literal      whether smoothing is what the scheme says, and not a choice
    """

    schemes: dict[str, Scheme]
    smooth: Calibration | None = None
    compensate: Calibration | None = None
    literal: bool = False
    _errors: list[tuple[float, float]] = field(default_factory=list)  # before and after
    _few: Counter[str] = field(default_factory=Counter)  # layers that saw little, by what follows

    def refuse(self, name: str, linear: nn.Linear) -> str | None:
        """Return why a layer can't be quantised so, or None."""
        scheme = self.schemes[name]
        for argument, seen in (("smooth", self.smooth), ("compensate", self.compensate)):
            reason = None if seen is None else _refuse_seen(seen, name, linear)
            if reason is not None:
                return f"{argument}: {reason}"
        if scheme.smooth and (self.smooth is None or name not in self.smooth.amax):
            detail = "none was given"
            if self.smooth is not None:
                detail = "none of its calls reached this layer"
            return f"smooth: expected a calibration for {scheme}; {detail}"
        return refuse_linear(linear, scheme)

    def make(self, name: str, linear: nn.Linear) -> QuantLinear:
        """Return the quantised layer, the same whether the caller's autocast is on or not."""
        with torch.autocast(linear.weight.device.type, enabled=False):
            return self._make(name, linear)

    def _make(self, name: str, linear: nn.Linear) -> QuantLinear:
        scheme, seen = self.schemes[name], self.compensate
        rows = None if seen is None else seen.inputs.get(name)
        if seen is None or rows is None:
            return self._rounded(name, linear, scheme)
        ways = splits(rows, seen.runs.get(name))
        if not ways:
            self._few["compensate"] += 1
            return self._rounded(name, linear, scheme)
        literal = self.literal or scheme.smooth
        fitted = ways[0].fitted if self.smooth is seen else None
        rounded = self._rounded(name, linear, scheme, fitted)
        layer, after, before = quantize_compensated(linear, rounded, ways, literal=literal)
        self._errors.append((before, after))
        self._few["again"] += layer is not rounded and not any(len(w.new.rows) for w in ways)
        return layer

    def _rounded(
        self, name: str, linear: nn.Linear, scheme: Scheme, fitted: Samples | None = None
    ) -> QuantLinear:
        seen = self.smooth
        if seen is None or name not in seen.amax or (self.literal and not scheme.smooth):
            return QuantLinear.from_linear(linear, scheme)
        samples = fitted or Samples.of(seen.inputs[name])
        if not samples.enough and not scheme.smooth:
            self._few["smooth"] += 1
            return QuantLinear.from_linear(linear, scheme)
        return quantize_smoothed(linear, scheme, samples, seen.amax[name])

    def calibrated(self) -> dict[str, bool]:
        """Return the notes of a plan that is made of what this makes."""
        given = {"smoothed": self.smooth, "compensated": self.compensate}
        return {note: True for note, seen in given.items() if seen is not None}

    def notes(self) -> list[str]:
        """Say what calibration did, for `QuantizedModules.explain`."""
        few = [
            f"layers that saw {what}: {self._few[argument]}"
            for argument, what in (
                (
                    "compensate",
                    f"fewer than {FEWEST} different rows in one run, rounded to nearest",
                ),
                ("again", "the same few rows in every run, compensated for these alone"),
                ("smooth", f"fewer than {FEWEST} different rows, not smoothed"),
            )
            if self._few[argument]
        ]
        if self.compensate is None:
            return few
        gained = sum(after < before for before, after in self._errors)
        text = f"rounding compensated in {gained} of {len(self._errors)} layers calibrated"
        if self._errors:
            before, after = (
                decibels(statistics.median(e)) for e in zip(*self._errors, strict=True)
            )
            text += f": {before:.1f} dB to {after:.1f} dB at the median layer, on rows held out"
        return [text, *few]


def _refuse_seen(seen: Calibration, name: str, linear: nn.Linear) -> str | None:
    """Return why a calibration does not fit a layer, or None; it may have missed it."""
    if name not in seen.amax:
        return None
    columns, sizes = seen.amax[name], (linear.in_features,)
    if columns.shape != sizes or seen.inputs[name].shape[1:] != sizes:
        return f"expected inputs of {sizes[0]}, got {len(columns)}: another model"
    if not columns.isfinite().all() or not seen.inputs[name].isfinite().all():
        return "expected finite inputs in the calibration, got inf or NaN"
    return None
