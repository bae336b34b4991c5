"""Where the op tests run: Triton on the GPU where there is one, else in its CPU interpreter.

A test says which kernel it runs by a parameter or fixture `impl` or `kernel`, or by the marker
`triton`. Its tensors are then built on that kernel's device, because that is torch's default device
for the length of the test. What runs on a GPU is marked `gpu`.
"""

from pathlib import Path

import pytest
import torch

from fewstep.ops import UnsupportedError
from helpers import place

PLACE = pytest.StashKey[str]()


def _kernel(item):
    params = getattr(item, "callspec", None)
    params = params.params if params is not None else {}
    if item.get_closest_marker("triton"):
        return "triton", params.get("device")
    return params.get("impl", params.get("kernel")), params.get("device")


@pytest.hookimpl(tryfirst=True)  # before -m selects by the mark that is added here
def pytest_collection_modifyitems(config, items):
    impossible = []
    for item in items:
        if item.path.parent != Path(__file__).parent:  # pytest hands over the items of all folders
            continue
        impl, device = _kernel(item)
        found = place(item.path.stem.removeprefix("test_"), impl, device)
        if found is None:
            impossible.append(item)
            continue
        item.stash[PLACE] = found
        if found == "cuda":
            item.add_marker(pytest.mark.gpu)
    config.hook.pytest_deselected(items=impossible)
    items[:] = [item for item in items if item not in impossible]


@pytest.fixture(autouse=True)
def _place(request):
    if request.node.stash.get(PLACE, "cpu") == "cpu":
        yield
        return
    with torch.device("cuda"):
        yield


@pytest.fixture
def one_thread():
    """Waking threads for problems as small as most tests' takes longer than solving them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Skip what GPU kernels refuse: float32 in some, strides that the copy engine can't take."""
    try:
        return (yield)
    except UnsupportedError as error:
        reasons = "got float32", "the Hopper kernel: ", "the CUDA kernel: "
        known = any(reason in str(error) for reason in reasons)
        if pyfuncitem.stash.get(PLACE, "cpu") != "cuda" or not known:
            raise
        pytest.skip(str(error))
