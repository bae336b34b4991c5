"""Results for people: one table per case, by rich."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table

from .run import Result


def seconds(value: float) -> str:
    """Return a time with three digits and a fitting unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * scale >= 1 or unit == "us":
            return f"{value * scale:.3g} {unit}"
    raise AssertionError


def case_table(results: Sequence[Result]) -> Table:
    """Return the table of one case: times, rates, each kernel's ratios, share of the limit.

    A column per kernel that was timed, so that many baselines stay readable side by side: it says
    how many times faster the kernel is than the row.
    """
    first = results[0]
    shape = " ".join(f"{symbol}={size}" for symbol, size in first.shape.items())
    table = Table(
        title=f"{first.op} · {first.case} · {shape} · {first.dtype}", title_justify="left"
    )
    table.add_column("provider")
    for name in ("median", "IQR", "GB/s", "GFLOP/s"):
        table.add_column(name, justify="right", no_wrap=True)
    timed = [r for r in results if not r.skipped]
    kernels = [r for r in timed if r.role == "op"]
    for kernel in kernels:
        name = kernel.provider.removeprefix("fewstep ")
        table.add_column(f"{name} is faster", justify="right", min_width=6)
    table.add_column("of limit", justify="right", no_wrap=True)
    for result in timed:
        ratios = [kernel.ratios.get(result.provider) for kernel in kernels]
        table.add_row(
            f"[bold]{result.provider}[/bold]" if result.role == "op" else result.provider,
            seconds(result.median_s),
            seconds(result.iqr_s),
            f"{result.bytes_per_s / 1e9:.1f}" if result.bytes else "",
            f"{result.flops_per_s / 1e9:.3g}" if result.flops else "",
            *("" if ratio is None else f"{ratio:.2f}x" for ratio in ratios),
            share(result),
        )
    return table


def share(result: Result) -> str:
    """Return the share of the limit that was reached, and which limit binds."""
    return "" if result.of_limit is None else f"{result.of_limit:.0%} {result.limit}"


def summary_rows(results: Iterable[Result]) -> list[tuple[str, ...]]:
    """Return a row per case and kernel: its time, and its ratio to every baseline of the run.

    Every baseline, not the fastest: one that does less (attention without the tangent) is there to
    be seen beside, not to be beaten.
    """
    rows = []
    for result in results:
        if result.role != "op" or result.skipped:
            continue
        rows.append(
            (
                result.op,
                f"{result.case}, {result.dtype}",
                result.provider.removeprefix("fewstep "),
                seconds(result.median_s),
                "; ".join(f"{ratio:.2f}x {name}" for name, ratio in result.ratios.items()),
                share(result),
            )
        )
    return rows


SUMMARY_COLUMNS = ("op", "case", "kernel", "median", "against", "of the limit")


def summary_table(results: Iterable[Result]) -> Table:
    """Return `summary_rows` as a table."""
    table = Table(*SUMMARY_COLUMNS)
    for row in summary_rows(results):
        table.add_row(*row)
    return table


def summary_markdown(results: Iterable[Result]) -> str:
    """Return `summary_rows` as a Markdown table."""
    rows = [SUMMARY_COLUMNS, ("---",) * len(SUMMARY_COLUMNS), *summary_rows(results)]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def reasons(results: Iterable[Result]) -> list[str]:
    """Return who has no number and why, in sentences."""
    return [f"{r.op} · {r.provider}: {r.skipped}" for r in results if r.skipped]
