"""`fewstep doctor`: what this machine can run, and why not more.

The report is one dict, printed as JSON or as tables. `auto`'s choice per op is asked with the first
of the op's own gate cases as example arguments, so a new op appears here by itself.
"""

from __future__ import annotations

import json as jsonlib
import platform
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .. import __version__, _native, ops
from ..bench.environment import cpu_model, driver, package_version
from ..ops import _gate

PACKAGES = ("torch", "triton", "diffusers", "transformers", "numpy", "scikit-learn")


def _cuda_absence() -> str | None:
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return f"torch is built for CUDA {torch.version.cuda}, but finds no usable device"


def _devices() -> list[torch.device]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(count))]


def _describe(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {
            "device": "cpu",
            "name": cpu_model(),
            "isa": _native.cpu_isa(),
            "threads": torch.get_num_threads(),
        }
    facts = torch.cuda.get_device_properties(device)
    return {
        "device": str(device),
        "name": facts.name,
        "capability": f"sm_{facts.major}{facts.minor}",
        "memory_gib": round(facts.total_memory / 2**30, 1),
        "driver": driver(),
    }


def _choice(op: str, device: torch.device) -> dict[str, Any]:
    args, kwargs, *_ = ops.module(op).gate_cases(device)[0]
    explanation = ops.explain(op, *args, **kwargs)
    return {"auto": explanation.choice, "reasons": explanation.reasons}


def runnable(op: str, device: torch.device) -> list[str]:
    """Return the kernels of an op that could run on a device, gate or no gate."""
    module = ops.module(op)
    args, kwargs, *_ = module.gate_cases(device)[0]
    return [
        candidate.name
        for candidate in module.IMPLEMENTATIONS
        if candidate.name != "reference" and candidate.refuse(*args, **kwargs) is None
    ]


def report() -> dict[str, Any]:
    """Return everything but the checks."""
    return {
        "fewstep": __version__,
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "native": _native.build_info(),
        "no_cuda_device": _cuda_absence(),
        "devices": [
            _describe(device) | {"ops": {op: _choice(op, device) for op in ops.OPS}}
            for device in _devices()
        ],
    }


def checks() -> Iterator[dict[str, Any]]:
    """Run every gate, each in a child process; yield one verdict after the other."""
    for device in _devices():
        for op in ops.OPS:
            for impl in runnable(op, device):
                start = time.perf_counter()
                verdict = _gate.run_gate(op, impl, device)
                if device.index is not None:  # what `auto` will go by from now on
                    _gate.record(op, impl, device.index, verdict)
                seconds = round(time.perf_counter() - start, 1)
                yield {
                    "op": op,
                    "impl": impl,
                    "device": str(device),
                    "verdict": verdict,
                    "seconds": seconds,
                }


def _native_line(native: dict[str, Any]) -> str:
    if "missing" in native:
        return f"[red]{native['missing']}[/red]"
    cuda = f"on for {native['cuda_architectures']}" if native["cuda"] else "off"
    return f"{native['version']}, CUDA kernels {cuda} ({native['cuda_reason']})"


def _device_line(entry: dict[str, Any]) -> str:
    if entry["device"] == "cpu":
        isa = entry["isa"] or "unknown instruction set"
        return f"{entry['name']}, {isa}, {entry['threads']} threads"
    return (
        f"{entry['name']}, {entry['capability']}, {entry['memory_gib']} GiB, "
        f"driver {entry['driver'] or 'unknown'}"
    )


def show(facts: dict[str, Any], console: Console) -> None:
    """Print the report as tables."""
    versions = (f"{name} {text or 'not installed'}" for name, text in facts["packages"].items())
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    grid.add_row("fewstep", f"{facts['fewstep']} on Python {facts['python']}")
    grid.add_row("packages", ", ".join(versions))
    grid.add_row("native", _native_line(facts["native"]))
    for entry in facts["devices"]:
        grid.add_row(entry["device"], _device_line(entry))
    if facts["no_cuda_device"]:
        grid.add_row("cuda", facts["no_cuda_device"])
    console.print(grid, highlight=False)
    for entry in facts["devices"]:
        table = Table(title=f"ops on {entry['device']}", title_justify="left")
        table.add_column("op")
        table.add_column("auto takes", style="green")
        table.add_column("why not the others", overflow="fold")
        for op, choice in entry["ops"].items():
            why = "\n".join(f"{name}: {reason}" for name, reason in choice["reasons"].items())
            table.add_row(op, choice["auto"] or "[red]nothing[/red]", why)
        console.print(table, highlight=False)


def main(json: bool, check: bool) -> int:
    """Run the gates with `check`, then print the report. Return 1 if a gate fails."""
    console = Console(stderr=json)
    verdicts = []
    # Before the report: on a GPU, `auto` goes by these verdicts.
    for entry in checks() if check else ():
        verdicts.append(entry)
        passed = entry["verdict"] == "passed"
        mark = "[green]passed[/green]" if passed else f"[red]{entry['verdict']}[/red]"
        console.print(
            f"gate {entry['op']} {entry['impl']} on {entry['device']}: {mark} "
            f"({entry['seconds']} s)",
            highlight=False,
        )
    facts = report()
    if check:
        facts["checks"] = verdicts
    if json:
        sys.stdout.write(jsonlib.dumps(facts, indent=2) + "\n")
    else:
        show(facts, console)
    return int(any(entry["verdict"] != "passed" for entry in verdicts))
