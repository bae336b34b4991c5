"""Every figure in the documents is the one in the committed records, and none is typed."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

from fewstep.bench import discover

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "docs/readme_tables.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["readme_tables"] = module
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("readme_tables")


def test_the_documents_are_what_the_records_say(tables):
    folder = tables.drawn_from(tables.README.read_text())
    for path, text in tables.documents(folder).items():
        assert path.read_text() == text, f"{path}: run python docs/readme_tables.py"


def test_captions_name_the_commit_of_the_records(tables):
    folder = tables.drawn_from(tables.README.read_text())
    records, text = tables.Records.load(tables.RESULTS / folder), tables.README.read_text()
    for environment in (records.demo["environment"], records.bench[0]):
        assert f"commit {environment['commit'][:10]}." in text


@pytest.fixture
def results(tables, tmp_path, monkeypatch):
    """A copy of the records; returns a function that changes every line of one file in it."""
    folder = tables.drawn_from(tables.README.read_text())
    shutil.copytree(tables.RESULTS / folder, tmp_path / folder)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)

    def change(name, edit):
        path = tmp_path / folder / name
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("\n".join(json.dumps(edit(line)) for line in lines))
        return folder

    return change


def test_every_headline_is_a_case_and_a_baseline_of_its_benchmark(tables):
    for op, case, dtype, rival in tables.HEADLINES:
        benchmark = discover.load(ROOT / "benchmarks", op)
        assert (case, dtype) in {(c.name, str(c.dtype).partition(".")[2]) for c in benchmark.cases}
        assert rival in {p.name for p in benchmark.providers if p.role == "baseline"}


def test_another_record_draws_other_tables(tables, results):
    folder = results("gemm_w8a8.jsonl", lambda r: r | {"ratios": dict.fromkeys(r["ratios"], 9.87)})
    drawn = tables.documents(folder)
    assert "9.87x to 9.87x" in drawn[tables.README]
    assert "9.87x torch linear" in drawn[tables.BENCHMARKS]


@pytest.fixture
def peers(tables, results):
    """gemm_w8a8's records as a run beside ONNX Runtime; returns a function that writes them."""
    name = "ONNX Runtime DynamicQuantizeMatMul"

    def timed(record):
        if record["provider"] == name:
            return record | {"skipped": None, "median_s": 1.0, "package": "onnxruntime 1.2.3"}
        ratios = record["ratios"] | ({name: 1.23} if record["case"] == "SDXL 1280 proj" else {})
        return record | {"ratios": ratios, "package": None}

    def write(**difference):
        folder = results("gemm_w8a8.jsonl", lambda record: record)
        lines = (tables.RESULTS / folder / "gemm_w8a8.jsonl").read_text().splitlines()
        records = [timed(json.loads(line)) | difference for line in lines]
        text = "\n".join(map(json.dumps, records))
        (tables.RESULTS / folder / tables.PEERS).write_text(text)
        return folder

    return write


def test_other_packages_are_drawn_from_their_own_record(tables, peers):
    drawn = tables.documents(peers(commit="another commit"))
    for path in (tables.README, tables.BENCHMARKS):
        assert "each package in a process of its own (onnxruntime 1.2.3), on" in drawn[path]
        assert "commit another co." in drawn[path]
        assert "Against other packages: 1.23x to 1.23x ONNX Runtime" in drawn[path]
    assert "1.23x ONNX Runtime DynamicQuantizeMatMul |" in drawn[tables.README]
    assert "| op | case | rows | from x | torch linear | onnxruntime |" in drawn[tables.BENCHMARKS]
    assert "| 1.23x |" in drawn[tables.BENCHMARKS]
    with pytest.raises(ValueError, match=r"peers\.jsonl: expected records of one run of a clean"):
        tables.documents(peers(dirty=True))


def test_without_a_record_of_other_packages_the_documents_say_so(tables, results):
    folder = results("gemm_w8a8.jsonl", lambda record: record)
    (tables.RESULTS / folder / tables.PEERS).unlink(missing_ok=True)
    drawn = tables.documents(folder)
    for path in (tables.README, tables.BENCHMARKS):
        assert "Beside other packages: not measured yet." in drawn[path]
        assert "Against other packages" not in drawn[path]


