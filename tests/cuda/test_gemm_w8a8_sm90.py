"""gemm_w8a8's Hopper kernel, run on the host (tests/cuda/emulation stands in for the chip) and on a
GPU where there is one; and the arithmetic of its tiles.

e4m3 is the same kernel: test_gemm_fp8_sm90.py has what differs.
"""

import ctypes

import pytest
import torch

from cuda_gemm8 import (
    AT_SIZE,
    NAMES,
    TILINGS,
    call_on_host,
    check,
    needs_hopper,
    operands,
    run,
    with_end,
)
from fewstep import _native, ops
from fewstep.bench.products import asked_tiling
from fewstep.ops import _gemm, _select
from fewstep.ops._gemm_hopper import loadable, refuse_hopper
from helpers import padded

OP = "gemm_w8a8"
ACTIVATIONS = ["", "gelu", "gelu_tanh", "silu", "geglu", "swiglu"]
SMALL = 2  # 64 x 128 tiles


# A tile and a bit of the next in every direction, over more tiles than blocks; less than one.
@pytest.mark.parametrize(
    ("tiling", "shape"),
    [(0, (130, 264, 272)), (1, (260, 136, 144)), (2, (200, 130, 400)), (2, (1, 1, 16))],
)
def test_sums_are_exact(gemm8, tiling, shape):
    given = operands(OP, *shape)
    given["a_scale"], given["w_scale"] = torch.ones(shape[0]), torch.ones(shape[1])
    out = run(gemm8, OP, given, tiling=tiling)
    assert torch.equal(out.double(), given["a"].double() @ given["w"].double().mT)


@pytest.mark.parametrize(("tiling", "M"), [(0, 20), (1, 260), (SMALL, 330)])
def test_many_slabs_reuse_the_slots(gemm8, tiling, M):
    """More than the ring holds; in turns, by groups that skip each other's, several tiles each."""
    given = operands(OP, M, 20, 17 * 128)
    given["a_scale"], given["w_scale"] = torch.ones(M), torch.ones(20)
    given["a"][:, :1500], given["w"][:, :1500] = -128, 127
    out = run(gemm8, OP, given, tiling=tiling)
    # Beyond 2^24: rounded once, as torch rounds.
    assert torch.equal(out, (given["a"].double() @ given["w"].double().mT).float())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ends(gemm8, activation, out_dtype):
    # Columns by fours; a gate's row serves 35.
    dtypes = torch.bfloat16, torch.float32, out_dtype
    given = operands(OP, 70, 136, 64)
    check(gemm8, OP, given, activation=activation, out_dtype=out_dtype, tiling=SMALL)
    N = 68 if "glu" in activation else 136
    given = with_end(given, N, 2, dtypes)
    check(gemm8, OP, given, activation=activation, out_dtype=out_dtype, tiling=SMALL)


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize(("activation", "N"), [("gelu", 259), ("swiglu", 262)])
def test_columns_that_are_no_fours(gemm8, tiling, activation, N):
    M, width = (66 if tiling == SMALL else 130), N // 2 if activation == "swiglu" else N
    dtypes = torch.float32, torch.float16, torch.bfloat16
    given = with_end(operands(OP, M, N, 48), width, M, dtypes)
    check(gemm8, OP, given, activation=activation, out_dtype=torch.float16, tiling=tiling)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("tiling", "R"), [(SMALL, 8), (SMALL, 32), (SMALL, 40), (1, 72), (0, 136), (2, 1), (2, 33)]
)
def test_low_rank_branch(gemm8, tiling, R, dtype):
    given = operands(OP, 70, 70, 32)
    for name in ("low", "up"):  # what lies between rows is not read
        wide = torch.full((70, R + -R % 8), torch.nan, dtype=dtype)
        given[name] = wide[:, :R].copy_(torch.randn(70, R))
    given["residual"] = torch.randn(70, 70)
    check(gemm8, OP, given, tiling=tiling)


