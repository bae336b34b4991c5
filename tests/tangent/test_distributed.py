"""fewstep.jvp of DDP and FSDP2 modules: two gloo processes, right tangents and gradients."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "ending"), [("ddp", "right"), ("ddp_unused", "raises"), ("fsdp2", "right")]
)
def test_right_or_raises(kind, ending, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, HERE / "distributed.py", str(rank), tmp_path / "store", kind],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = []
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
        assert output.endswith(f"{ending}\n")
