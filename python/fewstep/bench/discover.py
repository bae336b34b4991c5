"""Finds the benchmark files: they live in the repository, not in the installed package."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

from .model import Benchmark


def find_directory(given: Path | None = None) -> Path:
    """Return the `benchmarks` folder: the one given, or the nearest at or above the current one.

    Raises:
        FileNotFoundError: there is none; the message says what to do.
    """
    if given is not None:
        if (given / "ops").is_dir():
            return given
        raise FileNotFoundError(f"--benchmarks: expected a folder with ops/ inside, got {given}")
    for parent in (Path.cwd(), *Path.cwd().parents):
        if (parent / "benchmarks" / "ops").is_dir():
            return parent / "benchmarks"
    raise FileNotFoundError(
        "no benchmarks/ops folder here or above: the benchmark files are part of fewstep's "
        "repository; run this from a checkout, or pass --benchmarks DIR"
    )


def available(directory: Path) -> list[str]:
    """Return the ops that have a benchmark file."""
    return sorted(p.stem for p in (directory / "ops").glob("*.py") if not p.stem.startswith("_"))


def load(directory: Path, op: str) -> Benchmark:
    """Return the benchmark declared in `ops/<op>.py`.

    Raises:
        ValueError: no such file, or it declares no BENCHMARK of this op.
    """
    path = directory / "ops" / f"{op}.py"
    if not path.is_file():
        offered = ", ".join(available(directory)) or "none"
        raise ValueError(f"op: expected one of {offered}, got {op!r}")
    spec = importlib.util.spec_from_file_location(f"fewstep_benchmarks_{op}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    benchmark = getattr(module, "BENCHMARK", None)
    if not isinstance(benchmark, Benchmark) or benchmark.op != op:
        raise ValueError(f"{path}: expected BENCHMARK = Benchmark({op!r}, ...), got {benchmark!r}")
    return dataclasses.replace(benchmark, path=path)
