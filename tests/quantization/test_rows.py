"""QuantizedRows: what a quantised layer takes in the place of the tensor that it would quantise."""

import pytest
import torch
from torch import nn

from fewstep import ops
from fewstep.quantization import QuantizedRows, QuantLinear

K, N = 64, 48
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(scheme, dtype=torch.float32):
    return QuantLinear.from_linear(nn.Linear(K, N).to(dtype), scheme)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a8-g32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_computes_the_same_bits(scheme, dtype):
    layer, x = make(scheme, dtype), torch.randn(2, 5, K).to(dtype)
    rows = QuantizedRows.of(x)
    got, want = layer(rows), layer(x)
    assert got.dtype == dtype
    assert torch.equal(got, want)


def test_it_stands_for_a_tensor():
    x = torch.randn(2, 5, K).bfloat16()
    rows = QuantizedRows.of(x)
    assert (rows.shape, rows.ndim, rows.device) == (x.shape, x.ndim, x.device)
    q, scale = ops.quantize_int8(x)
    assert torch.equal(rows.q, q)
    assert torch.equal(rows.scale, scale)


def test_to_changes_what_layers_return():
    layer, rows = make("w8a8"), QuantizedRows.of(torch.randn(5, K).bfloat16())
    for arguments in ((torch.float32,), ("cpu", torch.float32)):
        wide = rows.to(*arguments)
        assert wide.dtype == torch.float32
        assert layer(wide).dtype == torch.float32
        assert torch.equal(layer(wide).bfloat16(), layer(rows))
    assert rows.to("meta").q.is_meta
    assert rows.to("meta").scale.is_meta


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ("w8a8-r4", "the layer has a low-rank branch"),
        ("w4a8-r4", "the layer has a low-rank branch"),
        ("w4a16", "the layer takes activations as they are"),
        ("fp8", "the layer takes activations in e4m3"),
    ],
)
def test_layers_that_need_the_values_say_so(scheme, reason):
    with pytest.raises(TypeError, match=f"x: expected a tensor, because {reason}"):
        make(scheme)(QuantizedRows.of(torch.randn(5, K)))


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-h16", "w4a8-h32"])
@pytest.mark.parametrize("smoothed", [False, True])
def test_rows_are_prepared_as_the_layer_prepares_them(scheme, smoothed):
    layer, x = make(scheme), torch.randn(5, K)
    layer.smooth = torch.rand(K) + 0.5 if smoothed else None
    rows = QuantizedRows.of(x, layer.smooth, layer.rotate)
    assert torch.equal(layer(rows), layer(x))
    assert torch.equal(layer(rows.to(torch.float32)), layer(x))
    for wrong in ((layer.smooth, 64), (torch.ones(K), layer.rotate)):
        with pytest.raises(ValueError, match=r"x: expected rows quantised for w.a8.*, got factors"):
            layer(QuantizedRows.of(x, *wrong))


def test_the_width_is_checked():
    with pytest.raises(ValueError, match=r"x: expected \[\.\.\., 64\], got \[5, 65\]"):
        make("w8a8")(QuantizedRows.of(torch.randn(5, K + 1)))


def test_a_plain_layer_does_not_take_them():
    with pytest.raises(TypeError):
        nn.Linear(K, N)(QuantizedRows.of(torch.randn(5, K)))


@pytest.mark.parametrize("smoothed", [False, True])
def test_compiles_without_graph_break(smoothed):
    layer, x = make("w8a8-h16"), torch.randn(5, K)
    layer.smooth = torch.rand(K) + 0.5 if smoothed else None

    def shared(x):
        rows = QuantizedRows.of(x, layer.smooth, layer.rotate)
        return layer(rows) + layer(rows.to(torch.float32))

    compiled = torch.compile(shared, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), shared(x))
