"""The API pages build without a warning, with a page for every op."""

import importlib.util
import warnings
from pathlib import Path

import pytest

from fewstep import ops

ROOT = Path(__file__).parents[1]


def test_api_pages_build_without_a_warning(tmp_path):
    pytest.importorskip("pdoc")
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="pdoc")
        assert module.build(tmp_path) > len(ops.OPS)
    for op in ops.OPS:
        assert (tmp_path / "fewstep" / "ops" / f"{op}.html").is_file()
    for area in ("patching", "tangent", "sampling", "caching", "quantization", "distillation"):
        assert list(tmp_path.glob(f"fewstep/{area}*"))
