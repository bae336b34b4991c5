"""Peers with threads of their own, each in a process of its own, timed in turns with the rest.

Another package's threads stay awake for a while after a call, on the cores of whoever is timed
next. So a worker process per peer loads the benchmark file, makes the same input sets from the same
seed, and sleeps on a pipe. One turn at a time is given, to a worker or to a provider of this
process, and it ends only when the threads that worked have gone to sleep.

Whoever has a turn has slept through all others'. So everybody makes one call untimed, on another
input set, which wakes the threads, and then the timed one.

    this process               worker
    ("prepare", case, sets) -> makes its inputs and calls, and calls each; why it can't, or None
    ("turn", i)             -> a call on set i - 1, then a timed call on set i; its seconds, or why
                               there are none

A peer that has failed, ended or not answered is out of that case (`PeerError`); a process that is
no more is started anew for the next one.
"""

from __future__ import annotations

import functools
import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from . import discover
from .inputs import input_sets
from .measure import forget_compiled, warm_up
from .model import Benchmark, Case, Provider, Thunk

READY_SECONDS = 300.0  # to import a package and to make a case's layers
ENDING_SECONDS = 10.0  # for a process that has let go of its pipe: to leave its exit code
_TICK, _ASLEEP, _PATIENCE = 2e-3, 2e-4, 0.25


class PeerError(Exception):
    """The peer `name` has no turns any more, for the reason in the message."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name = name


def settle() -> None:
    """Sleep until the threads of this process do: until its clock of CPU time stands still."""
    end = time.perf_counter() + _PATIENCE
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(_TICK)
        if time.process_time() - before < _ASLEEP:
            return


def turn(wake: Thunk, call: Thunk) -> float:
    """Return the seconds of `call`, the threads awake from `wake`; leave them asleep."""
    wake()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    settle()
    return seconds


def turns(thunks: Sequence[Thunk]) -> list[Callable[[], float]]:
    """Return the calls of a provider of this process as turns."""
    return [functools.partial(turn, thunks[i - 1], call) for i, call in enumerate(thunks)]


class TurnClock:
    """Samples of turns, which time themselves."""

    def sample(self, calls: Sequence[Callable[[], float]]) -> list[float]:
        """Return the seconds of each turn, taken in this order."""
        return [call() for call in calls]


def _prepare(benchmark: Benchmark, provider: Provider, index: int, count: int) -> Any:
    case, cpu = benchmark.cases[index], torch.device("cpu")
    forget_compiled()
    thunks = []
    for inputs in input_sets(benchmark, case, cpu, count):
        made = provider.make(case, *inputs)
        if isinstance(made, str):
            return made
        warm_up(made, cpu, 0.0)
        thunks.append(made)
    settle()
    return turns(thunks)


def _serve(pipe: Connection, path: Path, op: str, name: str, threads: int) -> None:
    """Answer the requests of one harness for the provider `name` of one benchmark file."""
    torch.set_num_threads(threads)
    benchmark = discover.load(path.parents[1], op)
    provider = next(p for p in benchmark.providers if p.name == name)
    calls: Any = None
    while True:
        try:
            request, *arguments = pipe.recv()
        except EOFError:  # the harness is gone, or done
            return
        try:
            if request == "turn":
                answer = calls[arguments[0]]()
            else:
                calls = None  # the last case's layers are freed first
                calls = _prepare(benchmark, provider, *arguments)
                answer = calls if isinstance(calls, str) else None
        except Exception as error:  # the package's own; the rest is timed without it
            answer = f"{type(error).__name__}: {error}".splitlines()[0]
        pipe.send(answer)


class Worker:
    """One peer's process."""

    def __init__(self, benchmark: Benchmark, provider: Provider) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.name, self.cases = provider.name, list(benchmark.cases)
        self.pipe, theirs = spawn.Pipe()
        arguments = (theirs, benchmark.path, benchmark.op, self.name, torch.get_num_threads())
        self.process = spawn.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def _ask(self, *request: Any) -> Any:
        """Return the answer; where it is a reason or there is none, raise PeerError."""
        try:
            self.pipe.send(request)
            answer = self.pipe.recv() if self.pipe.poll(READY_SECONDS) else TimeoutError
        except (OSError, EOFError):  # it has ended
            self.process.join(ENDING_SECONDS)
            answer = f"its process ended with exit code {self.process.exitcode}"
            self.close()
        if answer is TimeoutError:
            self.process.kill()
            self.close()
            answer = f"TimeoutError: no answer within {READY_SECONDS:g} s"
        if isinstance(answer, str):
            raise PeerError(self.name, answer)
        return answer

    def prepare(self, case: Case, count: int) -> list[Callable[[], float]] | str:
        """Return the peer's turns on `count` input sets, or why there are none."""
        try:
            self._ask("prepare", self.cases.index(case), count)
        except PeerError as error:
            return str(error)
        return [functools.partial(self._ask, "turn", i) for i in range(count)]

    @property
    def closed(self) -> bool:
        """Whether the process was ended, or found to have."""
        return self.pipe.closed

    def close(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.join(1.0)
        self.process.kill()
        self.process.join()


class Workers:
    """The workers of one benchmark, started as their peers are first needed."""

    def __init__(self, benchmark: Benchmark, device: torch.device) -> None:
        self.benchmark, self.device = benchmark, device
        self.started: dict[str, Worker] = {}

    def take(self, provider: Provider) -> Worker | None:
        """Return the worker of a provider, None where it is timed in this process."""
        wanted = provider.package is not None and self.device.type == "cpu"
        if not wanted or self.benchmark.path is None:
            return None
        worker = self.started.get(provider.name)
        if worker is None or worker.closed:
            worker = self.started[provider.name] = Worker(self.benchmark, provider)
        return worker

    def close(self) -> None:
        """End all of them."""
        for worker in self.started.values():
            worker.close()
