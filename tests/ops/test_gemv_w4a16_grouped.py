"""gemv_w4a16_grouped: each problem as gemm_w4a16 would have it, within its bound, in one launch."""

import pytest
import torch

from fewstep import _native, ops
from fewstep.ops._register import DerivativeError
from fewstep.ops.gemm_w4a16 import dequantize_int4
from fewstep.ops.gemv_w4a16_grouped import same_bits
from helpers import DEVICES, padded, padding_intact, row_sliced, strided
from product_rules import within

IMPLS = ["reference", "native", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows, K, G: parts of 128 k and many, every group, every number of rows modulo 4.
SHAPES = [((1,), 96, 32), ((), 64, 64), ((2, 4), 160, 32), ((3,), 640, 64), ((6,), 256, 128)]
WIDTHS = (70, 1, 133)  # one CPU panel and more, tiles of 4 columns in part
FEW = (17, 1, 6)  # programs of 4 to 16 columns in part: the interpreter takes its time for each


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


def widths_for(impl):
    return FEW if impl == "triton" else WIDTHS


def weights(K, group, widths=WIDTHS, scale_dtype=torch.bfloat16, device=None):
    """Return lists w, w_scale, bias; one problem has no bias, the others' differ in dtype."""
    w = [torch.randint(0, 256, (N, K // 2), dtype=torch.uint8) for N in widths]
    w_scale = [(torch.rand(N, K // group) + 0.01).to(scale_dtype) for N in widths]
    bias = [torch.randn(N).to(dtype) for N, dtype in zip(widths, DTYPES, strict=False)]
    bias[1] = None
    lists = w, w_scale, bias
    return [[t if t is None else t.to(device) for t in tensors] for tensors in lists]


def check(x, w, w_scale, bias, impl):
    outs = ops.gemv_w4a16_grouped(x, w, w_scale, bias=bias, impl=impl)
    several = x if isinstance(x, list) else [x] * len(w)
    assert len(outs) == len(w)
    for out, x_g, w_g, s_g, b_g in zip(outs, several, w, w_scale, bias, strict=True):
        assert out.dtype == x_g.dtype
        assert out.shape == (*x_g.shape[:-1], w_g.shape[0])
        assert out.is_contiguous()
        assert out.untyped_storage().data_ptr() == outs[0].untyped_storage().data_ptr()
        weight = dequantize_int4(w_g, s_g)
        exact = x_g.double() @ weight.mT
        if b_g is not None:
            exact = exact + b_g.double()
        # gemm_w4a16's bound; tensor cores cut where other units round: 2^-23 for 2^-24.
        terms = x_g.double().abs() @ weight.abs().mT
        before = (x_g.shape[-1] + 2) * 2.0**-24 * terms + 2.0**-24 * exact.abs()
        if impl == "native" and x_g.device.type == "cuda":
            before = 2.2 * before
        assert within(out, exact, before)
    return outs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_oracle(shape, dtype, impl, device):
    rows, K, group = shape
    xs = [torch.randn(*rows, K).to(device, dtype) for _ in WIDTHS]
    check(xs[0], *weights(K, group, widths_for(impl), device=device), impl)
    check(xs, *weights(K, group, widths_for(impl), torch.float16, device), impl)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_has_the_bits_of_gemm_w4a16(dtype, isa, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CPU_ISA", isa)
    for rows, K, group in SHAPES:
        w, w_scale, bias = weights(K, group)
        x = torch.randn(*rows, K).to(dtype)
        assert same_bits(x)
        outs = ops.gemv_w4a16_grouped(x, w, w_scale, bias=bias, impl="native")
        for i, out in enumerate(outs):
            alone = ops.gemm_w4a16(x, w[i], w_scale[i], bias=bias[i], impl="native")
            assert torch.equal(out, alone)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_has_the_bits_of_gemm_w4a16_without_dots(dtype):
    for rows in (1, 2, 8) if dtype == torch.float32 else (1, 2):
        w, w_scale, bias = weights(1280, 64, FEW)  # more than one step of 32 parts
        x = torch.randn(rows, 1280).to(dtype)
        outs = ops.gemv_w4a16_grouped(x, w, w_scale, bias=bias, impl="triton")
        for i, out in enumerate(outs):
            alone = ops.gemm_w4a16(x, w[i], w_scale[i], bias=bias[i], impl="triton")
            assert torch.equal(out, alone)


def test_many_problems_of_all_widths(impl):
    widths = [1 + 37 * i % widths_for(impl)[0] for i in range(20)]
    w, w_scale, _ = weights(64, 32, widths)
    check(torch.randn(2, 64), w, w_scale, [None] * 20, impl)


def test_a_problem_without_outputs_is_passed_over(impl):
    for widths in ((0, 5, 0, 0, 7), (5, 0), (0, 0)):
        w, w_scale, _ = weights(64, 32, widths)
        check(torch.randn(3, 64), w, w_scale, [None] * len(widths), impl)


def test_empty_axes(impl):
    w, w_scale, bias = weights(64, 32)
    outs = ops.gemv_w4a16_grouped(torch.randn(0, 64), w, w_scale, bias=bias, impl=impl)
    assert [out.shape for out in outs] == [(0, N) for N in WIDTHS]
    w, w_scale = [w[0][:, :0]], [w_scale[0][:, :0]]
    outs = ops.gemv_w4a16_grouped(torch.zeros(3, 0), w, w_scale, bias=bias[:1], impl=impl)
    assert torch.equal(outs[0], bias[0].expand(3, -1))


@pytest.mark.parametrize("layout", [padded, strided, row_sliced])
def test_layouts_do_not_read_padding(layout, impl):
    w, w_scale, bias = weights(96, 32, widths_for(impl))
    bias = [b if b is None else layout(b) for b in bias]
    w, w_scale = [layout(t) for t in w], [layout(t) for t in w_scale]
    check(layout(torch.randn(3, 96)), w, w_scale, bias, impl)
    check([layout(torch.randn(3, 96)) for _ in w], w, w_scale, bias, impl)
    check(torch.randn(2, 96)[:1].expand(4, 96), w, w_scale, bias, impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_writes_only_its_outputs(dtype):
    for rows, K, group in ((1, 32, 32), (5, 160, 32), (8, 128, 128)):
        lists = weights(K, group)
        w, w_scale = ([padded(t) for t in tensors] for tensors in lists[:2])
        bias = [padded(torch.empty(0) if b is None else b) for b in lists[2]]
        x, out = (
            torch.randn(1, rows, K).to(dtype),
            padded(torch.zeros(rows * sum(WIDTHS)).to(dtype)),
        )
        _native.call("gemv_w4a16_grouped", padded(x), w, w_scale, bias, out)
        assert padding_intact(out)
        wants = ops.gemv_w4a16_grouped(x[0], *lists[:2], bias=lists[2], impl="native")
        assert torch.equal(out, torch.cat([want.reshape(-1) for want in wants]))


def test_threads_do_not_change_a_bit():
    w, w_scale, bias = weights(256, 64)
    x, threads = torch.randn(5, 256), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        ones = ops.gemv_w4a16_grouped(x, w, w_scale, bias=bias, impl="native")
    finally:
        torch.set_num_threads(threads)
    again = ops.gemv_w4a16_grouped(x, w, w_scale, bias=bias, impl="native")
    assert all(map(torch.equal, ones, again))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_non_finite_rows_stay_alone(value, impl):
    w, w_scale, bias = weights(160, 32, widths_for(impl))
    w = [t | 0x11 for t in w]  # no q is zero, so an infinity stays visible
    x = torch.randn(5, 160)
    clean = ops.gemv_w4a16_grouped(x, w, w_scale, bias=bias, impl=impl)
    x[2, 33] = value
    outs = ops.gemv_w4a16_grouped(x, w, w_scale, bias=bias, impl=impl)
    for out, before in zip(outs, clean, strict=True):
        assert not out[2].isfinite().any()
        assert torch.equal(out[[0, 1, 3, 4]], before[[0, 1, 3, 4]])


@pytest.mark.triton
def test_a_table_is_of_the_memory_that_is_there():
    """Weights that are replaced, in the same list and of the same shape, are the ones read."""
    w, w_scale, bias = weights(64, 32, FEW)
    x = torch.randn(1, 64)
    check(x, w, w_scale, bias, "triton")
    w[0], w_scale[2] = w[0].flip(0), w_scale[2].flip(0)
    check(x, w, w_scale, bias, "triton")


def test_opcheck():
    w, w_scale, bias = weights(64, 32)
    op = torch.ops.fewstep.gemv_w4a16_grouped.default
    x = torch.randn(3, 64)
    torch.library.opcheck(op, ([x], w, w_scale, bias, "native"))
    torch.library.opcheck(op, ([x, x, x + 1], w, w_scale, [None] * 3, "native"))


def test_compiles_without_graph_break():
    w, w_scale, bias = weights(64, 32)
    x = torch.randn(3, 64)

    def layers(x):
        return ops.gemv_w4a16_grouped(x, w, w_scale, bias=bias)

    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(x), layers(x)))


def test_derivatives_raise_and_are_not_lost():
    w, w_scale, bias = weights(64, 32)
    x = torch.randn(3, 64)
    op = torch.ops.fewstep.gemv_w4a16_grouped.default

    def layers(x):
        return ops.gemv_w4a16_grouped(x, w, w_scale, bias=bias)

    for call in (
        lambda: layers(x.clone().requires_grad_()),
        lambda: layers([x, x, x.clone().requires_grad_()]),
        lambda: ops.gemv_w4a16_grouped(x, w, w_scale, bias=[None, None, bias[2].requires_grad_()]),
        lambda: op([x, x, x.clone().requires_grad_()], w, w_scale, bias, "native"),
        lambda: torch.func.jvp(layers, (x,), (x,)),
        lambda: torch.func.jvp(lambda x: op([x], w, w_scale, bias, "native"), (x,), (x,)),
        lambda: torch.func.grad(lambda x: layers(x)[2].sum())(x),
    ):
        with pytest.raises(DerivativeError):
            call()
    bias[2].requires_grad_(False)
    with torch.no_grad():
        layers(x.clone().requires_grad_())


def test_outputs_may_be_written_to(impl):
    """In place, with gradients too; no other output's version changes."""
    w, w_scale, bias = weights(64, 32, widths_for(impl))
    x = torch.randn(2, 64)
    want = [out.clone() for out in ops.gemv_w4a16_grouped(x, w, w_scale, bias=bias, impl=impl)]
    outs = ops.gemv_w4a16_grouped(x, w, w_scale, bias=bias, impl=impl)
    shift = torch.ones(want[1].shape[-1], requires_grad=True)
    before = [out._version for out in outs]
    outs[1].add_(shift).sum().backward()
    assert [out._version - old for out, old in zip(outs, before, strict=True)] == [0, 1, 0]
    assert torch.equal(shift.grad, torch.full_like(shift, 2.0))
    assert torch.equal(outs[1], want[1] + 1)
    assert torch.equal(outs[0], want[0])
    assert torch.equal(outs[2], want[2])


def zeros(*shape, dtype=torch.uint8):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(9, 64)}, "x: expected at most 8 rows, got 9"),
        ({"x": torch.zeros(3, 3, 64)}, "x: expected at most 8 rows, got 9"),
        ({"x": zeros(3, 64)}, r"x: expected floating \[\.\.\., K\], got torch.uint8"),
        ({"x": torch.zeros(3, 63)}, "x: expected an even K, got 63"),
        ({"x": [torch.zeros(3, 64)] * 2}, "x: expected one tensor, or 3 in a list, got 2"),
        (
            {"x": [torch.zeros(3, 64)] * 2 + [torch.zeros(2, 64)]},
            r"x\[2\]: expected shape \[3, 64\], got \[2, 64\]",
        ),
        ({"w": []}, "w: expected at least one weight"),
        ({"w_scale": [torch.ones(70, 2)]}, "w_scale: expected 3 tensors, one for each w, got 1"),
        ({"bias": [None]}, "bias: expected 3 tensors, one for each w, got 1"),
        (
            {"w": [zeros(70, 32), zeros(1, 48), zeros(133, 32)]},
            r"problem 1: w_scale: expected bfloat16 or float16 \[1, 96 / G\]",
        ),
        (
            {"bias": [None, None, torch.ones(5)]},
            r"bias\[2\]: expected shape \[133\], got \[5\]",
        ),
        ({"impl": "cuda"}, "impl: expected one of"),
    ],
)
def test_bad_input_names_the_argument(change, message):
    w, w_scale, bias = weights(64, 32)
    kwargs = {"x": torch.zeros(3, 64), "w": w, "w_scale": w_scale, "bias": bias} | change
    with pytest.raises(ValueError, match=message):
        ops.gemv_w4a16_grouped(**kwargs)


def test_problems_of_two_groups_are_refused():
    w, w_scale, bias = weights(64, 32)
    w_scale[2] = w_scale[2][:, :1]
    with pytest.raises(ValueError, match=r"w_scale\[2\]: expected shape \[133, 2\], got"):
        ops.gemv_w4a16_grouped(torch.zeros(3, 64), w, w_scale, bias=bias)
    with pytest.raises(TypeError, match="w: expected a list of tensors, got Tensor"):
        ops.gemv_w4a16_grouped(torch.zeros(3, 64), w[0], w_scale[0])


def test_on_gpus_both_ops_share_a_kernel_for_few_plain_rows(monkeypatch):
    from types import SimpleNamespace

    apart, grouped = (ops.module(op) for op in ("gemm_w4a16", "gemv_w4a16_grouped"))
    monkeypatch.setattr(grouped, "refuse_native", lambda *_: None)
    properties = SimpleNamespace(shared_memory_per_block_optin=227 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    def fake(*shape):
        device = torch.device("cuda")
        return SimpleNamespace(shape=shape, device=device, dtype=torch.bfloat16)

    for refuse in (apart._refuse_native, lambda x: grouped._refuse_native([x])):
        assert refuse(fake(8, 3072)) is None
        assert "up to 8 rows and K above 0, got 9 x 3072" in refuse(fake(9, 3072))
        assert "in 232448 bytes of shared memory, got 263168" in refuse(fake(8, 16384))
    for end in ({"up": fake(3, 2)}, {"activation": "gelu"}, {"out_dtype": torch.int8}):
        assert "expected a product and a bias" in apart._refuse_native(fake(1, 64), **end)
    assert apart.IMPLEMENTATIONS[0].held_back == grouped.IMPLEMENTATIONS[0].held_back
    assert "not run on a GPU yet" in grouped.NO_RUN_YET


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cuda_has_the_bits_of_gemm_w4a16(shape, dtype):
    rows, K, group = shape
    w, w_scale, bias = weights(K, group, device="cuda")
    x = torch.randn(*rows, K).to("cuda", dtype)
    outs = ops.gemv_w4a16_grouped(x, w, w_scale, bias=bias, impl="native")
    for i, out in enumerate(outs):
        alone = ops.gemm_w4a16(x, w[i], w_scale[i], bias=bias[i], impl="native")
        assert torch.equal(out, alone)
