"""Builds the API pages from the docstrings into docs/api (pdoc: no theme or configuration to own).

pdoc finds the modules from the package. An op has a page of its own module; the attribute
`fewstep.ops.<op>` is the function.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pdoc
import pdoc.render

import fewstep

# pdoc follows `__all__`, where `patching` is represented by `patch`.
MODULES = ("fewstep", "fewstep.patching")
OUTPUT = Path(__file__).parent / "api"


def build(output: Path) -> int:
    """Write the pages and return how many there are."""
    for name in fewstep.__all__:  # they load on use, and pdoc looks into the module without asking
        setattr(fewstep, name, getattr(fewstep, name))
    pdoc.render.configure(docformat="google", math=False)
    with warnings.catch_warnings():
        # A NamedTuple's constructor belongs to no module in which pdoc could look up annotations.
        warnings.filterwarnings("ignore", "Error parsing type annotation ForwardRef")
        pdoc.pdoc(*MODULES, output_directory=output)
    return len(list(output.rglob("*.html")))


if __name__ == "__main__":
    print(f"wrote {build(OUTPUT)} pages to {OUTPUT}")
