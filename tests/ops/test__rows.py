"""What the row kernels share: tiles of [B, N, C] views are read and written only where masked, and
which axes are B and which N.
"""

import pytest
import torch
import triton
import triton.language as tl
from fewstep.kernels._common import strides_of
from fewstep.kernels._rows import load_tile, store_tile

from fewstep import ops
from fewstep.ops._rows import choose_split, fold, fold_broadcast
from helpers import DEVICES, padded, padding_intact, relative_error

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


X = (2, 3, 5, 8)


@pytest.mark.parametrize(
    "shape",
    [(2, 3, 1, 8), (3, 1, 8), (1, 3, 1, 8), (2, 1, 1, 8), (8,), (1, 3, 5, 8), (3, 5, 8), X],
    ids=str,
)
def test_a_modulation_is_not_expanded_in_memory(shape):
    x, v = torch.randn(X), torch.randn(shape)
    split = choose_split(x, [], v)
    view = fold_broadcast(v, x, split)
    assert torch.equal(view, fold(v.expand(X), split))
    # The exception: a row per frame for all batch items repeats frames inside of the batch.
    if shape not in ((3, 1, 8), (1, 3, 1, 8)):
        assert view.data_ptr() == v.data_ptr()
    assert view.untyped_storage().nbytes() <= 2 * v.nbytes


def test_layouts_decide_too():
    """What is strided so that only some axes become one is not copied for a small operand."""
    x = torch.randn(2, 6, 5, 8)[:, :3]
    assert choose_split(x, [], torch.randn(2, 1, 1, 8)) == 1
    assert fold(x, 1).data_ptr() == x.data_ptr()
    assert choose_split(torch.randn(2, 3, 6, 8)[:, :, :5], [], torch.randn(2, 1, 1, 8)) == 2


@pytest.mark.parametrize("impl", ["native", "triton"])
@pytest.mark.parametrize("shape", [(2, 3, 1, 8), (3, 1, 8)], ids=str)
def test_gradients_of_a_modulation_per_frame_are_summed_in_float32(impl, shape):
    """256 rows of bfloat16 each: rounded one by one they would be off by many units."""
    torch.manual_seed(0)
    x, y, d = (torch.randn(2, 3, 256, 8).bfloat16() for _ in range(3))
    v, w = (torch.randn(shape).bfloat16().requires_grad_() for _ in range(2))
    results = (
        ops.norm_jvp(x, y, scale=v, t_scale=w, impl=impl),
        ops.modulate_jvp(x, y, v, None, y, w, impl=impl),
    )
    exact = [t.detach().double().requires_grad_() for t in (v, w)]
    wanted = (
        ops.norm_jvp(x.double(), y.double(), scale=exact[0], t_scale=exact[1]),
        ops.modulate_jvp(x.double(), y.double(), exact[0], None, y.double(), exact[1]),
    )
    for got, want in zip(results, wanted, strict=True):
        got = torch.autograd.grad(got, (v, w), (d, d))
        want = torch.autograd.grad(want, exact, (d.double(), d.double()))
        for ours, theirs in zip(got, want, strict=True):
            assert ours.shape == theirs.shape
            assert relative_error(ours, theirs) < torch.finfo(torch.bfloat16).eps / 2
