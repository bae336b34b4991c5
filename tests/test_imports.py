"""Imports run one way, and `import fewstep` is light.

cli -> patching -> areas -> ops -> {reference, kernels, _native}. The areas do not import each
other, except distillation, which stands on tangent (ADR 0004); diffusers is imported only where it
must be.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "fewstep"
KERNELS = ROOT / "kernels" / "triton"

AREAS = {"tangent", "quantization", "caching", "sampling", "distillation"}
OPS = {"ops", "reference", "kernels", "_native", "_C"}
# What each part may import of fewstep itself (its own files always).
ALLOWED = {
    "_native": {"_C"},
    "reference": set(),
    "kernels": set(),
    "ops": {"reference", "kernels", "_native"},
    **{area: OPS for area in AREAS},
    "distillation": OPS | {"tangent"},
    "metrics": {"assets"},
    "assets": {"sampling"},
    "patching": OPS | AREAS | {"assets"},
    "bench": OPS,
    "cli": OPS | AREAS | {"patching", "assets", "metrics", "bench"},
    "__main__": {"cli"},
}
DIFFUSERS = {"patching", "sampling", "assets", "cli"}
FILES = [*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")]


def parts(path: Path) -> tuple[str, list[str]]:
    """Return (part, package of the file as a list) with the part as named in ALLOWED."""
    if KERNELS in path.parents:
        return "kernels", ["fewstep", "kernels", *path.relative_to(KERNELS).parts[:-1]]
    relative = path.relative_to(PACKAGE)
    part = relative.parts[0].removesuffix(".py")
    return part, ["fewstep", *relative.parts[:-1]]


def imported(path: Path) -> set[str]:
    """Return the absolute names that a file imports, at any depth of nesting."""
    _, package = parts(path)
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = [*base, *(node.module.split(".") if node.module else [])]
            if len(prefix) > 1 or prefix != ["fewstep"]:
                names.add(".".join(prefix))
            if prefix == ["fewstep"]:
                names |= {f"fewstep.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_direction(path):
    part, _ = parts(path)
    if path == PACKAGE / "__init__.py":
        pytest.skip("the root loads every part lazily")
    assert part in ALLOWED, f"{part}: a new part; say in ALLOWED what it may import"
    for name in imported(path):
        if not name.startswith("fewstep."):
            continue
        target = name.split(".")[1]
        if target.startswith("__"):
            continue
        assert target == part or target in ALLOWED[part], f"{part} must not import {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_diffusers_only_where_it_must_be(path):
    part, _ = parts(path)
    if part not in DIFFUSERS:
        roots = {name.split(".")[0] for name in imported(path)}
        assert not roots & {"diffusers", "transformers"}


def test_the_checker_sees_relative_and_nested_imports(tmp_path, monkeypatch):
    file = tmp_path / "ops" / "x.py"
    file.parent.mkdir()
    file.write_text("def f():\n    from ..caching import state\n    from .. import _native\n")
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    assert imported(file) == {"fewstep.caching", "fewstep._native"}


def test_import_is_light():
    code = (
        "import sys, fewstep; heavy = {'triton', 'diffusers', 'transformers', 'matplotlib'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "import fewstep.ops, torch; assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_kernels_package_at_the_top():
    # It would shadow the `kernels` package that diffusers imports.
    assert not (ROOT / "kernels" / "__init__.py").exists()
