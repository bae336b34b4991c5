"""`steps=n`: the scheduler and grid that fit the checkpoint, fixed at exactly n evaluations.

    student with its own sampler     LCM, TCD, sCM, flow LCM, flow map, FlowConsistencyScheduler:
                                     the same sampler, its own grid for n
    Euler with trailing spacing      the same sampler: SDXL-Lightning and SDXL-Turbo ship it
    flow matching                    Euler on 1, (n-1)/n .. 1/n before the checkpoint's own shift.
                                     The default grid of diffusers ends with a network evaluation
                                     that moves sigma by 0.001; on a Gaussian mixture with known
                                     velocity the grid alone halves the error of 2 steps
    DPM-Solver++, UniPC              kept, with trailing spacing and a final sigma of 0
    any other noise or v predictor   DPM-Solver++ 2M (arXiv 2211.01095), trailing spacing

The pipeline gets a new scheduler object; the user's own is not touched. Its `set_timesteps` keeps
the signature of its class, because pipelines inspect it, and overrides the count asked for: a
pipeline always passes one (its default of 28 or 50, or the grid 1 .. 1/28 made from it), so the
patch can't tell a default from a wish. Grids that can only come from the caller are respected if
they have n entries, and refused otherwise. `grid` has the details, and image-to-image.
"""

from __future__ import annotations

import warnings
from typing import Any

from .grid import StrengthSteps, fix
from .undo import Change, ConfigKeys, ConfigStack, Slot

__all__ = ["plan_steps"]

_STUDENTS = {
    "LCMScheduler": "latent consistency model",
    "TCDScheduler": "trajectory consistency model",
    "SCMScheduler": "continuous-time consistency model",
    "FlowMatchLCMScheduler": "consistency model of a flow",
    "FlowMapEulerDiscreteScheduler": "flow map",
    "FlowConsistencyScheduler": "consistency model of a flow",
}
_TRAILING = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
_FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
_SOLVERS = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")


def _check_steps(steps: Any) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps: expected an integer, got {type(steps).__name__} {steps!r}")
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")


def _copy(scheduler: Any, **changes: Any) -> Any:
    return type(scheduler).from_config(scheduler.config, **changes)


def _choose(scheduler: Any, steps: int) -> tuple[Any, str]:
    """Return a new scheduler and the reason for it."""
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

    name, config = type(scheduler).__name__, scheduler.config
    if name in _STUDENTS:
        own = "its own grid"
        if config.get("knots"):
            stored = str(steps) in config["knots"]
            own = (
                "the grid stored with it" if stored else f"a uniform grid: none stored for {steps}"
            )
        return _copy(scheduler), f"a few-step student ({_STUDENTS[name]}): {name} kept, {own}"
    if name in _TRAILING and config.get("timestep_spacing") == "trailing":
        why = f"{name} with trailing spacing is what few-step students ship with: kept"
        return _copy(scheduler), why
    if name in _FLOW:
        chosen = FlowMatchEulerDiscreteScheduler.from_config(config)
        why = (
            "flow matching: Euler on 1 .. 1/n, without the evaluation that the default grid wastes"
        )
        return chosen, why
    if name in _SOLVERS:
        changes = {"timestep_spacing": "trailing", "final_sigmas_type": "zero"}
        return _copy(scheduler, **changes), f"{name} kept, with trailing spacing down to sigma 0"
    if name in {member.name for member in KarrasDiffusionSchedulers}:
        chosen = DPMSolverMultistepScheduler.from_config(
            config,
            algorithm_type="dpmsolver++",
            solver_order=2,
            timestep_spacing="trailing",
            final_sigmas_type="zero",
            lower_order_final=True,
        )
        predictor = config.get("prediction_type", "epsilon")
        return chosen, f"{predictor} predictor: DPM-Solver++ 2M, trailing spacing"
    known = sorted({*_STUDENTS, *_FLOW, *_SOLVERS} | {m.name for m in KarrasDiffusionSchedulers})
    raise ValueError(f"steps: expected a scheduler of {', '.join(known)}; got {name}")


def plan_steps(pipe: Any, steps: Any, config: ConfigStack) -> Change:
    """Plan the scheduler of n steps; nothing is changed yet.

    Raises:
        TypeError, ValueError: not a step count, or a scheduler that is not known.
    """
    _check_steps(steps)
    before = getattr(pipe, "scheduler", None)
    if before is None:
        raise ValueError(f"steps: expected a pipeline with a scheduler, got {type(pipe).__name__}")
    most = before.config.get("num_train_timesteps", steps)
    if steps > most:
        raise ValueError(f"steps: expected at most {most} (num_train_timesteps), got {steps}")
    scheduler, why = _choose(before, steps)
    fix(scheduler, steps)
    try:  # a step count that the sampler can't do must fail here, not in the first call
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial = fix(_copy(scheduler), steps)
            mu = {"mu": 0.5} if scheduler.config.get("use_dynamic_shifting") else {}
            trial.set_timesteps(**mu)
    except Exception as error:
        raise ValueError(
            f"steps: expected a count that {type(scheduler).__name__} can do, got {steps}: {error}"
        ) from error

    change = Change("steps", f"{steps} step{'s' * (steps > 1)}, {type(scheduler).__name__}")
    change.done.append(why)
    if type(scheduler) is not type(before):
        change.done.append(f"was {type(before).__name__}")
        library = ["diffusers", type(scheduler).__name__]
        change.slots.append(ConfigKeys(pipe, config, "steps", {"scheduler": tuple(library)}))
    change.done.append(
        f"every call takes {steps} steps; `num_inference_steps` of a call has no effect"
    )
    change.slots.append(Slot(pipe, "scheduler", scheduler, "pipe.scheduler"))
    if hasattr(type(pipe), "get_timesteps"):
        change.done.append(
            f"with `strength`: the last {steps} of {steps} / strength steps, so {steps} too"
        )
        replacement = StrengthSteps(pipe, steps)
        change.slots.append(Slot(pipe, "get_timesteps", replacement, "pipe.get_timesteps"))
    if type(before).__name__ not in _STUDENTS:
        change.left.append(
            "the weights: nothing marks this checkpoint as a few-step student, so quality at "
            f"{steps} step{'s' * (steps > 1)} is what the solver alone gives"
        )
    change.left.append("the scheduler object of before: not touched, `undo` puts it back")
    return change
