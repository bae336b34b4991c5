"""The physical limits, measured in the same run and interleaved with everyone else.

A copy moves 2 x its size (read + write). A square matrix product does 2 n^3 operations; int8 goes
through `torch._int_mm` (0.9 of the VNNI peak on CPUs), never through oneDNN's quantised linear.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from .measure import cache_bytes
from .model import Case, Provider, Thunk


def _copy_bytes(device: torch.device) -> int:
    # Nothing of the last call may be left in the cache; a GPU also needs a while to reach its rate.
    return (8 if device.type == "cuda" else 2) * cache_bytes(device)


@functools.lru_cache(maxsize=2)
def _copy_buffers(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.randn(_copy_bytes(device) // 4, device=device)
    return source, torch.empty_like(source)


def copy_limit() -> Provider:
    """Return the rate of a large copy, bytes read plus bytes written."""

    def make(case: Case, *inputs: Any) -> Thunk:
        source, target = _copy_buffers(_device(inputs))
        return lambda: target.copy_(source)

    def amount(case: Case, device: torch.device) -> float:
        return 2.0 * _copy_bytes(device)

    return Provider("copy", make, "limit", resource="bytes", amount=amount)


def _side(device: torch.device) -> int:
    return 8192 if device.type == "cuda" else 1024


@functools.lru_cache(maxsize=4)
def _factors(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    n = _side(device)
    if dtype == torch.int8:
        a, b = (torch.randint(-127, 128, (n, n), dtype=dtype, device=device) for _ in range(2))
    else:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return a, b.t()


def matmul_limit(dtype: torch.dtype | None = None, only: str | None = None) -> Provider:
    """Return the rate of a large matrix product in `dtype` (the case's dtype if None).

    With `only`, "cpu" or "cuda", it is a limit on that type of device alone.
    """

    def make(case: Case, *inputs: Any) -> Thunk | str:
        if only not in (None, _device(inputs).type):
            return f"it is the limit on {only} only"
        kind = dtype or case.dtype
        a, b = _factors(_device(inputs), kind)
        if kind == torch.int8:
            return lambda: torch._int_mm(a, b)
        if kind == torch.float8_e4m3fn:
            one = torch.ones((), device=a.device)
            return lambda: torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16)
        return lambda: a @ b

    def amount(case: Case, device: torch.device) -> float:
        return 2.0 * _side(device) ** 3

    name = "matmul" if dtype is None else f"matmul {str(dtype).removeprefix('torch.')}"
    return Provider(name, make, "limit", resource="flops", amount=amount)


def _device(inputs: tuple[Any, ...]) -> torch.device:
    return next(value.device for value in inputs if isinstance(value, torch.Tensor))
