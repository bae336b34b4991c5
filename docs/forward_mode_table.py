"""Rewrites docs/forward_mode_models.md from a run of the tiny models under tests/tangent/zoo.

    python docs/forward_mode_table.py

One row per transformer and UNet class of diffusers. Every error in it is measured here.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "forward_mode_models.md"

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(ROOT / "tests"))

from tangent.zoo import CASES, EXCLUDED  # noqa: E402
from tangent.zoo.measure import Measurement, measure, relative  # noqa: E402
from tangent.zoo.subject import HOW  # noqa: E402

ROUTES = {
    "sdpa": "`F.scaled_dot_product_attention`",
    "flex": "`flex_attention`",
    "softmax": "matmul and softmax in the model",
    "linear": "linear attention in the model",
}


def plain(run: Measurement) -> str:
    """Say what `torch.func.jvp` of the same model does without help."""
    try:
        torch.func.jvp(run.single, run.single.primals, run.single.tangents)
    except NotImplementedError:
        return "raises: fused SDPA"
    except Exception as error:
        # FlexAttention compiles itself; Dynamo then meets functorch's tensors.
        return "raises: FlexAttention" if "flex_attention" in str(error) else "raises"
    return "works"


def row(name: str) -> str:
    """Measure one case and return its line."""
    case, run = CASES[name], measure(name)
    error = relative(run.tangent, run.expected_tangent)
    works = "works" if error <= case.budget else f"wrong: above {case.budget:.1e}"
    reached = ", ".join(ROUTES[route] for route in case.attention.split("+"))
    return f"| {name} | {works} | {plain(run)} | {reached} | {error:.1e} | {case.note} |"


def main() -> None:
    """Write the page."""
    import diffusers

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    lines = [
        "# Forward mode through the models of diffusers",
        "",
        f"Measured by `python docs/forward_mode_table.py`: diffusers {diffusers.__version__},",
        f"torch {torch.__version__}, {HOW}.",
        "Each class is a tiny random model in fp32, differentiated along its sample and its time",
        "steps, against the same in fp64 with attention as matmul and softmax (tests/tangent/zoo).",
        "The error is ||t - t64|| / ||t64|| over all outputs; the bound is 1e-5 where no note says",
        "otherwise. *Alone* is what `torch.func.jvp(model, ...)` does without help.",
        "",
        "| class | | alone | attention through | error | note |",
        "|---|---|---|---|---:|---|",
        *sorted(map(row, CASES)),
        *(f"| {name} | left out | | | | {reason} |" for name, reason in EXCLUDED.items()),
    ]
    TABLE.write_text("\n".join(lines) + "\n")
    print(f"{TABLE.name}: {len(CASES)} cases")


if __name__ == "__main__":
    main()
