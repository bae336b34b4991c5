"""gemm_w4a8's Hopper kernel: what of the products of 8-bit rows is different for a 4-bit weight.

It runs on the host as gemm_w8a8's does, whose tests hold the end's arithmetic; here it is met
transposed.
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
from fewstep.ops._gemm_hopper import refuse_hopper
from fewstep.reference.gemm_w4a8 import fold_factors, fold_int4

OP = "gemm_w4a8"
SMALL = 2  # 128 x 64 tiles


def unscaled(given):
    """Return operands whose outputs are the integer sums: every row has a largest scale of 16."""
    scale = given["w_scale"]
    given["w_scale"] = (scale / scale.amax(1, keepdim=True) * 16).to(scale.dtype)
    given["w_scale"][:, 0] = 16
    given["a_scale"] = torch.ones(given["a"].shape[0])
    return given


def sums(given):
    w8, scale = fold_int4(given["w"], given["w_scale"])
    assert (scale == 1).all()
    return given["a"].double() @ w8.double().mT


# A tile and a bit of the next in every direction, over more tiles than blocks; less than one;
# groups of every size that end within a slab; more slabs than slots.
@pytest.mark.parametrize(
    ("tiling", "shape", "group"),
    [
        (0, (260, 130, 288), 32),
        (1, (130, 264, 320), 64),
        (SMALL, (70, 300, 384), 128),
        (SMALL, (1, 1, 32), 32),
        (SMALL, (5, 7, 17 * 128), 64),
        (0, (20, 20, 11 * 128), 128),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_are_exact(gemm4, tiling, shape, group, dtype):
    given = operands(OP, *shape, group)
    given["w_scale"] = given["w_scale"].to(dtype)
    out = run(gemm4, OP, unscaled(given), tiling=tiling)
    assert torch.equal(out.double(), sums(given))


def test_sums_beyond_float32_are_rounded_once(gemm4):
    given = operands(OP, 3, 20, 4096, 128)
    given["w_scale"].fill_(16)
    given["a_scale"] = torch.ones(3)
    given["a"][:, :4000], given["w"][:, :2000] = -128, 0x88
    out = run(gemm4, OP, given, tiling=SMALL)
    assert sums(given).abs().max() > 2**25
    assert torch.equal(out, sums(given).float())


def test_every_nibble_with_every_factor(gemm4_on_host):
    nibbles = torch.arange(16)
    for f in [*range(0, 4097, 37), 1, 15, 16, 17, 127, 128, 129, 255, 256, 4095, 4096]:
        q = (nibbles ^ 8) - 8
        want = ((q * f + 128) >> 8).to(torch.int8)
        for first in range(0, 16, 4):
            word = sum((first + i) << 4 * i for i in range(4))
            bits = gemm4_on_host.expand(word, f)
            got = torch.tensor([bits >> 8 * i & 0xFF for i in range(4)]).to(torch.uint8)
            assert torch.equal(got.view(torch.int8), want[first : first + 4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_factors_are_the_reference_s(gemm4, dtype):
    """One row of a at a time sees one k of each group, so out is w8 where q is 1 and 7."""
    torch.manual_seed(1)
    N, groups = 40, 24
    scale = torch.rand(N, groups).to(dtype)
    scale[0], scale[1, 3], scale[2, 5] = 0, float("nan"), float("inf")
    scale[3] = torch.finfo(dtype).smallest_normal / 4  # subnormal
    scale[4, 1:] = 0
    given = {
        "a": torch.eye(groups, dtype=torch.int8).repeat_interleave(32, 1),
        "a_scale": torch.full((groups,), 16 / 32),
        "w": torch.full((N, groups * 16), 0x77, dtype=torch.uint8),
        "w_scale": scale,
    }
    out = run(gemm4, OP, given, tiling=SMALL)
    top = scale.float().amax(1)
    want = (((7 * fold_factors(scale).int() + 128) >> 8) * top[:, None]).mT
    assert out[:, 1].isnan().all()
    assert out[:, 2].isnan().all()  # 0 times infinity
    assert torch.equal(out.nan_to_num(9.0), want.nan_to_num(9.0))


@pytest.mark.parametrize("activation", ["", "gelu", "gelu_tanh", "silu", "geglu", "swiglu"])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ends(gemm4, activation, out_dtype):
    # Columns by fours; a gate's row serves 35; more columns than a tile's.
    N = 144
    width = N // 2 if "glu" in activation else N
    dtypes = torch.bfloat16, torch.float32, out_dtype
    given = with_end(operands(OP, 70, N, 64), width, 2, dtypes)
    check(gemm4, OP, given, activation=activation, out_dtype=out_dtype, tiling=SMALL)


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize(("activation", "N"), [("gelu", 131), ("swiglu", 262)])
def test_columns_that_are_no_fours(gemm4, tiling, activation, N):
    M, width = (66 if tiling == SMALL else 130), N // 2 if activation == "swiglu" else N
    dtypes = torch.float32, torch.float16, torch.bfloat16
    given = with_end(operands(OP, M, N, 64), width, M, dtypes)
    check(gemm4, OP, given, activation=activation, out_dtype=torch.float16, tiling=tiling)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("tiling", "R", "activation"),
    [(SMALL, 8, ""), (SMALL, 32, "geglu"), (SMALL, 40, ""), (1, 72, "geglu"), (0, 136, "")],
)
def test_low_rank_branch(gemm4, tiling, R, activation, dtype):
    given = operands(OP, 70, 140, 32)
    given["low"], given["up"] = torch.randn(70, R).to(dtype), torch.randn(140, R).to(dtype)
    check(gemm4, OP, given, activation=activation, tiling=tiling)


def test_branch_over_several_tiles(gemm4):
    given = operands(OP, 200, 140, 1184)  # ten slabs and three of the branch in a ring of eight
    given["low"], given["up"] = torch.randn(200, 80).half(), torch.randn(140, 80).half()
    check(gemm4, OP, given, tiling=SMALL)


def test_rows_of_wider_matrices(gemm4):
    given = operands(OP, 70, 24, 96)
    wide = torch.full((70, 160), 127, dtype=torch.int8)
    given["a"] = wide[:, 16:112].copy_(given["a"])
    wide = torch.full((24, 80), 0x77, dtype=torch.uint8)
    given["w"] = wide[:, 16:64].copy_(given["w"])
    given["residual"] = torch.randn(70, 40)[:, 8:32]
    check(gemm4, OP, given, tiling=SMALL)


def test_scales_that_start_anywhere(gemm4):
    """Eight scales of a row are read at once only where they lie together in 16 bytes."""
    for N, groups, offset in ((9, 8, 0), (9, 8, 3), (9, 5, 0)):
        given = operands(OP, 4, N, 32 * groups)
        flat = torch.zeros(N * groups + offset, dtype=torch.bfloat16)[offset:]
        given["w_scale"] = flat.view(N, groups).copy_(given["w_scale"])
        check(gemm4, OP, given, tiling=SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w_scale": torch.ones(20, 3).half()}, "w_scale: expected .N, K / G. with G 32, 64 or 12"),
        ({"w_scale": torch.ones(20, 4).half()}, "w_scale: expected .N, K / G. with G 32, 64 or 12"),
        ({"w_scale": torch.ones(20, 2)}, "w_scale: expected bfloat16 or float16, got float32"),
        ({"w": torch.zeros(20, 32, dtype=torch.int8)}, "w: expected uint8"),
        ({"a_scale": None}, "a_scale: expected one per row, got none"),
        ({"low": torch.zeros(6, 8).bfloat16()}, "low, up: expected both or none"),
    ],
)
def test_what_the_kernel_refuses(gemm4_on_host, change, message):
    given = operands(OP, 6, 20, 64) | change
    with pytest.raises(ValueError, match=message):
        run(gemm4_on_host, OP, given, tiling=SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"a": torch.zeros(6, 80, dtype=torch.int8)[:, 8:72]}, "a: expected rows that start at"),
        ({"w": torch.zeros(20, 36, dtype=torch.uint8)[:, 4:]}, "w: expected rows that start at"),
        ({"a_scale": torch.ones(6, 1)}, "a_scale: expected one scale per row, got scales of"),
        ({"up": torch.zeros(20, 8), "low": torch.zeros(6, 8)}, "both the same, got torch.float32"),
    ],
)
def test_operands_that_the_op_leaves_to_others(change, message):
    reason = refuse_hopper(**operands(OP, 6, 20, 64) | change)
    assert reason == message if message is None else message in reason


def test_the_op_reaches_the_kernel(gemm4_on_host, monkeypatch):
    given = operands(OP, 12, 40, 64, 64)
    a, a_scale = given["a"].view(3, 4, 64), given["a_scale"].view(3, 4)
    options = {
        "bias": torch.randn(40).bfloat16(),
        "low": torch.randn(3, 4, 8).bfloat16(),
        "up": torch.randn(40, 8).bfloat16(),
        "gate": torch.randn(3, 1, 20),
        "residual": torch.randn(3, 4, 20),
        "activation": "swiglu",
    }

    def call(impl):
        return ops.gemm_w4a8(a, a_scale, given["w"], given["w_scale"], **options, impl=impl)

    want, called = call("reference"), []

    def to_emulation(op, *args):
        called.append(op)
        *first, smooth, rotate, activation, gate, residual, scale, out = args
        assert (smooth, rotate, scale) == (None, 0, None)
        tensors = dict(zip(NAMES, (*first, gate, residual, out), strict=True))
        call_on_host(gemm4_on_host, tensors, activation, -1)

    monkeypatch.setattr(_native, "call", to_emulation)
    torch.testing.assert_close(call("native"), want, rtol=1e-5, atol=1e-5)
    assert called == [OP]


@needs_hopper
@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("shape", AT_SIZE)
def test_sums_are_exact_at_size(shape, tiling):
    M, N, K = shape
    given = unscaled(operands(OP, M, N, K // 128 * 128, 64))
    w8, _ = fold_int4(given["w"].cuda(), given["w_scale"].cuda())
    want = (given["a"].cuda().double() @ w8.double().mT).float()  # below 2^53
    assert torch.equal(run(None, OP, given, tiling=tiling), want.cpu())


@pytest.mark.parametrize("tiling", TILINGS)
def test_shared_memory(gemm4_on_host, tiling):
    facts = (ctypes.c_int * 4)()
    gemm4_on_host.describe(tiling, facts)
    columns, slots, slot, used = facts
    assert slot == columns * 128 + 128 * (64 + 8)
    assert slot % 1024 == 0  # where a swizzled block of 128-byte rows may start
    assert slots >= 5
    assert used <= 227 << 10
    assert used + slot > 227 << 10 or slots == 8


@pytest.mark.parametrize("is_glu", [False, True])
def test_every_row_of_a_tile_is_multiplied_once(gemm4_on_host, is_glu):
    rows = [gemm4_on_host.tile_row(g, r, is_glu) for g in range(2) for r in range(64)]
    assert sorted(rows) == list(range(128))
    if is_glu:  # the two that meet in a thread are eight apart, and lie half a tile apart
        for r in range(64):
            if r // 8 % 2 == 0:
                pair = [gemm4_on_host.tile_row(1, r + i, is_glu) for i in (0, 8)]
                assert pair[1] - pair[0] == 64


@pytest.mark.parametrize("is_glu", [False, True])
def test_scratch_of_a_transposed_accumulator(gemm4_on_host, is_glu):
    place = (ctypes.c_int * 2)()

    def at(r, column):
        gemm4_on_host.scratch_place(r, column, is_glu, place)
        return tuple(place)

    places = {at(r, column) for r in range(64) for column in range(32)}
    assert places == {(w, offset) for w in range(4) for offset in range(0, 2048, 4)}
    # A warp writes at once one value of each thread.
    for r, column in ((0, 0), (8, 8), (24, 16)):
        offsets = [at(r + t // 4, column + t % 4 * 2)[1] for t in range(32)]
        banks = {offset // 4 % 32 for offset in offsets}
        assert len(banks) == 32


def test_rows_of_64_bytes_meet_in_no_bank(gemm4_on_host):
    """A warp reads two bytes of each of eight rows in four places, or four bytes."""
    for at in range(0, 64, 16):
        banks = {
            gemm4_on_host.half_row_offset(r, at + 4 * c) // 4 % 32
            for r in range(8)
            for c in range(4)
        }
        assert len(banks) == 32


# Of estimates in gemm4_plan.h: what they are meant to say. A record replaces them.
@pytest.mark.parametrize(
    ("shape", "tiling"),
    [
        ((4096, 12288, 3072), 0),  # FLUX.1's image stream
        ((512, 3072, 3072), 1),  # its text stream: 96 tiles rather than 48
        ((16, 9216, 3072), 2),
    ],
)
def test_choice_of_tiles(gemm4_on_host, shape, tiling):
    M, N, K = shape
    assert gemm4_on_host.choose_tiling(M, N, K // 128, 132) == tiling


@pytest.mark.parametrize("multiprocessors", [114, 132])
def test_the_gate_runs_every_tiling(gemm4_on_host, multiprocessors, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    op = ops.module(OP)
    chosen = [
        gemm4_on_host.choose_tiling(M, N, -(-K // 128), multiprocessors)
        for M, N, K in (*op.TILED_SHAPES, (600, 96, 192))
    ]
    assert chosen == [0, 1, 2]
    cases = op.gate_cases(torch.device("cpu"))
    large = [(args, options) for args, options, *_ in cases if args[0].shape[0] > 1000]
    assert [(*a.shape, w.shape[0]) for (a, _, w, _), _ in large] == [
        (M, K, N) for M, N, K in op.TILED_SHAPES
    ]
    for args, options in large:
        assert refuse_hopper(**dict(zip(NAMES, args, strict=False)), **options) is None
