"""The timing of whole runs with plans: every plan runs as many full steps as its row says."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    path = ROOT / "benchmarks/pipelines/cache_time.py"
    spec = importlib.util.spec_from_file_location("cache_time", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows(script, tmp_path):
    script.main(["--quick", "--record", str(tmp_path)])
    (path,) = tmp_path.glob("*/cache_time.json")
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["steps"], row["full_steps"]) == (6, 2)
    assert row["speedup"] == pytest.approx(row["plain"] / row["seconds"])
    assert row["efficiency"] == pytest.approx(row["speedup"] / 3)


def test_plans_are_even_and_sum_as_much_as_calibrated_ones(script):
    plan = script.evenly([float(t) for t in range(12, 0, -1)], 4)
    assert plan.full == (0, 3, 6, 9)
    assert [len(w) for w in plan.steps if w is not None] == [1, 1, 2, 2, 3, 3, 4, 4]
