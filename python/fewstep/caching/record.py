"""Recording denoising runs where the scheduler steps, on any pipeline.

    m_i      what the scheduler gets at step i: the model's output after guidance
    x_{i+1}  the latents it returns
    R_bi     how far one unit of m_i moves the latents that enter step b, all else unchanged

Tensors are kept as a sample of their elements per image, on the CPU: weights have few unknowns.
R comes from a copy of the scheduler stepping on unit impulses, one element per step, which takes
samplers with a history as they are; for Euler it is the step width.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ._pipelines import standing_in
from .steps import step_now, times_of

__all__ = ["Run", "record", "repeatable", "responses", "sample_of", "seeded", "takeovers"]

_IMPULSE = 1e-3  # small, so that samplers that clip don't


@dataclass
class Run:
    """One call of a pipeline: outputs and latents by step, each [B, P] float32."""

    times: tuple[float, ...] = ()  # of the whole grid
    start: int = 0  # the step of it that the call started at
    size: tuple[int, ...] = ()  # of one image's latents
    scheduler: Any = None  # a copy as it was before the first step
    outputs: list[Tensor] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    images: Any = None
    models: list[int] = field(default_factory=list)  # by step, which of several was called

    @contextmanager
    def watch(self, models: Sequence[nn.Module]) -> Iterator[None]:
        """Note which of several models is called before each step.

        Raises:
            ValueError: two in one step.
        """

        def note(number: int, *_: Any) -> None:
            step = len(self.outputs)
            if len(self.models) <= step:
                self.models += [number] * (step + 1 - len(self.models))
            elif self.models[step] != number:
                raise ValueError(
                    "pipe: expected models that take turns, step by step, got two at work at step "
                    f"{step}"
                )

        alone = len(models) < 2
        hooks = [
            model.register_forward_pre_hook(functools.partial(note, number))
            for number, model in enumerate(() if alone else models)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def takeovers(models: Sequence[int]) -> list[int]:
    """Return the steps at which another model begins."""
    return [step for step in range(1, len(models)) if models[step] != models[step - 1]]


def sample_of(x: Tensor, values: int, seed: int) -> Tensor:
    """Return the same elements of every image, on the CPU."""
    flat = x.detach().reshape(x.shape[0], -1)
    if flat.shape[1] > values:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(flat.shape[1], generator=generator)[:values]
        flat = flat[:, chosen.sort().values.to(flat.device)]
    return flat.float().cpu()


@contextmanager
def record(scheduler: Any, *, values: int, seed: int) -> Iterator[Run]:
    """Watch `scheduler.step` and fill a `Run`; the scheduler is as it was afterwards."""
    run = Run()
    inner: Callable[..., Any] = scheduler.step

    # Pipelines look at the signature for whether `step` takes a generator and eta.
    class Step:
        """`scheduler.step`; a copy of the scheduler steps without being recorded."""

        def __init__(self) -> None:
            functools.update_wrapper(self, inner)

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            return copy.deepcopy(inner, memo)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            sample = given.get("sample")
            if not isinstance(sample, Tensor):
                raise ValueError(
                    f"pipe: expected a scheduler whose step takes one tensor of latents, got "
                    f"{type(scheduler).__name__} with {type(sample).__name__}"
                )
            if not run.outputs:
                run.times = times_of(scheduler)
                time = torch.as_tensor(given.get("timestep", 0)).reshape(-1)[0].item()
                run.start = step_now(scheduler, time, run.times) or 0
                run.size = tuple(sample.shape[1:])
                run.scheduler = copy.deepcopy(scheduler)
            elif tuple(sample.shape[1:]) != run.size:
                raise ValueError(
                    f"pipe: expected one tensor that {type(scheduler).__name__} steps, got latents "
                    f"of {list(run.size)} and {list(sample.shape[1:])}; others can have a copy of "
                    "the scheduler"
                )
            result = inner(*args, **kwargs)
            latents = result[0] if isinstance(result, tuple) else result.prev_sample
            run.outputs.append(sample_of(given["model_output"], values, seed))
            run.latents.append(sample_of(latents, values, seed))
            return result

    signature = inspect.signature(inner)
    with standing_in([(scheduler, "step", Step())]):
        yield run


@contextmanager
def repeatable(calls: Iterable[Mapping[str, Any]]) -> Iterator[None]:
    """Leave the calls' generators as they were.

    They advance from call to call in between: calls that share one draw different numbers.
    """
    given = [call.get("generator") for call in calls]
    flat = [g for one in given for g in (one if isinstance(one, list | tuple) else [one])]
    generators = {id(g): g for g in flat if isinstance(g, torch.Generator)}.values()
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw what is drawn without a generator from a seed; the global ones stay as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def responses(run: Run) -> np.ndarray:
    """Return R [S + 1, S]: row b is what the outputs do to the latents that enter step b."""
    steps = len(run.outputs)
    timesteps = run.scheduler.timesteps[run.start :]

    def drive(size: float) -> np.ndarray:
        scheduler = copy.deepcopy(run.scheduler)
        x = torch.zeros(1, 1, 1, steps, dtype=torch.float32, device=timesteps.device)
        rows = [x.reshape(-1)]
        with seeded(0), torch.no_grad():
            for index in range(steps):
                impulse = torch.zeros_like(x)
                impulse[..., index] = size
                x = scheduler.step(impulse, timesteps[index], x, return_dict=False)[0].float()
                rows.append(x.reshape(-1))
        return torch.stack(rows).double().cpu().numpy()

    return (drive(_IMPULSE) - drive(0.0)) / _IMPULSE
