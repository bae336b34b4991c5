"""`fewstep bench ops`: runs benchmark files, shows tables, writes records."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..bench import Result, Settings, discover, roofline_picture, run_benchmark
from ..bench.environment import environment, slug
from ..bench.measure import QUICK, Budget
from ..bench.model import Benchmark, Case
from ..bench.table import case_table, reasons, summary_markdown, summary_table
from .device import resolve_device

PEERS = "peers"  # a run of its own beside the others: one file for all ops


class Writer:
    """Writes records as they come: one file, one file per op in a folder, or nowhere.

    `name` is the one file for all ops in a folder.
    """

    def __init__(self, output: Path | None, device: str, name: str | None = None) -> None:
        self.output, self.name = output, name
        self.folder = None
        self.opened: set[Path] = set()
        if output is not None and output.suffix not in (".jsonl", ".json"):
            self.folder = output / slug(device)
        # Now rather than after minutes of measuring: a folder that can't be made is an error.
        folder = self.folder if self.folder is not None or output is None else output.parent
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise typer.BadParameter(f"--output: {error}") from error

    def write(self, op: str, lines: Sequence[str]) -> None:
        """Append an op's lines; a file left by an earlier run is replaced."""
        name = f"{self.name or op}.jsonl"
        path = self.folder / name if self.folder is not None else self.output
        if path is None or not lines:
            return
        with path.open("a" if path in self.opened else "w") as file:
            file.writelines(line + "\n" for line in lines)
        self.opened.add(path)


def load_all(directory: Path, ops: Sequence[str]) -> list[Benchmark]:
    """Return the benchmarks asked for, or all of them."""
    return [discover.load(directory, op) for op in ops or discover.available(directory)]


def main(
    ops: Sequence[str],
    device_text: str,
    output: Path | None,
    json: bool,
    quick: bool,
    peers: bool,
    kernels: bool,
    benchmarks: Path | None,
) -> int:
    """Run, show and write; return 1 if a correctness gate failed, or `peers` found none."""
    device = resolve_device(device_text)
    try:
        directory = discover.find_directory(benchmarks)
        loaded = load_all(directory, ops)
    except (FileNotFoundError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    if peers:
        loaded = [b for b in loaded if any(provider.package for provider in b.providers)]
    settings = Settings(device, quick, QUICK if quick else Budget(), peers, kernels)
    machine = environment(device)
    console = Console(stderr=json)
    writer = Writer(output, machine["device"], PEERS if peers else None)
    total = sum(len(benchmark.select(device, quick)) for benchmark in loaded)
    console.print(
        f"{machine['device']} · {machine['threads']} threads · torch {machine['torch']} · "
        f"triton {machine['triton']} · commit {(machine['commit'] or 'unknown')[:10]}"
        f"{' with changes' if machine['dirty'] else ''}",
        highlight=False,
    )
    everything: list[Result] = []
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    ) as progress:
        task = progress.add_task("ops", total=total)
        cases_done = 0

        def on_step(case: Case, fraction: float) -> None:
            progress.update(task, completed=cases_done + fraction)

        for benchmark in loaded:
            progress.update(task, description=benchmark.op)
            for results in run_benchmark(benchmark, settings, on_step):
                cases_done += 1
                everything += results
                if all(result.skipped for result in results):
                    continue
                lines = [jsonlib.dumps(r.record(machine), allow_nan=False) for r in results]
                writer.write(benchmark.op, lines)
                if json:
                    sys.stdout.writelines(line + "\n" for line in lines)
                else:
                    progress.console.print(case_table(results))
    for sentence in dict.fromkeys(reasons(everything)):
        console.print(f"not timed: {sentence}", highlight=False, soft_wrap=True)
    for path in sorted(writer.opened):
        console.print(f"records: {path}", highlight=False, soft_wrap=True)
    none = peers and all(r.skipped for r in everything)
    if none:
        console.print('no other package was timed: pip install "fewstep\\[peers]"', soft_wrap=True)
    refused = any(r.skipped and r.skipped.startswith("refused") for r in everything)
    return int(none or refused)


def show(paths: Sequence[Path], markdown: bool, roofline: Path | None = None) -> int:
    """Print records as one table per machine, `--peers` apart; return 1 if there are none.

    `roofline` is a PNG to draw them into as well: the records of one op on one machine.
    """
    files = [f for p in paths for f in (sorted(p.rglob("*.jsonl")) if p.is_dir() else [p])]
    machines: dict[str, list[Result]] = {}
    for file in files:
        try:
            records = [jsonlib.loads(line) for line in file.read_text().splitlines()]
            for record in records:
                title = (
                    f"{record['device']} · {record['threads']} threads · torch {record['torch']} · "
                    f"commit {(record['commit'] or 'unknown')[:10]}"
                    f"{' · --peers' if file.stem == PEERS else ''}"
                )
                machines.setdefault(title, []).append(Result.from_record(record))
        except (ValueError, TypeError, KeyError) as error:
            raise typer.BadParameter(
                f"PATHS: expected records written by `fewstep bench ops --output`, got {file} "
                f"({type(error).__name__}: {error})"
            ) from error
    console = Console()
    if not machines:
        console.print("no records: expected *.jsonl written by `fewstep bench ops --output`")
        return 1
    if roofline is not None:
        _draw_roofline(roofline, machines)
    for title, results in machines.items():
        console.print(title, highlight=False, soft_wrap=True)
        if markdown:
            sys.stdout.write("\n" + summary_markdown(results) + "\n")
        else:
            console.print(summary_table(results), highlight=False)
    return 0


def _draw_roofline(path: Path, machines: dict[str, list[Result]]) -> None:
    """Draw the records of one op on one machine."""
    kinds = {(title, r.op) for title, results in machines.items() for r in results}
    if len(kinds) != 1:
        raise typer.BadParameter(
            f"--roofline: expected records of one op on one machine, got {len(kinds)} such"
        )
    ((title, op),) = kinds
    try:
        roofline_picture(path, machines[title], f"{op} · {title}")
    except ValueError as error:
        raise typer.BadParameter(f"--roofline: {error}") from error
    except ImportError as error:
        raise typer.BadParameter(
            f"--roofline: expected matplotlib to be installed ({error}); pip install fewstep[demo]"
        ) from error
