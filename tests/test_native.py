"""What a caller that skips the Python validation meets: an error, never a stray pointer."""

import pytest
import torch

from fewstep import _native, ops

X, Y, SHORT = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(2, 3, 4)
PARTIALS, METRIC = torch.empty(2, 1, 2, dtype=torch.float64), torch.empty(2)
W = torch.ones(5, 8, dtype=torch.int8)
A, A_SCALE, W_SCALE = torch.ones(3, 8, dtype=torch.int8), torch.ones(3), torch.ones(5)
UP, LOW = torch.ones(5, 2), torch.ones(3, 2)
WIDE, W4 = torch.ones(3, 64), torch.ones(5, 32, dtype=torch.uint8)
GROUPS, A4 = torch.ones(5, 2).bfloat16(), torch.ones(3, 64, dtype=torch.int8)
Q8 = torch.empty(3, 8, dtype=torch.int8)
END = ("", None, None)  # activation, gate, residual
OUT = torch.empty(3, 5)
Q, TQ = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 2, 3, 8)
K, TK = torch.randn(1, 1, 3, 8), torch.randn(1, 1, 1, 3, 8)
MASK, OFFSETS = torch.zeros(1, 2, 3, 3), torch.tensor([0, 1, 3], dtype=torch.int32)
KEY_OUT = torch.empty(1, 1, 3, 8)
OUT4, T_OUT4 = torch.empty(1, 2, 3, 8), torch.empty(1, 1, 2, 3, 8)
STAT, T_STAT = torch.empty(1, 2, 3), torch.empty(1, 1, 2, 3)


def put(values, index, value):
    return [value if i == index else old for i, old in enumerate(values)]


