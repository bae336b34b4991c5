"""The peers of the low-bit benchmarks compute the layer, to their precision."""

import importlib.util

import pytest
import torch

from fewstep import ops
from fewstep.bench import Case, products
from helpers import relative_error

CASE = Case("layer", {"M": 16, "N": 48, "K": 256, "G": 64}, torch.float32)
PACKAGES = {"onnx": ("onnx", "onnxruntime"), "openvino": ("openvino",), "torch": ()}


@pytest.mark.parametrize(
    "peer", ["torch_int4", "onnx_int4", "openvino_int4", "onnx_int8", "openvino_int8"]
)
def test_peers_compute_the_layer(peer):
    if any(importlib.util.find_spec(p) is None for p in PACKAGES[peer.split("_")[0]]):
        pytest.skip("an optional peer that is not installed")
    x, w, bias = torch.randn(16, 256), torch.randn(48, 256), torch.randn(48)
    layer, *args = getattr(products, peer)(CASE, x, w, bias)
    out = layer(*args)
    if not isinstance(out, torch.Tensor):
        out = torch.from_numpy(next(iter(out.values())) if hasattr(out, "values") else out[0])
    q, scale = ops.quantize_int4(w, group=64)
    eight = peer.endswith("int8")
    want = x @ w.mT + bias if eight else ops.gemm_w4a16(x, q, scale, bias=bias)
    # Activations in 8 bits, with one scale and zero point for all of x at worst: steps of about
    # 8 / 255 of values of size 1 leave 0.9 %; int8 weights add 0.7 %. Other weights leave 10 %.
    assert relative_error(out, want) < 0.02


def test_model_shapes_are_whole_groups_and_tiles():
    for case in products.model_cases(group=64):
        M, N, K, G = (case[symbol] for symbol in "MNKG")
        assert K % G == 0
        assert N % 8 == K % 8 == 0  # what torch._int_mm wants on GPUs
        assert M > 16
    rows = [tuple(case.shape.values()) for case in products.activation_cases()]
    assert len(set(rows)) == len(rows)
    assert set(rows) == {(M, K) for M, _, K in products.MODEL_SHAPES.values()}


def test_tilings_are_timed_on_gpus_only():
    for op, tiles in products.HOPPER_TILES.items():
        tilings = products.hopper_tilings(op, lambda case, *tensors: tensors)
        assert [p.devices for p in tilings] == [("cuda",)] * len(tiles)


def test_missing_packages_are_named(monkeypatch):
    x = torch.zeros(1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    assert products.needs_onnx(CASE, x) == "onnxruntime is not installed (pip install onnxruntime)"
    assert products.on_cpu(CASE, x) is None
