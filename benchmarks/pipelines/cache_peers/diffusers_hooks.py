"""Trials of diffusers' own hooks: First Block Cache, MagCache, TaylorSeer, SeaCache.

DiTTransformer2DModel is no CacheMixin, so `enable_cache` is not to be had and no pipeline of it
opens a cache context. The hooks are put on by the public `apply_*` functions, and a forward
pre-hook of the transformer does what a pipeline would: it names the call ("cond", or "uncond" for
the null label), says where the run is, and resets the states where a run starts.

What the hooks need besides:
    MagCache     ratios: its own calibration, on the calls that plans are calibrated on. It prints
                 one list per run and branch and takes one: their mean. Full steps at the start and
                 skips in a row are by default 10 of 50 and 3, with which at least 18 steps run.
    TaylorSeer   names of the modules: its default patterns end in "attn" and "proj_out", and this
                 model has attn1 and proj_out_2. float32 factors. Of the blocks' attention and
                 feed-forward ("modules"), or of the last layer ("output", its lite mode). Of a
                 UNet, the residual and attention layers of all levels.
    SeaCache     a callback that gives the latents: there is one for two video models. By default
                 at most 2 steps in a row are skipped.
Other settings that the methods' authors and diffusers leave to the user are swept.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import io
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import torch
from diffusers.hooks import (
    FirstBlockCacheConfig,
    HookRegistry,
    MagCacheConfig,
    TaylorSeerCacheConfig,
    apply_first_block_cache,
    apply_mag_cache,
    apply_taylorseer_cache,
)
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from diffusers.hooks.sea_cache import SeaCacheConfig, apply_sea_cache

from .trial import Study, Trial

PACKAGE = f"diffusers {diffusers.__version__}"
MODULES = [r"transformer_blocks\.\d+\.(attn1|ff)"]
BLOCKS, LAST = [r"transformer_blocks\.\d+"], ["proj_out_2"]
LAYERS = [
    r"(down_blocks|up_blocks)\.\d+\.(resnets|attentions)\.\d+",
    r"mid_block\.(resnets|attentions)\.\d+",
]
FIRST_BLOCK = (0.06, 0.1, 0.15, 0.2, 0.3)
MAG = (0.05, 0.1, 0.2, 0.4, 0.8)
INTERVALS = (3, 4, 6, 9)
SEA = (0.1, 0.2, 0.3, 0.5, 0.8)


def contexts(pipe: Any) -> None:
    """Tell the hooks on the pipeline's transformer what its calls are."""
    scheduler, null = pipe.scheduler, pipe.num_classes

    def tell(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        index = scheduler.step_index or 0  # None before the first step
        name = "uncond" if int(kwargs["class_labels"][0]) == null else "cond"
        if index == 0 and name == "cond":
            HookRegistry.check_if_exists_or_initialize(module).reset_stateful_hooks(recurse=True)
        context = CacheContext(
            name,
            step_index=index,
            num_inference_steps=len(scheduler.timesteps),
            timestep=scheduler.timesteps[index],
            sigma=float(scheduler.sigmas[index]),
        )
        _set_cache_context(module, context)

    pipe.transformer.register_forward_pre_hook(tell, with_kwargs=True)


def _apply(pipe: Any, apply: Callable[[Any, Any], None], config: Any) -> None:
    apply(pipe.transformer, config)
    contexts(pipe)


@functools.cache
def mag_ratios(study: Study) -> list[float]:
    """Return MagCache's ratios, found by its own calibration."""
    pipe, printed = study.pipeline(), io.StringIO()
    config = MagCacheConfig(calibrate=True, num_inference_steps=study.steps)
    _apply(pipe, apply_mag_cache, config)
    with contextlib.redirect_stdout(printed):
        for call in study.calibration():
            pipe(**call)
    lines = [line for line in printed.getvalue().splitlines() if line.startswith("[1.0")]
    return torch.tensor([ast.literal_eval(line) for line in lines]).mean(0).tolist()


def _mag(pipe: Any, study: Study, **settings: Any) -> None:
    ratios = mag_ratios(study)
    config = MagCacheConfig(num_inference_steps=study.steps, mag_ratios=ratios, **settings)
    _apply(pipe, apply_mag_cache, config)


def _latents(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Return the images as SeaCache wants them: each [C, 1, H, W]."""
    return list(args[0][:, :, None])


def trials(study: Study) -> Iterator[Trial]:
    """Yield the hooks' sweeps; of UNets, which have no list of blocks, TaylorSeer's alone."""
    unet = study.is_unet()
    for threshold in () if unet else FIRST_BLOCK:
        config = FirstBlockCacheConfig(threshold=threshold)
        install = functools.partial(_apply, apply=apply_first_block_cache, config=config)
        yield Trial("First Block Cache", f"threshold={threshold}", install, PACKAGE)
    for threshold in () if unet else MAG:
        settings = {"threshold": threshold, "max_skip_steps": 10, "retention_ratio": 0.06}
        install = functools.partial(_mag, study=study, **settings)
        text = ", ".join(f"{name}={value}" for name, value in settings.items())
        yield Trial("MagCache", text, install, PACKAGE)
    places = {"modules": {"cache_identifiers": LAYERS if unet else MODULES}}
    if not unet:
        places["output"] = {"cache_identifiers": LAST, "skip_predict_identifiers": BLOCKS}
    for where, patterns in places.items():
        for order in (1, 2):
            for interval in INTERVALS:
                config = TaylorSeerCacheConfig(
                    cache_interval=interval,
                    disable_cache_before_step=3,
                    max_order=order,
                    taylor_factors_dtype=torch.float32,
                    **patterns,
                )
                install = functools.partial(_apply, apply=apply_taylorseer_cache, config=config)
                method = f"TaylorSeer, {where}, order {order}"
                yield Trial(method, f"cache_interval={interval}", install, PACKAGE)
    for threshold in () if unet else SEA:
        config = SeaCacheConfig(
            threshold=threshold, max_consecutive_cached=0, raw_vision_callback=_latents
        )
        install = functools.partial(_apply, apply=apply_sea_cache, config=config)
        yield Trial("SeaCache", f"threshold={threshold}", install, PACKAGE)
