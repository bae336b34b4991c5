"""What the row kernels share: tiles of [B, N, C] views are read and written only where masked."""

import pytest
import torch
import triton
import triton.language as tl
from fewstep.kernels._common import present, strides_of
from fewstep.kernels._rows import load_tile, store_tile

from helpers import DEVICES, padded, padding_intact

pytestmark = pytest.mark.triton


@triton.jit
def _copy(x_ptr, y_ptr, xb, xn, yb, yn, N, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    b, n = rows // N, rows % N
    mask = (rows < 2 * N)[:, None] & (cols < C)[None, :]
    tile = load_tile(x_ptr, xb, xn, b, n, cols, mask)
    store_tile(y_ptr, yb, yn, b, n, cols, tile, mask)


@pytest.mark.parametrize("device", DEVICES)
def test_a_tile_is_copied_and_nothing_beside_it(device):
    x = torch.randn(2, 3, 5, device=device)
    for source in (x, x[:1].expand(2, 3, 5), x[:, :1].expand(2, 3, 5)):
        source = source if 0 in source.stride() else padded(source)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            out = padded(torch.zeros(2, 3, 5, dtype=dtype, device=device))
            _copy[(1,)](source, out, *strides_of(2, source, out), 3, 5, ROWS=8, COLUMNS=8)
            assert torch.equal(out, source.to(dtype))  # rounded to nearest, ties to even
            assert padding_intact(out)


def test_what_is_absent_has_a_stand_in_and_no_strides():
    x = torch.zeros(2, 3, 5)
    assert present(x, None, x)[0] is x
    assert strides_of(2, x, None) == [15, 5, 0, 0]
