"""gemm_grouped's Hopper kernel, on the host and on a GPU where there is one: several products in
one launch, and outputs in 8 bits by limits.

The products themselves are test_gemm_w8a8_sm90.py's: a problem has the bits that it has alone.
"""

import ctypes
import math

import pytest
import torch

from cuda_emulation import View, compile_once, targets, to_device
from cuda_gemm8 import NAMES, TILINGS, is_e4m3, operands, run
from fewstep import _native, ops
from fewstep.bench.products import asked_tiling
from helpers import padded, padding_intact

OPS = ["gemm_w8a8", "gemm_fp8"]
ALL = [*NAMES, "limit", "scale", "amax", "exceeded"]
SMALL = 2  # 64 x 128 tiles


@pytest.fixture(scope="module")
def grouped_on_host(tmp_path_factory):
    return compile_once("gemm_grouped_sm90_emulated.cpp", tmp_path_factory)


@pytest.fixture(params=targets())
def kernels(request):
    """Return the emulated kernels of groups and of single products, or twice None for a GPU's."""
    if request.param == "device":
        return None, None
    names = ("grouped_on_host", "gemm8_on_host")
    return tuple(map(request.getfixturevalue, names))


def call(library, problems, activation, tiling):
    """Run the kernel on problems, each a dict of tensors by name."""
    tensors = [problem.get(name) for problem in problems for name in ALL]
    with asked_tiling(tiling):
        if library is None:
            return call_on_device(tensors, len(problems), activation)
        views = (View * len(tensors))(*map(View.of, tensors))
        present = (ctypes.c_bool * len(tensors))(*(x is not None for x in tensors))
        error = library.run(views, present, len(problems), activation.encode())
        if error:
            raise ValueError(error.decode())


def call_on_device(tensors, count, activation):
    moved, copy_back = to_device(tensors)
    columns = [moved[i :: len(ALL)] for i in range(len(ALL))]
    *first, gate, residual, out = columns[: len(NAMES)]
    limits = [[x for x in column if x is not None] for column in columns[len(NAMES) :]]
    stream = torch.cuda.current_stream().cuda_stream
    kernel = _native._C.cuda.gemm_grouped_sm90
    kernel(*first, activation, gate, residual, *limits, out, stream)
    copy_back()


def run_group(library, problems, activation="", out_dtype=torch.float32, tiling=SMALL):
    """Return the outputs, around which nothing is written; q where there are limits."""
    given = []
    for problem in problems:
        N = problem["w"].shape[0] // (2 if "glu" in activation else 1)
        out = padded(torch.zeros(problem["a"].shape[0], N, dtype=out_dtype), 64)
        plain = {k: x.view(torch.uint8) if is_e4m3(x) else x for k, x in problem.items()}
        given.append({**plain, "out": out})
    call(library, given, activation, tiling)
    assert all(padding_intact(problem["out"], 64) for problem in given)
    return [problem["out"] for problem in given]


def stream(op, M, N, K, R=0, width=None):
    """Return a problem with all that a layer of a stream may have."""
    given = operands(op, M, N, K)
    given["bias"] = torch.randn(N)
    if R:
        for name, rows in (("low", M), ("up", N)):
            wide = torch.zeros(rows, R + -R % 8).bfloat16()
            given[name] = wide[:, :R].copy_(torch.randn(rows, R))
    if width:
        given["gate"], given["residual"] = torch.randn(1, width), torch.randn(M, width)
    return given


