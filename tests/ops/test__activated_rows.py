"""An activation before rows are quantised: what it means, its error, and who refuses what.

Implementations round activation(x) to x's dtype, where few values fall to different sides of a tie;
everything behind is tested to the bit in test__prologue.py.
"""

import pytest
import torch

from fewstep import ops, reference
from fewstep.ops._epilogue import ACTIVATIONS
from helpers import padded, padding_intact, row_sliced, steps_apart, strided

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
QUANTIZE = {
    "int8": ops.quantize_int8,
    "fp8": ops.quantize_fp8,
    "fp8 blocks": lambda x, **kwargs: ops.quantize_fp8(x, block=128, **kwargs),
}


@pytest.fixture(params=["native", "triton"])
def impl(request):
    return request.param


@pytest.fixture(params=QUANTIZE)
def quantize(request):
    return QUANTIZE[request.param]


def check(x, got, want):
    """Compare with the reference: scales to a unit of x's dtype, values within a step."""
    torch.testing.assert_close(got[1], want[1], rtol=2 * torch.finfo(x.dtype).eps, atol=0)
    apart = steps_apart(got[0], want[0])
    assert (apart <= 1).all()
    assert (apart > 0).float().mean() < 0.02


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation_comes_first(activation, dtype, quantize, impl):
    x = (torch.randn(2, 5, 192) * 3).to(dtype)
    got = quantize(x, activation=activation, impl=impl)
    check(x, got, quantize(x, activation=activation, impl="reference"))
    assert got[0].shape == (2, 5, 96 if "glu" in activation else 192)
    smooth, rotate = torch.rand(got[0].shape[-1]) + 0.5, 32
    prologue = {"smooth": smooth, "rotate": rotate, "activation": activation}
    check(x, quantize(x, **prologue, impl=impl), quantize(x, **prologue, impl="reference"))


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "chunk"])
def test_reference_is_the_tensor_between_two_layers(activation, quantize):
    """To the bit: activation(x) of x's dtype, by torch, quantised."""
    x = torch.randn(3, 64).bfloat16()
    value, switch = x.float().chunk(2, -1)
    functional = torch.nn.functional
    want = {
        "gelu": lambda: functional.gelu(x.float()),
        "gelu_tanh": lambda: functional.gelu(x.float(), approximate="tanh"),
        "silu": lambda: functional.silu(x.float()),
        "geglu": lambda: value * functional.gelu(switch),
        "swiglu": lambda: value * functional.silu(switch),
        "chunk": lambda: x.float(),
    }[activation]()
    options = {} if activation == "chunk" else {"activation": activation}
    got = quantize(x, **options, impl="reference")
    wanted = quantize(want.bfloat16(), impl="reference")
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_every_instruction_set_has_the_same_bits(isa, activation, quantize, monkeypatch):
    for dtype in DTYPES:
        x, down = (torch.randn(7, 154) * 2).to(dtype), torch.randn(3, 154).to(dtype)
        if activation == "swiglu":
            down = down[:, :77]
        want = quantize(x, activation=activation, impl="native")
        with monkeypatch.context() as patch:
            patch.setenv("FEWSTEP_CPU_ISA", isa)
            got = quantize(x, activation=activation, down=down, impl="native")
        for a, b in zip(got[:2], want, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("activation", ["gelu_tanh", "geglu"])
def test_low_is_of_the_activated_rows(activation, quantize, impl):
    x, down = torch.randn(6, 96).bfloat16(), torch.randn(5, 96).bfloat16()
    down = down[:, : 48 if activation == "geglu" else 96].contiguous()
    options = {"activation": activation, "smooth": torch.rand(down.shape[1]) + 0.5}
    q, scale, low = quantize(x, down=down, **options, impl=impl)
    check(x, (q, scale), quantize(x, **options, impl="reference"))
    v = reference._prologue.activated(x, activation).double()
    # Each v may be a unit off, which a sum of K sees in full; low is rounded once.
    unit = torch.finfo(x.dtype).eps
    terms = v.abs() @ down.double().abs().mT
    exact = v @ down.double().mT
    assert ((low.double() - exact).abs() <= unit * (terms * 0.05 + exact.abs())).all()


@pytest.mark.parametrize("layout", [padded, strided, row_sliced])
def test_layouts_do_not_read_padding(layout, quantize, impl):
    x = layout(torch.randn(3, 70))
    check(
        x,
        quantize(x, activation="geglu", impl=impl),
        quantize(x.clone(), activation="geglu", impl="reference"),
    )
    if layout is padded:
        assert padding_intact(x)


def test_empty(quantize, impl):
    q, scale = quantize(torch.zeros(0, 64), activation="geglu", impl=impl)
    assert q.shape == (0, 32)
    assert scale.shape[:1] == (0,)


def test_a_bad_switch_is_seen_in_its_row_alone(quantize, impl):
    x = torch.randn(3, 64)
    clean = quantize(x, activation="swiglu", impl=impl)
    x[1, 40] = float("nan")
    q, scale = quantize(x, activation="swiglu", impl=impl)
    assert scale[1].isnan().all()
    keep = torch.tensor([0, 2])
    assert torch.equal(scale[keep], clean[1][keep])
    assert torch.equal(q[keep].view(torch.uint8), clean[0][keep].view(torch.uint8))


def test_compiles_without_graph_break(quantize):
    x = torch.randn(3, 64)

    def run(x):
        return quantize(x, activation="geglu", rotate=32)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(compiled(x), run(x), strict=True))


def test_bad_input_names_the_argument(quantize):
    x = torch.randn(3, 65)
    with pytest.raises(ValueError, match=r"activation: expected None or one of gelu.*got 'relu'"):
        quantize(x, activation="relu")
    with pytest.raises(ValueError, match="x: expected an even last axis for geglu, got 65"):
        quantize(x, activation="geglu")
    with pytest.raises(ValueError, match=r"smooth: expected floating \[32\]"):
        quantize(x[:, :64], activation="swiglu", smooth=torch.ones(64))
    with pytest.raises(ValueError, match=r"down: expected torch.float32 \[R, 32\]"):
        quantize(x[:, :64], activation="swiglu", down=torch.ones(2, 64))
