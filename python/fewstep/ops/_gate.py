"""When `auto` may use a GPU kernel on this machine.

At once, on an architecture whose passing record is committed (`validated.json`, drawn from
benchmarks/results/). Anywhere else the kernel first passes its own gate here: the op's `gate_cases`
against the reference, in a child process so that a fault can't poison the caller, once per device,
driver, version of torch and Triton, and state of the kernels' files. The verdict is cached; a
kernel that fails is refused with the reason.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

TIMEOUT_SECONDS = 300


def cache_file() -> Path:
    """Return where verdicts are kept: FEWSTEP_CACHE_DIR or ~/.cache/fewstep, gates.json."""
    root = os.environ.get("FEWSTEP_CACHE_DIR")
    return (Path(root) if root else Path.home() / ".cache" / "fewstep") / "gates.json"


@functools.cache
def _validated() -> dict[str, list[str]]:
    return json.loads((Path(__file__).parent / "validated.json").read_text())


@functools.cache
def _machine(index: int) -> str:
    from .. import __version__

    try:
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
        ).stdout.split("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        driver = "unknown"
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return (
        f"{torch.cuda.get_device_name(index)} | driver {driver} | torch {torch.__version__} | "
        f"triton {triton} | fewstep {__version__}"
    )


@functools.cache
def fingerprint(impl: str) -> str:
    """Return a digest of the files that hold the kernels: an edited kernel is another kernel."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    files = sorted(package.glob("_C*"))
    if impl == "triton":
        kernels = importlib.import_module("fewstep.kernels")
        files = sorted(path for root in kernels.__path__ for path in Path(root).glob("*.py"))
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _load() -> dict[str, Any]:
    try:
        return json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}


def _store(machine: str, key: str, verdict: str) -> None:
    verdicts = _load()
    verdicts.setdefault(machine, {})[key] = verdict
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(verdicts, indent=2))
        partial.replace(path)
    except OSError:
        pass  # a read-only home costs a repeated gate, nothing else


def run_gate(op: str, impl: str, device: torch.device) -> str:
    """Run the gate in a child process and return "passed" or the reason it failed."""
    command = [sys.executable, "-m", "fewstep.ops._gate", op, impl, str(device)]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return f"did not finish within {TIMEOUT_SECONDS} s"
    if child.returncode == 0:
        return "passed"
    return last_error(child.stderr) or f"the child process ended with status {child.returncode}"


def last_error(stderr: str) -> str:
    """Return the message of the last exception in a traceback, its lines joined; "" if none."""
    lines = stderr.strip().splitlines()
    starts = [i for i, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception)\b", line)]
    message = " ".join(line.strip() for line in lines[starts[-1] if starts else -1 :])
    return re.sub(r"\s+", " ", message)[:400]


_known: dict[tuple[str, str, int], str] = {}  # of this process: a read-only home asks once


def _key(op: str, impl: str) -> str:
    return f"{op}:{impl}:{fingerprint(impl)}"


def record(op: str, impl: str, index: int, verdict: str) -> None:
    """Keep the verdict on a kernel on CUDA device `index`: `auto` goes by it from now on."""
    _known[op, impl, index] = verdict
    _store(_machine(index), _key(op, impl), verdict)


def _verdict(op: str, impl: str, index: int) -> str:
    known = _known.get((op, impl, index))
    if known is None:
        known = _load().get(_machine(index), {}).get(_key(op, impl))
        if known is None:
            known = run_gate(op, impl, torch.device("cuda", index))
            record(op, impl, index, known)
        _known[op, impl, index] = known
    return known


def refusal(op: str, impl: str, device: torch.device) -> str | None:
    """Return why `auto` may not use this kernel on this CUDA device, or None."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    major, minor = torch.cuda.get_device_capability(index)
    if f"{op}:{impl}" in _validated().get(f"sm_{major}{minor}", []):
        return None
    verdict = _verdict(op, impl, index)
    return None if verdict == "passed" else f"its gate on this machine failed: {verdict}"


# torch.compile asks once, while tracing, instead of tracing into files and child processes. What
# torch.compiler.assume_constant_result sets; calling that would import the compiler here.
refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check(op: str, impl: str, device: torch.device) -> None:
    """Compare `impl` with the reference over the op's gate cases; raise AssertionError if off.

    A case is (args, kwargs, rtol, atol), compared element by element with the reference in the same
    dtype, or (args, kwargs, bound), compared in norm with the reference in float64: what is left of
    the bound is then the kernel's own error, not that of single elements. Bounds are those of the
    op's tests. Cases that the implementation refuses, and says so, are left out. In the first form
    the arguments are compared too, each call having its own: an op may write to them.
    """
    module = importlib.import_module(f"fewstep.ops.{op}")
    function = getattr(module, op)
    refuse = next(x.refuse for x in module.IMPLEMENTATIONS if x.name == impl)
    cases = [case for case in module.gate_cases(device) if refuse(*case[0], **case[1]) is None]
    if not cases:
        raise AssertionError(f"{op}: impl='{impl}' takes none of the gate's cases")
    for args, kwargs, *bounds in cases:
        own_args, own_kwargs = copy.deepcopy((args, kwargs))
        got = function(*own_args, **own_kwargs, impl=impl)
        if len(bounds) == 2:
            want = function(*args, **kwargs, impl="reference")
            if any(bounds):  # torch compares 8-bit floats by their bits alone
                got, want = _widen(got), _widen(want)
            torch.testing.assert_close(got, want, rtol=bounds[0], atol=bounds[1])
            ours, theirs = _tensors(own_args, own_kwargs), _tensors(args, kwargs)
            torch.testing.assert_close(ours, theirs, rtol=bounds[0], atol=bounds[1], equal_nan=True)
            continue
        exact = function(*map(_double, args), **_double_values(kwargs), impl="reference")
        for i, (ours, want) in enumerate(zip(got, exact, strict=True)):
            _expect_close_in_norm(i, ours.double(), want.double(), bounds[0], (args, kwargs))


def _widen(found: Any) -> Any:
    if isinstance(found, (list, tuple)):
        return [_widen(x) for x in found]
    if found is None:  # a derivative that was not asked for
        return None
    return found.float() if found.dtype == torch.float8_e4m3fn else found


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
    return [x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x for x in tensors]


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def _double_values(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: _double(x) for name, x in kwargs.items()}


def _expect_close_in_norm(
    i: int, got: torch.Tensor, want: torch.Tensor, bound: float, case: tuple[Any, ...]
) -> None:
    infinite = want.isinf()
    error = (got - want)[~infinite].norm()
    limit = bound * want[~infinite].norm()
    if torch.equal(got[infinite], want[infinite]) and bool(error <= limit):  # NaN is not
        return
    args, kwargs = case
    shapes = [list(x.shape) for x in args if isinstance(x, torch.Tensor)]
    raise AssertionError(
        f"result {i}: expected an error of at most {limit:.1e} in norm, got {error:.1e}, for "
        f"{shapes} and {', '.join(kwargs) or 'no options'}"
    )


if __name__ == "__main__":
    check(sys.argv[1], sys.argv[2], torch.device(sys.argv[3]))
