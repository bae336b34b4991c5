"""Hopper kernels on the host: compiles them against tests/cuda/emulation and calls them."""

import ctypes
import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fewstep import _native

ROOT = Path(__file__).parents[1]
HERE = ROOT / "tests" / "cuda"
# fewstep::DType, in order.
DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.bool,
]


class View(ctypes.Structure):
    """fewstep::TensorView."""

    _fields_ = (
        ("data", ctypes.c_size_t),
        ("dtype", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("sizes", ctypes.c_int64 * 5),
        ("strides", ctypes.c_int64 * 5),
    )

    @classmethod
    def of(cls, x):
        """Return the view of a tensor, or an empty one for None."""
        view = cls()
        if x is not None:
            view.data, view.dtype, view.ndim = x.data_ptr(), DTYPES.index(x.dtype), x.dim()
            view.sizes[: x.dim()] = x.shape
            view.strides[: x.dim()] = x.stride()
        return view


def to_device(tensors):
    """Return the tensors in copies of their storages on the GPU, and what copies these back."""
    storages = {}

    def on_device(x):
        flat = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
        key = flat.data_ptr(), x.dtype
        storages.setdefault(key, (flat, flat.cuda()))
        return storages[key][1].as_strided(x.shape, x.stride(), x.storage_offset())

    def copy_back():
        torch.cuda.synchronize()
        for flat, copy in storages.values():
            flat.copy_(copy)

    return [x if x is None else on_device(x) for x in tensors], copy_back


class Device:
    """The op's kernel on a Hopper GPU, called as the emulated one is."""

    def __init__(self, op):
        self.op = f"{op}_sm90"

    def run(self, tensors, is_causal, scale):
        """Run on copies of the tensors' storages, and copy these back."""
        moved, copy_back = to_device(tensors)
        split = 17 if "backward" in self.op else 10  # is_causal comes before the outputs
        kernel = getattr(_native._C.cuda, self.op)
        stream = torch.cuda.current_stream().cuda_stream
        kernel(*moved[:split], is_causal, *moved[split:], scale, stream)
        copy_back()


def targets():
    """Return where kernels run, for params: the host, and a Hopper GPU if one is there."""
    has = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return ["host", *([pytest.param("device", marks=pytest.mark.gpu)] if has else [])]


def build(op, folder, *flags):
    """Compile the kernels of an op for the host, with more flags; skip without a compiler."""
    return compile_for_host(f"{op}_sm90_emulated.cpp", folder, *flags)


def compile_for_host(source, folder, *flags):
    """Compile and load a file of tests/cuda with the emulation."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    target = (folder / source).with_suffix(".so")
    command = [compiler, "-std=c++17", "-O2", "-shared", "-fPIC", "-x", "c++"]
    command += [f"-I{HERE / 'emulation'}", f"-I{ROOT / 'csrc' / 'include'}"]
    subprocess.run([*command, *flags, str(HERE / source), "-o", str(target)], check=True)
    return load(target)


def compile_once(source, tmp_path_factory):
    """As `compile_for_host`, by the first of a run's processes that asks; others wait for it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each has its own in the run's
        folder = folder.parent
    target = (folder / source).with_suffix(".so")
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return load(target) if target.exists() else compile_for_host(source, folder)


def load(target):
    """Return a compiled library; its `run` returns an error or nothing."""
    library = ctypes.CDLL(str(target))
    library.run.restype = ctypes.c_char_p
    return library


def call(library, tensors, is_causal, scale):
    """Run with the tensors, some of them None, in the order of the native contract."""
    if isinstance(library, Device):
        return library.run(tensors, is_causal, scale)
    views = (View * len(tensors))(*map(View.of, tensors))
    present = (ctypes.c_bool * len(tensors))(*(x is not None for x in tensors))
    error = library.run(views, present, is_causal, ctypes.c_double(scale))
    if error:
        raise ValueError(error.decode())
    return None
