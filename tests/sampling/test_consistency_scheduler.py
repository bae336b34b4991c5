"""FlowConsistencyScheduler: its update, its grids, and its place in diffusers."""

from __future__ import annotations

import pytest
import torch

from fewstep.sampling import FlowConsistencyScheduler


class Counting:
    """A network that knows the answer: F = (x - x0) / s."""

    def __init__(self, x0: torch.Tensor) -> None:
        self.x0, self.calls = x0, 0

    def __call__(self, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return (x - self.x0) / s


def run(scheduler, model, x, **kwargs):
    for t, s in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        x = scheduler.step(model(x, s), t, x, **kwargs).prev_sample
    return x


@pytest.mark.parametrize("n", range(1, 9))
def test_every_step_count_evaluates_exactly_n_times_and_ends_clean(n):
    scheduler = FlowConsistencyScheduler()
    scheduler.set_timesteps(n)
    x0 = torch.randn(2, 1, 4, 4)
    model = Counting(x0)
    out = run(scheduler, model, torch.randn(2, 1, 4, 4), generator=torch.Generator())
    assert model.calls == n == len(scheduler.timesteps) == len(scheduler.sigmas) - 1
    torch.testing.assert_close(out, x0, atol=1e-5, rtol=0)


def test_step_is_the_formula():
    scheduler = FlowConsistencyScheduler(knots={"2": [1.0, 0.6]})
    scheduler.set_timesteps(2)
    x, F = torch.randn(2, 3, 1, 4, 4).unbind(0)
    out = scheduler.step(F, scheduler.timesteps[0], x, torch.Generator().manual_seed(3))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(out.pred_original_sample, x - F)
    torch.testing.assert_close(out.prev_sample, 0.4 * (x - F) + 0.6 * noise)
    last = scheduler.step(F, scheduler.timesteps[1], x)
    torch.testing.assert_close(last.prev_sample, x - 0.6 * F)


def test_the_last_step_draws_no_noise():
    scheduler = FlowConsistencyScheduler()
    scheduler.set_timesteps(1)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    x = torch.randn(1, 4)
    scheduler.step(x, scheduler.timesteps[0], x, generator)
    assert torch.equal(generator.get_state(), before)


def test_arithmetic_is_fp32_whatever_the_sample():
    scheduler = FlowConsistencyScheduler()
    scheduler.set_timesteps(sigmas=[0.3])
    x, F = torch.randn(2, 64, 8).bfloat16().unbind(0)
    (out,) = scheduler.step(F, scheduler.timesteps[0], x, return_dict=False)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, (x.float() - 0.3 * F.float()).bfloat16())


def test_grids():
    scheduler = FlowConsistencyScheduler(knots={"2": [1.0, 0.55]}, shift=3.0)
    scheduler.set_timesteps(2)
    assert scheduler.sigmas.tolist() == pytest.approx([1.0, 0.55, 0.0])
    scheduler.set_timesteps(4)
    assert scheduler.sigmas.tolist() == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])
    scheduler.set_timesteps(sigmas=[0.9, 0.2])
    assert scheduler.timesteps.tolist() == pytest.approx([900.0, 200.0])
    scheduler.set_timesteps(timesteps=[1000, 400])
    assert scheduler.sigmas.tolist() == pytest.approx([1.0, 0.4, 0.0])
    scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=1.0)
    assert scheduler.sigmas.tolist() == pytest.approx([1.0, 0.5, 0.0])
    shifted = FlowConsistencyScheduler(use_dynamic_shifting=True)
    shifted.set_timesteps(sigmas=[1.0, 0.5], mu=1.0)
    assert shifted.sigmas[1].item() == pytest.approx(0.7310586)


def test_begin_index_and_lookup():
    scheduler = FlowConsistencyScheduler()
    scheduler.set_timesteps(4)
    x = torch.zeros(1, 4)
    scheduler.step(x, scheduler.timesteps[2], x)
    assert scheduler.step_index == 3
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(1)
    scheduler.step(x, torch.tensor(float("nan")), x)  # never read once the begin index is set
    assert scheduler.step_index == 2


