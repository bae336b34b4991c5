"""The rotated input sets of a case: made from one seed, so every process has the same."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .measure import cache_bytes
from .model import Benchmark, Case

MAX_SETS = 64


def nbytes(values: Any) -> int:
    """Return the bytes of the tensors in a nest of tuples, lists and dicts."""
    if isinstance(values, Tensor):
        return values.numel() * values.element_size()
    if isinstance(values, dict):
        return sum(map(nbytes, values.values()))
    return sum(map(nbytes, values)) if isinstance(values, (tuple, list)) else 0


def input_sets(
    benchmark: Benchmark, case: Case, device: torch.device, count: int | None = None
) -> list[tuple[Any, ...]]:
    """Return `count` different input sets, or so many that their total is twice the cache.

    At most 64, at least 2.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        first = benchmark.inputs(case, device)
        if count is None:
            wanted = math.ceil(2 * cache_bytes(device) / max(nbytes(first), 1))
            count = min(max(wanted, 2), MAX_SETS)
        return [first, *(benchmark.inputs(case, device) for _ in range(count - 1))]