def test_branch_over_several_tiles(gemm8):
    given = operands(OP, 330, 70, 1168)  # ten slabs and two of the branch in a ring of eight
    given["low"], given["up"] = torch.randn(330, 80).half(), torch.randn(70, 80).half()
    check(gemm8, OP, given, tiling=SMALL)


def test_rows_of_wider_matrices(gemm8):
    given = operands(OP, 70, 24, 32)
    wide = {"a": 48, "w": 64}
    for name, columns in wide.items():
        rows = padded(torch.full((given[name].shape[0], columns), 127, dtype=torch.int8), 64)
        given[name] = rows[:, 16:48].copy_(given[name])
    given["residual"] = torch.randn(70, 40)[:, 8:32]
    given["gate"] = torch.randn(7, 32)[:, :24]
    check(gemm8, OP, given, tiling=SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(6, 24, dtype=torch.int8)}, "a: expected a multiple of 16 columns"),
        ({"a_scale": None}, "a_scale: expected one per row, got none"),
        ({"low": torch.zeros(6, 8).bfloat16()}, "low, up: expected both or none"),
        (
            {"low": torch.zeros(6, 4).bfloat16(), "up": torch.zeros(20, 4).bfloat16()},
            "low: expected rows that start at multiples of 16 bytes, got stride 4",
        ),
        (
            {"low": torch.zeros(6, 8), "up": torch.zeros(20, 8)},
            "low: expected bfloat16 or float16, got float32",
        ),
        ({"gate": torch.zeros(4, 20)}, "gate: expected rows that divide 6, got 4"),
        ({"a": torch.zeros(6, 40, dtype=torch.int8)[:, 3:35]}, "a: expected rows that start"),
    ],
)
def test_what_the_kernel_refuses(gemm8_on_host, change, message):
    given = operands(OP, 6, 20, 32) | change
    if given["a"].shape[1] != 32:
        given["w"] = torch.zeros(20, given["a"].shape[1], dtype=torch.int8)
    with pytest.raises(ValueError, match=message):
        run(gemm8_on_host, OP, given, tiling=SMALL)


@needs_hopper
@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("shape", AT_SIZE)
def test_sums_are_exact_at_size(shape, tiling):
    """Bit-exact against sums in float64, with every tiling."""
    given = operands(OP, *shape)
    given["a_scale"], given["w_scale"] = torch.ones(shape[0]), torch.ones(shape[1])
    want = (given["a"].cuda().double() @ given["w"].cuda().double().mT).float()  # below 2^53
    assert torch.equal(run(None, OP, given, tiling=tiling), want.cpu())


