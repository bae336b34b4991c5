"""Nunchaku's packed layers: where every value lies, both ways to the bit, and what is refused."""

import pytest
import torch

from fewstep.ops.quantize_int4 import pack_nibbles, unpack_nibbles
from fewstep.quantization import pack_awq, pack_svdq, unpack_awq, unpack_svdq
from nunchaku_files import awq, svdq

DTYPES = [torch.bfloat16, torch.float16]


def registers():
    """Yield (lane group, lane in group, n8 tile, k half) of the four 32-bit registers of a lane."""
    for lane in range(32):
        for register in range(4):
            yield lane // 4, lane % 4, register // 2, register % 2


def place_weight(q):
    """Return qweight as 32-bit words, from the B fragment of m16n8k64 (PTX ISA).

    Register r of a lane holds rows k = 8 (lane % 4) + 0..7, + 32 for r = 1, of column
    n = lane // 4. A warp reads 16 outputs x 64 inputs at a time, all of 128 outputs before the
    next 64 inputs.
    """
    words = []
    for tile in range(0, q.shape[0], 128):
        for k64 in range(0, q.shape[1], 64):
            for n16 in range(tile, tile + 128, 16):
                for group, lane, n8, half in registers():
                    n, k = n16 + 8 * n8 + group, k64 + 32 * half + 8 * lane
                    words.append(sum((int(q[n, k + e]) & 15) << (4 * e) for e in range(8)))
    return words


