"""Forecast weights and schedules: exact where they must be, and the cheapest chain of gaps."""

import itertools

import numpy as np
import pytest

from fewstep.caching.solve import affine_weights, best_schedule, fit_affine, gap_costs, gaps


def gram_of(outputs):
    return outputs @ outputs.T / outputs.shape[1]


def test_weights_reproduce_polynomials_on_uneven_steps():
    times = np.array([1.0, 0.93, 0.9, 0.71, 0.55, 0.5, 0.2, 0.07])
    rng = np.random.default_rng(0)
    for degree in range(4):
        powers = times[:, None] ** np.arange(degree + 1)
        outputs = powers @ rng.standard_normal((degree + 1, 400))
        gram = gram_of(outputs)
        known = [4, 2, 1, 0][: degree + 1]
        for target in (5, 6, 7):
            weights = affine_weights(gram, known, target, ridge=1e-15)
            assert weights.sum() == pytest.approx(1, abs=1e-6)
            error = weights @ outputs[known] - outputs[target]
            # The normal equations square the condition of the snapshots, 1e5 for the cubic.
            assert np.abs(error).max() < 1e-3 * np.abs(outputs).max()


def test_fit_is_the_minimum_on_the_plane():
    rng = np.random.default_rng(1)
    factor = rng.standard_normal((5, 4))
    normal, right = factor.T @ factor, rng.standard_normal(4)
    best = fit_affine(normal, right, 2.5, ridge=0)

    def cost(weights):
        return weights @ normal @ weights - 2 * right @ weights

    assert best.sum() == pytest.approx(2.5)
    for _ in range(50):
        step = rng.standard_normal(4) * 0.1
        assert cost(best + step - step.mean()) >= cost(best) - 1e-12


def test_the_ridge_pulls_to_the_prior():
    weights = fit_affine(
        np.eye(2), np.array([5.0, 0.0]), 1.0, ridge=1e9, prior=np.array([0.2, 0.8])
    )
    assert weights == pytest.approx([0.2, 0.8], abs=1e-6)
    assert fit_affine(np.eye(1), np.array([7.0]), 1.0) == pytest.approx([1.0])


@pytest.mark.parametrize("power", [1.0, 8.0])
def test_schedule_is_the_best_of_all(power):
    rng = np.random.default_rng(2)
    steps, full = 9, 4
    outputs = np.cumsum(rng.standard_normal((3, steps, 40)), 1)
    grams = outputs @ outputs.transpose(0, 2, 1) / 40

    def rho(start, end):
        share = np.zeros(steps)
        share[start + 1 : end] = 0.1
        return share

    cost = gap_costs(grams, rho, power=power)

    def total(chosen):
        pairs = gaps(chosen, steps)
        return sum(cost(chosen[max(0, i - 1) : i + 1], b) for i, (_, b) in enumerate(pairs))

    every = [(0, *rest) for rest in itertools.combinations(range(1, steps), full - 1)]
    best = min(every, key=total)
    found = best_schedule(steps, full, cost)
    assert total(found) == pytest.approx(total(best))


def test_schedule_ends():
    def cost(known, end):
        return float((end - known[-1] - 1) ** 2)

    assert best_schedule(5, 5, cost) == (0, 1, 2, 3, 4)
    assert best_schedule(5, 9, cost) == (0, 1, 2, 3, 4)
    assert best_schedule(6, 1, cost) == (0,)
    assert best_schedule(9, 3, cost) == (0, 3, 6)


def test_a_gap_of_reused_steps_costs_nothing_where_nothing_moves():
    grams = np.ones((1, 6, 6))
    cost = gap_costs(grams, lambda a, b: np.array([a < i < b for i in range(6)], float))
    assert cost((0,), 6) == pytest.approx(0, abs=1e-9)
