"""Results for people: one table per case, by rich."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from .run import Result


def seconds(value: float) -> str:
    """Return a time with three digits and a fitting unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * scale >= 1 or unit == "us":
            return f"{value * scale:.3g} {unit}"
    raise AssertionError


def case_table(results: Sequence[Result]) -> Table:
    """Return the table of one case: times, rates, ratios to every baseline, share of the limit."""
    first = results[0]
    shape = " ".join(f"{symbol}={size}" for symbol, size in first.shape.items())
    table = Table(
        title=f"{first.op} · {first.case} · {shape} · {first.dtype}", title_justify="left"
    )
    table.add_column("provider")
    for name in ("median", "IQR", "GB/s", "GFLOP/s"):
        table.add_column(name, justify="right")
    baselines = [r.provider for r in results if r.role == "baseline" and not r.skipped]
    for name in baselines:
        table.add_column(f"vs {name}", justify="right")
    table.add_column("of limit", justify="right")
    for result in results:
        if result.skipped:
            table.add_row(result.provider, f"[dim]{result.skipped}[/dim]")
            continue
        ratios = [result.ratios.get(name) for name in baselines]
        share = "" if result.of_limit is None else f"{result.of_limit:.0%} {result.limit}"
        table.add_row(
            f"[bold]{result.provider}[/bold]" if result.role == "op" else result.provider,
            seconds(result.median_s),
            seconds(result.iqr_s),
            f"{result.bytes_per_s / 1e9:.1f}" if result.bytes else "",
            f"{result.flops_per_s / 1e9:.0f}" if result.flops else "",
            *("" if ratio is None else f"{ratio:.2f}x" for ratio in ratios),
            share,
        )
    return table


def reasons(results: Sequence[Result]) -> list[str]:
    """Return who has no number and why, in sentences."""
    return [f"{r.op} · {r.provider}: {r.skipped}" for r in results if r.skipped]
