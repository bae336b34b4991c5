"""time="cache" in several threads, and when what it serves goes."""

import copy
import gc
import threading
import weakref

import pytest
import torch

import fewstep
from fewstep.caching import timestep
from patching.timed import kept, run
from patching.tiny_pipelines import build, denoiser

TIMES = 12


@pytest.mark.parametrize("room", [None, 20_000])
def test_threads_get_the_same_bits_while_weights_move(room, monkeypatch):
    """With little room and no patience values go while other threads look for them."""
    pipe = build("digits")
    model, weight = pipe.transformer, next(kept(pipe, "digits").parameters())
    x, labels = torch.randn(1, 1, 16, 16), torch.tensor([1])
    with torch.no_grad():
        plain = [model(x, torch.tensor([float(t)]), labels).sample for t in range(TIMES)]
    patch = fewstep.patch(pipe, time="cache")
    session = patch._changes[0]._session
    if room is not None:
        session.max_bytes = room
        monkeypatch.setattr(timestep, "_PATIENCE", 0)
    wrong = []

    @torch.no_grad()
    def work(number):
        try:
            for i in range(40):
                if number == 0 and i % 10 == 0:
                    weight.data = weight.data.clone()
                t = (7 * i + number) % TIMES
                if not torch.equal(model(x, torch.tensor([float(t)]), labels).sample, plain[t]):
                    wrong.append(t)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    report = patch.report()["time"]
    assert report["saved"] > 0
    assert report["bytes"] == sum(one.bytes for one in session._kept.values()) <= session.max_bytes
    patch.undo()


def test_a_value_of_weights_that_another_thread_has_seen_change_is_not_kept(monkeypatch):
    """One thread computes while the weights change, and is done after another has seen that."""
    pipe = build("digits")
    module = kept(pipe, "digits")
    given = (torch.randn(1, 1, 16, 16), torch.ones(1), torch.tensor([1]))
    own, entered, seen = type(module).forward, [], []

    @torch.no_grad()
    def evaluate():
        return pipe.transformer(*given).sample

    def slow(self, *args, **kwargs):
        value = own(self, *args, **kwargs)
        if self is module and not entered:
            entered.append(1)
            with torch.no_grad():
                module.linear_2.weight.mul_(0.5)
            thread = threading.Thread(target=lambda: seen.append(evaluate()))
            thread.start()
            thread.join()
        return value

    with fewstep.patch(pipe, time="cache"):
        monkeypatch.setattr(type(module), "forward", slow)
        early = evaluate()
        after = evaluate()
    plain = evaluate()
    assert torch.equal(after, plain)
    assert torch.equal(seen[0], plain)
    assert not torch.equal(early, plain)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("name", ["digits", "sana", "sd-unet"])
def test_a_patched_model_goes_with_its_last_name(name, copied):
    """At once, also where the handle stays: what it holds is for undoing."""
    pipe = build(name)
    patch = fewstep.patch(pipe, time="cache")
    run(pipe)
    if copied:
        pipe = copy.deepcopy(pipe)
        run(pipe)
    gc.collect()
    gc.disable()
    try:
        modules = [weakref.ref(module) for module in denoiser(pipe).modules()]
        run(pipe)
        del pipe
        assert not [module() for module in modules if module() is not None]
    finally:
        gc.enable()
    patch.undo()
