"""Plans on other grids and on parts of their own: every row is of what it says."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_rows(tmp_path):
    path = ROOT / "benchmarks/pipelines/cache_grids.py"
    spec = importlib.util.spec_from_file_location("cache_grids", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    small = "--steps 6 --full-steps 4 --counts 5 --strengths 0.5 --images 10 --calls 1"
    script.main([*small.split(), "--record", str(tmp_path)])
    (path,) = tmp_path.glob("*/cache_grids.json")
    rows = json.loads(path.read_text())["rows"]
    found = {(row["plan"], row["strength"]): row for row in rows}
    assert {(row["plan"], row["steps"]) for row in rows if row["strength"] == 1.0} == {
        ("own", 5),
        ("carried", 5),
        ("gram", 5),
        ("fewer", 5),
    }
    assert found["own", 1.0]["full_steps"] == 4
    assert found["own", 1.0]["psnr"] > found["fewer", 1.0]["psnr"]
    assert {row["steps"] for row in rows if row["strength"] == 0.5} == {6}
    assert found["own", 0.5]["full_steps"] == found["carried", 0.5]["full_steps"] < 4
    assert found["waits", 0.5]["full_steps"] >= found["carried", 0.5]["full_steps"]
    assert all(row["psnr_min"] <= row["psnr"] for row in rows)