CALLS = {
    "cache_metric": (X, Y, None, None, PARTIALS, METRIC),
    "quantize_int8": (X[0], None, 0, None, "", Q8, torch.empty(3), None),
    "gemm_w8a8": (A, A_SCALE, W, W_SCALE, W_SCALE, LOW, UP, None, 0, *END, None, OUT),
    "quantize_int4": (WIDE, 0, W4[:3].clone(), GROUPS[:3].clone()),
    "gemm_w4a8": (A4, A_SCALE, W4, GROUPS, W_SCALE, LOW, UP, None, 0, *END, None, OUT),
    "gemm_w4a16": (WIDE, W4, GROUPS, W_SCALE, LOW, UP, *END, OUT),
    "attention_jvp": (
        *(Q, K, K, TQ, TK, TK, MASK, MASK[None], None, None, False),
        *(OUT4, T_OUT4, STAT, T_STAT, STAT, 1.0),
    ),
    "attention_jvp_backward": (
        *(Q, Q, STAT, STAT, Q, K, K, Q, K, K, STAT, STAT, STAT, MASK, MASK, None, None, False),
        *(OUT4, KEY_OUT, KEY_OUT, OUT4, KEY_OUT, KEY_OUT, 1.0),
    ),
}
BAD = [
    ("cache_metric", 1, SHORT, "y: expected size 8 in axis 2, got 4"),
    ("cache_metric", 1, Y.half(), "y: expected float32, got float16"),
    ("cache_metric", 1, Y[0], "y: expected 3 axes, got 2"),
    ("cache_metric", 1, Y.mT.contiguous().mT, "y: expected unit stride"),
    ("cache_metric", 2, SHORT, "previous: expected size"),
    ("cache_metric", 3, SHORT, "residual: expected size"),
    ("cache_metric", 4, PARTIALS.float(), "partials: expected float64"),
    ("cache_metric", 5, torch.empty(3), "metric: expected size 2"),
    ("quantize_int8", 4, "relu", "activation: expected gelu"),
    ("quantize_int8", 4, "geglu", "x: expected size 16 in axis 1"),
    ("quantize_int8", 5, torch.empty(3, 8), "q: expected int8, got float32"),
    ("quantize_int8", 5, torch.empty(8, 3, dtype=torch.int8).t(), "q: expected unit stride"),
    ("quantize_int8", 6, torch.empty(2), "scale: expected size 3"),
    ("quantize_int8", 1, torch.ones(7), "smooth: expected size 8"),
    ("quantize_int8", 2, 16, "rotate: expected 0 or a power of two .* divides K = 8, got 16"),
    ("quantize_int8", 2, 3, "rotate: expected 0 or a power of two .* got 3"),
    ("quantize_int8", 3, X[0], "low: expected one with down, got none"),
    ("quantize_int8", 3, X[0].double(), "down: expected float32, got float64"),
    ("quantize_int8", 7, X[0], "low: expected one with down, got one without"),
    (
        "gemm_w8a8",
        0,
        A.float(),
        "a_scale: expected one with int8 a and none with floating a, got one",
    ),
    ("gemm_w8a8", 1, None, "a_scale: expected one with int8 a.*got none"),
    ("gemm_w8a8", 1, torch.ones(2), "a_scale: expected size 3"),
    ("gemm_w8a8", 2, W[:, :4], "w: expected size 8 in axis 1"),
    ("gemm_w8a8", 3, torch.ones(10)[::2], "w_scale: expected unit stride"),
    ("gemm_w8a8", 4, torch.ones(4), "bias: expected size 5"),
    ("gemm_w8a8", 5, None, "low, up: expected both or neither, got up alone"),
    ("gemm_w8a8", 5, LOW.double(), "low: expected float32, bfloat16 or float16, got float64"),
    ("gemm_w8a8", 5, LOW[:2], "low: expected size 3 in axis 0"),
    ("gemm_w8a8", 6, None, "low, up: expected both or neither, got low alone"),
    ("gemm_w8a8", 6, torch.ones(5, 3), "up: expected size 2 in axis 1"),
    ("gemm_w8a8", 7, torch.ones(8), "smooth, rotate: expected none with int8 a, got one"),
    ("gemm_w8a8", 8, 16, "smooth, rotate: expected none with int8 a, got one"),
    ("gemm_w8a8", 13, torch.empty(3, 9)[:, :5], "out: expected a contiguous tensor"),
    ("quantize_int4", 2, torch.empty(3, 32), "q: expected uint8, got float32"),
    ("quantize_int4", 3, torch.ones(3, 3).bfloat16(), "scale: expected .* got 3 groups"),
    ("quantize_int4", 3, torch.ones(3, 0).bfloat16(), "scale: expected .* got 0 groups"),
    ("gemm_w4a8", 2, W4[:, :31], "w: expected size 32 in axis 1"),
    ("gemm_w4a8", 3, GROUPS.float(), "w_scale: expected bfloat16 or float16, got float32"),
    ("gemm_w4a8", 3, torch.ones(5, 4).bfloat16(), "w_scale: expected .* got 4 groups"),
    ("gemm_w4a8", 5, LOW.double(), "low: expected float32, bfloat16 or float16, got float64"),
    ("gemm_w4a16", 0, torch.ones(3, 128)[:, ::2], "x: expected unit stride"),
    ("gemm_w4a16", 0, WIDE.double(), "out: expected float64"),
    ("gemm_w4a16", 1, W4[:, :31], "w: expected size 32 in axis 1"),
    ("gemm_w4a16", 2, torch.ones(5, 4).bfloat16(), "w_scale: expected .* got 4 groups"),
    ("gemm_w4a16", 2, GROUPS.float(), "w_scale: expected bfloat16 or float16, got float32"),
    ("gemm_w4a16", 5, None, "low, up: expected both or neither, got low alone"),
    ("attention_jvp", 1, torch.randn(1, 3, 3, 8), "k: expected heads that divide those of q, 2"),
    ("attention_jvp", 2, torch.randn(1, 1, 2, 8), "v: expected size 3 in axis 2"),
    ("attention_jvp", 3, Q, "t_q: expected 5 axes, got 4"),
    ("attention_jvp", 4, torch.randn(2, 1, 1, 3, 8), "t_k: expected size 1 in axis 0"),
    ("attention_jvp", 5, TK.double(), "t_v: expected float32, got float64"),
    ("attention_jvp", 6, MASK.double(), "attn_mask: expected float32, got float64"),
    ("attention_jvp", 6, MASK[..., :2], "attn_mask: expected size 3 in axis 3"),
    ("attention_jvp", 6, MASK.bool(), "t_attn_mask: expected an additive attn_mask"),
    ("attention_jvp", 7, torch.randn(2, 1, 2, 3, 3), "t_attn_mask: expected size 1 in axis 0"),
    ("attention_jvp", 8, OFFSETS, "attn_mask: expected none where cu_seqlens_q is given"),
    ("attention_jvp", 9, OFFSETS, "cu_seqlens_q, cu_seqlens_k: expected both or none"),
    ("attention_jvp", 12, torch.empty(1, 1, 2, 2, 8), "t_o: expected size 3"),
    ("attention_jvp", 13, STAT.double(), "lse: expected float32"),
    ("attention_jvp", 14, STAT, "mu: expected 4 axes"),
    ("attention_jvp", 15, STAT.double(), "lse_rest: expected float32"),
    ("attention_jvp_backward", 0, Q[:, :, :2], "d_o: expected size 3 in axis 2"),
    ("attention_jvp_backward", 1, Q.double(), "dt_o: expected float32, got float64"),
    ("attention_jvp_backward", 2, None, "delta0: expected beside dt_o, got none"),
    ("attention_jvp_backward", 3, STAT.mT.contiguous().mT, "delta1: expected unit stride"),
    ("attention_jvp_backward", 5, torch.randn(1, 3, 3, 8), "k: expected heads that divide"),
    ("attention_jvp_backward", 7, TQ, "t_q: expected 4 axes, got 5"),
    ("attention_jvp_backward", 9, torch.randn(1, 1, 4, 8), "t_v: expected size 3 in axis 2"),
    ("attention_jvp_backward", 10, STAT.double(), "lse: expected float32, got float64"),
    ("attention_jvp_backward", 11, torch.empty(1, 2, 4), "mu: expected size 3 in axis 2"),
    ("attention_jvp_backward", 12, STAT[0], "lse_rest: expected 3 axes, got 2"),
    ("attention_jvp_backward", 13, MASK[..., :2], "attn_mask: expected size 3 in axis 3"),
    ("attention_jvp_backward", 14, MASK[None], "t_attn_mask: expected 4 axes"),
    ("attention_jvp_backward", 15, OFFSETS, "attn_mask: expected none where cu_seqlens_q"),
    ("attention_jvp_backward", 18, KEY_OUT, "d_q: expected size 2 in axis 1"),
    ("attention_jvp_backward", 22, KEY_OUT.half(), "dt_k: expected float32, got float16"),
    ("attention_jvp_backward", 23, torch.empty(1, 1, 3, 16), "dt_v: expected size 8 in axis 3"),
]


