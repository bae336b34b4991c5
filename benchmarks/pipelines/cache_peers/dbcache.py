"""Trials of cache-dit: DBCache, with and without its forecast of the residual.

`cache_dit.enable_cache(pipe)` knows pipelines by name, and this one by none; a BlockAdapter with
its own functor for DiTTransformer2DModel serves. One block is always run and compared (F1B0), as
in its fastest published settings; the first 3 steps are full, and nothing but the threshold limits
skips in a row. A mask of steps, which its presets for 28 steps are made of, is tried with gaps of
even length: then nothing is compared ("static"), and the residual is forecast.

It replaces `__call__` of the pipeline's class, so the pipeline gets a class of its own.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from typing import Any

from .trial import Study, Trial

THRESHOLDS = (0.1, 0.15, 0.2, 0.3)
BINS = (3, 4, 6, 9)
WARMUP = 3


def why_not() -> str | None:
    """Return why there is nothing to try, or None."""
    return None if importlib.util.find_spec("cache_dit") else "cache-dit is not installed"


def mask(steps: int, every: int) -> list[int]:
    """Return 1 for steps that run: the first ones, then every n-th."""
    return [int(step < WARMUP or (step - WARMUP + 1) % every == 0) for step in range(steps)]


def _install(pipe: Any, *, steps: int, calibrator: dict[str, Any] | None, **settings: Any) -> None:
    import cache_dit
    from cache_dit.caching.patch_functors import DiTPatchFunctor

    guided = pipe.config.default_guidance > 1
    pipe.__class__ = type(type(pipe).__name__, (type(pipe),), {})
    adapter = cache_dit.BlockAdapter(
        pipe=pipe,
        transformer=pipe.transformer,
        blocks=pipe.transformer.transformer_blocks,
        forward_pattern=cache_dit.ForwardPattern.Pattern_3,
        patch_functor=DiTPatchFunctor(),
        check_forward_pattern=True,
        has_separate_cfg=guided,
    )
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        max_warmup_steps=WARMUP,
        enable_separate_cfg=guided,
        num_inference_steps=steps,
        **settings,
    )
    forecast = cache_dit.TaylorSeerCalibratorConfig(**calibrator) if calibrator else None
    cache_dit.enable_cache(adapter, cache_config=config, calibrator_config=forecast)


def trials(study: Study) -> Iterator[Trial]:
    """Yield DBCache's sweeps; nothing for UNets, or where it is not installed."""
    if why_not() or study.is_unet():
        return
    package = f"cache-dit {importlib.metadata.version('cache-dit')}"
    for order in (0, 1, 2):
        calibrator = {"taylorseer_order": order} if order else None
        of = f" + TaylorSeer {order}" if order else ""
        install = functools.partial(_install, steps=study.steps, calibrator=calibrator)
        for threshold in THRESHOLDS if order < 2 else ():
            call = functools.partial(install, residual_diff_threshold=threshold)
            yield Trial(f"DBCache{of}", f"F1B0, threshold={threshold}", call, package)
        for every in BINS if order else ():
            call = functools.partial(
                install,
                steps_computation_mask=mask(study.steps, every),
                steps_computation_policy="static",
            )
            yield Trial(f"DBCache, mask{of}", f"F1B0, every={every}", call, package)
