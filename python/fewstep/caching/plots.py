"""A picture of what a cache did to the last image: `patch.report()["cache"]`, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

__all__ = ["plot_report"]

_FULL, _SKIPPED = "#2563eb", "#d1d5db"
_COLOURS = {"full": _FULL, "half": "#93b4f5"}


def plot_report(numbers: Mapping[str, Any], path: str | Path) -> None:
    """Write which steps ran in full, by guidance pass, and the forecasts' errors below.

    Args:
        numbers: `patch.report()["cache"]` after a call.
        path: of the picture; its ending chooses the format.

    Raises:
        ImportError: matplotlib is not installed (`pip install 'fewstep[demo]'`).
        ValueError: no report of a cache, or one of before the first call.
    """
    branches = numbers.get("branches") if isinstance(numbers, Mapping) else None
    if not branches:
        raise ValueError(
            'numbers: expected patch.report()["cache"] after a call, got '
            f"{'one without steps' if branches is not None else repr(numbers)}"
        )
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_report needs matplotlib: pip install 'fewstep[demo]'") from error

    expected = numbers.get("step_error")
    measured = numbers.get("measured_error", {})
    rows = 2 if expected or any(measured.values()) else 1
    figure = Figure(
        figsize=(9, 1.2 + 0.35 * len(branches) + 2.2 * (rows - 1)), layout="constrained"
    )
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    for place, decisions in enumerate(branches.values()):
        colours = [_COLOURS.get(decision, _SKIPPED) for decision in decisions]
        axes[0].bar(range(len(decisions)), 0.8, bottom=place + 0.1, width=0.9, color=colours)
    axes[0].set_yticks([place + 0.5 for place in range(len(branches))], list(branches))
    why = ", ".join(f"{reason} {count}" for reason, count in numbers.get("why_full", {}).items())
    axes[0].set_title(f"{numbers['full']} in full ({why}), {numbers['skipped']} forecast", size=10)
    if rows == 2:
        if expected:
            pairs = [(step, error) for step, error in enumerate(expected) if error > 0]
            axes[1].plot(*zip(*pairs, strict=True), "o-", ms=3, label="calibration, RMS")
        for name, errors in measured.items():
            if errors:
                means = [fmean(error) for error in errors.values()]
                axes[1].plot(list(errors), means, "x--", ms=4, label=f"{name}, L1")
        axes[1].set_yscale("log")
        axes[1].set_ylabel("relative error of\nforecasts")
        axes[1].legend(fontsize=8)
    axes[-1].set_xlabel("step")
    figure.savefig(path, dpi=120)
