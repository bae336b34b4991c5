"""Flow matching and the consistency loss against closed forms and finite differences in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fewstep.distillation import (
    adaptive_loss,
    consistency_loss,
    ema_decay,
    ema_update,
    flow_derivative,
    flow_matching_loss,
    interpolate,
    sample_times,
)


class TinyNet(nn.Module):
    """Attention over 6 tokens with a time embedding: enough to need forward-mode SDPA."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 8)
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = torch.tanh(x + self.time(t[:, None])[:, None])
        q, k, v = self.qkv(h)[:, None].chunk(3, dim=-1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v)[:, 0])


@pytest.fixture
def net() -> TinyNet:
    torch.manual_seed(0)
    return TinyNet().double()


@pytest.fixture
def point() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(5, 6, 8, dtype=torch.float64)
    return x, torch.rand(5, dtype=torch.float64), torch.randn_like(x)


def test_derivative_is_that_of_finite_differences(net, point):
    x, t, v = point
    value, derivative = flow_derivative(net, x, t, v)
    h = 1e-5
    with torch.no_grad():
        central = (net(x + h * v, t + h) - net(x - h * v, t - h)) / (2 * h)
        torch.testing.assert_close(value, net(x, t))
    # Central differences: h^2 truncation and eps/h rounding, both about 1e-10 here.
    torch.testing.assert_close(derivative, central, rtol=1e-7, atol=1e-8)
    assert not derivative.requires_grad
    assert value.requires_grad


def test_derivative_of_a_whole_diffusers_model():
    from fewstep.assets.digits import digits_transformer

    torch.manual_seed(0)
    model = digits_transformer(heads=1, layers=2).double()
    labels = torch.tensor([3, 10])

    def F(x: Tensor, t: Tensor) -> Tensor:
        return model(x, timestep=16 * t, class_labels=labels, return_dict=False)[0]

    x, v = torch.randn(2, 2, 1, 16, 16, dtype=torch.float64).unbind(0)
    t = torch.tensor([0.3, 0.9], dtype=torch.float64)
    with torch.no_grad():
        _, derivative = flow_derivative(F, x, t, v)
    h = 1e-3
    with torch.no_grad():
        central = (F(x + h * v, t + h) - F(x - h * v, t - h)) / (2 * h)
    # diffusers computes the time embedding in fp32: differences lose eps32/h = 1e-4 of its size.
    error = (derivative - central).norm() / central.norm()
    assert error < 2e-3
    assert derivative.norm() > 0


def exact_average_velocity(x: Tensor, t: Tensor) -> Tensor:
    """F of the flow that carries N(0, 1) data: x_0 = x / sqrt((1-t)^2 + t^2) is its flow map."""
    s = t[:, None]
    return x * (1 - 1 / torch.sqrt((1 - s) ** 2 + s**2)) / s


def exact_velocity(x: Tensor, t: Tensor) -> Tensor:
    """v = E[eps - x0 | x_t = x] for x0, eps ~ N(0, 1)."""
    s = t[:, None]
    return x * (2 * s - 1) / ((1 - s) ** 2 + s**2)


def test_an_exact_consistency_model_is_a_fixed_point():
    torch.manual_seed(0)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    x, t = torch.randn(64, 3, dtype=torch.float64), torch.rand(64, dtype=torch.float64) * 0.9 + 0.1

    def F(x: Tensor, t: Tensor) -> Tensor:
        return scale * exact_average_velocity(x, t)

    terms = consistency_loss(F, x, t, exact_velocity(x, t), c=1e-2)
    (gradient,) = torch.autograd.grad(terms.loss, scale)
    assert terms.residual.max() < 1e-24
    assert abs(gradient) < 1e-12


def test_a_wrong_model_is_not_a_fixed_point():
    x, t = torch.randn(64, 3, dtype=torch.float64), torch.rand(64, dtype=torch.float64) * 0.9 + 0.1
    terms = consistency_loss(exact_velocity, x, t, exact_velocity(x, t))
    assert terms.residual.mean() > 1e-3


