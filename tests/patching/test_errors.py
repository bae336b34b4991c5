"""Every refusal names the argument, what was expected and what came; the pipeline is unchanged."""

from types import SimpleNamespace

import diffusers
import pytest
import torch

import fewstep
from fewstep.caching import FirstBlock, Fora, Interval
from fewstep.patching import PatchError, active_patches
from patching.snapshot import snapshot
from patching.tiny_pipelines import build, call, denoiser


def policy(**wrong):
    """A policy of the user's own."""
    rules = {"must_run": lambda step, since: None, "small_change": lambda change: True}
    return SimpleNamespace(**{"first": 1, "last": 0, "measures": False, **rules, **wrong})


WRONG = [
    ({}, ValueError, "patch: expected at least one of steps, quantize, cache, time, text, guid"),
    ({"steps": 0}, ValueError, "steps: expected at least 1, got 0"),
    ({"steps": 2.0}, TypeError, r"steps: expected an integer, got float 2\.0"),
    ({"steps": True}, TypeError, "steps: expected an integer, got bool"),
    ({"steps": "fast"}, TypeError, "steps: expected an integer, got str 'fast'"),
    ({"steps": 5000}, ValueError, r"steps: expected at most 1000 .*got 5000"),
    ({"quantize": "w4a4"}, ValueError, "quantize: scheme: expected one of w8a8, .*got 'w4a4'"),
    ({"quantize": 8}, TypeError, "quantize: scheme: expected a text, got int 8"),
    (
        {"cache": "second-block"},
        ValueError,
        "cache: expected 'auto', 'first-block', 'interval', 'f",
    ),
    ({"cache": 0.1}, TypeError, r"cache: expected .*got 0\.1"),
    ({"cache": FirstBlock}, TypeError, "cache: expected .*got <class"),
    ({"cache": FirstBlock(first=3, last=1)}, ValueError, "cache: expected more than 4 blocks"),
    ({"cache": policy(first=0)}, ValueError, "cache: first of .*: expected at least 1, got 0"),
    ({"cache": policy(first=-1)}, ValueError, "cache: first of .*: expected at least 1, got -1"),
    ({"cache": policy(last=-1)}, ValueError, "cache: last of .*: expected at least 0, got -1"),
    ({"cache": policy(first="a")}, TypeError, "cache: first of .*: expected an integer, got str"),
    ({"guidance": "on"}, ValueError, "guidance: expected 'off' or a number >= 1, got 'on'"),
    ({"guidance": -1}, ValueError, "guidance: expected 'off' or a number >= 1, got -1"),
    ({"guidance": [1]}, TypeError, "guidance: expected 'off' or a number"),
    # a good feature beside a bad one
    ({"steps": 2, "cache": "none"}, ValueError, "cache: expected"),
    ({"steps": 2, "guidance": "off", "cache": Interval(first=4)}, ValueError, "cache: expected"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG, ids=lambda w: str(w)[:40])
def test_a_wrong_argument_changes_nothing(arguments, error, message):
    pipe = build("digits")
    before = snapshot(pipe)
    with pytest.raises(error, match=message):
        fewstep.patch(pipe, **arguments)
    assert snapshot(pipe) == before
    assert active_patches(pipe) == []


@pytest.mark.parametrize(
    ("pipe", "message"),
    [
        ("stabilityai/sdxl-turbo", "an object of type str"),
        (None, "an object of type NoneType"),
        (diffusers.FluxPipeline, "the class FluxPipeline"),
        (torch.nn.Linear(2, 2), "an object of type Linear"),
    ],
    ids=["str", "None", "class", "module"],
)
def test_a_wrong_object(pipe, message):
    with pytest.raises(TypeError, match=f"pipe: expected a diffusers DiffusionPipeline.*{message}"):
        fewstep.patch(pipe, steps=2)


def test_a_pipeline_without_a_known_denoiser():
    class Prior(diffusers.DiffusionPipeline):
        def __init__(self, prior):
            super().__init__()
            self.register_modules(prior=prior)

    message = r"pipe: expected a model in one of transformer, unet, got Prior with \['prior'\]"
    with pytest.raises(ValueError, match=message):
        fewstep.patch(Prior(build("digits").transformer), steps=2)


def test_an_unknown_family_can_have_steps_but_no_cache():
    pipe = build("digits")
    odd = type("OddModel", (torch.nn.Module,), {"forward": lambda self, x: x})()
    pipe.transformer = odd
    message = r"cache: expected a denoiser of Flux.*; got OddModel.*scope=\"output\".*calibrate"
    for cache in ("interval", Fora(every=2, scope="blocks"), Fora(every=2, scope="block")):
        with pytest.raises(ValueError, match=message):
            fewstep.patch(pipe, cache=cache)
    fewstep.patch(pipe, cache="taylor").undo()
    with pytest.raises(ValueError, match=r"quantize: expected a model with nn.Linear layers"):
        fewstep.patch(pipe, quantize="w8a8")
    with fewstep.patch(pipe, steps=2) as patch:
        assert "of no family with known blocks" in patch.explain()


@pytest.mark.parametrize("name", ["flux", "sd3", "sana", "pixart", "sd-unet"])
def test_guidance_is_refused_where_it_belongs_to_the_class(name):
    pipe = build(name)
    before = snapshot(pipe)
    with pytest.raises(ValueError, match="guidance: expected a pipeline with `default_guidance`"):
        fewstep.patch(pipe, guidance="off")
    assert snapshot(pipe) == before


@pytest.mark.parametrize("feature", [{"steps": 2}, {"cache": "interval"}, {"guidance": "off"}])
def test_twice_the_same_names_the_earlier_patch(feature):
    pipe = build("digits")
    first = fewstep.patch(pipe, **feature)
    before = snapshot(pipe)
    with pytest.raises(PatchError, match=r"expected a pipeline not yet patched .*<Patch on Digits"):
        fewstep.patch(pipe, **{"steps": 3, **feature})
    assert snapshot(pipe) == before
    assert active_patches(pipe) == [first]
    first.undo()
    fewstep.patch(pipe, **feature).undo()


def test_a_compiled_model_is_refused():
    pipe = build("digits")
    pipe.transformer = torch.compile(pipe.transformer)
    with pytest.raises(ValueError, match="expected an uncompiled model"):
        fewstep.patch(pipe, cache="interval")


def test_a_hook_added_later_is_not_thrown_away():
    """A forward that somebody wrapped after the patch: refuse, or switch off below it."""
    pipe = build("digits")
    plain = call(pipe)
    patch = fewstep.patch(pipe, cache=FirstBlock(threshold=1e9), steps=6)
    block = pipe.transformer.transformer_blocks[1]
    below, calls = block.forward, []

    def theirs(*args, **kwargs):
        calls.append(1)
        return below(*args, **kwargs)

    block.forward = theirs
    patched = call(pipe)
    with pytest.raises(PatchError, match=r"undo: .*pipe.transformer.transformer_blocks.1.forward"):
        patch.undo()
    assert patch.active
    assert torch.equal(call(pipe), patched)
    patch.undo(force=True)
    assert block.forward is theirs
    assert torch.equal(call(pipe), plain)
    assert calls
    assert denoiser(pipe).__dict__.get("forward") is None


def test_a_scheduler_set_later_is_not_thrown_away():
    pipe = build("sd-unet")
    patch = fewstep.patch(pipe, steps=2)
    pipe.scheduler = theirs = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(PatchError, match=r"pipe\.scheduler"):
        patch.undo()
    patch.undo(force=True)
    assert pipe.scheduler is theirs
    assert pipe.config["scheduler"] == ("diffusers", "DDIMScheduler")


def test_a_failure_while_applying_takes_the_earlier_changes_back(monkeypatch):
    from fewstep.patching import cache

    pipe = build("digits")
    before = snapshot(pipe)

    def fail(self):
        self.slots += self.plan()
        self.slots[0].apply()
        raise RuntimeError("no")

    monkeypatch.setattr(cache._CacheChange, "apply", fail)
    with pytest.raises(RuntimeError, match="no"):
        fewstep.patch(pipe, steps=2, guidance="off", cache="interval")
    assert snapshot(pipe) == before
    assert active_patches(pipe) == []
