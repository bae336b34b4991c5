"""Which kernels a call launches, by torch's profiler.

A name says what a library chose: of `torch._int_mm` on a Hopper GPU whether it is one of Ampere's
(mma.sync) or Hopper's own (wgmma), and of this library's products that they ran at all.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# This library's products in low precision: csrc/cuda's and kernels/triton's names.
PRODUCTS = re.compile(r"gem[mv][48]?_\w*(sm90|w\da\d|fp8)")
PRODUCT_OPS = "fewstep::gem"  # gemm_*, gemv_*
_COMPILED = "triton_"  # Inductor names its kernels after what went into them


@dataclass(frozen=True)
class Kernel:
    """A kernel of one call: how often it was launched, and its seconds in all."""

    name: str
    launches: int
    seconds: float


@dataclass(frozen=True)
class Launches:
    """What one call did: a GPU's kernels, those with the most time first; on a CPU how often each
    of this library's ops ran.
    """

    kernels: list[Kernel]
    ops: dict[str, int]

    def products(self, device: torch.device) -> int:
        """Return how many low-bit products ran: kernels on a GPU, calls of the ops on a CPU."""
        if device.type == "cuda":
            found = ((k.name, k.launches) for k in self.kernels)
            return sum(count for name, count in found if is_product(name))
        return sum(count for op, count in self.ops.items() if op.startswith(PRODUCT_OPS))


def is_product(kernel: str) -> bool:
    """Return whether a kernel is one of this library's low-bit products."""
    return PRODUCTS.search(kernel) is not None and not kernel.startswith(_COMPILED)


def launches(call: Callable[[], Any], device: torch.device) -> Launches:
    """Return what one call launches; it should have been called before, so nothing is compiled."""
    cuda = device.type == "cuda"
    # The thousands of calls on the host would take longer to read than all else.
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as trace:
        call()
        if cuda:
            torch.cuda.synchronize(device)
    found: dict[str, tuple[int, float]] = {}
    ops: dict[str, int] = {}
    for event in trace.events():
        if event.device_type == DeviceType.CUDA:
            count, seconds = found.get(event.name, (0, 0.0))
            found[event.name] = count + 1, seconds + event.time_range.elapsed_us() / 1e6
        elif event.name.startswith("fewstep::"):
            ops[event.name] = ops.get(event.name, 0) + 1
    kernels = [Kernel(name, *what) for name, what in found.items()]
    return Launches(sorted(kernels, key=lambda k: -k.seconds), ops)


def kernel_names(call: Callable[[], Any], device: torch.device) -> list[str]:
    """Return the names of the kernels that one call launches, the longest-running first."""
    return [kernel.name for kernel in launches(call, device).kernels]
