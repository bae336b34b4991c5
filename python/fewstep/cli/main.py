"""The command's options. Bodies live beside this file and load on use, so that --help is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import __version__

app = typer.Typer(
    help="Makes diffusers pipelines fast at 1-8 steps.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
bench_app = typer.Typer(help="Measure, against every baseline in the same run.")
app.add_typer(bench_app, name="bench", no_args_is_help=True)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fewstep {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say it and exit.")
    ] = False,
) -> None:
    """Makes diffusers pipelines fast at 1-8 steps."""


Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@app.command()
def doctor(
    json: Json = False,
    check: Annotated[
        bool, typer.Option("--check", help="Run every kernel's gate; exit 1 if one fails.")
    ] = False,
) -> None:
    """Say what this machine can run, what `auto` takes for each op, and why not the others."""
    from .doctor import main

    raise typer.Exit(main(json, check))


@bench_app.command("ops")
def bench_ops(
    op: Annotated[list[str] | None, typer.Option(help="Only this op; may be repeated.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")] = "auto",
    output: Annotated[
        Path | None,
        typer.Option(help="Write records to FILE.jsonl, or to DIR/<device>/<op>.jsonl."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON lines, no tables.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="One case per op, fewer rounds.")] = False,
    peers: Annotated[
        bool,
        typer.Option(
            "--peers",
            help="Only what other packages can do too; records in DIR/<device>/peers.jsonl.",
        ),
    ] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Note the names of the kernels that a GPU runs.")
    ] = False,
    benchmarks: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="The benchmarks folder of a checkout."),
    ] = None,
) -> None:
    """Time ops against plain torch, installable peers and the machine's limits."""
    from .bench import main

    raise typer.Exit(main(op or [], device, output, json, quick, peers, kernels, benchmarks))


@bench_app.command("show")
def bench_show(
    paths: Annotated[
        list[Path], typer.Argument(exists=True, help="Record files, or folders of them.")
    ],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    roofline: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Also draw FLOP/s over FLOP/byte into this PNG."),
    ] = None,
) -> None:
    """Print records: each kernel against the fastest baseline and the limit of its run."""
    from .bench import show

    raise typer.Exit(show(paths, markdown, roofline))


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for the pictures and the report.")
    ] = Path("demo"),
    samples: Annotated[int, typer.Option(min=1, help="Images per row, at most.")] = 240,
    batch: Annotated[int, typer.Option(min=1, help="Images per call.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the first batch.")] = 0,
    seconds: Annotated[
        float, typer.Option(min=0, help="Stop sampling at a batch boundary before this.")
    ] = 150.0,
    teacher_steps: Annotated[int, typer.Option(min=1, help="Steps of the baseline.")] = 50,
    weights: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Folder with teacher/ and student/ instead of the package's.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")] = "auto",
    record: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Write the report to DIR/<device>/demo.json too."),
    ] = None,
) -> None:
    """Sample a trained digits pipeline with every patch: a table, two pictures and a report."""
    from .demo import main

    raise typer.Exit(
        main(output, samples, batch, seed, seconds, teacher_steps, weights, device, record)
    )
