"""Builds the API pages from the docstrings into docs/api (pdoc: no theme or configuration to own).

An op's page is built from its module; the attribute `fewstep.ops.<op>` is the function.
"""

from __future__ import annotations

from pathlib import Path

import pdoc
import pdoc.render

from fewstep import ops

OUTPUT = Path(__file__).parent / "api"
MODULES = [
    "fewstep",
    "fewstep.assets",
    "fewstep.caching",
    "fewstep.distillation",
    "fewstep.metrics",
    "fewstep.ops",
    *(f"fewstep.ops.{op}" for op in ops.OPS),
    "fewstep.patching",
    "fewstep.quantization",
    "fewstep.reference",
    "fewstep.sampling",
]


def main() -> None:
    """Write the pages."""
    pdoc.render.configure(docformat="google", math=False)
    pdoc.pdoc(*MODULES, output_directory=OUTPUT)
    print(f"wrote {len(list(OUTPUT.rglob('*.html')))} pages to {OUTPUT}")


if __name__ == "__main__":
    main()
