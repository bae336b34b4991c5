"""What a benchmark file declares: cases, providers, and the work of a case."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

Thunk = Callable[[], Any]
Role = Literal["op", "baseline", "limit"]


@dataclass(frozen=True)
class Case:
    """One problem size of a named model: `Case("FLUX.1 1024px", {"B": 1, "S": 4096}, dtype)`.

    `case["S"]` reads the shape. `devices` says where the case makes sense; `quick` puts it into
    `--quick` runs; `options` holds whatever else the file's own functions want to know.
    """

    name: str
    shape: Mapping[str, int]
    dtype: torch.dtype
    devices: tuple[str, ...] = ("cpu", "cuda")
    quick: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, symbol: str) -> int:
        return self.shape[symbol]


@dataclass(frozen=True)
class Provider:
    """One way to do the work.

    `make(case, *inputs)` gets one input set, prepares whatever is not to be timed (weights,
    casts) and returns the call to time, or a sentence saying why it can't run here. An op's
    provider names its `impl`, which must pass the op's gate first. A limit does `amount` units of
    `resource` per call instead of the case's work: its rate bounds everyone else's.
    `unless(case, *inputs)` is asked before `make` and says why it can't run, or returns None.
    `package` names the other package that a peer runs: a record carries its version, and on the CPU
    it is timed in a process of its own (apart.py). On devices other than `devices` it is left out.
    `state` makes a context in which it passes its gate and is called; a sample leaves out entering.
    """

    name: str
    make: Callable[..., Thunk | str]
    role: Role = "op"
    impl: str | None = None
    resource: Literal["bytes", "flops"] | None = None
    amount: Callable[[Case, torch.device], float] | None = None
    unless: Callable[..., str | None] | None = None
    package: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    state: Callable[[], AbstractContextManager[Any]] | None = None


@dataclass(frozen=True)
class Benchmark:
    """Everything about one op.

    inputs       (case, device) -> one set of inputs, a tuple; called once per rotated set
    flops        (case) -> floating-point (or integer) operations of one call
    bytes_moved  (case) -> the fewest bytes: each input read once, each output written once
    path         the file that declares it, where discover.load has read one
    """

    op: str
    cases: Sequence[Case]
    inputs: Callable[[Case, torch.device], tuple[Any, ...]]
    providers: Sequence[Provider]
    flops: Callable[[Case], float]
    bytes_moved: Callable[[Case], float]
    path: Path | None = None

    def select(self, device: torch.device, quick: bool = False) -> list[Case]:
        """Return the cases for a device; `quick` keeps those marked so, or else the first."""
        cases = [case for case in self.cases if device.type in case.devices]
        return ([case for case in cases if case.quick] or cases[:1]) if quick else cases
