"""What a record says about the machine and the code that made it."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from .. import __version__, _native


def _output(*command: str, cwd: Path | None = None) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, cwd=cwd)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def package_version(name: str) -> str | None:
    """Return the installed version of a package without importing it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver() -> str | None:
    """Return the NVIDIA driver's version."""
    text = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return text.splitlines()[0] if text else None


def cpu_model() -> str:
    """Return the CPU's name with family and model, which virtual machines do not hide."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = dict(re.findall(r"^(model name|cpu family|model)\s*: (.+)$", text, re.MULTILINE))
    name = found.get("model name", platform.machine())
    family = f" (family {found['cpu family']}, model {found['model']})" if "model" in found else ""
    return name + family


def package_checkout() -> Path | None:
    """Return the checkout that this package is imported from; None where it is installed."""
    root = Path(__file__).parents[3]
    here = (root / ".git").exists() and (root / "python" / "fewstep" / "bench").is_dir()
    return root if here else None


def commit(checkout: Path | None) -> tuple[str | None, bool | None]:
    """Return the commit and whether tracked files differ from it; (None, None) without a checkout.

    Records under benchmarks/results/ don't count as changes: a run writes them. FEWSTEP_COMMIT,
    "<hash>" or "<hash>+dirty", stands in where the files came without .git.
    """
    given = os.environ.get("FEWSTEP_COMMIT")
    if given:
        return given.removesuffix("+dirty"), given.endswith("+dirty")
    head = _output("git", "rev-parse", "HEAD", cwd=checkout) if checkout is not None else None
    if head is None:
        return None, None
    changes = ("status", "--porcelain", "-uno", "--", ".", ":(exclude)benchmarks/results")
    return head, bool(_output("git", *changes, cwd=checkout))


def environment(device: torch.device) -> dict[str, Any]:
    """Return the machine's part of a record, with the commit of the package that runs."""
    cuda = device.type == "cuda"
    head, dirty = commit(package_checkout())
    return {
        "device": torch.cuda.get_device_name(device) if cuda else cpu_model(),
        "device_type": device.type,
        "capability": "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if cuda else None,
        "driver": driver() if cuda else None,
        "cpu": cpu_model(),
        "isa": _native.cpu_isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": package_version("triton"),
        "python": platform.python_version(),
        "fewstep": __version__,
        "commit": head,
        "dirty": dirty,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def slug(device: str) -> str:
    """Return a folder name for a device: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
