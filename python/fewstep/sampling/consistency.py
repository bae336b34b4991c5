"""FlowConsistencyScheduler: multistep sampling of a consistency model of a flow.

    x0    = x - s F(x, s)                     the network's clean image, s its noise level
    x_s'  = (1 - s') x0 + s' noise            back up to the next level; s' = 0 draws no noise

x, F, x0 [B, ...];  s: sigma in (0, 1], timestep = s * num_train_timesteps.  F is an average
velocity down to 0, but a plain flow velocity also works (then x0 is its one-step guess, as in
diffusers' FlowMatchLCMScheduler). Arithmetic is fp32 whatever the dtype of x.
sCM, arXiv 2410.11081, section on sampling; consistency models, arXiv 2303.01469, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


@dataclass
class FlowConsistencySchedulerOutput(BaseOutput):
    """One step's result.

    Args:
        prev_sample: x at the next noise level, the next network input, [B, ...].
        pred_original_sample: x0, [B, ...].
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


def _check_sigmas(name: str, sigmas: Sequence[float], top: float = 1.0) -> list[float]:
    values = [float(s) for s in sigmas]
    falling = all(a > b for a, b in pairwise(values))
    # Some slack above: callers pass fp32 grids that were scaled to timesteps and back.
    if not values or not falling or values[-1] <= 0 or values[0] > top * (1 + 1e-5):
        raise ValueError(f"{name}: expected falling values in (0, {top:g}], got {values}")
    return values


def _check_knots(knots: Mapping[str | int, Sequence[float]]) -> dict[str, list[float]]:
    """Return the grids under string keys, as `set_timesteps` looks them up."""
    if not isinstance(knots, Mapping):
        raise TypeError(f"knots: expected a mapping of step counts to grids, got {knots!r}")
    checked: dict[str, list[float]] = {}
    for key, sigmas in knots.items():
        count = str(key)
        if isinstance(key, bool) or not count.isdecimal() or count.startswith("0"):
            raise ValueError(f"knots: expected step counts such as '2' for keys, got {key!r}")
        if count in checked:
            raise ValueError(f"knots: expected one grid per step count, got two for {count}")
        checked[count] = _check_sigmas(f"knots[{key!r}]", sigmas)
        if len(checked[count]) != int(count):
            raise ValueError(f"knots[{key!r}]: expected {count} values, got {len(sigmas)}")
    return checked


def _is_number(value: object) -> bool:
    real = isinstance(value, Real) and not isinstance(value, bool)
    return real and math.isfinite(value)


