"""`fewstep bench ops`: tables, records, errors."""

import json

import pytest
from typer.testing import CliRunner

from fewstep.cli.main import app
from fewstep.ops import _gate

runner = CliRunner()

FILE = """
import torch
from fewstep.bench import Benchmark, Case, baseline, implementations

BENCHMARK = Benchmark(
    "cache_metric",
    [Case("tiny", {"N": 64}, torch.float32), Case("other", {"N": 128}, torch.float32)],
    lambda case, device: (torch.randn(2, 3, case["N"], device=device),),
    [
        *implementations("cache_metric", lambda x, impl: x + 1),
        baseline("plain", lambda x: x + 1),
    ],
    lambda case: 6.0 * case["N"],
    lambda case: 24.0 * case["N"],
)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "benchmarks" / "ops").mkdir(parents=True)
    (tmp_path / "benchmarks" / "ops" / "cache_metric.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fewstep.bench.inputs.cache_bytes", lambda device: 10_000)
    return tmp_path


def invoke(*arguments):
    return runner.invoke(app, ["bench", "ops", *arguments], env={"COLUMNS": "200"})


def test_quick_json_and_a_folder_of_records(folder):
    result = invoke("--device", "cpu", "--quick", "--json", "--output", "out")
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert {r["case"] for r in records} == {"tiny"}
    timed = {r["provider"]: r for r in records if r["skipped"] is None}
    assert timed["fewstep native"]["ratios"]["plain"] > 0
    (written,) = folder.glob("out/*/cache_metric.jsonl")
    assert written.read_text().splitlines() == result.stdout.splitlines()


def test_tables_and_one_file(folder):
    result = invoke("--device", "cpu", "--quick", "--output", "r.jsonl")
    assert result.exit_code == 0, result.output
    assert "native is faster" in result.output
    assert "not timed: cache_metric · fewstep triton" in result.output
    assert len((folder / "r.jsonl").read_text().splitlines()) == 3


def test_peers_are_one_record_of_their_own(folder, monkeypatch):
    result = invoke("--device", "cpu", "--quick", "--peers", "--output", "out")
    assert result.exit_code == 1
    assert 'pip install "fewstep[peers]"' in result.output
    assert not list(folder.glob("out/*/*.jsonl"))
    path = folder / "benchmarks" / "ops" / "cache_metric.py"
    path.write_text(FILE.replace("lambda x: x + 1)", 'lambda x: x + 1, package="pytest")'))
    # In this process: tests/bench/test_apart.py has the workers.
    monkeypatch.setattr("fewstep.bench.run.Workers.take", lambda self, provider: None)
    result = invoke("--device", "cpu", "--quick", "--peers", "--output", "out")
    assert result.exit_code == 0, result.output
    (written,) = folder.glob("out/*/peers.jsonl")
    packages = [json.loads(line)["package"] for line in written.read_text().splitlines()]
    assert [bool(package) for package in packages] == [False, False, True]
    assert packages[-1].startswith("pytest ")


def test_show_reads_records_back(folder):
    assert invoke("--device", "cpu", "--quick", "--output", "out").exit_code == 0
    result = runner.invoke(app, ["bench", "show", "out", "--markdown"])
    assert result.exit_code == 0, result.output
    assert "| cache_metric | tiny, float32 | native |" in result.output
    assert "x plain" in result.output
    assert runner.invoke(app, ["bench", "show", str(folder / "benchmarks")]).exit_code == 1


def test_show_gives_the_run_with_peers_a_title_of_its_own(folder):
    assert invoke("--device", "cpu", "--quick", "--output", "out").exit_code == 0
    (written,) = folder.glob("out/*/cache_metric.jsonl")
    (written.parent / "peers.jsonl").write_text(written.read_text())
    result = runner.invoke(app, ["bench", "show", "out"], env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    titles = [line for line in result.output.splitlines() if " · commit " in line]
    assert titles == [titles[0], titles[0] + " · --peers"]


def test_roofline_without_its_limit_is_an_error_that_says_so(folder):
    assert invoke("--device", "cpu", "--quick", "--output", "out").exit_code == 0
    result = runner.invoke(
        app, ["bench", "show", "out", "--roofline", "r.png"], env={"COLUMNS": "300"}
    )
    assert result.exit_code == 2, result.output
    assert "limit in FLOP/s" in result.output
    assert not (folder / "r.png").exists()


def test_what_is_no_record_is_named(tmp_path):
    (tmp_path / "text.md").write_text("# words")
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    for name in ("nothing", "text.md", "other.jsonl"):
        result = runner.invoke(app, ["bench", "show", str(tmp_path / name)], env={"COLUMNS": "300"})
        assert result.exit_code == 2, name
        assert name in result.output
        assert "Traceback" not in result.output


def test_an_output_that_cannot_be_written_is_an_error_before_the_first_measurement(
    folder, monkeypatch
):
    monkeypatch.setattr("fewstep.cli.bench.run_benchmark", lambda *args: pytest.fail("measured"))
    (folder / "file").write_text("")
    result = invoke("--device", "cpu", "--quick", "--output", "file/out")
    assert result.exit_code == 2
    assert "--output" in result.output


@pytest.mark.parametrize("device", ["tpu", "meta", "cuda:99"])
def test_a_device_that_is_not_there_is_named(folder, device):
    result = invoke("--device", device, "--quick")
    assert result.exit_code == 2
    assert device in result.output


def test_a_failed_gate_sets_the_exit_code(folder, monkeypatch):
    def check(op, impl, device):
        raise AssertionError("not close")

    monkeypatch.setattr(_gate, "check", check)
    result = invoke("--device", "cpu", "--quick")
    assert result.exit_code == 1
    assert "refused: its correctness gate failed: not close" in result.output


def test_errors_name_what_was_expected(folder, monkeypatch):
    result = invoke("--op", "nothing", "--device", "cpu")
    assert result.exit_code == 2
    assert "expected one of cache_metric" in result.output
    monkeypatch.chdir(folder / "benchmarks" / "ops")
    (folder / "benchmarks" / "ops" / "cache_metric.py").unlink()
    (folder / "benchmarks" / "ops").rename(folder / "elsewhere")
    monkeypatch.chdir(folder)
    result = invoke("--device", "cpu")
    assert result.exit_code == 2
    assert "--benchmarks" in result.output
