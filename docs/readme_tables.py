"""Rewrites README's tables and pictures from measurements: demo/report.json and bench records.

    make demo && fewstep bench ops --output benchmarks/out/readme && python docs/readme_tables.py

A table's caption names the machine and the commit of the run it was drawn from; nothing is typed.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from fewstep.bench import Result
from fewstep.bench.table import summary_markdown

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "demo"
RECORDS = ROOT / "benchmarks" / "out" / "readme"
IMAGES = ROOT / "docs" / "images"


def caption(environment: dict[str, Any], what: str) -> str:
    """Return the line under a table: what, where, with which versions, at which commit."""
    commit = environment["commit"][:10] + (" with local changes" if environment["dirty"] else "")
    return (
        f"{what} {environment['cpu']}, {environment['threads']} threads, {environment['isa']}, "
        f"torch {environment['torch']}, commit {commit}.\n"
    )


def demo_table(report: dict[str, Any]) -> str:
    """Return the demo's rows as Markdown."""
    lines = [
        "| | network evaluations | ms / image | speed-up | Frechet distance | ratio | accuracy |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in report["rows"]:
        if row["failure"]:
            lines.append(f"| {row['label']} | not run | | | | | |")
            continue
        evaluations = f"{row['evaluations']:.4g}"
        if row["full_evaluations"] < row["evaluations"] - 0.005:
            evaluations += f" ({row['full_evaluations']:.3g} full)"
        lines.append(
            f"| {row['label']} | {evaluations} | {1e3 * row['seconds_per_image']:.1f} "
            f"| {row['speedup']:.2f}x | {row['frechet']:.2f} | {row['frechet_ratio']:.2f} "
            f"| {row['accuracy']:.1%} |"
        )
    ratio = report["real_frechet"] / report["rows"][0]["frechet"]
    lines.append(
        f"| real digits (training half) | | | | {report['real_frechet']:.2f} | {ratio:.2f} | |"
    )
    return "\n".join(lines) + "\n"


def bench_table(records: list[dict[str, Any]]) -> str:
    """Return the harness's summary as Markdown."""
    return summary_markdown([Result.from_record(record) for record in records])


def replace(text: str, name: str, body: str) -> str:
    """Put `body` between the markers `table:<name>` and `end`."""
    pattern = rf"(<!-- table:{name} -->\n).*?(<!-- end -->)"
    return re.sub(pattern, lambda match: match[1] + body + match[2], text, flags=re.DOTALL)


def main() -> None:
    """Rewrite the README in place."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    report = json.loads((DEMO / "report.json").read_text())
    what = f"`fewstep demo`: {report['samples']} images per row from the same seeds, one run on"
    text = replace(text, "demo", demo_table(report) + "\n" + caption(report["environment"], what))
    IMAGES.mkdir(exist_ok=True)
    for name in ("samples.png", "tradeoff.png"):
        shutil.copy(DEMO / name, IMAGES / name)
    files = sorted(RECORDS.rglob("*.jsonl"))
    records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    if records:
        body = bench_table(records) + "\n" + caption(records[0], "One run on")
        text = replace(text, "bench", body)
    readme.write_text(text)
    print(f"README: {len(report['rows'])} demo rows, {len(records)} bench records")


if __name__ == "__main__":
    main()
