"""Tables of one evaluation of a denoiser: small ones on a CPU, full-size ones on GPUs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fewstep.bench.table import seconds

from .markdown import caption, table

MODELS = "model_steps.json"  # of benchmarks/pipelines/model_steps.py
LOOPS = "cache_steps.json"  # of benchmarks/pipelines/cache_steps.py
MODES = ("eager", "graph", "compiled", "compiled, graph")
GIB = 2**30


def step_table(report: dict[str, Any]) -> str:
    """Return the time of one evaluation of a large model per scheme, as Markdown."""
    rows = [
        [
            row["form"],
            f"{seconds(row['seconds'])} ({seconds(row['q1'])} - {seconds(row['q3'])})",
            f"{row['over_bfloat16']:.2f}x",
            f"{row['over_float32']:.2f}x",
            f"{row['weights']:.3f}",
        ]
        for row in report["rows"]
    ]
    header = "| form | one evaluation (quartiles) | over bf16 | over float32 | weights / bf16 |"
    return table(header, "lrrrr", rows)


def cache_time_table(report: dict[str, Any] | None) -> str:
    """Return what of the steps that plans leave out is saved time, as Markdown."""
    if report is None:
        return "Not measured yet.\n"
    rows = [
        [
            row["model"],
            f"{row['full_steps']} of {row['steps']}",
            seconds(row["plain"]),
            f"{seconds(row['seconds'])} ({seconds(row['q1'])} - {seconds(row['q3'])})",
            f"{row['speedup']:.2f}x",
            f"{100 * row['efficiency']:.1f}%",
        ]
        for row in report["rows"]
    ]
    header = (
        "| model | full steps | in full | with the plan (quartiles) | speed-up | of steps / full |"
    )
    body = table(header, "llrrrr", rows)
    return body + "\n" + caption(report["environment"], "Whole runs, on")


def kept_table(report: dict[str, Any] | None, kept: str) -> str:
    """Return what keeping the time's or the text's path saves per evaluation, as Markdown."""
    if report is None:
        return "Not measured yet.\n"
    rows = [
        [
            row["model"],
            row["blocks"],
            f"{row['parameters'] / 1e6:.0f}M",
            seconds(row["plain"]),
            f"{row['ratio']:.3f}x ({' - '.join(f'{x:.3f}' for x in row['ratio_quartiles'])})",
            f"{row['bytes'] / 2**10:.0f} KiB",
        ]
        for row in report["rows"]
    ]
    header = f"| model | blocks | parameters | one evaluation | faster by (quartiles) | {kept} |"
    body = table(header, "llrrrr", rows)
    return body + "\n" + caption(report["environment"], "bfloat16, two samples, on")


def _model_row(runs: dict[str, dict[str, Any]]) -> list[str]:
    """Return the row of one form of a model; `runs` has its records by mode."""
    some = next(iter(runs.values()))
    best = max((run["ratios"].get("bf16 compiled", 0.0) for run in runs.values()), default=0.0)
    taken = [run["weight_bytes"] + (run["extra_bytes"] or 0) for run in runs.values()]
    served = runs.get("eager", {}).get("served", {})
    kernels = ", ".join(f"{count} `{name}`" for name, count in served.items())
    stay = sum(n for why, n in some["left_in_bf16"].items() if why.startswith("by the table"))
    return [
        some["model"],
        some["form"],
        *(seconds(runs[mode]["median_s"]) if mode in runs else "" for mode in MODES),
        f"{best:.2f}x" if best else "",
        kernels or (str(some["low_bit_layers"]) if some["low_bit_layers"] else ""),
        str(stay) if stay else "",
        f"{some['weight_bytes'] / GIB:.2f}",
        f"{max(taken) / GIB:.2f}",
    ]


def _without(rows: list[dict[str, Any]]) -> list[str]:
    """Return a line for each run that has no number, with the reason."""
    return [
        f"- {row['model']}, {row['form']}, {row['mode']}: {row.get('failed') or row['skipped']}\n"
        for row in rows
        if "median_s" not in row
    ]


def _clean(report: dict[str, Any], name: str) -> dict[str, Any]:
    machine = report["environment"]
    if machine["commit"] is None or machine["dirty"]:
        raise ValueError(f"{name}: expected records of a clean commit, got {machine['commit']}")
    return machine


def _gpu_caption(machine: dict[str, Any], what: str) -> str:
    return (
        f"\n{what}, random weights, on {machine['device']}, driver {machine['driver']}, torch "
        f"{machine['torch']}, Triton {machine['triton']}, commit {machine['commit'][:10]}.\n"
    )


def model_table(report: dict[str, Any]) -> str:
    """Return what the forms of full-size models take on one GPU, as Markdown.

    Raises:
        ValueError: the report is of no commit, or of local changes.
    """
    machine = _clean(report, MODELS)
    forms: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in report["rows"]:
        if "median_s" in row:
            forms.setdefault((row["model"], row["form"]), {})[row["mode"]] = row
    header = (
        "| model | form | eager | graph | compiled | compiled, graph | best over bf16 compiled "
        "| low-bit layers | kept by the table | weights, GiB | peak, GiB |"
    )
    body = table(header, "llrrrrrlrrr", [_model_row(runs) for runs in forms.values()])
    without = _without(report["rows"])
    left = "\nWithout a number:\n\n" + "".join(without) if without else ""
    return f"{body}{left}" + _gpu_caption(machine, "One evaluation")


def loop_table(report: dict[str, Any]) -> str:
    """Return what plans save of whole loops of full-size models on one GPU, as Markdown.

    Raises:
        ValueError: the report is of no commit, or of local changes.
    """
    machine = _clean(report, LOOPS)
    rows = [
        [
            row["model"],
            row["mode"],
            f"{row['full_steps']} of {row['steps']}",
            seconds(row["full"]["median_s"]),
            seconds(row["plan"]["median_s"]),
            f"{row['speedup']:.2f}x",
            f"{100 * row['efficiency']:.1f}%",
            str(row["host_waits"]),
        ]
        for row in report["rows"]
        if "failed" not in row
    ]
    header = (
        "| model | mode | full steps | in full | with the plan | speed-up | of steps / full "
        "| host waits |"
    )
    failed = "".join(
        f"\nWithout a number: {row['model']}: {row['failed']}\n"
        for row in report["rows"]
        if "failed" in row
    )
    return table(header, "lllrrrrr", rows) + failed + _gpu_caption(machine, "Whole loops")


def gpu_tables(results: Path, name: str, draw: Callable[[dict[str, Any]], str]) -> str:
    """Return a table for each GPU that has a record, or that there is none."""
    reports = [json.loads(path.read_text()) for path in sorted(results.glob(f"*/{name}"))]
    on_gpus = [r for r in reports if r["environment"]["device_type"] == "cuda"]
    return "\n".join(map(draw, on_gpus)) or "Not measured yet.\n"
