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


def test_other_packages_are_named_where_they_were_timed(tables, results):
    name = "ONNX Runtime DynamicQuantizeMatMul"

    def timed(record):
        if record["provider"] == name:
            return record | {"skipped": None, "median_s": 1.0}
        return record | {"ratios": record["ratios"] | {name: 1.23}}

    drawn = tables.documents(results("gemm_w8a8.jsonl", timed))[tables.README]
    assert f"1.23x {name} |" in drawn
    assert f"Against other packages: 1.23x to 1.23x {name}." in drawn


def test_other_packages_that_were_not_installed_are_no_figure(tables):
    record = {"op": "gemm_w8a8", "case": "layer", "dtype": "bfloat16", "role": "baseline"}
    absent = record | {"provider": "torchao int8, compiled", "skipped": "torchao is not installed"}
    assert tables.best_peer([absent], record) == "none installed"
    assert tables.best_peer([absent], record | {"op": "cache_metric"}) == ""


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