@needs_hopper
def test_rows_that_start_anywhere():
    """One row has no stride to refuse; the op copies what the copy engine can't read."""
    given = operands(OP, 1, 24, 256)
    a = torch.zeros(259, dtype=torch.int8, device="cuda")[3:].copy_(given["a"][0])
    args = a, *(given[name].cuda() for name in NAMES[1:4])
    args = a, args[1][0], *args[2:]
    out, want = (ops.gemm_w8a8(*args, impl=impl) for impl in ("native", "reference"))
    torch.testing.assert_close(out, want, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("is_float", [False, True])
@pytest.mark.parametrize("tiling", TILINGS)
def test_shared_memory(gemm8_on_host, is_float, tiling):
    facts = (ctypes.c_int * 4)()
    gemm8_on_host.describe(is_float, tiling, facts)
    rows, columns, slots, used = facts
    assert slots >= 4
    assert used <= 227 << 10
    assert used + (rows + columns) * 128 > 227 << 10 or slots == 8


@pytest.mark.parametrize(("rows", "columns", "group"), [(1, 1, 16), (33, 7, 16), (5, 40, 11)])
def test_every_tile_is_taken_once(gemm8_on_host, rows, columns, group):
    place = (ctypes.c_int * 2)()
    seen = set()
    for index in range(rows * columns):
        gemm8_on_host.place_of(index, rows, columns, group, place)
        seen.add(tuple(place))
    assert seen == {(r, c) for r in range(rows) for c in range(columns)}


def test_scratch_has_no_bank_conflicts(gemm8_on_host):
    offsets = {
        gemm8_on_host.scratch_offset(row, column) for row in range(16) for column in range(32)
    }
    assert offsets == set(range(0, 16 * 32 * 4, 4))
    # Half a warp writes pairs of an accumulator at once, a quarter of one reads a row of fours.
    for q in range(4):
        lanes = range(16)
        banks = [gemm8_on_host.scratch_offset(t // 4, 8 * q + t % 4 * 2) // 4 % 32 for t in lanes]
        assert len({bank + i for bank in banks for i in range(2)}) == 32
    for row in range(16):
        banks = [gemm8_on_host.scratch_offset(row, 4 * t) // 4 % 32 for t in range(8)]
        assert len({bank + i for bank in banks for i in range(4)}) == 32


# Of estimates in gemm8_plan.h: what they are meant to say. A record replaces them.
@pytest.mark.parametrize(
    ("shape", "tiling"),
    [
        ((4096, 12288, 3072), 0),  # FLUX.1's image stream
        ((2048, 1280, 1280), 0),  # 80 tiles at once rather than 160 on 132 SMs
        ((512, 3072, 3072), 1),  # its text stream: 96 tiles rather than 48
        ((16, 9216, 3072), 2),
    ],
)
def test_choice_of_tiles(gemm8_on_host, shape, tiling):
    M, N, K = shape
    assert gemm8_on_host.choose_tiling(False, M, N, K // 128, 132) == tiling


@pytest.mark.parametrize("is_float", [False, True])
@pytest.mark.parametrize("multiprocessors", [114, 132])
def test_the_gate_runs_every_tiling(gemm8_on_host, is_float, multiprocessors, monkeypatch):
    """On H100s of either size; the gate's other cases are of 600 x 96 x 192 and about that."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    chosen = [
        gemm8_on_host.choose_tiling(is_float, M, N, -(-K // 128), multiprocessors)
        for M, N, K in (*_gemm.TILED_SHAPES, (600, 96, 192))
    ]
    assert chosen == [0, 1, 2]
    op = ops.module("gemm_fp8" if is_float else OP)
    cases = op.gate_cases(torch.device("cpu"))
    large = [
        (args, options)
        for args, options, *_ in cases
        if args[0].shape[0] > 1000 and "limit" not in options
    ]
    assert [(*a.shape, w.shape[0]) for (a, _, w, _), _ in large] == [
        (M, K, N) for M, N, K in _gemm.TILED_SHAPES
    ]
    for args, options in large:
        assert options["activation"] == "geglu"
        assert options["up"] is not None
        assert refuse_hopper(**dict(zip(NAMES, args, strict=False)), **options) is None


def test_a_tiling_is_asked_for_by_the_environment(gemm8_on_host, monkeypatch):
    monkeypatch.delenv("FEWSTEP_GEMM8_TILING", raising=False)
    assert gemm8_on_host.asked_tiling() == -1
    for tiling in (*TILINGS, -1):
        with asked_tiling(tiling):
            assert gemm8_on_host.asked_tiling() == tiling
    assert gemm8_on_host.asked_tiling() == -1
    for wrong in ("3", "x", "00"):
        monkeypatch.setenv("FEWSTEP_GEMM8_TILING", wrong)
        assert gemm8_on_host.asked_tiling() == -2


@pytest.mark.parametrize("R", [8, 5])
def test_the_op_reaches_the_kernel(gemm8_on_host, monkeypatch, R):
    """What the op hands over, in the kernel's order; the CPU's takes the same of integer rows."""
    given = operands(OP, 12, 40, 48)
    a, a_scale = given["a"].view(3, 4, 48), given["a_scale"].view(3, 4)
    options = {
        "bias": torch.randn(40).bfloat16(),
        "low": torch.randn(3, 4, R).bfloat16(),
        "up": torch.randn(40, R).bfloat16(),
        "gate": torch.randn(3, 1, 20),
        "residual": torch.randn(3, 4, 20),
        "activation": "swiglu",
    }

    def call(impl):
        return ops.gemm_w8a8(a, a_scale, given["w"], given["w_scale"], **options, impl=impl)

    want = call("reference")
    called = []

    def to_emulation(op, *args):
        called.append(op)
        *first, smooth, rotate, activation, gate, residual, scale, out = args
        assert (smooth, rotate, scale) == (None, 0, None)
        first[5:] = map(loadable, first[5:])  # low and up, as for a GPU
        tensors = dict(zip(NAMES, (*first, gate, residual, out), strict=True))
        call_on_host(gemm8_on_host, tensors, activation, -1)

    monkeypatch.setattr(_native, "call", to_emulation)
    torch.testing.assert_close(call("native"), want, rtol=1e-5, atol=1e-5)
    assert called == [OP]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"a": torch.zeros(6, 24, dtype=torch.int8)}, "K above 0 and a multiple of 16, got 24"),
        ({"a": torch.zeros(6, 40, dtype=torch.int8)[:, 8:]}, "a: expected rows that start at"),
        ({"a_scale": torch.ones(6, 1)}, "a_scale: expected one scale per row, got scales of"),
        ({"w_scale": torch.ones(1, 1)}, "w_scale: expected one scale per column, got scales of"),
        ({"w": torch.zeros(1, 32, dtype=torch.int8).expand(20, 32)}, "w: expected rows of their"),
        ({"up": torch.zeros(20, 8), "low": torch.zeros(6, 8)}, "both the same, got torch.float32"),
        ({"up": torch.zeros(20, 0).half(), "low": torch.zeros(6, 0).half()}, "a rank above 0"),
        ({"up": torch.zeros(20, 3).half(), "low": torch.zeros(6, 3).half()}, None),
        ({"up": torch.zeros(20, 8).half(), "low": torch.zeros(6, 8).half()}, None),
    ],
)
def test_operands_that_the_op_leaves_to_others(change, message):
    reason = refuse_hopper(**operands(OP, 6, 20, 32) | change)
    assert reason == message if message is None else message in reason


def test_int8_outputs_need_triton(monkeypatch):
    given = operands(OP, 6, 20, 32)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert refuse_hopper(**given, out_dtype=torch.int8) is None
    monkeypatch.setattr(_select, "_HAS_TRITON", False)
    reason = refuse_hopper(**given, out_dtype=torch.int8)
    assert reason == "the Hopper kernel: Triton is not installed"
    assert refuse_hopper(**given, out_dtype=torch.bfloat16) is None


@pytest.mark.parametrize("op", ["gemm_w8a8", "gemm_fp8"])
def test_refusals_are_asked_about_the_outputs_too(op, monkeypatch):
    """What is rounded to before int8 is not what is asked for."""
    module, asked = ops.module(op), []

    def select(name, impl, implementations, *args):
        asked.append(args)
        return "reference"

    monkeypatch.setattr(module, "select", select)
    args = operands(op, 6, 20, 32).values()
    getattr(ops, op)(*args, out_dtype=torch.int8)
    assert _gemm.Operands(*asked[0]).out_dtype == torch.int8


def test_memory_that_starts_elsewhere_is_copied():
    base = torch.arange(259).to(torch.int8)
    base = base[-base.data_ptr() % 16 :]  # base[0] is at a multiple
    whole, part = base[:240], base[3:243]
    assert _native.aligned(whole) is whole
    copy = _native.aligned(part)
    assert copy.data_ptr() % 16 == 0
    assert torch.equal(copy, part)
    assert _native.aligned(None) is None
