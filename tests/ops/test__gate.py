"""The gate that a GPU kernel passes before `auto` may use it, with the machine and child faked."""

import pytest
import torch

from fewstep.ops import _gate

CUDA = torch.device("cuda", 0)


@pytest.fixture
def asked(monkeypatch):
    """Fake an sm_90 machine with no committed record; return the gates that were run."""
    gates = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(_gate, "_machine", lambda index: "a machine")
    monkeypatch.setattr(_gate, "_validated", dict)
    monkeypatch.setattr(
        _gate, "run_gate", lambda op, impl, device: gates.append((op, impl)) or gates_verdict(op)
    )
    monkeypatch.setattr(_gate, "_known", {})
    return gates


def gates_verdict(op):
    return "passed" if op == "good" else "a wrong sum"


def test_a_verdict_is_asked_once_and_kept_on_disk(asked):
    assert _gate.refusal("good", "triton", CUDA) is None
    _gate._known.clear()  # as a new process
    assert _gate.refusal("good", "triton", CUDA) is None
    assert asked == [("good", "triton")]


def test_an_edited_kernel_is_asked_again(asked, monkeypatch):
    assert _gate.refusal("good", "triton", CUDA) is None
    monkeypatch.setattr(_gate, "fingerprint", lambda impl: "another")
    _gate._known.clear()
    assert _gate.refusal("good", "triton", CUDA) is None
    assert asked == [("good", "triton")] * 2


def test_a_recorded_verdict_is_the_one_that_auto_reads(asked):
    assert _gate.refusal("good", "triton", CUDA) is None
    # A later check (`fewstep doctor --check`) counts at once, here and in the next process.
    _gate.record("good", "triton", 0, "a wrong sum")
    for _ in range(2):
        assert "a wrong sum" in _gate.refusal("good", "triton", CUDA)
        _gate._known.clear()
    assert asked == [("good", "triton")]


def test_a_read_only_home_costs_one_gate_per_kernel_and_process(asked, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder can be made in here")
    monkeypatch.setenv("FEWSTEP_CACHE_DIR", str(tmp_path / "file" / "cache"))
    for _ in range(2):
        assert _gate.refusal("good", "triton", CUDA) is None
        assert _gate.refusal("bad", "triton", CUDA)
    assert asked == [("good", "triton"), ("bad", "triton")]


def test_fingerprints_cover_the_files():
    assert len({_gate.fingerprint(impl) for impl in ("triton", "native")}) == 2


def test_the_reason_is_the_whole_message():
    stderr = """Traceback (most recent call last):
  File "x.py", line 1, in <module>
AssertionError: Tensor-likes are not close!

Mismatched elements: 3 / 9 (33.3%)
The failure occurred for item [1]
"""
    assert _gate.last_error(stderr) == (
        "AssertionError: Tensor-likes are not close! Mismatched elements: 3 / 9 (33.3%) "
        "The failure occurred for item [1]"
    )
    assert _gate.last_error("Fatal: killed") == "Fatal: killed"
    assert _gate.last_error("") == ""


def test_a_failing_kernel_is_refused_with_the_reason(asked):
    reason = _gate.refusal("bad", "native", CUDA)
    assert reason == "its gate on this machine failed: a wrong sum"


def test_a_committed_record_needs_no_gate(asked, monkeypatch):
    monkeypatch.setattr(_gate, "_validated", lambda: {"sm_90": ["bad:native"]})
    assert _gate.refusal("bad", "native", CUDA) is None
    assert asked == []


def test_a_gate_does_not_break_a_compiled_graph(asked):
    def f(x):
        return x + 1 if _gate.refusal("good", "native", CUDA) is None else x

    compiled = torch.compile(f, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))


@pytest.mark.parametrize("op", ["attention_jvp", "attention_jvp_backward"])
def test_attention_passes_on_the_cpu(op):
    """Every kind of masking, shared heads and directions, in norm against float64."""
    _gate.check(op, "native", torch.device("cpu"))


@pytest.mark.parametrize(
    "op",
    [
        "quantize_int4",
        "gemm_w8a8",
        "gemm_w4a8",
        "gemm_w4a16",
        "gemm_grouped",
        "snapshot_store",  # writes to its arguments
        "modulate_jvp_backward",  # returns None for what was not asked for
    ],
)
def test_ops_pass_on_the_cpu(op):
    """The harness times a kernel only behind its gate, so a bound too tight would hide it."""
    _gate.check(op, "native", torch.device("cpu"))


@pytest.mark.parametrize("op", ["attention_jvp", "attention_jvp_backward"])
def test_an_error_twice_the_usual_is_noticed(op, monkeypatch):
    """In 16 bits, of one result alone."""
    from fewstep import ops

    module = ops.module(op)
    cases = [
        case
        for case in module.gate_cases(torch.device("cpu"))
        if any(x is not None and x.dtype == torch.bfloat16 for x in case[0])
    ]
    assert cases
    original = getattr(module, op)

    def off(*args, impl, **kwargs):
        results = list(original(*args, impl=impl, **kwargs))
        if impl == "native":
            generator = torch.Generator().manual_seed(0)
            x = results[1].float()
            noise = torch.randn(x.shape, generator=generator)
            results[1] = (x + 0.02 * noise * x.norm() / noise.norm()).to(results[1])
        return tuple(results)

    monkeypatch.setattr(module, op, off)
    monkeypatch.setattr(module, "gate_cases", lambda device: cases[:1])
    with pytest.raises(AssertionError, match=r"result 1: expected an error of at most .* in norm"):
        _gate.check(op, "native", torch.device("cpu"))
