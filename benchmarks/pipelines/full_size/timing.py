"""Seconds and bytes of one call, and the call captured in a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["capture", "distance", "memory", "seconds", "wait"]


def wait(device: torch.device) -> None:
    """Wait for what was given to a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Return how long a call takes, from an idle device to an idle device."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def memory(call: Callable[[], Any], device: torch.device) -> int | None:
    """Return the most bytes that a call takes beside what is there already; None on a CPU."""
    if device.type != "cuda":
        return None
    wait(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    wait(device)
    return torch.cuda.max_memory_allocated(device) - before


def capture(call: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], Tensor], int]:
    """Return the call as a replay of its CUDA graph, and the bytes of the graph's own memory."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    taken = torch.cuda.memory_reserved(device) - before

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay, taken


def distance(out: Tensor, want: Tensor) -> float:
    """Return how far a tensor is off another in L2, relative to that."""
    return float((out.double() - want.double()).norm() / want.double().norm())
