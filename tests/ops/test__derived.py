"""Copies kept beside a tensor: whether they are still its own."""

import gc
import weakref

import pytest
import torch

from fewstep.ops._derived import Source, is_stale, mark


def kept(*sources):
    copy = torch.zeros(1)
    mark(copy, Source(*sources))
    return copy


def test_is_current_as_long_as_nothing_was_written():
    a, b = torch.randn(3), torch.randn(4)
    copy = kept(a, b)
    assert not is_stale(copy, a, b)
    assert not is_stale(torch.zeros(1), a, b)  # not marked: the caller's own
    with torch.no_grad():
        b.mul_(1)
    assert is_stale(copy, a, b)


@pytest.mark.parametrize(
    "change", [lambda a: a.clone(), lambda a: a.view_as(a), lambda a: a.detach()]
)
def test_another_tensor_is_not_the_source(change):
    a = torch.randn(3)
    assert is_stale(kept(a), change(a))


def test_memory_that_is_used_again_is_not_the_source():
    a = torch.randn(1000)
    copy = kept(a)
    for _ in range(50):  # each frees the memory, and maybe the address, that the next may get
        a.data = torch.randn(1000)
        assert is_stale(copy, a)


def test_does_not_keep_the_source_alive():
    a = torch.randn(3)
    source, seen = Source(a), []
    weakref.finalize(a, seen.append, 1)
    del a
    gc.collect()
    assert seen
    assert not source.is_current(torch.randn(3))


def test_inference_tensors_have_no_version():
    with torch.inference_mode():
        a = torch.randn(3)
    assert not is_stale(kept(a), a)