class FlowConsistencyScheduler(SchedulerMixin, ConfigMixin):
    """Scheduler for flow models that predict the average velocity down to 0.

    Every step count n makes exactly n network evaluations and draws n - 1 noises. The grid is, in
    this order: `sigmas` or `timesteps` of the call, the stored knots for n, else 1 ... 1/n shifted.

    Args:
        num_train_timesteps: timestep of sigma 1.
        knots: measured grids by step count, e.g. {"2": [1.0, 0.6]}; the config is JSON, so that
            it has strings for keys, but integers are accepted.
        shift: of the default grid, s -> shift s / (1 + (shift - 1) s).
        use_dynamic_shifting: shift also by `mu`, s -> e^mu / (e^mu + 1/s - 1), as FLUX does; then
            given sigmas are shifted too. Otherwise `mu` is accepted and ignored.
    """

    _compatibles: list = []  # noqa: RUF012 (diffusers reads a plain list)
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        knots: Mapping[str | int, Sequence[float]] | None = None,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
    ) -> None:
        if not _is_number(num_train_timesteps) or num_train_timesteps < 1:
            raise ValueError(
                f"num_train_timesteps: expected a number of at least 1, got {num_train_timesteps!r}"
            )
        if not _is_number(shift) or shift <= 0:
            raise ValueError(f"shift: expected a positive number, got {shift!r}")
        if knots is not None:
            self.register_to_config(knots=_check_knots(knots))
        self.num_inference_steps: int | None = None
        self._begin_index: int | None = None
        self._step_index: int | None = None
        self._place(self._default_grid(1), None)

    @property
    def has_own_knots(self) -> bool:
        """Whether `set_timesteps(n)` knows better than a caller's 1 ... 1/n grid."""
        return bool(self.config.knots)

    @property
    def begin_index(self) -> int | None:
        """Index of the first step, set by the pipeline."""
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        """Index of the next step; lives on the host."""
        return self._step_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this index of the grid. Call it before `step` and no step ever looks one up."""
        self._begin_index = begin_index

    def _default_grid(self, n: int) -> list[float]:
        knots = (self.config.knots or {}).get(str(n))
        if knots is not None:
            return [float(s) for s in knots]
        shift = self.config.shift
        uniform = [(n - i) / n for i in range(n)]
        return [shift * u / (1 + (shift - 1) * u) for u in uniform]

    def _place(self, sigmas: list[float], device: str | torch.device | None) -> None:
        # The same numbers twice: floats that `step` reads without a sync, tensors for callers.
        self._levels = [*sigmas, 0.0]
        self.sigmas = torch.tensor(self._levels, dtype=torch.float32, device=device)
        self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Choose the grid: n steps, or explicit falling sigmas or timesteps without the final 0.

        Raises:
            ValueError: nothing or two grids given, a grid that does not fall, or a wrong length.
        """
        if sigmas is not None and timesteps is not None:
            raise ValueError("sigmas, timesteps: expected at most one of them, got both")
        total = self.config.num_train_timesteps
        if sigmas is not None:
            grid = _check_sigmas("sigmas", sigmas)
        elif timesteps is not None:
            grid = [t / total for t in _check_sigmas("timesteps", timesteps, total)]
        elif num_inference_steps is None or num_inference_steps < 1:
            raise ValueError(
                f"num_inference_steps: expected a positive integer, got {num_inference_steps}"
            )
        else:
            grid = self._default_grid(num_inference_steps)
        if num_inference_steps is not None and len(grid) != num_inference_steps:
            raise ValueError(
                f"num_inference_steps: expected {len(grid)} as many as the grid given, "
                f"got {num_inference_steps}"
            )
        if self.config.use_dynamic_shifting and mu is not None:
            grid = [math.exp(mu) / (math.exp(mu) + 1 / s - 1) for s in grid]
        self.num_inference_steps = len(grid)
        self._begin_index = self._step_index = None
        self._place(grid, device)

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """Index of the grid's nearest timestep; syncs where `timestep` is a device tensor."""
        level = float(timestep) / self.config.num_train_timesteps
        steps = range(len(self._levels) - 1)
        return min(steps, key=lambda i: abs(self._levels[i] - level))

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The sample itself: a flow model takes it unscaled."""
        return sample

    def scale_noise(
        self, sample: Tensor, timestep: float | Tensor, noise: Tensor | None = None
    ) -> Tensor:
        """(1 - s) sample + s noise at the timesteps given, a scalar or [B]; for image-to-image."""
        if noise is None or noise.shape != sample.shape:
            got = None if noise is None else tuple(noise.shape)
            raise ValueError(f"noise: expected shape {tuple(sample.shape)}, got {got}")
        s = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device)
        s = s.reshape(-1, *(1,) * (sample.ndim - 1)) / self.config.num_train_timesteps
        return ((1 - s) * sample.float() + s * noise.float()).to(sample.dtype)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> FlowConsistencySchedulerOutput | tuple[Tensor]:
        """From x at one level to x at the next.

        Args:
            model_output: F(x, s), [B, ...].
            timestep: read only to find the first step where no begin index was set.
            sample: x, [B, ...].
            generator: seeds the noise; one, or one per sample.
            return_dict: False returns (prev_sample,).
        """
        if self.num_inference_steps is None:
            raise ValueError("step: expected set_timesteps to be called first")
        if self._step_index is None:
            begin = self._begin_index
            self._step_index = self.index_for_timestep(timestep) if begin is None else begin
        if self._step_index >= self.num_inference_steps:
            raise ValueError(
                f"step: expected at most {self.num_inference_steps} steps, got one more; "
                "call set_timesteps before a new run"
            )
        level, following = self._levels[self._step_index : self._step_index + 2]
        self._step_index += 1

        x0 = sample.float() - level * model_output.float()
        x = x0
        if following > 0:
            noise = randn_tensor(
                sample.shape, generator=generator, device=sample.device, dtype=torch.float32
            )
            x = (1 - following) * x0 + following * noise
        if not return_dict:
            return (x.to(sample.dtype),)
        return FlowConsistencySchedulerOutput(x.to(sample.dtype), x0.to(sample.dtype))

    def __len__(self) -> int:
        return self.config.num_train_timesteps
