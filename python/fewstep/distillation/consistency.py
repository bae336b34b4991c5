"""Flow matching, and the continuous-time consistency loss with an exact derivative.

    x_t = (1 - t) x0 + t eps            rectified flow, t in [0, 1], t = 1 is noise
    v   = dx_t/dt = eps - x0            (training), or a guided teacher's velocity (distillation)

    F(x, t)      the average velocity from t down to 0:  F = 1/t * integral_0^t v(x_s, s) ds
    f(x, t) = x - t F(x, t)             the clean image that the flow carries x to
    df/dt = 0 along the flow   <=>   F = v - t dF/dt,   dF/dt = (dF/dx) v + dF/dt|_x

    target = v - r t dF/dt              r: 0 -> 1, the tangent warm-up
    loss   = w |F - sg(target)|^2,      w = 1 / sg(|F - target|^2 + c)^p

x0, eps, x_t, v, F  [B, ...] of one floating dtype;  t  [B];  sg: stop gradient;  |.|^2: mean over
a sample's own elements, so that c does not depend on the resolution.

This is MeanFlow with its second time fixed at 0, or sCM written for a flow model:
flow matching arXiv 2210.02747, sCM arXiv 2410.11081, MeanFlow arXiv 2505.13447.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.tangent import jvp

VelocityFn = Callable[[Tensor, Tensor], Tensor]
"""(x [B, ...], t [B]) -> velocity [B, ...]; conditioning is already bound."""


class ConsistencyTerms(NamedTuple):
    """What `consistency_loss` returns; everything but `loss` is detached."""

    loss: Tensor
    """Weighted loss, a scalar; its gradient is the training signal."""
    residual: Tensor
    """[B] mean square of F - target before weighting: the number to watch."""
    derivative: Tensor
    """[B, ...] dF/dt along the flow."""


def _check_batch(x: Tensor, t: Tensor, **like_x: Tensor) -> None:
    if not x.is_floating_point() or x.ndim < 2:
        raise ValueError(
            f"x: expected a floating tensor [B, ...], got {x.dtype} with shape {tuple(x.shape)}"
        )
    if t.shape != x.shape[:1]:
        raise ValueError(f"t: expected shape ({x.shape[0]},), got {tuple(t.shape)}")
    for name, value in like_x.items():
        if value.shape != x.shape:
            raise ValueError(f"{name}: expected shape {tuple(x.shape)}, got {tuple(value.shape)}")


def expand_time(t: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B, 1, ...], to multiply a [B, ...] tensor."""
    return t.reshape(-1, *(1,) * (x.ndim - 1))


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t noise; x0 and noise [B, ...], t [B]."""
    _check_batch(x0, t, noise=noise)
    s = expand_time(t, x0)
    return (1 - s) * x0 + s * noise


def sample_times(
    n: int,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    endpoint_mass: float = 0.0,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """n times in (0, 1]: sigmoid(N(mean, std^2)), a share `endpoint_mass` of them exactly 1.

    Every sample starts at t = 1, which a logit-normal draw never reaches; the endpoint mass
    trains the network where it is used first.
    """
    if not 0 <= endpoint_mass <= 1:
        raise ValueError(f"endpoint_mass: expected a share in [0, 1], got {endpoint_mass}")
    t = torch.sigmoid(mean + std * torch.randn(n, generator=generator, device=device))
    at_end = torch.rand(n, generator=generator, device=device) < endpoint_mass
    return torch.where(at_end, torch.ones_like(t), t)


def flow_matching_loss(velocity: VelocityFn, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """mean |velocity(x_t, t) - (noise - x0)|^2, a scalar in at least fp32 (arXiv 2210.02747)."""
    prediction = velocity(interpolate(x0, noise, t), t)
    if prediction.shape != x0.shape:
        raise ValueError(
            f"velocity(x, t): expected shape {tuple(x0.shape)}, got {tuple(prediction.shape)}"
        )
    return (prediction.to(x0.dtype) - (noise - x0)).square().mean()


def flow_derivative(F: VelocityFn, x: Tensor, t: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(F, dF/dt along dx/dt = v), [B, ...], exact, in one forward-mode pass.

    The derivative is detached. F keeps its graph where gradients are on, so that the same pass
    also serves the loss: one forward less per training step than a derivative taken apart.
    Attention runs in `fewstep.ops.attention_jvp`, also in unmodified models (`fewstep.jvp`).
    """
    _check_batch(x, t, v=v)
    value, derivative = jvp(F, (x, t), (v.to(x.dtype), torch.ones_like(t)))
    return value.to(x.dtype), derivative.detach().to(x.dtype)


def adaptive_loss(
    prediction: Tensor, target: Tensor, *, c: float, p: float
) -> tuple[Tensor, Tensor]:
    """(mean over B of w e, e [B] detached); e = |prediction - sg(target)|^2, w = 1/sg(e + c)^p.

    p = 0 is the plain square, p = 1 gives every sample a gradient of bounded length.
    """
    if c <= 0 or p < 0:
        raise ValueError(f"c, p: expected c > 0 and p >= 0, got c={c}, p={p}")
    error = (prediction - target.detach()).flatten(1).square().mean(1)
    weight = (error.detach() + c).pow(-p)
    return (weight * error).mean(), error.detach()


def consistency_loss(
    F: VelocityFn,
    x: Tensor,
    t: Tensor,
    v: Tensor,
    *,
    tangent_weight: float = 1.0,
    c: float = 1e-2,
    p: float = 1.0,
) -> ConsistencyTerms:
    """The consistency loss of the module's header at the points (x, t) of a flow with velocity v.

    Args:
        F: the student, (x [B, ...], t [B]) -> average velocity [B, ...].
        x: points on the flow, [B, ...].
        t: their times, [B], in (0, 1].
        v: velocity of the flow there, [B, ...]; a guided teacher's bakes the guidance in.
        tangent_weight: r in [0, 1]; 0 regresses F on v, 1 is the consistency loss proper.
        c: floor of the adaptive weight, > 0.
        p: power of the adaptive weight, >= 0.

    Raises:
        ValueError: a shape does not fit, or a scalar is outside its range.
    """
    if not 0 <= tangent_weight <= 1:
        raise ValueError(f"tangent_weight: expected a value in [0, 1], got {tangent_weight}")
    prediction, derivative = flow_derivative(F, x, t, v)
    target = v - tangent_weight * expand_time(t, x) * derivative
    loss, residual = adaptive_loss(prediction, target, c=c, p=p)
    return ConsistencyTerms(loss, residual, derivative)


@torch.no_grad()
def ema_update(ema: Iterable[Tensor], values: Iterable[Tensor], decay: float) -> None:
    """ema <- decay ema + (1 - decay) value, in place, tensor by tensor."""
    if not 0 <= decay <= 1:
        raise ValueError(f"decay: expected a value in [0, 1], got {decay}")
    torch._foreach_lerp_(list(ema), [value.detach() for value in values], 1 - decay)


def ema_decay(step: int, maximum: float) -> float:
    """min(maximum, (1 + step) / (10 + step)): a short memory first, to forget the start."""
    return min(maximum, (1 + step) / (10 + step))