@pytest.mark.parametrize(
    ("op", "tiling"), [("gemm_fp8", 0), *(("gemm_w8a8", tiling) for tiling in TILINGS)]
)
def test_problems_have_the_bits_that_they_have_alone(kernels, op, tiling):
    """More tiles than blocks, groups that skip each other's, slabs that differ by the branch."""
    grouped, single = kernels
    N, K = 268, 144
    problems = [
        stream(op, 140, N, K, R=5, width=N // 2),
        stream(op, 3, N, K),
        stream(op, 70, N, K, R=72),
    ]
    got = run_group(grouped, problems, "geglu", torch.bfloat16, tiling)
    for problem, out in zip(problems, got, strict=True):
        options = {"activation": "geglu", "out_dtype": torch.bfloat16, "tiling": tiling}
        assert torch.equal(out, run(single, op, problem, **options))


def test_more_slabs_than_slots_in_turns(kernels):
    problems = [stream("gemm_w8a8", M, 20, 10 * 128) for M in (330, 5, 130)]
    for problem, out in zip(problems, run_group(kernels[0], problems), strict=True):
        assert torch.equal(out, run(kernels[1], "gemm_w8a8", problem, tiling=SMALL))


def test_what_is_empty_is_left_out(kernels):
    problems = [stream("gemm_w8a8", M, 24, 32) for M in (0, 6, 0)]
    got = run_group(kernels[0], problems)
    assert [len(out) for out in got] == [0, 6, 0]
    assert torch.equal(got[1], run(kernels[1], "gemm_w8a8", problems[1], tiling=SMALL))


def bits(x):
    return x.view(torch.uint8) if is_e4m3(x) else x


def with_limits(problems, limits):
    """Return the problems with limits, and outputs for what is found, as the kernel must not."""
    whole = []
    for problem, limit in zip(problems, limits, strict=True):
        M = len(limit)
        found = {"scale": padded(torch.full((M,), 7.0), 8), "amax": padded(torch.ones(M), 8)}
        found["exceeded"] = torch.full((1,), 9, dtype=torch.int32)
        whole.append({**problem, "limit": limit, **found})
    return whole


@pytest.mark.parametrize(
    ("op", "tiling", "activation", "N"),
    [
        ("gemm_w8a8", 0, "swiglu", 262),
        ("gemm_w8a8", 1, "gelu", 140),
        ("gemm_w8a8", 2, "swiglu", 136),
        ("gemm_fp8", 0, "gelu", 203),
        ("gemm_fp8", 1, "swiglu", 136),
        ("gemm_fp8", 2, "gelu", 136),
    ],
)
def test_limits_that_are_the_rows_own(kernels, op, tiling, activation, N):
    """q and scale of quantize_int8 and quantize_fp8, to the bit; nothing exceeds."""
    width = N // 2 if activation == "swiglu" else N
    problems = [stream(op, M, N, 48, R=8, width=width) for M in (130, 7)]
    exact = run_group(kernels[0], problems, activation, tiling=tiling)
    exact[0][3] = 0  # of the limit alone
    limits = [v.abs().amax(1) for v in exact]
    problems = with_limits(problems, limits)
    dtype = torch.int8 if op == "gemm_w8a8" else torch.uint8
    got = run_group(kernels[0], problems, activation, dtype, tiling)
    quantize = ops.quantize_int8 if op == "gemm_w8a8" else ops.quantize_fp8
    for i, (problem, v, out) in enumerate(zip(problems, exact, got, strict=True)):
        q, scale = quantize(v, impl="reference")
        assert torch.equal(out, bits(q))
        assert torch.equal(problem["scale"], scale)
        assert padding_intact(problem["scale"], 8)
        assert padding_intact(problem["amax"], 8)
        same = [m for m in range(len(v)) if i != 0 or m != 3]
        assert torch.equal(problem["amax"][same], limits[i][same])
        # The row without a limit leaves nothing of itself, and says so.
        assert problem["exceeded"].item() == (width if i == 0 else 0)


@pytest.mark.parametrize("op", OPS)
def test_outputs_beyond_their_limits(kernels, op):
    """Cut off, counted one by one over tiles of rows and columns, and the amax is what it is."""
    M, N = 70, 300
    problem = stream(op, M, N, 32)
    (v,) = run_group(kernels[0], [problem])
    limit = v.abs().amax(1) * (0.3 + torch.rand(M))
    (given,) = with_limits([problem], [limit])
    dtype = torch.int8 if op == "gemm_w8a8" else torch.uint8
    (q,) = run_group(kernels[0], [given], out_dtype=dtype)
    form = torch.int8 if op == "gemm_w8a8" else torch.float8_e4m3fn
    top = 127 if op == "gemm_w8a8" else 448
    step = limit / top
    cut = v.clamp(-limit[:, None], limit[:, None])
    values = q.view(form).float() * given["scale"][:, None]
    # Half a step of int8; half a unit of three bits, or of a subnormal, of e4m3.
    bound = step[:, None] * 0.5
    if op == "gemm_fp8":
        bound = torch.maximum(cut.abs() * 2.0**-4, step[:, None] * 2.0**-10)
    assert ((values - cut).abs() <= bound * 1.0001).all()
    assert torch.equal(given["scale"], step)
    assert torch.equal(given["amax"], v.abs().amax(1))
    assert given["exceeded"].item() == (v.abs() > limit[:, None]).sum().item() > 0


@pytest.mark.parametrize("M", [(130, 3), (3, 4)])
def test_what_is_found_is_zeroed_once(grouped_on_host, M):
    """Together or one by one: a clear a problem where the outputs lie as the op has them."""
    problems = [stream("gemm_w8a8", rows, 140, 48) for rows in M]
    problems = with_limits(problems, [torch.full((rows,), 3.0) for rows in M])
    apart = grouped_on_host.clears()
    want = run_group(grouped_on_host, problems, out_dtype=torch.int8, tiling=-1)
    apart = grouped_on_host.clears() - apart
    beside = []
    for problem, rows in zip(problems, M, strict=True):
        found = padded(torch.full((2 * rows + 1,), 9, dtype=torch.int32), 8)
        scale, amax = found[: 2 * rows].view(torch.float32).split(rows)
        names = {"scale": scale, "amax": amax, "exceeded": found[2 * rows :], "all": found}
        beside.append({**problem, **names})
    once = grouped_on_host.clears()
    got = run_group(grouped_on_host, beside, out_dtype=torch.int8, tiling=-1)
    assert (apart, grouped_on_host.clears() - once) == (6, 2)
    for a, b, q, wanted in zip(problems, beside, got, want, strict=True):
        assert torch.equal(q, wanted)
        assert all(torch.equal(a[name], b[name]) for name in ("scale", "amax", "exceeded"))
        assert padding_intact(b["all"], 8)


def test_rows_that_are_not_finite(kernels):
    problem = stream("gemm_w8a8", 6, 260, 32)
    problem["residual"] = torch.zeros(6, 260)
    problem["residual"][1, 259], problem["residual"][2, 3] = math.nan, math.inf
    limit = torch.tensor([100.0, 100, 100, math.inf, math.nan, 100])
    (given,) = with_limits([problem], [limit])
    run_group(kernels[0], [given], out_dtype=torch.int8)
    assert given["scale"].isnan().tolist() == [False, True, True, True, True, False]
    assert given["amax"].isfinite().tolist() == [True, False, False, True, True, True]
    # An infinity exceeds a hundred, nothing infinity; no NaN is within, and nothing within a NaN.
    assert given["exceeded"].item() == 2 + 260


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": torch.zeros(20, 64, dtype=torch.int8)}, "w: expected one N, one K and one"),
        ({"limit": torch.ones(6)}, "limit, scale, amax, exceeded: expected"),
        ({"a_scale": None}, "a, a_scale, w, w_scale: expected 2 tensors each, got 1"),
        ({"bias": torch.zeros(19)}, "bias: expected size 24"),
    ],
)
def test_what_the_kernel_refuses(grouped_on_host, change, message):
    problems = [stream("gemm_w8a8", 6, 24, 32), stream("gemm_w8a8", 6, 24, 32) | change]
    with pytest.raises(ValueError, match=message):
        run_group(grouped_on_host, problems)


