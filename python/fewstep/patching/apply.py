"""`apply_cache` and `remove_cache`: the cache alone, also for a denoiser without a pipeline.

The form of diffusers' `apply_first_block_cache(module, config)`, for loops of one's own.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..caching import ScheduledPolicy
from .cache import CacheOptions, plan_cache
from .patch import Patch, patch
from .pipeline import SchedulerHeld
from .recognise import recognise_model

__all__ = ["apply_cache", "remove_cache"]


def apply_cache(model: Any, cache: Any, scheduler: Any = None) -> Patch:
    """Cache a denoiser and return the handle that undoes it.

    Args:
        model: a diffusers transformer or UNet, or a pipeline, as in `patch(pipe, cache=...)`.
        cache: as `patch` takes it: a preset's name, a policy or a plan.
        scheduler: with a denoiser, the one that your loop steps. Without one, a step is a new time,
            or the same guidance pass again; schedules need one, since they are for its grid.

    Raises:
        TypeError, ValueError: not a model or policy, or one that doesn't fit the other.
        PatchError: the model is cached already, by this library or by diffusers.
    """
    from diffusers import DiffusionPipeline

    if isinstance(model, DiffusionPipeline):
        if scheduler is not None:
            raise ValueError("scheduler: expected None with a pipeline, which has its own")
        return patch(model, cache=cache)
    found = recognise_model(model)
    held = SchedulerHeld(scheduler, shared=True)
    change = plan_cache(model, found, cache, CacheOptions(), scheduler, held)
    if scheduler is None and isinstance(change.policy, ScheduledPolicy):
        raise ValueError(
            f"scheduler: expected the one that steps this model, since {change.policy!r} is laid "
            "out for its grid; got none"
        )
    change.session.by_call = scheduler is None
    change.apply()
    return Patch(model, found.describe(), [change], [])


def remove_cache(model: Any) -> bool:
    """Take a cache off a denoiser or a pipeline's denoisers, whoever has a handle of it.

    Also off deep and pickled copies, which stay cached and have no handle.

    Returns:
        whether there was one.
    """
    from .hooks import remove

    parts = [model] if isinstance(model, nn.Module) else getattr(model, "components", {}).values()
    return any([remove(part) for part in parts if isinstance(part, nn.Module)])
