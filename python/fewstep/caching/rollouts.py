"""Runs of a pipeline that something is trained on, with gradients through all of their steps.

    loss   mean over a call's images of log |x_S - x_S(full)|^2      x_S: the last latents

Pipelines turn gradients off around their calls; that is unwrapped here. What stands for the model,
or for modules in it, is a `Rollout`'s; the logarithm makes a decibel of a good image worth as much
as one of a bad image.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from ._pipelines import standing_in
from .output import take_apart
from .quality import images_of, psnr
from .record import seeded
from .steps import times_of

__all__ = ["Rollout", "Runs", "first_tensor", "standing", "work_in"]

_MANY = 32  # evaluations of a run from which on gradients are checkpointed


def first_tensor(output: Any) -> Tensor:
    """Return what a model's output is about."""
    return take_apart(output)[0][0]


class Rollout:
    """Follows one run after another of one pipeline and stands for its model.

    Attributes:
        latents: where the last run ended.
        times: of the last run.
        step: steps taken in the last run.
        evaluations: of the model in it.
        checkpointed: whether gradients have the inside of the model computed again instead of kept.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.checkpointed = False
        self.start()

    def start(self) -> None:
        """Forget the last run."""
        self.latents: Tensor | None = None
        self.times: tuple[float, ...] = ()
        self.step = self.branch = self.evaluations = 0  # branch: calls of the model in this step

    def run(self, call: Mapping[str, Any], *, gradient: bool = False) -> Any:
        """Return what the pipeline returns for a call; `latents` has a gradient if wanted."""
        self.start()
        if not gradient:
            with torch.no_grad():
                return self.pipe(**call)
        with torch.enable_grad():
            return inspect.unwrap(type(self.pipe).__call__)(self.pipe, **call)

    def evaluate(self, below: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stand for the model's forward."""
        output = self.compute(below, *args, **kwargs)
        self.branch += 1
        self.evaluations += 1
        return output

    def compute(self, below: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return what stands for the model's output."""
        return below(*args, **kwargs)

    def kept(self, compute: Callable[[], Any]) -> Any:
        """Return what a function returns; for gradients it may be called again."""
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint.checkpoint(compute, use_reentrant=False)
        return compute()

    def stepped(self, below: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stand for the scheduler's step."""
        self.times = self.times or times_of(self.pipe.scheduler)
        result = below(*args, **kwargs)
        self.latents = result[0] if isinstance(result, tuple) else result.prev_sample
        self.step, self.branch = self.step + 1, 0
        return result


@contextmanager
def standing(
    denoiser: nn.Module, rollout: Rollout, more: Iterable[tuple[nn.Module, Any]] = ()
) -> Iterator[None]:
    """Let a rollout stand for the model; everything is as it was afterwards.

    Args:
        denoiser: the model; its parameters want no gradients meanwhile.
        rollout: stands for its forward, and for the step of the pipeline's scheduler.
        more: modules, each with what stands for its forward, given that.
    """
    stands = [(module, "forward", stand) for module, stand in more]
    stands.append((denoiser, "forward", rollout.evaluate))
    stands.append((rollout.pipe.scheduler, "step", rollout.stepped))
    flags = [(parameter, parameter.requires_grad) for parameter in denoiser.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        with standing_in(
            (owner, name, _above(owner, name, stand)) for owner, name, stand in stands
        ):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _above(owner: Any, name: str, stand: Callable[..., Any]) -> Callable[..., Any]:
    """Return what stands for an object's function, given that first."""
    below = getattr(owner, name)
    return functools.wraps(below)(functools.partial(stand, below))


@contextmanager
def work_in(modules: Iterable[nn.Module]) -> Iterator[list[float]]:
    """Count, by module, the multiplications of the linear layers and convolutions in it."""
    work: list[float] = []

    def add(index: int, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        work[index] += float(output.numel() * layer.weight[0].numel())

    with ExitStack() as hooks:
        for index, module in enumerate(modules):
            work.append(0.0)
            for layer in module.modules():
                if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d):
                    handle = layer.register_forward_hook(functools.partial(add, index))
                    hooks.callback(handle.remove)
        yield work


class Runs:
    """The calls in full, as the rollout stands when this is made, and then with what is trained.

    Args:
        rollout: stands for the model.
        calls: keyword dicts.
        seed: of what calls draw without a generator.

    Raises:
        ValueError: calls on several grids or on a part of one.
    """

    def __init__(self, rollout: Rollout, calls: list[Mapping[str, Any]], seed: int) -> None:
        self.rollout, self.calls, self.seed = rollout, calls, seed
        self.full: list[tuple[Tensor, Any]] = []
        self.states: list[list[Tensor]] = []  # of each call's generators, which calls may share
        for index, call in enumerate(calls):
            self.states.append([generator.get_state() for generator in _generators(call)])
            self.full.append(self.draw(index))
            if index == 0:
                self.times, self.steps = rollout.times, rollout.step
            if (rollout.times, rollout.step) != (self.times, self.steps):
                raise ValueError(
                    f"calls: expected one grid in all calls, {self.steps} steps from "
                    f"{self.times[0]:g}, got {rollout.step} from {rollout.times[0]:g} in call "
                    f"{index}"
                )
        if len(self.times) != self.steps:
            raise ValueError(
                f"calls: expected one call of {type(rollout.pipe.scheduler).__name__}.step per "
                f"timestep, got {self.steps} for {len(self.times)} timesteps"
            )
        rollout.checkpointed = rollout.evaluations >= _MANY

    def draw(self, index: int, *, gradient: bool = False) -> tuple[Tensor, Any]:
        """Return a call's final latents and its images."""
        call, rollout = self.calls[index], self.rollout
        for generator, state in zip(_generators(call), self.states[index], strict=True):
            generator.set_state(state)
        with seeded(self.seed + index):
            result = rollout.run(call, gradient=gradient)
        if rollout.latents is None:
            raise ValueError(
                f"calls: expected calls that step {type(rollout.pipe.scheduler).__name__}, got "
                f"none in call {index}"
            )
        return rollout.latents, images_of(result)

    def loss(self, index: int, *, gradient: bool = False) -> Tensor:
        """Return the loss of a call."""
        latents, _ = self.draw(index, gradient=gradient)
        wanted = self.full[index][0].float()
        error = (latents.float() - wanted).square().flatten(1).mean(1)
        return (error + 1e-12 * wanted.square().mean()).log().mean()

    def losses(self, indices: Iterable[int]) -> float:
        """Return the mean loss of some calls."""
        return float(np.mean([self.loss(index).item() for index in indices]))

    def quality(self) -> dict[str, Any]:
        """Return what is lost on the calls, as plans' `predicted` says it."""
        drawn = [self.draw(index) for index in range(len(self.calls))]
        of, lost = "images", psnr([full[1] for full in self.full], [one[1] for one in drawn])
        if lost is None:
            of, lost = "latents", psnr([full[0] for full in self.full], [one[0] for one in drawn])
        return {
            "psnr": float(np.mean(lost)),
            "psnr_min": float(np.min(lost)),
            "samples": len(lost),
            "of": of,
        }


def _generators(call: Mapping[str, Any]) -> Iterator[torch.Generator]:
    given = call.get("generator")
    for generator in given if isinstance(given, list | tuple) else [given]:
        if isinstance(generator, torch.Generator):
            yield generator