def test_too_many_problems(grouped_on_host):
    with pytest.raises(ValueError, match="expected at most 8 products, got 9"):
        run_group(grouped_on_host, [stream("gemm_w8a8", 2, 24, 32)] * 9)


# Of estimates in gemm8_plan.h: what they are meant to say. A record replaces them.
@pytest.mark.parametrize(
    ("M", "N", "K", "pays", "tiling"),
    [
        ((4096, 512), 9216, 3072, True, 0),  # FLUX.1's qkv: 10 rounds of tiles, not 9 and more
        ((4096, 512), 3072, 3072, False, 0),  # 3.3 rounds cost four; 2.9 and a small one less
        ((4096, 4096, 4096, 512, 512, 512), 3072, 3072, True, 0),  # q, k and v of both
        ((512, 512), 3072, 3072, True, 0),
        ((512,), 3072, 3072, True, 1),
    ],
)
def test_choice_for_several_products(grouped_on_host, M, N, K, pays, tiling):
    rows = (ctypes.c_int * len(M))(*M)
    given = False, rows, len(M), N, K // 128, 132
    assert bool(grouped_on_host.grouping_pays(*given) & 1) is pays
    assert grouped_on_host.choose_tiling(*given) == tiling


@pytest.mark.parametrize("M", [(130, 3), (3, 4)])
def test_the_plan_only_decides_how(kernels, M):
    """Together or one by one: the bits are those of single launches."""
    problems = [stream("gemm_w8a8", rows, 140, 48, R=8) for rows in M]
    problems = with_limits(problems, [torch.full((rows,), 3.0) for rows in M])
    got = run_group(kernels[0], problems, out_dtype=torch.int8, tiling=-1)
    found = [(q, problem["exceeded"].item()) for q, problem in zip(got, problems, strict=True)]
    for problem, (q, exceeded) in zip(problems, found, strict=True):
        (alone,) = run_group(kernels[0], [problem], out_dtype=torch.int8)
        assert torch.equal(q, alone)
        assert problem["exceeded"].item() == exceeded > 0
