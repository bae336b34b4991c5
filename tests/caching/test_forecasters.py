"""Forecasters: exact to their degree on uneven steps, and what they were published as."""

import math

import numpy as np
import pytest

from fewstep.caching import forecasters

# Newest first, falling like a scheduler's times; no two gaps are alike.
KNOWN = (411.5, 502.0, 590.25, 733.0, 801.0, 866.5, 941.0, 1000.0)
TARGET = 377.0

# Rounding: weights of degree 7 sum to less than 1e5 in magnitude, values are 1 at most, and fp64
# keeps 1e-16 of their products.
EXACT = 1e-10

CASES = [
    ("reuse", {}, 0),
    *(("taylor", {"degree": m}, 1) for m in range(1, 8)),
    *(("newton", {"degree": m}, m) for m in range(1, 8)),
    *(("hermite", {"degree": m}, 0) for m in (1, 2, 3)),
    ("hermite", {"degree": 1, "scale": math.sqrt(0.5)}, 1),
    ("hermite", {"degree": 3, "scale": math.sqrt(0.5)}, 1),
    ("foca", {}, 1),
]


def forecast(name, values, known, target, **settings):
    weights = getattr(forecasters, name)(known, target, **settings)
    return float(np.dot(weights, values[: len(weights)]))


@pytest.mark.parametrize(("name", "settings", "degree"), CASES)
def test_polynomials_to_the_degree(name, settings, degree):
    known = [(t - TARGET) / 700 for t in KNOWN]
    for target in (0.0, -0.04):
        assert sum(getattr(forecasters, name)(known, target, **settings)) == pytest.approx(
            1, abs=EXACT
        )
        for power in range(degree + 1):
            values = np.power(np.asarray(known) - 0.3, power)
            got = forecast(name, values, known, target, **settings)
            assert got == pytest.approx((target - 0.3) ** power, abs=EXACT)
    power = 2 if name == "taylor" and settings["degree"] == 1 else degree + 1
    steps = [7 * t for t in known]  # in units of about a step: high powers would vanish
    missed = forecast(name, np.power(steps, power), steps, -0.3, **settings) - (-0.3) ** power
    assert abs(missed) > 1e-3


@pytest.mark.parametrize("every", [1, 3, 5])
@pytest.mark.parametrize("ahead", [1, 2])
def test_even_steps_are_taylorseer_and_hicache(every, ahead):
    """Their nested backward differences over the interval, as they are implemented."""
    values = np.array([0.7, -1.3, 2.9, 0.4])
    known = [-every * i for i in range(4)]
    differences, row = [values[0]], values
    for _ in range(3):
        row = (row[:-1] - row[1:]) / every
        differences.append(row[0])
    taylor = sum(d * ahead**i / math.factorial(i) for i, d in enumerate(differences))
    assert forecast("taylor", values, known, ahead, degree=3) == pytest.approx(taylor, rel=1e-12)
    scale, x = 0.6, 0.6 * ahead
    powers = [1, 2 * x, 4 * x**2 - 2, 8 * x**3 - 12 * x]
    hermite = sum(d * scale**i * powers[i] / math.factorial(i) for i, d in enumerate(differences))
    got = forecast("hermite", values, known, ahead, degree=3, scale=scale)
    assert got == pytest.approx(hermite, rel=1e-12)


def test_foca_on_even_steps_by_hand():
    """p = (4 y0 - y1 + 2 d0) / 3 with d0 = (3 y0 - 4 y1 + y2) / 2, d = (3 p - 4 y0 + y1) / 2."""
    y0, y1, y2 = 0.7, -1.3, 2.9
    before = (3 * y0 - 4 * y1 + y2) / 2
    predicted = (4 * y0 - y1 + 2 * before) / 3
    after = (3 * predicted - 4 * y0 + y1) / 2
    got = forecast("foca", [y0, y1, y2], [0, -1, -2], 1)
    assert got == pytest.approx(y0 + (before + after) / 2, rel=1e-12)


@pytest.mark.parametrize("name", ["taylor", "newton", "hermite", "foca"])
def test_few_points_lower_the_degree(name):
    assert getattr(forecasters, name)([4.0], 3.0) == (1.0,)
    assert len(getattr(forecasters, name)([4.0, 6.0], 3.0)) == 2


@pytest.mark.parametrize("name", ["reuse", "taylor", "newton", "hermite", "foca"])
def test_bad_times(name):
    forecaster = getattr(forecasters, name)
    with pytest.raises(ValueError, match="known: expected the times of at least one"):
        forecaster([], 1.0)
    with pytest.raises(ValueError, match="known: expected distinct times"):
        forecaster([2.0, 2.0], 1.0)
    with pytest.raises(ValueError, match="expected finite times"):
        forecaster([2.0, math.nan], 1.0)
