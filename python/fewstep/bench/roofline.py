"""A roofline: each case's rate over its arithmetic intensity, under the rates that were measured.

    rate <= min(matmul rate, bytes rate * FLOP / byte)

Both roofs are limits measured in the same records (`fewstep.bench.limits`), the best of their
medians; without a copy among them only the flat one is drawn. FLOPs and bytes are the case's own:
what a baseline does beyond them lowers its mark. (Williams, Waterman, Patterson: Roofline,
CACM 52(4), 2009.)

matplotlib draws it: the demo has it already, and nobody should write axes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from .run import Result

_MARKERS = "oDs^v<>pP*X"


def _rate(results: Iterable[Result], resource: str) -> float | None:
    """Return the highest measured limit in flops or bytes per second."""
    rates = [
        getattr(r, f"{resource}_per_s")
        for r in results
        if r.role == "limit" and not r.skipped and getattr(r, resource) > 0
    ]
    return max(rates, default=None)


def roofline_picture(
    path: Path, results: Sequence[Result], title: str, baselines: Sequence[str] = ()
) -> None:
    """Write a PNG with one panel per dtype: kernels filled, the named baselines hollow.

    Raises:
        ValueError: no kernel in `results` was timed together with a limit in FLOP/s.
    """
    timed = [r for r in results if not r.skipped]
    shown = [r for r in timed if r.role == "op" or r.provider in baselines]
    shown = [r for r in shown if r.flops > 0 and r.bytes > 0]
    dtypes = list(dict.fromkeys(r.dtype for r in shown if r.role == "op"))
    dtypes = [d for d in dtypes if _rate((r for r in timed if r.dtype == d), "flops")]
    if not dtypes:
        raise ValueError(
            "results: expected a timed kernel and a limit in FLOP/s, as `fewstep bench ops` "
            f"records them, got {len(results)} results without"
        )
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    size = (5.2 * len(dtypes), 4.6)
    figure, axes = plt.subplots(
        1, len(dtypes), figsize=size, layout="constrained", squeeze=False, sharey=True
    )
    providers = list(dict.fromkeys(r.provider for r in shown))
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        here = [r for r in shown if r.dtype == dtype]
        peak = _rate((r for r in timed if r.dtype == dtype), "flops")
        bandwidth = _rate(timed, "bytes")
        assert peak is not None
        intensities = [r.flops / r.bytes for r in here]
        low, high = min(intensities) / 2, max(intensities) * 2
        axis.axhline(peak, color="black", linewidth=1)
        axis.annotate(
            f"matmul {peak / 1e9:,.0f} GFLOP/s", (high, peak), ha="right", va="bottom", fontsize=8
        )
        if bandwidth is not None:
            low = min(low, peak / bandwidth / 2)
            axis.plot([low, peak / bandwidth], [low * bandwidth, peak], color="black", linewidth=1)
            axis.annotate(
                f"copy {bandwidth / 1e9:.3g} GB/s",
                (peak / bandwidth, peak),
                xytext=(0, -4),
                textcoords="offset points",
                va="top",
                fontsize=8,
            )
        for provider in providers:
            points = [(r.flops / r.bytes, r.flops_per_s) for r in here if r.provider == provider]
            if not points:
                continue
            kernel = provider not in baselines
            axis.scatter(
                *zip(*points, strict=True),
                marker=_MARKERS[providers.index(provider) % len(_MARKERS)],
                facecolor="#2563eb" if kernel else "none",
                edgecolor="#2563eb" if kernel else "#6b7280",
                label=provider,
                zorder=3,
            )
        axis.set(xscale="log", yscale="log", xlim=(low, high), title=dtype, xlabel="FLOP / byte")
        for ticks, unit in ((axis.xaxis, 1.0), (axis.yaxis, 1e9)):
            ticks.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ticks.set_major_formatter(FuncFormatter(lambda x, _, unit=unit: f"{x / unit:,.10g}"))
            ticks.set_minor_formatter(NullFormatter())
        axis.grid(visible=True, alpha=0.3)
    axes[0, 0].set_ylabel("GFLOP/s")
    marks = {}
    for axis in axes[0]:
        handles, labels = axis.get_legend_handles_labels()
        marks |= dict(zip(labels, handles, strict=True))
    figure.legend(
        marks.values(), marks.keys(), fontsize=8, loc="outside lower center", ncols=len(marks)
    )
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
