"""The bridge to `fewstep._C`: tensors to views, the device guard, the current stream.

`_C` knows no torch (docs/adr/0001-torch-free-bindings.md): it reads pointers, sizes and strides
through the C functions that torch.Tensor offers to DLPack consumers. torch is imported first
because the CPU kernels resolve their OpenMP symbols to the runtime that torch loads.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_C: Any = None
_missing: str | None = None
try:
    _C = importlib.import_module("fewstep._C")
except ImportError as error:  # a source tree that was never built: doctor says so, ops refuse
    _missing = f"the native library is not built ({error})"

if _C is not None and not hasattr(_C, "read_tensors"):
    _missing = f"the native library is of an older version, build it again: {_C.__file__}"
    _C = None
if _C is not None:
    _C.read_tensors(Tensor, Tensor.__dlpack_c_exchange_api__)


def build_info() -> dict[str, Any]:
    """Return what `_C` was built with, or {"missing": reason}."""
    return dict(_C.build_info()) if _C is not None else {"missing": _missing}


def cpu_isa() -> str | None:
    """Return the instruction set the CPU kernels use now: avx512_vnni, avx2 or portable."""
    return _C.cpu_isa() if _C is not None else None


def _kernel(op: str, device: torch.device) -> str:
    """Return what the native `op` is called for a device: on Hopper `<op>_sm90`, if it exists."""
    special = f"{op}_sm90"
    if device.type == "cuda" and hasattr(_C.cuda, special):
        return special if torch.cuda.get_device_capability(device) == (9, 0) else op
    return op


def unavailable(op: str, device: torch.device) -> str | None:
    """Return why the native `op` cannot run on `device`, or None if it can."""
    if _C is None:
        return _missing
    kernels = getattr(_C, device.type, None)
    if kernels is None:
        return f"there are no native kernels for device type '{device.type}'"
    if hasattr(kernels, _kernel(op, device)):
        return None
    if device.type == "cuda" and not _C.build_info()["cuda"]:
        return f"built without CUDA kernels ({_C.build_info()['cuda_reason']})"
    if hasattr(kernels, f"{op}_sm90"):
        return "the native kernel is for GPUs of capability 9.0 (H100, H200)"
    return f"there is no native {device.type} kernel for this op"


def cpu_kernel(op: str) -> Any:
    """Return the native CPU kernel `op`, a function of views and numbers; None if not built."""
    return None if _C is None else getattr(_C.cpu, op, None)


def aligned(x: Tensor | None, unit: int = 16) -> Tensor | None:
    """Return x if its memory starts at a multiple of `unit` bytes, else a copy; None for None."""
    return x if x is None or x.data_ptr() % unit == 0 else x.clone()


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """Return where the memory of these starts, 0 for None: for kernels that get a table of it."""
    return [0 if x is None else x.data_ptr() for x in tensors]


def _flat(args: tuple[Any, ...]) -> tuple[Any, ...] | list[Any]:
    return args[0] if isinstance(args[0], list) else args


def call(op: str, *args: Any) -> None:
    """Run the native kernel `op` on the device of its first tensor.

    Tensors in `args`, and in lists, are read as views; other values pass through. On CUDA the
    tensors' device is made current and the current stream is appended as the last argument.
    """
    device = next(value.device for value in _flat(args) if isinstance(value, Tensor))
    if device.type == "cuda":
        function = getattr(_C.cuda, _kernel(op, device))
        with torch.cuda.device(device):
            function(*args, torch.cuda.current_stream().cuda_stream)
    else:
        getattr(getattr(_C, device.type), op)(*args)