def place_scales(scale):
    """Return wscales: lane 4 a + c of a warp holds those of 16 a + 2 c + (0, 1, 8, 9)."""
    return [
        scale[tile + 16 * (lane // 4) + 2 * (lane % 4) + n, group]
        for tile in range(0, scale.shape[0], 128)
        for group in range(scale.shape[1])
        for lane in range(32)
        for n in (0, 1, 8, 9)
    ]


def place_factor(at, channels, ranks, down):
    """Return proj_down or proj_up: B fragments of m16n8k16, of tiles of 16 channels x 16 ranks.

    Registers 0 and 1 hold k = 2 (lane % 4) + (0, 1) and + 8. The ranks are n of the down
    projection and k of the up projection.
    """
    values = []
    for c in range(0, channels, 16):
        for r in range(0, ranks, 16):
            for group, lane, n8, half in registers():
                n, k = 8 * n8 + group, 8 * half + 2 * lane
                for e in range(2):
                    where = (r + n, c + k + e) if down else (c + n, r + k + e)
                    values.append(at[where])
    return values


def place_awq(q):
    """Return an AWQ qweight as 16-bit words: word j of 32 inputs holds inputs j, 8 + j, ..."""
    return [
        sum(int(q[n, k + 8 * e + j]) << (4 * e) for e in range(4))
        for n4 in range(0, q.shape[0], 4)
        for k64 in range(0, q.shape[1], 64)
        for n in range(n4, n4 + 4)
        for k in (k64, k64 + 32)
        for j in range(8)
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_value_lies_where_the_fragment_wants_it(dtype):
    natural, q = svdq(256, 128, rank=32, dtype=dtype)
    state = pack_svdq(natural)
    words = torch.tensor(place_weight(q)).to(torch.int64)
    got = state["qweight"].view(torch.int32).flatten().to(torch.int64) & 0xFFFFFFFF
    assert torch.equal(got, words)
    want = {
        "wscales": place_scales(natural["weight_scale"]),
        "bias": place_scales(natural["bias"][:, None]),
        "smooth": place_scales(natural["smooth"][:, None]),
        "lora_down": place_factor(natural["down"], 128, 32, down=True),
        "lora_up": place_factor(natural["up"], 256, 32, down=False),
    }
    assert state.keys() == {"qweight"} | want.keys()
    for name, values in want.items():
        assert torch.equal(state[name].flatten(), torch.stack(values)), name
    shapes = {name: list(value.shape) for name, value in state.items()}
    assert shapes == {
        "qweight": [256, 64],
        "wscales": [2, 256],
        "bias": [256],
        "smooth": [128],
        "lora_down": [128, 32],
        "lora_up": [256, 32],
    }
    assert state["qweight"].dtype == torch.int8


def test_every_value_of_an_awq_layer_lies_where_its_kernel_reads_it():
    natural, q = awq(24, 192)
    state = pack_awq(natural)
    got = state["qweight"].view(torch.int16).flatten().to(torch.int64) & 0xFFFF
    assert torch.equal(got, torch.tensor(place_awq(q)))
    assert list(state["qweight"].shape) == [6, 96]
    assert state["qweight"].dtype == torch.int32
    assert torch.equal(state["wscales"], natural["weight_scale"].T)
    assert torch.equal(state["wzeros"], natural["weight_zero"].T)


def same(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name].view(torch.uint8), value.view(torch.uint8)), name


def noise(dtype, *shape):
    """Return random bits, NaNs and infinities among them."""
    bits = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16)
    return bits.view(dtype) if dtype.itemsize == 2 else bits.to(torch.int8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lite", [False, True])
def test_any_packed_layer_survives_the_way_there_and_back(dtype, lite):
    names = ("smooth_factor", "smooth_factor_orig", "proj_down", "proj_up")
    if not lite:
        names = ("smooth", "smooth_orig", "lora_down", "lora_up")
    shapes = ((384,), (384,), (384, 48), (128, 48))
    state = {"qweight": noise(torch.int8, 128, 192), "wscales": noise(dtype, 6, 128)}
    state |= {name: noise(dtype, *shape) for name, shape in zip(names, shapes, strict=True)}
    same(pack_svdq(unpack_svdq(state), lite=lite), state)
    state["bias"] = noise(dtype, 128)
    same(pack_svdq(unpack_svdq(state), lite=lite), state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_awq_layer_survives_the_way_there_and_back(dtype):
    state = {
        "qweight": noise(torch.int8, 5, 4 * 96).view(torch.int32),
        "wscales": noise(dtype, 16, 20),  # rows beyond K / 64, as the converter pads them
        "wzeros": noise(dtype, 16, 20),
    }
    same(pack_awq(unpack_awq(state)), state)


def test_natural_order_is_ours():
    natural, q = svdq(128, 256)
    back = unpack_svdq(pack_svdq(natural))
    same(back, natural)
    assert torch.equal(unpack_nibbles(back["weight_int4"]), q)
    natural, q = awq(8, 64)
    back = unpack_awq(pack_awq(natural))
    same(back, natural)
    assert torch.equal(back["weight_uint4"], pack_nibbles(q))


def test_sizes_are_padded_to_tiles():
    natural, _ = svdq(72, 192, rank=5)
    back = unpack_svdq(pack_svdq(natural))
    sizes = {"weight_int4": (72, 96), "weight_scale": (72, 3), "bias": (72,), "smooth": (192,)}
    sizes |= {"down": (5, 192), "up": (72, 5)}
    padded = {"weight_int4": (128, 128), "weight_scale": (128, 4), "bias": (128,)}
    padded |= {"smooth": (256,), "down": (16, 256), "up": (128, 16)}
    assert {name: tuple(value.shape) for name, value in back.items()} == padded
    for name, size in sizes.items():
        inside = tuple(slice(n) for n in size)
        assert torch.equal(back[name][inside], natural[name]), name
        outside = back[name].clone()
        outside[inside] = 1 if name in ("weight_scale", "smooth") else 0
        assert (outside == outside.flatten()[0]).all(), name


def changed(state, **changes):
    state = {**state, **changes}
    return {name: value for name, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qweight": None}, r"a\.b\.qweight: expected int8 \[any, any\], got none"),
        ({"qweight": torch.zeros(128, 64)}, r"expected int8 .* got float32 \[128, 64\]"),
        (
            {"qweight": torch.zeros(96, 64, dtype=torch.int8)},
            r"a\.b\.qweight: expected padded outputs that are a multiple of 128, got 96",
        ),
        ({"wscales": None}, r"a\.b\.wscales: expected bfloat16 or float16 \[2, 128\], got none"),
        (
            {"wscales": torch.ones(8, 128).bfloat16()},
            r"a\.b\.wscales: expected .*\[2, 128\], got bfloat16 \[8, 128\]",
        ),
        ({"bias": torch.ones(128)}, r"a\.b\.bias: expected .*, got float32 \[128\]"),
        ({"smooth": torch.ones(64).half()}, r"a\.b\.smooth: expected .*\[128\], got .*\[64\]"),
        ({"lora_up": None}, r"a\.b\.lora_up: expected .*\[128, 16\], got none"),
        (
            {"lora_down": torch.ones(128, 24).half()},
            r"a\.b\.lora_down: expected ranks that are a multiple of 16, got 24",
        ),
        ({"wtscale": torch.ones(1)}, r"a\.b\.wtscale: expected one of .*wscales, got wtscale"),
        (
            {"smooth_factor": torch.ones(128).half()},
            r"a\.b\.smooth_factor: expected one tensor for smooth, got a\.b\.smooth too",
        ),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    state = pack_svdq(svdq(128, 128)[0])
    with pytest.raises(ValueError, match=message):
        unpack_svdq(changed(state, **changes), "a.b")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qweight": torch.zeros(2, 33, dtype=torch.int32)}, r"multiple of 64, got 66"),
        ({"wscales": torch.ones(1, 8).half()}, r"a\.wscales: expected at least 2 rows, got 1"),
        (
            {"wzeros": torch.ones(2, 8).half()},
            r"a\.wzeros: expected bfloat16 .*, got float16",
        ),
        ({"wzeros": None}, r"a\.wzeros: expected bfloat16 \[2, 8\], got none"),
        ({"bias": torch.ones(4).half()}, r"a\.bias: expected .* \[8\], got float16 \[4\]"),
    ],
)
def test_what_does_not_fit_an_awq_layer_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        unpack_awq(changed(pack_awq(awq(8, 128)[0]), **changes), "a")


def test_what_can_not_be_packed_is_named():
    natural, _ = svdq(64, 64)
    with pytest.raises(ValueError, match=r"weight_scale: expected .* \[64, 1\], got .* \[1, 64"):
        pack_svdq(natural | {"weight_scale": natural["weight_scale"].T})
    with pytest.raises(ValueError, match=r"up: expected .* \[64, 16\], got none"):
        pack_svdq({name: x for name, x in natural.items() if name != "up"})
    with pytest.raises(ValueError, match=r"weight_int4: expected inputs that are a multiple"):
        pack_svdq({"weight_int4": torch.zeros(4, 20, dtype=torch.uint8)})
    with pytest.raises(ValueError, match=r"weight_uint4: expected outputs that are a multiple"):
        pack_awq({"weight_uint4": torch.zeros(6, 32, dtype=torch.uint8)})
