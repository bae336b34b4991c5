"""`fewstep demo`: few steps, caching and int8 on a real trained pipeline, measured on this machine.

The baseline is the 50-step guided teacher in fp32. Nothing here knows better than the measurement:
a patch that is slower or worse than the baseline shows up as such.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

import fewstep

from ..bench.environment import environment, slug
from ..caching import find_plans, parse_target
from ..caching.plans import DEFAULT_TARGET, FOLDER
from .demo_rows import Row, Sampled, Score, plan, real_level, score, synchronize
from .device import resolve_device

MIN_BATCHES = 2


def load(name: str, weights: Path | None) -> Any:
    """Return a fresh pipeline: the packaged one, or that in a folder made by the training script.

    Raises:
        typer.BadParameter: there are no weights.
    """
    from diffusers.utils import logging

    from ..assets.digits import DigitsPipeline, load_digits_pipeline

    logging.disable_progress_bar()
    if weights is not None and not (weights / name / "model_index.json").is_file():
        raise typer.BadParameter(f"--weights: expected a pipeline in {weights / name}, found none")
    try:
        if weights is None:
            pipe = load_digits_pipeline(name)  # type: ignore[arg-type]
        else:
            pipe = DigitsPipeline.from_pretrained(
                str(weights / name), dtype=torch.float32, local_files_only=True
            )
    except FileNotFoundError as error:
        raise typer.BadParameter(str(error)) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def apply(pipe: Any, **wanted: Any) -> Any:
    """Patch the pipeline and return the handle."""
    return fewstep.patch(pipe, **wanted)


def planned_steps(pipe: Any) -> frozenset[int]:
    """Return the step counts that cache="auto" finds a plan for on a pipeline."""
    folder = Path(pipe.config["_name_or_path"]) / FOLDER
    plans, _ = find_plans(folder, pipe.transformer, pipe.scheduler)
    target = parse_target(DEFAULT_TARGET)
    return frozenset(len(p.times) for p in plans if p.predicted.get("psnr", 0.0) >= target)


def prepare(
    row: Row, weights: Path | None, device: torch.device, batch: int, teacher_steps: int
) -> Sampled:
    """Return the row with its own patched pipeline, warmed up, or with the reason why not."""
    sampled = Sampled(row, load(row.weights, weights).to(device))
    if row.patch:
        try:
            handle = apply(sampled.pipe, **row.patch)
            sampled.explanation = str(handle.explain())
        except Exception as error:  # shown in the table and in the exit status
            sampled.failure = f"{type(error).__name__}: {error}"
            return sampled
    # A GPU compiles and tunes kernels for the shapes it meets, so it warms up on a whole batch.
    images, steps = (batch, teacher_steps) if device.type == "cuda" else (2, 2)
    call = {"num_inference_steps": steps} if row.weights == "teacher" else {}
    sampled.pipe(torch.arange(images) % 10, output_type="latent", **call)
    synchronize(device)
    return sampled


@torch.no_grad()
def choose_threads(pipe: Any) -> int:
    """Return 1 or all threads, whichever runs the network faster now.

    On a machine whose cores are taken, threads that wait for each other can be ten times slower
    than one alone; every row uses the same count.
    """
    every = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    x, time_, labels = torch.randn(20, 1, 16, 16), torch.full((20,), 3.0), torch.arange(20) % 10
    best: dict[int, float] = {}
    for threads in sorted({1, min(torch.get_num_threads(), every or 1)}):
        torch.set_num_threads(threads)
        for _ in range(4):
            start = time.perf_counter()
            pipe.transformer(x, timestep=time_, class_labels=labels)
            seconds = time.perf_counter() - start
            best[threads] = min(best.get(threads, math.inf), seconds)
    return min(best, key=lambda threads: best[threads])


WIDE = 136  # columns of text that the whole table takes


def results_table(scores: Sequence[Score], real: float, samples: int, width: int = WIDE) -> Table:
    """Return the table of the rows so far; narrow screens go without the last ones."""
    wide = width >= WIDE
    table = Table(title=f"{samples} images per row", title_justify="left")
    table.add_column("", overflow="fold")
    names = ["evaluations", "ms / image (quartiles)", "speed-up", "Frechet", "ratio", "accuracy"]
    names = [*names, "PSNR", "rel. L2"] if wide else ["evals", "ms / image", *names[2:5]]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    head = "\0"
    for s in scores:
        # A row that adds to the one above is shown as what it adds.
        label = s.label.replace(head, "  ", 1) if s.label.startswith(head) else s.label
        head = head if s.label.startswith(head) else s.label
        if s.failure is not None:
            table.add_row(label, "[red]not run[/red]")
            continue
        evaluations = f"{s.evaluations:.4g}"
        if wide and s.full_evaluations < s.evaluations - 0.005:
            evaluations += f" ({s.full_evaluations:.3g} full)"
        decibels = "" if math.isnan(s.psnr_db) else f"{s.psnr_db:.1f} dB"
        decibels = "identical" if s.psnr_db == math.inf else decibels
        off = "" if math.isnan(s.relative_l2) else f"{s.relative_l2:.3g}"
        last = (f"{s.accuracy:.1%}", decibels, off)
        q1, median, q3 = (1e3 * seconds for seconds in (s.q1, s.seconds_per_image, s.q3))
        spread = f" ({q1:.1f}-{q3:.1f})" if wide else f" ±{(q3 - q1) / 2:.1f}"
        table.add_row(
            label,
            evaluations,
            f"{median:.1f}{spread}",
            s.speedup_text,
            f"{s.frechet:.3f}" if s.frechet < 100 else f"{s.frechet:.0f}",
            f"{s.frechet_ratio:.2f}",
            *(last if wide else ()),
        )
    table.add_section()
    frechet, ratio = f"{real:.3f}", ""
    if scores and scores[0].frechet:
        ratio = f"{real / scores[0].frechet:.2f}"
    table.add_row("real digits (training half)", "", "", "", frechet, ratio)
    return table


def run(
    rows: Sequence[Sampled],
    labels: Tensor,
    batch: int,
    seed: int,
    teacher_steps: int,
    limit_seconds: float,
    console: Console,
) -> tuple[list[Score], float]:
    """Sample all rows batch by batch under a live table; return the scores and the real level."""
    live = [row for row in rows if row.failure is None]
    batches = len(labels) // batch
    nominal = {r.row.key: _nominal_evaluations(r, teacher_steps) for r in live}
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
    task = progress.add_task("sampling", total=batches * sum(nominal.values()))
    shuffle = random.Random(seed)
    start, scores, real = time.perf_counter(), [], math.nan
    with Live(progress, console=console, refresh_per_second=2, transient=True) as screen:
        for index in range(batches):
            began = time.perf_counter()
            for sampled in shuffle.sample(live, len(live)):
                progress.update(task, description=sampled.row.label)
                own = labels[index * batch : (index + 1) * batch]
                sampled.sample(own, seed + index, teacher_steps)
                progress.advance(task, nominal[sampled.row.key])
            done = (index + 1) * batch
            if done > 32:  # a covariance of 32 features needs more samples than that
                real = real_level(labels[:done])
                scores = score(list(rows))
                table = results_table(scores, real, done, console.width)
                screen.update(Group(table, progress))
            now = time.perf_counter()
            if not console.is_terminal:
                console.print(f"batch {index + 1} of {batches}: {now - start:.0f} s")
            late = now - start + (now - began) > limit_seconds
            if late and index + 1 >= MIN_BATCHES and index + 1 < batches and scores:
                console.print(f"stopped after {done} images: the time limit is {limit_seconds:g} s")
                break
    return scores, real


def _nominal_evaluations(sampled: Sampled, teacher_steps: int) -> int:
    guided = sampled.pipe.config.default_guidance > 1
    default = teacher_steps if sampled.row.weights == "teacher" else 2
    return sampled.row.patch.get("steps", default) * (1 + guided)


def main(
    output: Path,
    samples: int,
    batch: int,
    seed: int,
    seconds: float,
    teacher_steps: int,
    weights: Path | None,
    device_text: str,
    record: Path | None,
) -> int:
    """Run the demo; return 1 if a row could not be run."""
    device = resolve_device(device_text)
    console = Console()
    if not console.is_terminal:  # a log or a pipe: no reason to squeeze the table
        console = Console(width=140)
    try:
        from ..assets.digits import digits_data
        from .demo_plots import samples_picture, tradeoff_picture

        real_images, real_labels = digits_data("held_out")
    except ImportError as error:
        raise typer.BadParameter(f"{error}; pip install 'fewstep[demo]'") from error
    if batch < 1 or samples // batch * batch <= 32:
        raise typer.BadParameter(
            f"--samples, --batch: expected more than 32 images in whole batches, got {samples} "
            f"in batches of {batch}"
        )
    output.mkdir(parents=True, exist_ok=True)
    threads_before = torch.get_num_threads()
    try:
        if device.type == "cpu":
            torch.set_num_threads(choose_threads(load("teacher", weights)))
        machine = environment(device)
        console.print(
            f"{machine['device']} · {machine['threads']} threads · torch {machine['torch']}",
            highlight=False,
        )
        rows = []
        for row in plan(teacher_steps, planned_steps(load("teacher", weights))):
            with console.status(f"preparing {row.label}"):
                rows.append(prepare(row, weights, device, batch, teacher_steps))
        labels = torch.arange(samples // batch * batch) % 10
        scores, real = run(rows, labels, batch, seed, teacher_steps, seconds, console)
    finally:
        torch.set_num_threads(threads_before)

    done = len(rows[0].seconds) * batch
    console.print(results_table(scores, real, done, console.width), highlight=False)
    good = [s for s in scores if s.failure is None]
    pictures = {r.row.key: torch.cat(r.images) for r in rows if r.images}
    # One real image per column, of the column's class.
    shown = torch.stack(
        [real_images[(real_labels == k).nonzero()[i // 10, 0]] for i, k in enumerate(labels[:20])]
    )
    samples_picture(output / "samples.png", [(s, pictures[s.key]) for s in good], shown)
    tradeoff_picture(output / "tradeoff.png", good, real)
    report = {
        "environment": machine,
        "samples": done,
        "batch": batch,
        "batches": len(rows[0].seconds),
        "seed": seed,
        "real_frechet": real,
        "weights": "packaged" if weights is None else str(weights),
        "rows": [s.record() for s in scores],
    }
    written = [output / "report.json"]
    if record is not None:
        written.append(record / slug(machine["device"]) / "demo.json")
    for path in written:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    for s in scores:
        if s.failure is not None:
            reason = (
                s.failure if len(s.failure) < 200 else s.failure[:200] + " ... (see the report)"
            )
            console.print(f"not run: {s.label}: {reason}", highlight=False)
    closing(console, [output / "samples.png", output / "tradeoff.png", *written])
    return int(any(s.failure is not None for s in scores))


def closing(console: Console, written: Sequence[Path]) -> None:
    """Say what the columns mean, where the files are, and what to do next."""
    console.print(
        'speed-up and ratio are to the first row, in this run; "as above": the images are the same '
        "or the quartile ranges of the times overlap. Evaluations are counted by hooks; "
        '"full" counts the blocks that a cache left to run. PSNR and relative L2 are to the images '
        "of the same seeds: without the patches at the same steps, other steps to the first row. "
        "A Frechet distance falls as the number of images grows: compare these with each other "
        "and with the real row, not with runs of other sizes "
        "(python examples/digits/evaluate.py takes all 898).",
        highlight=False,
    )
    for path in written:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    console.print(
        "On your own pipeline: patch = fewstep.patch(pipe, quantize='w8a8', cache='taylor'); "
        "print(patch.explain()); pipe(...); patch.undo()",
        highlight=False,
        soft_wrap=True,
    )
