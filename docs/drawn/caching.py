"""What caches cost in quality: a table and a picture from the records of cache_quality.py.

A method's PSNR at F full steps is the best of its settings with at most F, or what lies between two
neighbouring settings if that is more, so that a sweep that misses F is not held against it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .markdown import caption, table

OURS = "fewstep"
PLAN = "calibrated plan"
FEWER = (3, 4, 6, 8)
GOAL = (3, 4, 6)  # of which the sentence speaks
SUMMARY = (3, 6)  # of which the guide speaks
MARKERS = "sD^v<>PX*"


def methods(report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each method, fewest full steps first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in report["rows"]:
        found.setdefault(row["method"], []).append(row)
    return {name: sorted(rows, key=lambda r: r["full_steps"]) for name, rows in found.items()}


def level(rows: list[dict[str, Any]], full: float, key: str = "psnr_db") -> float | None:
    """Return a method's PSNR at so many full steps (header), None where it needs more."""
    known = [row[key] for row in rows if row["full_steps"] <= full + 1e-6]
    if not known:
        return None
    best = max(known)
    below = max((r for r in rows if r["full_steps"] <= full + 1e-6), key=lambda r: r["full_steps"])
    above = [r for r in rows if r["full_steps"] > full + 1e-6]
    if above:
        share = (full - below["full_steps"]) / (above[0]["full_steps"] - below["full_steps"])
        best = max(best, below[key] + share * (above[0][key] - below[key]))
    return best


def skipped_work(rows: list[dict[str, Any]], steps: int) -> float:
    """Return what share of the blocks a step that is not full runs, on average."""
    rest = [(row["block_share"] * steps - row["full_steps"], row["full_steps"]) for row in rows]
    skipped = sum(steps - full for _, full in rest)
    return max(0.0, sum(work for work, _ in rest) / skipped) if skipped > 1e-6 else 0.0


def sentence(report: dict[str, Any]) -> str:
    """Return what the calibrated plan gains over the best other method, in words."""
    found = methods(report)
    others = {name: rows for name, rows in found.items() if rows[0]["package"] != OURS}
    parts, falls = [], []
    for fewer in GOAL:
        full = report["steps"] // fewer
        own = level(found[PLAN], full)
        best = {name: at for name, rows in others.items() if (at := level(rows, full)) is not None}
        name = max(best, key=best.__getitem__)
        parts.append(f"{own - best[name]:+.1f} dB at {full} full steps ({name})")
    for row in found[PLAN]:
        if any(abs(row["full_steps"] - report["steps"] // fewer) < 1e-6 for fewer in GOAL):
            falls.append(row["psnr_median_db"] - row["psnr_worst_db"])
    return (
        f"The calibrated plan against the best of what is not this library's: {', '.join(parts)}. "
        f"Its worst held-out image is up to {max(falls):.1f} dB below the median one.\n"
    )


def headline(reports: dict[str, dict[str, Any] | None], picture: str) -> str:
    """Return the first report's picture and every report's sentence."""
    found = {name: report for name, report in reports.items() if report is not None}
    if not found:
        return "Not measured yet.\n"
    parts = [f"![PSNR over full steps]({picture})\n"]
    parts += [f"{name}: {sentence(report)}" for name, report in found.items()]
    last = next(iter(found.values()))
    return "\n".join(parts) + "\n" + caption(last["environment"], "Held-out images, on")


def anchor(model: str, method: str) -> str:
    """Return the name of a method's row on the page."""
    return f"{model}-{re.sub('[^a-z0-9]+', '-', method.lower()).strip('-')}"


def cache_table(report: dict[str, Any] | None, picture: str, model: str) -> str:
    """Return a model's picture, sentence, table and caption; or that there is no record."""
    if report is None:
        return "Not measured yet.\n"
    steps = report["steps"]
    counts = [steps // fewer for fewer in FEWER]
    rows = []
    for name, own in methods(report).items():
        cells = []
        for full in counts:
            mean, worst = (level(own, full, key) for key in ("psnr_db", "psnr_worst_db"))
            cells.append("" if mean is None else f"{mean:.1f} ({worst:.1f})")
        work = f"{skipped_work(own, steps):.0%}"
        # Of this library's alone: others have methods of the same name.
        mark = f'<a id="{anchor(model, name)}"></a>' if own[0]["package"] == OURS else ""
        rows.append([mark + name, own[0]["package"] or "", *cells, work])
    left_out = "; ".join(report["left_out"])
    columns = " | ".join(f"{full} full" for full in counts)
    header = f"| method | package | {columns} | a skipped step runs |"
    return (
        f"![PSNR over full steps]({picture})\n\n{sentence(report)}\n"
        + table(header, "ll" + "r" * (len(counts) + 1), rows)
        + "\n"
        + caption(
            report["environment"],
            f"{report['images']} images in batches of {report['batch']}, {steps} steps, on",
        )
        + (f"\nNot tried: {left_out}.\n" if left_out else "")
    )


def summary_table(reports: dict[str, dict[str, Any] | None], page: str) -> str:
    """Return this library's methods with their PSNR per model, each a link to its row."""
    found = {model: report for model, report in reports.items() if report is not None}
    if not found:
        return "Not measured yet.\n"
    own = {
        model: {name: rows for name, rows in methods(report).items() if rows[0]["package"] == OURS}
        for model, report in found.items()
    }
    rows = []
    for name in dict.fromkeys(name for some in own.values() for name in some):
        cells = []
        for model, report in found.items():
            for fewer in SUMMARY:
                measured = own[model].get(name, [])
                at = level(measured, report["steps"] // fewer) if measured else None
                link = f"[{'more' if at is None else f'{at:.1f}'}]({page}#{anchor(model, name)})"
                cells.append(link if measured else "")
        rows.append([name, *cells])
    columns = " | ".join(
        f"{model}, {report['steps'] // fewer} full"
        for model, report in found.items()
        for fewer in SUMMARY
    )
    last = next(iter(found.values()))
    return (
        table(f"| method | {columns} |", "l" + "r" * (len(SUMMARY) * len(found)), rows)
        + "\n"
        + caption(last["environment"], f"Mean PSNR in dB at so many of {last['steps']} steps, on")
    )


def draw_curves(path: Path, report: dict[str, Any], title: str) -> None:
    """Draw PSNR over full steps, one curve per method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9.5, 6), dpi=110)
    styles = {"fewstep": "-", "diffusers": "--", "cache-dit": ":", "DeepCache": ":", "": "-."}
    drawn = {
        name: shown
        for name, rows in methods(report).items()
        if (shown := [row for row in rows if row["full_steps"] <= report["steps"] / 2 + 1])
    }
    colours = pyplot.get_cmap("gist_rainbow")
    for index, (name, rows) in enumerate(drawn.items()):
        package = rows[0]["package"] or ""
        own = name == PLAN
        axes.plot(
            [row["full_steps"] for row in rows],
            [row["psnr_db"] for row in rows],
            styles[package.partition(" ")[0]],
            color="black" if own else colours(index / len(drawn)),
            linewidth=2.6 if own else 1.2,
            marker="o" if own else MARKERS[index % len(MARKERS)],
            markersize=5,
            label=f"{name} ({package})" if package else name,
        )
    axes.xaxis.set_major_locator(pyplot.MultipleLocator(2))
    axes.set_xlabel(f"steps of {report['steps']} that run in full (what others run is not counted)")
    axes.set_ylabel("PSNR to the uncached image, dB, mean")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
