"""`fewstep doctor`: complete, in words, and with an exit code."""

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from fewstep import ops
from fewstep.cli import doctor
from fewstep.cli.main import app
from fewstep.ops import _gate

runner = CliRunner()


def test_json_names_every_op_with_a_choice_and_every_refusal():
    result = runner.invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    cpu = facts["devices"][0]
    assert cpu["device"] == "cpu"
    assert set(cpu["ops"]) == set(ops.OPS)
    for op, choice in cpu["ops"].items():
        names = {candidate.name for candidate in ops.module(op).IMPLEMENTATIONS}
        assert choice["auto"] in names
        assert {choice["auto"], *choice["reasons"]} == names
    assert facts["packages"]["torch"]
    assert "cuda_reason" in facts["native"] or "missing" in facts["native"]
    assert "checks" not in facts


def test_tables_show_the_choice():
    result = runner.invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "why not the others" in result.output
    for op in ops.OPS:
        assert op in result.output


@pytest.mark.parametrize(("verdict", "code"), [("passed", 0), ("a wrong sum", 1)])
def test_check_runs_the_gates_and_sets_the_exit_code(monkeypatch, verdict, code):
    asked = []
    monkeypatch.setattr(
        _gate, "run_gate", lambda op, impl, dev: asked.append((op, impl)) or verdict
    )
    result = runner.invoke(app, ["doctor", "--check", "--json"])
    assert result.exit_code == code
    facts = json.loads(result.stdout)
    assert [(entry["op"], entry["impl"]) for entry in facts["checks"]] == asked
    assert {op for op, _ in asked} == set(ops.OPS)
    assert "reference" not in {impl for _, impl in asked}


@pytest.mark.parametrize("verdict", ["passed", "a wrong sum"])
def test_auto_goes_by_what_check_found_on_a_gpu(monkeypatch, verdict):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(doctor, "_devices", lambda: [device])
    monkeypatch.setattr(doctor, "runnable", lambda op, device: ["triton"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(_gate, "_machine", lambda index: "a machine")
    monkeypatch.setattr(_gate, "_validated", dict)
    monkeypatch.setattr(_gate, "_known", {})
    monkeypatch.setattr(_gate, "run_gate", lambda op, impl, device: verdict)
    assert {entry["verdict"] for entry in doctor.checks()} == {verdict}
    _gate._known.clear()  # as a new process, which must not have to run a gate again
    monkeypatch.setattr(_gate, "run_gate", lambda *args: pytest.fail("a gate was run again"))
    for op in ops.OPS:
        reason = _gate.refusal(op, "triton", device)
        assert (reason is None) == (verdict == "passed")


def test_one_real_gate_passes():
    assert _gate.run_gate("cache_metric", "native", torch.device("cpu")) == "passed"


def test_help_is_quick_and_loads_no_torch():
    code = (
        "import sys; from typer.testing import CliRunner; from fewstep.cli.main import app; "
        "r = CliRunner().invoke(app, ['--help']); assert r.exit_code == 0, r.output; "
        "assert 'doctor' in r.output; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