def test_generators_per_sample():
    scheduler = FlowConsistencyScheduler()
    x = torch.zeros(2, 1, 4, 4)
    scheduler.set_timesteps(2)
    both = [torch.Generator().manual_seed(s) for s in (1, 2)]
    pair = scheduler.step(x, 1000.0, x, both).prev_sample
    scheduler.set_timesteps(2)
    single = scheduler.step(x[:1], 1000.0, x[:1], torch.Generator().manual_seed(2)).prev_sample
    torch.testing.assert_close(pair[1:], single)


def test_scale_noise():
    scheduler = FlowConsistencyScheduler()
    x, noise = torch.randn(2, 3, 4).unbind(0)
    got = scheduler.scale_noise(x, torch.tensor([0.0, 250.0, 1000.0]), noise)
    torch.testing.assert_close(got[0], x[0])
    torch.testing.assert_close(got[1], 0.75 * x[1] + 0.25 * noise[1])
    torch.testing.assert_close(got[2], noise[2])


def test_round_trip_through_diffusers(tmp_path):
    scheduler = FlowConsistencyScheduler(knots={"2": [1.0, 0.6]}, shift=2.0)
    scheduler.save_pretrained(tmp_path)
    again = FlowConsistencyScheduler.from_pretrained(tmp_path)
    assert again.config.shift == 2.0
    assert again.config.knots == {"2": [1.0, 0.6]}
    again.set_timesteps(2)
    assert again.sigmas.tolist() == pytest.approx([1.0, 0.6, 0.0])


def test_from_the_config_of_a_stock_scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert FlowConsistencyScheduler.from_config(stock.config).config.shift == 3.0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "num_inference_steps"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"sigmas": [0.5, 0.5]}, "sigmas: expected falling"),
        ({"sigmas": [1.5]}, "sigmas: expected falling"),
        ({"timesteps": [1000, 0]}, "timesteps: expected falling"),
        ({"sigmas": [1.0], "timesteps": [1000]}, "at most one"),
        ({"sigmas": [1.0], "num_inference_steps": 2}, "num_inference_steps: expected 1"),
    ],
)
def test_bad_grids(kwargs, message):
    with pytest.raises(ValueError, match=message):
        FlowConsistencyScheduler().set_timesteps(**kwargs)


def test_bad_use():
    with pytest.raises(ValueError, match="knots"):
        FlowConsistencyScheduler(knots={"3": [1.0, 0.5]})
    scheduler = FlowConsistencyScheduler()
    x = torch.zeros(1, 4)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(x, 1000.0, x)
    scheduler.set_timesteps(1)
    scheduler.step(x, 1000.0, x)
    with pytest.raises(ValueError, match="one more"):
        scheduler.step(x, 1000.0, x)
    with pytest.raises(ValueError, match="noise"):
        scheduler.scale_noise(x, 500.0)


def test_integer_keys_are_step_counts_too(tmp_path):
    scheduler = FlowConsistencyScheduler(knots={2: (1.0, 0.6), "3": [1.0, 0.7, 0.3]})
    scheduler.set_timesteps(2)
    assert scheduler.sigmas.tolist() == pytest.approx([1.0, 0.6, 0.0])
    assert scheduler.config.knots == {"2": [1.0, 0.6], "3": [1.0, 0.7, 0.3]}
    scheduler.save_pretrained(tmp_path)
    assert FlowConsistencyScheduler.from_pretrained(tmp_path).config.knots == scheduler.config.knots


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"knots": {"two": [1.0, 0.5]}}, ValueError, "step counts such as '2' for keys, got 'two'"),
        ({"knots": {0: []}}, ValueError, "for keys, got 0"),
        ({"knots": {2.0: [1.0, 0.5]}}, ValueError, r"for keys, got 2\.0"),
        ({"knots": {2: [1.0, 0.5], "2": [1.0, 0.6]}}, ValueError, "got two for 2"),
        ({"knots": [1.0, 0.5]}, TypeError, "knots: expected a mapping"),
        ({"shift": float("nan")}, ValueError, "shift: expected a positive number, got nan"),
        ({"shift": "3"}, ValueError, "shift: expected a positive number, got '3'"),
        ({"shift": True}, ValueError, "shift: expected a positive number, got True"),
        ({"num_train_timesteps": 0}, ValueError, "num_train_timesteps: expected .* got 0"),
        ({"num_train_timesteps": None}, ValueError, "num_train_timesteps: expected .* got None"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        FlowConsistencyScheduler(**arguments)
