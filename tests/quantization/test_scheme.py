"""Schemes as text and back, and what is refused."""

import pytest

from fewstep.quantization import Scheme


@pytest.mark.parametrize(
    ("text", "options", "want"),
    [
        ("w8a8", {}, Scheme("w8a8")),
        ("w8a8-r16", {}, Scheme("w8a8", rank=16)),
        ("fp8-r8-h64", {}, Scheme("fp8", rank=8, rotate=64)),
        ("w4a8", {}, Scheme("w4a8", 64)),
        ("w4a8", {"group": 128, "rank": 32}, Scheme("w4a8", 128, 32)),
        ("w4a16-g32-r8", {"rank": 8}, Scheme("w4a16", 32, 8)),
        (Scheme("w4a8", 32), {"rank": 4}, Scheme("w4a8", 32, 4)),
        ("w4a8-g64-r32-smooth", {}, Scheme("w4a8", 64, 32, smooth=True)),
        ("w8a8-smooth", {"rank": 8}, Scheme("w8a8", rank=8, smooth=True)),
        (Scheme("w4a8", smooth=True), {}, Scheme("w4a8", 64, smooth=True)),
        ("w8a8-h128", {}, Scheme("w8a8", rotate=128)),
        ("w8a8-h", {}, Scheme("w8a8", rotate=True)),
        ("w8a8", {"rotate": True}, Scheme("w8a8", rotate=True)),
        ("w4a8-g64-r8-h64-smooth", {"rotate": 64}, Scheme("w4a8", 64, 8, True, 64)),
        (Scheme("w8a8", rotate=32), {"rank": 4}, Scheme("w8a8", None, 4, rotate=32)),
    ],
)
def test_parse(text, options, want):
    scheme = Scheme.parse(text, **options)
    assert scheme == want
    assert Scheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("w4a4", {}, "scheme: expected one of w8a8, fp8, w4a8, w4a16, got 'w4a4'"),
        ("w8a8-", {}, "scheme: expected one of"),
        ("w4a8-smooth-r8", {}, "scheme: expected one of"),
        ("w8a8-g64", {}, "group: expected none for w8a8, got 64"),
        ("fp8", {"group": 32}, "group: expected none for fp8, got 32"),
        ("w4a8-g48", {}, r"group: expected one of \(32, 64, 128\), got 48"),
        ("w4a8-g64", {"group": 32}, "group: expected 64 as in 'w4a8-g64', got 32"),
        ("w4a8", {"rank": -1}, "rank: expected an integer of at least 0, got -1"),
        ("w4a8", {"rank": 1.5}, "rank: expected an integer"),
        ("w8a8-h48", {}, r"rotate: expected True, 0 or one of \(16, .* got 48"),
        ("w8a8", {"rotate": 1}, r"rotate: expected True, 0 or one of .* got 1"),
        ("w8a8-h64", {"rotate": True}, "rotate: expected 64 as in 'w8a8-h64', got True"),
        ("w4a16-h64", {}, "rotate: expected none for w4a16, .* got 64"),
    ],
)
def test_what_is_refused_is_named(text, options, message):
    with pytest.raises(ValueError, match=message):
        Scheme.parse(text, **options)


def test_a_block_is_chosen_by_the_inputs():
    scheme = Scheme.parse("w4a8-r4-h")
    assert scheme.of(640).rotate == 128
    assert scheme.of(768).rotate == 256
    assert scheme.of(48) == Scheme("w4a8", 64, 4, rotate=16)
    assert scheme.of(100) == Scheme("w4a8", 64, 4)
    assert Scheme("w8a8", rotate=32).of(48).rotate == 32  # and is refused, by the layer's name


def test_another_type_is_refused():
    with pytest.raises(TypeError, match="scheme: expected a text, got int 8"):
        Scheme.parse(8)
