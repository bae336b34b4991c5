"""undo: the very objects that were there, after any sequence of patches, calls and exceptions."""

import gc
import random
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fewstep
from fewstep.caching import FirstBlock, Interval
from fewstep.patching import active_patches
from patching.snapshot import set_by_calls, snapshot
from patching.tiny_pipelines import BUILDERS, build, call, denoiser, inner

FEATURES = {
    "steps": {"steps": 2},
    "cache": {"cache": FirstBlock(threshold=1e9)},
    "interval": {"cache": Interval(every=2)},
    "quantize": {"quantize": "w8a8"},
    "time": {"time": "cache"},
    "guidance": {"guidance": "off"},
    "two": {"steps": 3, "cache": "interval"},
}


def served(name):
    return [key for key in FEATURES if key != "guidance" or name == "digits"]


def volatile_of(pipe):
    return set_by_calls(pipe, lambda: call(pipe, num_inference_steps=2))


class Stop(Exception):
    pass


@pytest.fixture(autouse=True)
def _small_layers_count(monkeypatch):
    """The default leaves layers below 128 x 128 alone; here every layer of a tiny model counts."""
    monkeypatch.setattr("fewstep.quantization.replace.SMALLEST_SIDE", 1)
    monkeypatch.setattr("fewstep.quantization.replace.SMALLEST_WEIGHT", 1)


def failing_call(pipe):
    def fail(*_):
        raise Stop

    handle = inner(pipe)[1].register_forward_pre_hook(fail)
    try:
        with pytest.raises(Stop):
            call(pipe, num_inference_steps=2)
    finally:
        handle.remove()


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_every_feature_alone_and_together(name):
    pipe = build(name)
    volatile = volatile_of(pipe)
    plain = call(pipe, num_inference_steps=2)
    for key in served(name):
        before = snapshot(pipe)
        fewstep.patch(pipe, **FEATURES[key]).undo()
        assert snapshot(pipe) == before
        before = snapshot(pipe, volatile)
        with fewstep.patch(pipe, **FEATURES[key]):
            call(pipe, num_inference_steps=2)
        assert snapshot(pipe, volatile) == before
        assert torch.equal(call(pipe, num_inference_steps=2), plain)
    before = snapshot(pipe)
    everything = {"steps": 2, "quantize": "w8a8", "cache": "first-block"}
    fewstep.patch(pipe, **everything).undo()
    assert snapshot(pipe) == before


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_after_an_exception_inside_a_call(name):
    pipe = build(name)
    volatile = volatile_of(pipe)
    plain = call(pipe, num_inference_steps=2)
    before = snapshot(pipe, volatile)
    everything = {"steps": 2, "quantize": "w8a8", "cache": "interval"}

    def use():
        with fewstep.patch(pipe, **everything):
            failing_call(pipe)
            raise Stop

    with pytest.raises(Stop):
        use()
    assert snapshot(pipe, volatile) == before
    assert torch.equal(call(pipe, num_inference_steps=2), plain)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("patch"), st.sampled_from(sorted(FEATURES))),
        st.tuples(st.just("undo"), st.integers(0, 4)),
        st.tuples(st.sampled_from(["call", "fail", "cast"]), st.none()),
    ),
    min_size=2,
    max_size=9,
)


@pytest.fixture(scope="module")
def pipelines():
    found = {}
    for name in ("digits", "flux", "sd-unet"):
        pipe = build(name)
        # Values that bfloat16 holds: a cast there and back changes no bit.
        pipe.to(torch.bfloat16).to(torch.float32)
        found[name] = (pipe, volatile_of(pipe))
    return found


def dtype_of(pipe):
    (dtype,) = {parameter.dtype for parameter in denoiser(pipe).parameters()}
    return dtype


def without_buffers(state):
    """A snapshot less the identities of buffers, which a cast replaces; their bits stay in it."""
    modules = [
        (*where, [entry for entry in attributes if entry[0] != "_buffers"])
        for *where, attributes in state["modules"]
    ]
    return {**state, "modules": modules}


@pytest.mark.parametrize("name", ["digits", "flux", "sd-unet"])
@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(operations=OPERATIONS, order=st.integers(0, 2**32 - 1))
def test_fuzz(pipelines, name, operations, order):
    """Any order of patching, calling, failing, casting and undoing, and of undoing the rest."""
    pipe, volatile = pipelines[name]
    before = without_buffers(snapshot(pipe, volatile))
    try:
        play(pipe, name, operations, before, volatile)
    finally:
        handles = active_patches(pipe)
        random.Random(order).shuffle(handles)  # draws nothing: all must be undone
        for handle in handles:
            handle.undo()
            handle.undo()  # twice is once
        dtype_of(pipe)  # the layers that waited outside have followed
        pipe.to(torch.float32)
    assert without_buffers(snapshot(pipe, volatile)) == before


def play(pipe, name, operations, before, volatile):
    handles = []
    for operation, argument in operations:
        if operation == "patch":
            taken = {feature for handle in handles for feature in handle.features}
            wanted = FEATURES[argument]
            if argument not in served(name) or taken & set(wanted):
                with pytest.raises((fewstep.patching.PatchError, ValueError)):
                    fewstep.patch(pipe, **wanted)
            else:
                handles.append(fewstep.patch(pipe, **wanted))
        elif operation == "undo" and handles:
            handles.pop(argument % len(handles)).undo()
        elif operation == "call":
            assert call(pipe, num_inference_steps=2).isfinite().all()
        elif operation == "fail":
            failing_call(pipe)
        elif operation == "cast":
            other = torch.bfloat16 if dtype_of(pipe) == torch.float32 else torch.float32
            pipe.to(other)
        assert active_patches(pipe) == handles
        if not handles and dtype_of(pipe) == torch.float32:
            assert without_buffers(snapshot(pipe, volatile)) == before


def test_hooks_of_others_stay_where_they_were():
    """A forward that was set on an instance before the patch comes back as it was."""
    pipe = build("digits")
    block = pipe.transformer.transformer_blocks[0]
    below = block.forward

    def theirs(*args, **kwargs):
        return below(*args, **kwargs)

    block.forward = theirs
    handle = block.register_forward_hook(lambda *_: None)
    before = snapshot(pipe)
    volatile = volatile_of(pipe)
    plain = call(pipe, num_inference_steps=4)
    with fewstep.patch(pipe, cache=FirstBlock(threshold=0)):
        assert block.forward is not theirs
        assert torch.equal(call(pipe, num_inference_steps=4), plain)
    assert block.forward is theirs
    assert [n for n, *_ in before["modules"]] == [n for n, *_ in snapshot(pipe)["modules"]]
    assert snapshot(pipe, volatile)["modules"] == before["modules"]
    handle.remove()


def test_the_record_does_not_keep_the_pipeline_alive():
    pipe = build("digits")
    patch = fewstep.patch(pipe, steps=2, cache="interval", guidance="off")
    call(pipe)
    seen = weakref.ref(pipe)
    del pipe
    gc.collect()
    assert seen() is None
    patch.undo()
    assert not patch.active


def test_a_config_changed_by_others_meanwhile_is_kept():
    pipe = build("digits")
    patch = fewstep.patch(pipe, guidance="off")
    pipe.register_to_config(default_steps=9)
    patch.undo()
    assert pipe.config["default_steps"] == 9
    assert pipe.config["default_guidance"] == 2.0
