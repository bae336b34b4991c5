"""One case measured: the fp32 tangent against the fp64 oracle, and how attention was reached."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from . import CASES
from .case import Built, build
from .oracle import oracle
from .routes import Routes
from .subject import forward_jvp


@dataclass(frozen=True)
class Measurement:
    """What both runs of a case gave; `single` is kept for further calls."""

    single: Built
    output: torch.Tensor
    tangent: torch.Tensor
    expected_output: torch.Tensor
    expected_tangent: torch.Tensor
    routes: dict[str, int]


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ||actual - expected|| / ||expected||."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


@cache
def measure(name: str) -> Measurement:
    """Build a case, run both, and keep the result for the tests that share it."""
    case = CASES[name]
    single, double = build(name, case)
    routes = Routes()

    def counted(*primals: torch.Tensor) -> torch.Tensor:
        with routes:
            return double(*primals)

    expected = oracle(counted, double.primals, double.tangents, case.wide_tables)
    actual = forward_jvp(single, single.primals, single.tangents)
    return Measurement(single, *actual, *expected, routes.counts)
