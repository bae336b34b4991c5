"""Which kernel makes the 8-bit rows of products on GPUs, and that low comes out of it."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from fewstep import _native, ops
from fewstep.ops import _gate, _gemm, _gemm_rows, _select

OPS = {torch.int8: "quantize_int8", torch.float8_e4m3fn: "quantize_fp8"}
DTYPES = pytest.mark.parametrize("dtype", OPS, ids=str)


@pytest.fixture
def gpu(monkeypatch):
    """Let a build with CUDA and a GPU that passes every gate be there; allow(op) lifts its hold."""
    monkeypatch.setattr(_native, "unavailable", lambda op, device: None)
    monkeypatch.setattr(_gate, "refusal", lambda op, impl, device: None)

    def allow(op):
        module = ops.module(op)
        ways = [dataclasses.replace(way, held_back=None) for way in module.IMPLEMENTATIONS]
        monkeypatch.setattr(module, "IMPLEMENTATIONS", ways)

    return allow


def rows_on_gpu(monkeypatch, K=64, dtype=torch.bfloat16):
    x = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(5, K))
    monkeypatch.setattr(_select, "first_tensor", lambda args: args[0])
    return x


@DTYPES
def test_native_where_its_table_lets_it(dtype, gpu, monkeypatch):
    x = rows_on_gpu(monkeypatch)
    assert _gemm_rows.quantising(dtype, x).name == "triton"
    gpu(OPS[dtype])
    assert _gemm_rows.quantising(dtype, x).name == "native"
    wide = rows_on_gpu(monkeypatch, K=24592)  # more columns than a row's registers
    assert _gemm_rows.quantising(dtype, wide).name == "triton"
    monkeypatch.setattr(_gate, "refusal", lambda op, impl, device: "its gate failed")
    assert _gemm_rows.quantising(dtype, x).name == "triton"


@DTYPES
def test_one_of_them_has_to_be_there(dtype, gpu, monkeypatch):
    x = rows_on_gpu(monkeypatch)
    monkeypatch.setattr(_select, "_HAS_TRITON", False)
    assert _gemm_rows.refuse_quantising(dtype, x) == "Triton is not installed"
    gpu(OPS[dtype])
    assert _gemm_rows.refuse_quantising(dtype, x) is None


def test_the_interpreter_keeps_to_triton():
    assert _gemm_rows.quantising(torch.int8, torch.randn(2, 32)).name == "triton"


@pytest.mark.parametrize(
    ("dtype", "block"),
    [(torch.int8, None), (torch.float8_e4m3fn, None), (torch.float8_e4m3fn, 128)],
)
@pytest.mark.parametrize("branch", [True, False])
def test_rows_and_low_come_from_one_call(dtype, block, branch, monkeypatch):
    """What a product on a GPU is given; the kernel stands on the CPU here."""
    op, calls = OPS[dtype], []
    way = next(way for way in ops.module(op).IMPLEMENTATIONS if way.name == "reference")

    def run(*args):
        calls.append(args)
        return way.run(*args)

    monkeypatch.setattr(
        _gemm_rows, "quantising", lambda dtype, x: dataclasses.replace(way, run=run)
    )
    x, smooth = torch.randn(3, 2, 256), torch.rand(256) + 0.5
    down, up = torch.randn(6, 256), torch.randn(40, 6)
    w_scale = torch.ones(1, 2) if block else torch.ones(40)
    p = _gemm.Operands(
        *(x, None, torch.zeros(40, 256, dtype=dtype), w_scale, None, smooth, 32),
        *((down, up) if branch else (None, None)),
        *(None, None, None, None, torch.float32),
    )
    form = _gemm.INT8 if dtype == torch.int8 else _gemm.E4M3
    q = _gemm.quantised(p, form)
    assert len(calls) == 1
    blocks = {} if dtype == torch.int8 else {"block": block}
    given = {"smooth": smooth, "rotate": 32, "down": p.down, "impl": "reference", **blocks}
    want = getattr(ops, op)(x, **given)
    assert torch.equal(q.a.view(torch.uint8), want[0].view(torch.uint8))
    assert torch.equal(q.a_scale, want[1])
    assert (q.smooth, q.rotate, q.down) == (None, 0, None)
    low, up_given = q.branch()
    if branch:
        assert torch.equal(low, want[2].flatten(0, 1))
        assert up_given is up
    else:
        assert (low, up_given) == (None, None)
    assert _gemm.quantised(q, form) is q
