"""What forecast_apply and snapshot_store share: their Triton kernels, and a ring that both use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fewstep import ops


@pytest.mark.slow
def test_compiles_for_hopper():
    """No spills; see `_hopper.py`. The interpreter takes more than the compiler does."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    child = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("_hopper.py")), "slots", "tokens"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-2000:]


@pytest.mark.parametrize("impl", ["reference", "native", "triton"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8], ids=str)
def test_a_line_is_forecast_from_two_stored_points(dtype, impl):
    """2 S_0 - S_1 goes on straight; the errors of both slots come with these weights."""
    start, change = torch.randn(2, 3, 64), torch.randn(2, 3, 64) / 8
    columns = 32 if dtype == torch.uint8 else 64
    ring, scale = torch.zeros(2, 2, 3, columns).to(dtype), torch.zeros(2, 2, 3, 2)
    for slot, x in enumerate((start + change, start)):
        ops.snapshot_store(x, ring, slot=slot, scale=scale, group=32, impl=impl)
    weights = torch.tensor([2.0, -1.0])
    y = ops.forecast_apply(ring, weights, scale=scale, group=32, impl=impl)
    if dtype == torch.float8_e4m3fn:
        bound = 2.0**-4 * (2 * (start + change).abs() + start.abs()) + 2.0**-8 * scale.amax()
    else:
        bound = (scale[0] + scale[1] / 2).repeat_interleave(32, -1)
    assert ((y - start - 2 * change).abs() <= bound * 1.0001).all()