def test_whole_models_are_drawn_from_records_of_gpus(tables, tmp_path):
    assert tables.gpu_tables(tmp_path, tables.MODELS, tables.model_table) == "Not measured yet.\n"
    machine = {"device": "NVIDIA H200", "device_type": "cuda", "driver": "1.2", "torch": "2.11"}
    machine |= {"triton": "3.6", "commit": "0123456789abcdef", "dirty": False}
    row = {"model": "SDXL", "form": "w8a8", "weight_bytes": 2**30, "low_bit_layers": 7}
    row |= {"left_in_bf16": {"by the table: 0.90x at 1 x 2 x 3": 5, "too small": 3}}
    rows = [
        row
        | {"mode": "eager", "median_s": 0.02, "extra_bytes": 2**30, "served": {"a native": 7}}
        | {"ratios": {"bf16 compiled": 1.25}},
        row
        | {"mode": "graph", "median_s": 0.01, "extra_bytes": 0}
        | {"ratios": {"bf16 compiled": 2.5}},
        {"model": "SDXL", "form": "fp8", "mode": "all", "skipped": "no reason"},
    ]
    for device, more in (("a-cpu", {"device_type": "cpu"}), ("nvidia-h200", {})):
        path = tmp_path / device / "model_steps.json"
        path.parent.mkdir()
        path.write_text(json.dumps({"environment": machine | more, "rows": rows}))
    drawn = tables.gpu_tables(tmp_path, tables.MODELS, tables.model_table)
    cells = "SDXL | w8a8 | 20 ms | 10 ms |  |  | 2.50x | 7 `a native` | 5 | 1.00 | 2.00"
    assert drawn.count("| model |") == 1
    assert f"| {cells} |" in drawn
    assert "- SDXL, fp8, all: no reason\n" in drawn
    assert "on NVIDIA H200, driver 1.2, torch 2.11, Triton 3.6, commit 0123456789." in drawn
    path.write_text(json.dumps({"environment": machine | {"dirty": True}, "rows": rows}))
    with pytest.raises(ValueError, match="clean commit"):
        tables.gpu_tables(tmp_path, tables.MODELS, tables.model_table)


def test_loops_are_drawn_from_records_of_gpus(tables, tmp_path):
    machine = {"device": "NVIDIA H200", "device_type": "cuda", "driver": "1.2", "torch": "2.11"}
    machine |= {"triton": "3.6", "commit": "0123456789abcdef", "dirty": False}
    row = {"model": "SDXL", "mode": "graph", "steps": 20, "full_steps": 5, "host_waits": 0}
    row |= {"full": {"median_s": 2.0}, "plan": {"median_s": 0.5}}
    row |= {"speedup": 4.0, "efficiency": 1.0}
    rows = [row, {"model": "FLUX.1-dev", "failed": "RuntimeError: no memory"}]
    path = tmp_path / "nvidia-h200" / "cache_steps.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"environment": machine, "rows": rows}))
    drawn = tables.gpu_tables(tmp_path, tables.LOOPS, tables.loop_table)
    assert "| SDXL | graph | 5 of 20 | 2 s | 500 ms | 4.00x | 100.0% | 0 |" in drawn
    assert "Without a number: FLUX.1-dev: RuntimeError: no memory" in drawn
    assert "Whole loops, random weights, on NVIDIA H200" in drawn


def test_quality_has_its_error_or_is_not_measured(tables):
    assert tables.quality(None) == "Not measured yet.\n"
    row = {"model": "student, 2 steps", "scheme": "w8a8", "plain_frechet": 2.0, "frechet": 2.01}
    row |= {"ratio": 1.005, "ratio_error": 0.0021, "psnr_db": None}
    folder = tables.drawn_from(tables.README.read_text())
    machine = tables.Records.load(tables.RESULTS / folder).demo["environment"]
    drawn = tables.quality({"environment": machine, "seeds": 8, "images": 320, "rows": [row]})
    assert "| student, 2 steps | `w8a8` | 2.000 | 2.010 | 1.005x ± 0.002 |  |" in drawn
    assert "320 images of 8 seeds, on" in drawn


@pytest.mark.parametrize(
    "difference", [{"dirty": True}, {"commit": "another"}, {"commit": None}, {"threads": 77}]
)
def test_records_of_local_changes_or_of_two_runs_are_refused(tables, results, difference):
    folder = results("cache_metric.jsonl", lambda r: r | difference)
    with pytest.raises(ValueError, match="one run of a clean commit"):
        tables.documents(folder)


def test_a_document_without_its_markers_is_an_error(tables):
    with pytest.raises(ValueError, match="table:x: expected one pair of markers, got 0"):
        tables.replace("no markers", "x", "folder", "body")
