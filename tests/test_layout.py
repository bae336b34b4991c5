"""One op, one stem: every op has every part under its own name, and no part is an orphan."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fewstep import ops, reference

ROOT = Path(__file__).parents[1]
REQUIRED = [
    "python/fewstep/ops/{op}.py",
    "python/fewstep/reference/{op}.py",
    "csrc/include/fewstep/ops/{op}.h",
    "csrc/cpu/{op}.cpp",
    "kernels/triton/{op}.py",
    "tests/ops/test_{op}.py",
    "benchmarks/ops/{op}.py",
    "docs/ops/{op}.md",
]
HARD_CAP = 800


@pytest.mark.parametrize("op", ops.OPS)
@pytest.mark.parametrize("part", REQUIRED)
def test_every_part_exists(op, part):
    assert (ROOT / part.format(op=op)).is_file()


@pytest.mark.parametrize(
    ("pattern", "prefix"),
    [
        ("csrc/cpu/*.cpp", ""),
        ("csrc/cuda/*.cu", ""),
        ("csrc/include/fewstep/ops/*.h", ""),
        ("kernels/triton/*.py", ""),
        ("python/fewstep/reference/*.py", ""),
        ("tests/ops/test_*.py", "test_"),
        ("benchmarks/ops/*.py", ""),
        ("docs/ops/*.md", ""),
    ],
)
def test_no_orphans(pattern, prefix):
    # `_name` is shared by several ops; `probe_name` measures the machine for a benchmark.
    for path in ROOT.glob(pattern):
        stem = re.sub(r"_sm\d+$", "", path.stem.removeprefix(prefix))
        assert stem in ops.OPS or stem.startswith(("_", "probe_")), f"{path} belongs to no op"


@pytest.mark.parametrize("op", ops.OPS)
def test_module_has_the_pattern(op):
    module = ops.module(op)
    assert getattr(module, op) is getattr(ops, op)
    assert getattr(reference, op) is not getattr(ops, op)
    names = [implementation.name for implementation in module.IMPLEMENTATIONS]
    assert names[-1] == "reference"
    assert set(names) <= {"native", "triton", "reference"}
    assert callable(module.gate_cases)
    assert module.__doc__
    assert getattr(ops, op).__doc__


def unrecorded(validated, results):
    """Return the (capability, "op:impl") that are listed as validated without a passing record."""
    recorded = set()
    for path in results.glob("*/*.jsonl"):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            # The harness times a kernel only after its gate has passed on that machine.
            if record["role"] == "op" and record["skipped"] is None:
                recorded.add((record["capability"], f"{record['op']}:{record['impl']}"))
    listed = {(capability, kernel) for capability in validated for kernel in validated[capability]}
    return listed - recorded


def test_validated_kernels_have_a_passing_record():
    """A kernel is in `auto` without a gate only where its record is committed."""
    validated = json.loads((ROOT / "python/fewstep/ops/validated.json").read_text())
    assert not unrecorded(validated, ROOT / "benchmarks" / "results")


def test_a_validated_kernel_without_a_passing_record_is_found(tmp_path):
    record = {"role": "op", "op": "x", "impl": "triton", "capability": "sm_90", "skipped": None}
    lines = [record, record | {"impl": "native", "skipped": "refused: its gate failed"}]
    (tmp_path / "device").mkdir()
    (tmp_path / "device" / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert unrecorded({"sm_90": ["x:triton"]}, tmp_path) == set()
    for capability, kernel in (("sm_80", "x:triton"), ("sm_90", "x:native"), ("sm_90", "y:triton")):
        assert unrecorded({capability: [kernel]}, tmp_path) == {(capability, kernel)}


def sources():
    for pattern in ("python/**/*.py", "kernels/**/*.py", "tests/**/*.py", "benchmarks/**/*.py"):
        yield from ROOT.glob(pattern)
    for suffix in ("cpp", "h", "cu", "cuh"):
        yield from ROOT.glob(f"csrc/**/*.{suffix}")


def test_no_file_is_over_the_hard_cap():
    lengths = {path: len(path.read_text().splitlines()) for path in sources()}
    assert not {str(path): n for path, n in lengths.items() if n > HARD_CAP}


def test_pointers_of_tensors_are_read_in_one_place():
    for word in ("dlpack", ".data_ptr()"):
        users = {p for p in ROOT.glob("python/**/*.py") if word in p.read_text()}
        assert users == {ROOT / "python/fewstep/_native.py"}


def test_no_torch_header_under_csrc():
    for path in sources():
        if "csrc" in path.parts:
            assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path


def test_pybind_only_in_bindings():
    users = [
        p.name for p in sources() if "csrc" in p.parts and "#include <pybind11" in p.read_text()
    ]
    assert users == ["bindings.cpp"]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_one_environment_builds_into_the_checkout(tmp_path):
    command = ["make", "--dry-run", "peers", f"VENV={tmp_path}/v"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    building = [
        line.split()[0] for line in done.stdout.splitlines() if "pip" in line and ".[" in line
    ]
    assert building == [f"{tmp_path}/v/bin/python"]
    assert f"{tmp_path}/v-peers/bin/python -m fewstep bench ops" in done.stdout
