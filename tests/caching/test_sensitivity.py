"""Gains: where they are measured, of what, and that a schedule follows them."""

import sys

import numpy as np
import pytest
import torch

from fewstep.caching import calibrate
from fewstep.caching.sensitivity import gain, gain_curve, places
from patching.tiny_pipelines import digits as digits_pipeline

SKIP = (1.0,)


def test_places_are_ends_of_gaps():
    steps = (None, SKIP, None, None, SKIP, SKIP, None, SKIP)
    assert places(steps) == [2, 6]
    assert places((None,) * 4) == []
    many = (None, SKIP) * 20
    assert places(many) == [2, 4, 8, 18, 38]


def test_gain_is_of_the_samples_that_are_off():
    full = torch.zeros(5, 3, 4)
    latents = full.clone()
    latents[1, 0], latents[-1, 0] = 0.5, 2.0
    latents[1, 1], latents[-1, 1] = 0.5, 1.0
    assert gain(full, latents, 2) == pytest.approx(((4**2 + 2**2) / 2) ** 0.5)
    assert gain(full, latents, 1) is None


def test_curve():
    found = gain_curve([(2, 16.0), (6, 4.0)], 10)
    assert found == pytest.approx(
        [16, 16, 16, *(16 / 2 ** np.arange(0.5, 2, 0.5)), 4, *(4 ** np.array([0.75, 0.5, 0.25])), 1]
    )
    assert gain_curve([], 10) is None


@pytest.mark.parametrize("rising", [False, True])
def test_full_steps_go_where_errors_grow(rising, monkeypatch):
    module = sys.modules[calibrate.__module__]
    made = []

    def curve(measured, steps):
        made.append(gain_curve(measured, steps))
        return np.geomspace(1, 100, steps + 1) if rising else np.geomspace(100, 1, steps + 1)

    monkeypatch.setattr(module, "gain_curve", curve)
    pipe = digits_pipeline(layers=1)
    pipe.set_progress_bar_config(disable=True)
    given = {"class_labels": [1, 2], "num_inference_steps": 12, "output_type": "latent"}
    calls = [{**given, "generator": torch.Generator().manual_seed(0)}]
    plain = calibrate(pipe, calls, full_steps=5, passes=0)
    minded = calibrate(pipe, calls, full_steps=5, passes=0, sensitivity=True)
    assert len(minded.full) == len(plain.full) == 5
    assert (sum(minded.full) > sum(plain.full)) == rising
    assert made[0].shape == (13,)
    assert (made[0] > 0).all()


def test_no_bool():
    with pytest.raises(TypeError, match="sensitivity: expected a bool"):
        calibrate(digits_pipeline(layers=1), [{}], sensitivity=3)
