"""Other packages on GPUs: what they are timed at, and that none of them can stop the others."""

import importlib.util

import pytest
import torch
from torch.nn import functional as F

from fewstep.bench import Case, gpu_peers, products

CASE = Case("FLUX.1 image ff1", {"M": 32, "N": 128, "K": 256, "G": 64}, torch.bfloat16, ("cuda",))
TENSORS = tuple(torch.randn(shape).bfloat16() for shape in ((32, 256), (128, 256), (128,)))
PEERS = [*gpu_peers.int8_peers(), *gpu_peers.fp8_peers(), *gpu_peers.int4_peers()]


def test_peers_are_timed_on_gpus_at_shapes_of_models():
    assert set(gpu_peers.TUNED) <= set(products.MODEL_SHAPES)
    assert gpu_peers.worth_tuning(CASE) is None
    others = ({"devices": ("cpu", "cuda")}, {"options": {"activation": "geglu"}}, {"name": "other"})
    for other in others:
        assert gpu_peers.worth_tuning(Case(**(vars(CASE) | other))) is not None
    assert len({p.name for p in PEERS}) == len(PEERS)
    for provider in PEERS:
        assert provider.devices == ("cuda",)
        assert provider.role == "baseline"
        assert "cuda only" in provider.unless(CASE, *TENSORS)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_peers_with_a_cpu_path_compute_the_layer(form):
    if importlib.util.find_spec("comfy_kitchen") is None:
        pytest.skip("an optional peer that is not installed")
    layer = getattr(gpu_peers, f"comfy_{form}")(CASE, *TENSORS)
    assert gpu_peers.checked(layer, form, *TENSORS) is None


def test_a_layer_is_as_good_as_its_format():
    """One of 4 bits is refused as one of 8, and what e4m3 leaves as int8."""
    x, w, bias = TENSORS
    errors = {"int8": 0.013, "fp8": 0.04, "int4": 0.12}
    exact = F.linear(x, w, bias).float()
    noise = torch.randn_like(exact)
    noise *= exact.norm() / noise.norm()
    passed = {
        (of, form): gpu_peers.checked(lambda _, e=e: exact + e * noise, form, *TENSORS) is None
        for of, e in errors.items()
        for form in gpu_peers.FARTHEST
    }
    order = list(errors)
    assert passed == {(a, b): order.index(a) <= order.index(b) for a in order for b in order}


def test_a_peer_that_raises_or_errs_has_a_reason_and_no_time():
    def broken(case, *tensors):
        raise RuntimeError("no kernel for this architecture\nsecond line")

    def wrong(case, x, w, bias):
        return lambda x: F.linear(x, w.flip(0), bias)

    def right(case, x, w, bias):
        return lambda x: F.linear(x, w, bias)

    made = [
        gpu_peers.peer("p", "p", "int4", make).make(CASE, *TENSORS)
        for make in (broken, wrong, right)
    ]
    assert made[0] == "RuntimeError: no kernel for this architecture"
    assert made[1].startswith("expected torch's linear, got an output 1.")
    torch.testing.assert_close(made[2](), F.linear(*TENSORS), rtol=0, atol=0)
