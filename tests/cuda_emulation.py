"""Hopper kernels on the host: compiles them against tests/cuda/emulation and calls them."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

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


def build(op, folder, *macros):
    """Compile the kernels of an op for the host, with some macros; skip without a compiler."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    target = folder / f"{op}.so"
    command = [compiler, "-std=c++17", "-O2", "-shared", "-fPIC", "-x", "c++"]
    command += [f"-D{macro}" for macro in macros]
    command += [f"-I{HERE / 'emulation'}", f"-I{ROOT / 'csrc' / 'include'}"]
    source = HERE / f"{op}_sm90_emulated.cpp"
    subprocess.run([*command, str(source), "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    library.run.restype = ctypes.c_char_p
    return library


def call(library, tensors, is_causal, scale):
    """Run with the tensors, some of them None, in the order of the native contract."""
    views = (View * len(tensors))(*map(View.of, tensors))
    present = (ctypes.c_bool * len(tensors))(*(x is not None for x in tensors))
    error = library.run(views, present, is_causal, ctypes.c_double(scale))
    if error:
        raise ValueError(error.decode())
