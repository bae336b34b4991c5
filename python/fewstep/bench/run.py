"""One benchmark from gate to records: make inputs, check, time, count, compare."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ..ops import _gate
from ..ops._select import UnsupportedError
from .apart import PeerError, TurnClock, Workers, turns
from .environment import package_version
from .inputs import input_sets, nbytes
from .kernels import kernel_names
from .measure import Budget, Within, cache_bytes, clock, forget_compiled, interleave, warm_up
from .model import Benchmark, Case, Provider, Thunk

SCHEMA = 1


@dataclass(frozen=True)
class Settings:
    """Where and how thoroughly to measure.

    `peers` leaves out cases that no other package does; `kernels` notes the names of the kernels
    that a GPU ran.
    """

    device: torch.device
    quick: bool = False
    budget: Budget = field(default_factory=Budget)
    peers: bool = False
    kernels: bool = False


@dataclass(frozen=True)
class Result:
    """One provider on one case. `skipped` holds the reason when there is no number.

    `ratios` maps each baseline to its time over this one's (above 1: this is faster).
    `of_limit` is the share of the physical limit reached: the least time the measured rates allow,
    over this time; `limit` names the rate that binds. `package` is the other package that a peer
    runs, with its version. `kernels` names a GPU's kernels, the longest first, where asked for.
    """

    op: str
    case: str
    shape: dict[str, int]
    dtype: str
    provider: str
    role: str
    impl: str | None
    skipped: str | None = None
    samples: int = 0
    median_s: float = math.nan
    q1_s: float = math.nan
    q3_s: float = math.nan
    flops: float = 0.0
    bytes: float = 0.0
    flops_per_s: float = math.nan
    bytes_per_s: float = math.nan
    ratios: dict[str, float] = field(default_factory=dict)
    of_limit: float | None = None
    limit: str | None = None
    input_sets: int = 0
    rotated_bytes: int = 0
    cache_bytes: int = 0
    package: str | None = None
    kernels: list[str] = field(default_factory=list)

    @property
    def iqr_s(self) -> float:
        """The spread: third minus first quartile."""
        return self.q3_s - self.q1_s

    def record(self, environment: dict[str, Any]) -> dict[str, Any]:
        """Return the JSON record: these fields and the machine's; no NaN."""
        fields = dataclasses.asdict(self) | {"iqr_s": self.iqr_s}
        fields = {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in fields.items()
        }
        return {"schema": SCHEMA} | fields | environment

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Result:
        """Return the result in a JSON record."""
        names = {f.name for f in dataclasses.fields(cls)}
        values = {name: value for name, value in record.items() if name in names}
        for name in ("median_s", "q1_s", "q3_s", "flops_per_s", "bytes_per_s"):
            values[name] = math.nan if values.get(name) is None else values[name]
        return cls(**values)


def gate(
    op: str, provider: Provider, device: torch.device, gates: dict[str, str | None]
) -> str | None:
    """Return why an implementation may not be timed: its correctness gate failed. Runs it once."""
    if provider.role != "op" or provider.impl is None:
        return None
    # One kernel in another state is another kernel.
    key = provider.impl if provider.state is None else provider.name
    if key not in gates:
        try:
            with provider.state() if provider.state else contextlib.nullcontext():
                _gate.check(op, provider.impl, device)
            gates[key] = None
        except UnsupportedError as error:
            gates[key] = str(error)
        except Exception as error:  # whatever went wrong, the answer is the same: no number
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            gates[key] = f"refused: its correctness gate failed: {first}"
    return gates[key]


def _reason(provider: Provider, case: Case, inputs: tuple[Any, ...]) -> str | None:
    return provider.unless(case, *inputs) if provider.unless else None


def _thunks(
    provider: Provider,
    case: Case,
    sets: list[tuple[Any, ...]],
    settings: Settings,
    check: Callable[[], str | None],
) -> list[Thunk] | str:
    """Return the provider's call per input set, warmed up, or why it can't or may not be timed."""
    if (reason := _reason(provider, case, sets[0])) is not None:
        return reason
    thunks: list[Thunk] = []
    for inputs in sets if provider.role != "limit" else sets[:1]:
        made = provider.make(case, *inputs)
        if isinstance(made, str):
            return made
        reason = None if thunks else check()
        if reason is not None:
            return reason
        thunks.append(made if provider.state is None else Within(provider.state, made))
    try:
        warm_up(thunks[0], settings.device, settings.budget.warmup_seconds)
    except UnsupportedError as error:
        return str(error)
    return thunks


