"""Denoising loops of full-size models with a plan: what is run, timed and refused."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

PIPELINES = Path(__file__).parents[2] / "benchmarks/pipelines"


@pytest.fixture(scope="module")
def loops():
    path, before = list(sys.path), set(sys.modules)
    spec = importlib.util.spec_from_file_location("cache_steps", PIPELINES / "cache_steps.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["cache_steps"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("cache_steps", "cache_time", "model_steps", "full_size"):
            del sys.modules[name]


def test_both_loops_are_timed_in_every_mode(loops):
    device = torch.device("cpu")
    rows = loops.measure("PixArt-Sigma", device, small=True, backend="eager", rounds=2)
    assert [row["mode"] for row in rows] == ["eager", "compiled"]
    latents = next(
        iter(loops.models.arguments(loops.models.MODELS["PixArt-Sigma"](True), device).values())
    )
    for row in rows:
        full, plan = row["full"]["median_s"], row["plan"]["median_s"]
        assert row["speedup"] == full / plan
        assert row["efficiency"] == row["speedup"] / (row["steps"] / row["full_steps"])
        assert row["full"]["samples"] == row["plan"]["samples"] == 2
        assert "full_steps" in row
        # The outputs of both full steps, each with a learned variance beside the latents.
        assert row["snapshot_bytes"] == 2 * 2 * latents.nbytes
        assert loops.line(row)


def test_on_a_gpu_one_model_a_call(loops, capsys):
    """Launches are counted by a profiler, which stays attached while the next one is timed."""
    for names in ([], ["SDXL", "FLUX.1-dev"]):
        with pytest.raises(SystemExit):
            loops.main([*names, "--device", "cuda"])
        assert "names: expected one model on a GPU, got" in capsys.readouterr().err


def test_a_loop_follows_its_plan_and_leaves_the_model_as_it_was(loops):
    device = torch.device("cpu")
    of = loops.models.MODELS["Qwen-Image"](True)
    model = loops.models.build(of, device)
    loop = loops.Loop(model, loops.models.arguments(of, device), device, 4, 2)
    calls = []
    model.register_forward_pre_hook(lambda *given: calls.append(1))
    layer = model.proj_out
    layer.register_forward_pre_hook(lambda *given: calls.append("layer"))
    before = dict(model.__dict__)
    want = loop()
    assert calls.count("layer") == 4
    with loop.following():
        got = loop()
    assert calls.count("layer") == 6
    assert not torch.equal(got, want)
    assert dict(model.__dict__) == before
    assert torch.equal(loop(), want)
    loop.full_steps = 3
    with pytest.raises(RuntimeError, match="expected 3 of 4 full"), loop.following():
        loop()


@pytest.mark.gpu
def test_a_captured_loop_waits_for_nothing_and_gives_the_same(loops):
    device = torch.device("cuda")
    rows = loops.measure("FLUX.1-dev", device, small=True, backend=None, rounds=2)
    assert [row["mode"] for row in rows] == ["eager", "graph"]
    assert all(row["host_waits"] == 0 for row in rows)
    assert rows[0]["snapshot_bytes"] == rows[1]["snapshot_bytes"] > 0
