"""The CUDA library: every kernel is bound, holds both architectures, and does not spill."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

from fewstep import _native

ROOT = Path(__file__).parents[1]
INFO = _native.build_info()
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))

pytestmark = pytest.mark.skipif(
    not INFO.get("cuda"),
    reason=f"built without CUDA kernels: {INFO.get('cuda_reason', INFO.get('missing'))}",
)


def cuobjdump(*arguments):
    """Run the cuobjdump that Triton's package carries on the native library."""
    spec = importlib.util.find_spec("triton")
    tools = [] if spec is None else list(Path(spec.origin).parent.rglob("bin/cuobjdump"))
    if not tools:
        pytest.skip("no cuobjdump: Triton is not installed or carries none")
    command = [str(tools[0]), *arguments, _native._C.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_kernel_is_bound(source):
    assert hasattr(_native._C.cuda, source.stem)


def test_both_architectures_are_there():
    listing = cuobjdump("--list-elf")
    for architecture in INFO["cuda_architectures"].split():
        assert f"sm_{architecture}" in listing


def test_no_kernel_spills():
    usage = re.findall(r"Function (\S+):\n.*?STACK:(\d+).*?LOCAL:(\d+)", cuobjdump("-res-usage"))
    assert usage
    assert not [(name, stack, local) for name, stack, local in usage if int(stack) or int(local)]


def hopper_kernels():
    """Return the instructions of every kernel that is for sm_90a alone, by its name."""
    listing = cuobjdump("--dump-sass", "--gpu-architecture", "sm_90a")
    functions = re.split(r"\n\s*Function : ", listing)[1:]
    named = {text.split("\n", 1)[0]: text for text in functions}
    return {name: text for name, text in named.items() if "_sm90_kernel" in name}


def test_hopper_kernels_use_the_chip():
    """Matrix instructions in batches, bulk loads, and nothing that goes through local memory."""
    kernels = hopper_kernels()
    assert kernels or not list(SOURCES[0].parent.glob("*_sm90.cu"))
    for name, text in kernels.items():
        products = re.findall(r"[HIQ]GMMA\.\S+ [^\n;]*", text)
        assert len(products) >= (8 if "gemm4" in name else 12), name
        assert "UTMALDG" in text, name
        assert not re.search(r"\b(LDL|STL)\b", text), name
        waited = [product for product in products if "gsb0" in product]
        if "gemm8" in name:
            # Products of bytes begin a tile or go on, or begin after every slab; the branch's are a
            # slab in two halves, of either 16-bit type.
            eight = [product for product in waited if product[0] in "IQ"]
            assert len(eight) == (1 if "Float8" in name else 2), name
            assert len(waited) == len(eight) + 4, name
            continue
        if "gemm4" in name:
            # Two batches of two products, a half of a slab each; the branch's of either type.
            assert [product[0] for product in waited].count("I") == 2, name
            assert len(waited) == 4, name
            continue
        # A batch for each step of a tile: S, tS and the sums; for gradients of queries and keys X0
        # and X1 too, for those of keys and values two batches of sums; for wide heads those of both
        # groups, and each group's first scores. Serialised by the compiler, each product would wait
        # for the one before.
        # Where the four sums are fused with those of queries, a batch more for one of two groups.
        gradient = re.search(r"PassE(\d)ELb\dELb(\d)", name)
        batches = {"00": 5, "10": 5, "11": 5, "30": 6, "31": 7}
        batches = batches.get(gradient and gradient[1] + gradient[2], 3)
        wide = re.search(r"WideConfig\w+?Li\d+ELb([01])", name)
        if wide:
            batches = 6 if wide[1] == "1" else 7
        assert len(waited) == batches, (name, len(waited), len(products))
        # S and tS of bytes, the sums of 16-bit values.
        eight = [product for product in waited if product[0] in "IQ"]
        assert len(eight) == (2 if "scores8" in name else 0), name