def test_no_tangent_weight_regresses_on_the_velocity(net, point):
    x, t, v = point
    terms = consistency_loss(net, x, t, v, tangent_weight=0.0, p=0.0)
    torch.testing.assert_close(terms.loss, (net(x, t) - v).square().mean())


def test_the_gradient_is_that_of_the_formula(net, point):
    x, t, v = point
    terms = consistency_loss(net, x, t, v, tangent_weight=0.7, c=0.05, p=0.5)
    got = torch.autograd.grad(terms.loss, list(net.parameters()))
    _, derivative = flow_derivative(net, x, t, v)
    prediction = net(x, t)
    residual = prediction - (v - 0.7 * t[:, None, None] * derivative)
    error = residual.flatten(1).square().mean(1)
    weight = (error + 0.05) ** -0.5
    cotangent = (2 * weight[:, None, None] * residual / residual.numel()).detach()
    want = torch.autograd.grad(prediction, list(net.parameters()), cotangent)
    torch.testing.assert_close(got, want)


def test_power_one_bounds_every_sample():
    prediction = torch.tensor([[1e-3, 0.0], [1e3, 0.0]], requires_grad=True)
    loss, error = adaptive_loss(prediction, torch.zeros(2, 2), c=1e-4, p=1.0)
    loss.backward()
    assert prediction.grad[1].norm() < 1e-2
    torch.testing.assert_close(error, torch.tensor([5e-7, 5e5]))


def test_flow_matching_of_the_true_velocity_is_zero():
    x0, noise, t = torch.randn(4, 1, 2, 2), torch.randn(4, 1, 2, 2), torch.rand(4)
    assert flow_matching_loss(lambda x, t: noise - x0, x0, noise, t) == 0
    torch.testing.assert_close(interpolate(x0, noise, torch.ones(4)), noise)
    torch.testing.assert_close(interpolate(x0, noise, torch.zeros(4)), x0)


def test_times():
    generator = torch.Generator().manual_seed(0)
    t = sample_times(20000, mean=0.5, std=1.0, endpoint_mass=0.25, generator=generator)
    assert ((t > 0) & (t <= 1)).all()
    assert abs((t == 1).float().mean() - 0.25) < 0.02
    assert abs(t[t < 1].logit().mean() - 0.5) < 0.05


def test_ema():
    ema, value = [torch.zeros(3)], [torch.ones(3, requires_grad=True)]
    ema_update(ema, value, 0.75)
    torch.testing.assert_close(ema[0], torch.full((3,), 0.25))
    assert [ema_decay(step, 0.9) for step in (0, 1000)] == [0.1, 0.9]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t": torch.rand(4)}, r"t: expected shape \(5,\), got \(4,\)"),
        ({"v": torch.rand(5, 6, 7)}, r"v: expected shape \(5, 6, 8\)"),
        ({"x": torch.ones(5, 6, 8, dtype=torch.int64)}, "x: expected a floating tensor"),
        ({"tangent_weight": 1.5}, "tangent_weight: expected a value in"),
        ({"c": 0.0}, "expected c > 0"),
    ],
)
def test_errors_name_the_argument(net, point, change, message):
    x, t, v = point
    with pytest.raises(ValueError, match=message):
        consistency_loss(net, **({"x": x, "t": t, "v": v} | change))


def test_bad_scalars():
    with pytest.raises(ValueError, match="endpoint_mass"):
        sample_times(3, endpoint_mass=2.0)
    with pytest.raises(ValueError, match="decay"):
        ema_update([torch.zeros(1)], [torch.zeros(1)], 1.5)
    with pytest.raises(ValueError, match="velocity"):
        flow_matching_loss(lambda x, t: x[:1], torch.zeros(2, 3), torch.zeros(2, 3), torch.rand(2))
