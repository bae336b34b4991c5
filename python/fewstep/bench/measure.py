"""Timing: providers interleaved round by round, each call on the next of many input sets.

On a CPU a sample is one call on the host clock. On CUDA it is the device time between two events
around one call; a read of a buffer of several L2 sizes before it evicts what the last call left
(without leaving dirty lines to write back) and, with a short sleep, keeps the device busy while the
host enqueues, so that launch gaps are counted only where a provider makes them itself.
"""

from __future__ import annotations

import functools
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .model import Thunk

_DEFAULT_CACHE = 32 << 20
_SLEEP_CYCLES = 200_000


@dataclass(frozen=True)
class Budget:
    """How long to measure: rounds are added until `seconds` are spent, within the bounds."""

    seconds: float = 2.0
    min_rounds: int = 9
    max_rounds: int = 200
    warmup_seconds: float = 0.05


QUICK = Budget(seconds=0.3, min_rounds=5, max_rounds=50, warmup_seconds=0.02)


@functools.cache
def cache_bytes(device: torch.device) -> int:
    """Return the size of the last-level cache (L2 on a GPU)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [0]
    for entry in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = entry.read_text().strip()
        factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * factor)
    return max(sizes) or _DEFAULT_CACHE


@dataclass(frozen=True)
class Within:
    """A call that needs a state of the process, which is set up and undone outside of its sample.

    Called by itself, as while warming up, it does both.
    """

    state: Callable[[], AbstractContextManager[Any]]
    call: Thunk

    def __call__(self) -> Any:
        """Call in the state."""
        with self.state():
            return self.call()


@contextmanager
def _timed(call: Thunk) -> Iterator[Thunk]:
    """Give what of a call its sample is of."""
    if not isinstance(call, Within):
        yield call
        return
    with call.state():
        yield call.call


class HostClock:
    """Samples on the host clock."""

    def sample(self, calls: Sequence[Thunk]) -> list[float]:
        """Return the seconds of each call, run in this order."""
        seconds = []
        for call in calls:
            with _timed(call) as timed:
                start = time.perf_counter()
                timed()
                seconds.append(time.perf_counter() - start)
        return seconds


class DeviceClock:
    """Samples between CUDA events, with eviction before each."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.evict = torch.randn(3 * cache_bytes(device) // 4, device=device)

    def sample(self, calls: Sequence[Thunk]) -> list[float]:
        """Return the seconds of each call, run in this order."""
        pairs = []
        with torch.cuda.device(self.device):
            for call in calls:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                with _timed(call) as timed:
                    self.evict.sum()
                    torch.cuda._sleep(_SLEEP_CYCLES)
                    start.record()
                    timed()
                    end.record()
                pairs.append((start, end))
            torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def clock(device: torch.device) -> HostClock | DeviceClock:
    """Return the clock for a device."""
    return DeviceClock(device) if device.type == "cuda" else HostClock()


def forget_compiled() -> None:
    """Have torch.compile begin anew: past 8 shapes of one function it runs in eager, unasked."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def warm_up(call: Thunk, device: torch.device, seconds: float) -> None:
    """Call at least twice and for `seconds`: compilation, allocation, frequency."""
    end = time.perf_counter() + seconds
    for count in range(1000):
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if count >= 1 and time.perf_counter() > end:
            return


def interleave(
    providers: Sequence[Sequence[Thunk]],
    timer: HostClock | DeviceClock,
    budget: Budget,
    on_round: Callable[[float], None] = lambda fraction: None,
) -> list[list[float]]:
    """Return samples per provider; `providers[p][i]` is provider p's call on input set i.

    Every call takes the next set, whoever makes it, so no provider finds what the one before left
    in the cache; the order within a round is shuffled, so that no one always follows the same.
    """
    samples: list[list[float]] = [[] for _ in providers]
    order = list(range(len(providers)))
    shuffle = random.Random(0)
    turn, start = 0, time.perf_counter()
    for done in range(budget.max_rounds):
        elapsed = time.perf_counter() - start
        if done >= budget.min_rounds and elapsed > budget.seconds:
            break
        by_time = elapsed / budget.seconds if budget.seconds else 1.0
        on_round(min(by_time, done / budget.min_rounds, 1.0))
        shuffle.shuffle(order)
        calls = []
        for p in order:
            calls.append(providers[p][turn % len(providers[p])])
            turn += 1
        for p, seconds in zip(order, timer.sample(calls), strict=True):
            samples[p].append(seconds)
    return samples
