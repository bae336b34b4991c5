"""hopper_layout.h against CuTe's layouts, where nvcc and the headers are."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def cutlass():
    """Return CUTLASS's include folder: the one that was named, or what the build fetched."""
    named = os.environ.get("FEWSTEP_CUTLASS_DIR")
    if named:
        return Path(named) / "include"
    fetched = ROOT.glob("build/cmake-*/cutlass-*/cutlass_library/source/include")
    return next(fetched, None)


def test_layouts_are_those_of_cute(tmp_path):
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    include = cutlass()
    if nvcc is None or include is None:
        pytest.skip("needs nvcc and the CUTLASS headers of a CUDA build")
    command = [nvcc, "-std=c++17", "-O1", "--expt-relaxed-constexpr"]
    command += ["-gencode=arch=compute_90a,code=sm_90a", f"-I{ROOT / 'csrc' / 'include'}"]
    target = tmp_path / "layouts"
    source = HERE / "hopper_layout.cu"
    subprocess.run([*command, f"-I{include}", str(source), "-o", str(target)], check=True)
    result = subprocess.run([str(target)], capture_output=True, text=True)
    # CuTe complains of addresses that the host doesn't have; they are not compared.
    lines = [x for x in result.stdout.splitlines() if "cast_smem_ptr_to_uint" not in x]
    assert (lines, result.returncode) == (["all equal"], 0)