def compare(results: list[Result], limits: dict[str, tuple[str, float]]) -> list[Result]:
    """Fill in the ratios to every baseline and the share of the limit.

    `limits` maps a limit's name to its resource ("bytes" or "flops") and measured rate per second.
    """
    baselines = {r.provider: r.median_s for r in results if r.role == "baseline" and not r.skipped}
    # Of two rates for one resource, the higher is the limit.
    binding: dict[str, tuple[str, float]] = {}
    for name, (resource, rate) in sorted(limits.items(), key=lambda item: item[1][1]):
        binding = {n: kept for n, kept in binding.items() if kept[0] != resource}
        binding[name] = (resource, rate)
    compared = []
    for result in results:
        if result.skipped or result.role == "limit":
            compared.append(result)
            continue
        ratios = {name: seconds / result.median_s for name, seconds in baselines.items()}
        ratios.pop(result.provider, None)
        floors = {
            name: getattr(result, resource) / rate for name, (resource, rate) in binding.items()
        }
        limit = max(floors, key=lambda name: floors[name], default=None)
        of_limit = floors[limit] / result.median_s if limit is not None else None
        compared.append(dataclasses.replace(result, ratios=ratios, limit=limit, of_limit=of_limit))
    return compared


def _version(provider: Provider) -> str | None:
    """Return a peer's package with its version, None where it is not installed or not needed."""
    version = provider.package and package_version(provider.package)
    return f"{provider.package} {version}" if version else None


def run_case(
    benchmark: Benchmark,
    case: Case,
    settings: Settings,
    gates: dict[str, str | None],
    on_step: Callable[[float], None] = lambda fraction: None,
    workers: Workers | None = None,
) -> list[Result]:
    """Return one result per provider, the skipped ones with their reason.

    Where one of `workers` takes part, everybody is timed in turns (apart.py).
    """
    device = settings.device
    forget_compiled()
    sets = input_sets(benchmark, case, device)
    results, timed, limits = [], [], {}
    peers = [p for p in benchmark.providers if p.package and not _reason(p, case, sets[0])]
    apart = {p.name: worker for p in peers if workers and (worker := workers.take(p))}
    for provider in benchmark.providers:
        if device.type not in provider.devices:
            continue
        if settings.peers and not peers and provider.package is None:
            continue
        blank = Result(
            benchmark.op,
            case.name,
            dict(case.shape),
            str(case.dtype).removeprefix("torch."),
            provider.name,
            provider.role,
            provider.impl,
            package=_version(provider),
        )
        check = functools.partial(gate, benchmark.op, provider, device, gates)
        if provider.name in apart:
            thunks = apart[provider.name].prepare(case, len(sets))
        else:
            thunks = _thunks(provider, case, sets, settings, check)
        if isinstance(thunks, str):
            results.append(dataclasses.replace(blank, skipped=thunks))
        else:
            timed.append((provider, blank, thunks))
    timer = clock(device)
    if apart:
        timed = [(p, blank, c if p.name in apart else turns(c)) for p, blank, c in timed]
        timer = TurnClock()
    samples = None
    while samples is None:
        try:
            samples = interleave([c for _, _, c in timed], timer, settings.budget, on_step)
        except PeerError as error:  # from the start without it, so that all share every round
            (failed,) = (blank for p, blank, _ in timed if p.name == error.name)
            results.append(dataclasses.replace(failed, skipped=f"in its turn: {error}"))
            timed = [entry for entry in timed if entry[0].name != error.name]
    named = settings.kernels and device.type == "cuda"
    for (provider, blank, thunks), seconds in zip(timed, samples, strict=True):
        q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
        flops, moved = benchmark.flops(case), benchmark.bytes_moved(case)
        if provider.role == "limit":
            assert provider.resource is not None
            assert provider.amount is not None
            amount = provider.amount(case, device)
            # A ceiling is the best that was seen, not the middle.
            limits[provider.name] = (provider.resource, amount / min(seconds))
            flops, moved = (amount, 0.0) if provider.resource == "flops" else (0.0, amount)
        results.append(
            dataclasses.replace(
                blank,
                samples=len(seconds),
                median_s=median,
                q1_s=q1,
                q3_s=q3,
                flops=flops,
                bytes=moved,
                flops_per_s=flops / median,
                bytes_per_s=moved / median,
                input_sets=len(sets),
                rotated_bytes=sum(map(nbytes, sets)),
                cache_bytes=cache_bytes(device),
                # Behind all samples of the case: a profiler slows the host's launches.
                kernels=kernel_names(thunks[0], device) if named else [],
            )
        )
    order = {provider.name: i for i, provider in enumerate(benchmark.providers)}
    return compare(sorted(results, key=lambda r: order[r.provider]), limits)


def run_benchmark(
    benchmark: Benchmark,
    settings: Settings,
    on_step: Callable[[Case, float], None] = lambda case, fraction: None,
) -> Iterator[list[Result]]:
    """Yield the results of each case; `on_step(case, fraction)` reports progress within it."""
    gates: dict[str, str | None] = {}
    with contextlib.closing(Workers(benchmark, settings.device)) as workers:
        for case in benchmark.select(settings.device, settings.quick):
            step = functools.partial(on_step, case)
            yield run_case(benchmark, case, settings, gates, step, workers)