@pytest.mark.parametrize("op", CALLS)
def test_the_plain_calls_are_accepted(op):
    _native.call(op, *CALLS[op])


@pytest.mark.parametrize(("op", "index", "value", "message"), BAD)
def test_a_wrong_view_is_refused(op, index, value, message):
    with pytest.raises(ValueError, match=message):
        _native.call(op, *put(CALLS[op], index, value))


NOT_VIEWS = {
    "complex": (
        torch.ones(3, 8, dtype=torch.complex64),
        "dtype: expected .*got DLPack code 5",
    ),
    "6 dims": (torch.ones(1, 1, 1, 1, 3, 8), "expected a tensor of at most 5 dimensions, got 6"),
    "meta": (torch.empty(3, 8, device="meta"), "meta"),
    "sparse": (torch.eye(3, 8).to_sparse(), "storage"),
    "number": (3, "incompatible function arguments"),
    "none": (None, "incompatible function arguments"),
}


@pytest.mark.parametrize("kind", NOT_VIEWS)
def test_what_is_no_view_is_refused(kind):
    value, message = NOT_VIEWS[kind]
    with pytest.raises((ValueError, TypeError, RuntimeError, BufferError), match=message):
        _native._C.cpu.quantize_int8(value, *CALLS["quantize_int8"][1:])


def test_parameters_and_slices_are_read_where_they_lie():
    for x in (torch.nn.Parameter(X[0]), torch.randn(3, 20)[:, 5:13], torch.randn(6, 8)[::2]):
        q, scale = torch.empty(3, 8, dtype=torch.int8), torch.empty(3)
        _native.call("quantize_int8", x, None, 0, None, "", q, scale, None)
        want = ops.quantize_int8(x.detach().clone(), impl="reference")
        assert torch.equal(q, want[0])
        assert torch.equal(scale, want[1])


def test_a_table_that_is_none_is_refused():
    with pytest.raises((TypeError, ValueError)):
        _native._C.read_tensors(torch.Tensor, None)


@pytest.mark.parametrize("offsets", [[0, 1], [1, 2, 3], [0, 2, 1, 3], [0, 5, 3], [0, 1, 4]])
def test_offsets_outside_the_rows_are_refused(offsets):
    call = put(put(CALLS["attention_jvp"], 6, None), 7, None)
    good = torch.tensor([*[0] * (len(offsets) - 1), 3], dtype=torch.int32)
    bad = torch.tensor(offsets, dtype=torch.int32)
    for name, pair in (("cu_seqlens_q", (bad, good)), ("cu_seqlens_k", (good, bad))):
        with pytest.raises(ValueError, match=f"{name}: expected offsets that rise from 0 to 3"):
            _native.call("attention_jvp", *call[:8], *pair, *call[10:])


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("FEWSTEP_CPU_ISA", "avx1024")
    with pytest.raises(ValueError, match="expected portable, avx2 or avx512, got avx1024"):
        _native.cpu_isa()
