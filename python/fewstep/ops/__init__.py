"""The operators: `fewstep.ops.<op>`, one file per op, found by folder.

Every op takes `impl="auto" | "reference" | "native" | "triton"`. `auto` picks by device,
capability, dtype and static sizes; an explicit choice runs or raises with the reasons.
`explain(op, ...)` says what each implementation would do with given arguments.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from ._select import Explanation, UnsupportedError, explain_choice

OPS: tuple[str, ...] = tuple(
    sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
)


def module(op: str) -> ModuleType:
    """Return the module `fewstep.ops.<op>` (the attribute of that name is the function)."""
    if op not in OPS:
        raise ValueError(f"op: expected one of {', '.join(OPS)}, got {op!r}")
    return importlib.import_module(f"{__name__}.{op}")


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Say which implementation `auto` picks for these arguments, and why the others can't run."""
    return explain_choice(op, module(op).IMPLEMENTATIONS, args, kwargs)


for _op in OPS:
    # Importing a submodule binds the module to its name; users want the function there.
    globals()[_op] = getattr(importlib.import_module(f"{__name__}.{_op}"), _op)

merge_partials = module("attention_jvp").merge_partials

__all__ = ["OPS", "Explanation", "UnsupportedError", "explain", "merge_partials", "module", *OPS]
