"""Trials of this library: calibrated plans, the presets, trained caches, and fewer steps.

A plan is calibrated on four calls of eight images each, on noise that no held-out image has. The
plan of the Gram matrix alone has the same full steps: it is the plan carried over to its own grid,
which fits the weights anew.

Trained caches are trained on the calls that plans are calibrated on, from a fixed seed, for less
than three minutes each on an idle core for the digits teacher. That leaves out what takes longer:
look-ahead blocks at a third of 50 steps, where gradients go through 32 evaluations of the model an
iteration, and routers on grids of more than 16 steps, where they go through all of them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import fewstep
from fewstep.caching import PRESETS, Plan, calibrate, train_lookahead, train_router

from .trial import Study, Trial

FEWER = (3, 4, 6, 8)  # times fewer full steps than steps
# What is swept of a preset that has such a setting; the others are tried as they come.
DIALS: dict[str, tuple[float, ...]] = {
    "threshold": (0.1, 0.15, 0.2, 0.3),
    "share": (0.125, 0.25, 0.5),
    "every": (3, 4, 6, 8),
}
FREE = {"max_skips": 50, "passes": "calls"}  # limits that would end a sweep early; the models' way
AHEAD = FEWER[1:]
ROUTED = (("final", 0.5), ("final", 0.75), ("step", 0.75))  # objectives and shares of work
FEW = 16  # steps that routers are trained on
THRESHOLDS = {
    "easycache": (0.02, 0.05, 0.1, 0.2, 0.3),
    "teacache": (0.03, 0.05, 0.07, 0.1, 0.2),
    "seacache": (0.1, 0.2, 0.3, 0.5, 0.8),
}
ALONE = ", one image at a time"


def said(settings: dict[str, Any]) -> str:
    """Return settings as the record writes them."""
    return ", ".join(f"{name}={value}" for name, value in settings.items()) or "as it comes"


@functools.cache
def refused(study: Study, preset: str) -> str | None:
    """Return why a preset does not serve the model, or None."""
    try:
        fewstep.patch(study.pipeline(), cache=PRESETS[preset]())
    except ValueError as error:
        return f"{preset}: {str(error).removeprefix('cache: ')}"
    return None


@functools.cache
def _calibrated(study: Study, full_steps: int, **options: Any) -> Plan:
    return calibrate(study.pipeline(), study.calibration(), full_steps=full_steps, **options)


def _plan(
    pipe: Any, *, study: Study, full_steps: int, corrected: bool = True, **options: Any
) -> dict[str, Any]:
    plan = _calibrated(study, full_steps, **options)
    if not corrected:
        plan = plan.at(plan.times, corrected=False)
    fewstep.patch(pipe, cache=plan)
    notes = {f"predicted_{name}_db": plan.predicted.get(name) for name in ("psnr", "psnr_min")}
    return notes | {"schedule": list(plan.full), "half_steps": list(plan.half)}


def _preset(pipe: Any, *, name: str, **settings: Any) -> None:
    fewstep.patch(pipe, cache=PRESETS[name](**settings))


def plans(study: Study) -> Iterator[Trial]:
    """Yield calibrated plans: as they come, uncorrected, and with the options of calibrating."""
    kinds: dict[str, dict[str, Any]] = {
        "calibrated plan": {},
        "plan of the Gram matrix alone": {"corrected": False},
        "calibrated plan, sensitivity": {"sensitivity": True},
    }
    if study.pipeline().config.default_guidance > 1:
        kinds["calibrated plan, half steps"] = {"guidance": "auto"}
    for fewer in FEWER:
        full_steps = max(1, study.steps // fewer)
        for name, options in kinds.items():
            install = functools.partial(_plan, study=study, full_steps=full_steps, **options)
            yield Trial(name, f"full_steps={full_steps}", install, "fewstep")


def presets(study: Study) -> Iterator[Trial]:
    """Yield every preset that serves the model, with a sweep of its dial."""
    for name, make in PRESETS.items():
        if refused(study, name):
            continue
        takes = inspect.signature(make).parameters
        free = {setting: value for setting, value in FREE.items() if setting in takes}
        dials = [dial for dial in DIALS if dial in takes]
        dial = dials[0] if dials else None
        values = DIALS.get(dial, ())
        if dial == "threshold":
            values = THRESHOLDS.get(name, values)
        sweep = [{dial: value} | free for value in values] if dial else [{}]
        if "tail" in takes:  # the last step's error stays in the image
            sweep += [settings | {"tail": 1} for settings in sweep]
        for settings in sweep:
            install = functools.partial(_preset, name=name, **settings)
            yield Trial(name, said(settings), install, "fewstep")


def one_at_a_time(study: Study) -> Iterator[Trial]:
    """Yield the presets that decide by image once more, each image a batch of its own.

    In a batch a step runs for all of its images as soon as one of them wants it.
    """
    for trial in presets(study):
        if getattr(PRESETS[trial.method], "measures", False):
            yield replace(trial, method=f"{trial.method}{ALONE}", batch=1)


def by_module(study: Study) -> Iterator[Trial]:
    """Yield forecasts for every attention and feed-forward layer, and what low precision loses."""
    if study.is_unet():
        return
    kept = [{"snapshots": snapshots, "every": 4} for snapshots in ("fp8", "int8", "int4")]
    for name, sweep in (
        ("fora", [{"every": every} for every in DIALS["every"]]),
        ("taylor", [{"every": n, "tail": tail} for tail in (0, 1) for n in DIALS["every"]] + kept),
    ):
        for settings in sweep:
            install = functools.partial(_preset, name=name, scope="module", **settings)
            method = f"{name}, modules"
            if "snapshots" in settings:
                method += f", {settings['snapshots']}"
            yield Trial(method, said(settings), install, "fewstep")


def of_unets(study: Study) -> Iterator[Trial]:
    """Yield what UNets have besides: the published key steps, and another level."""
    if not study.is_unet():
        return
    for name, settings in (
        ("faster-diffusion", {}),
        *(("deepcache, level 1", {"every": n, "level": 1}) for n in DIALS["every"]),
    ):
        install = functools.partial(_preset, name=name.partition(",")[0], **settings)
        yield Trial(name, said(settings), install, "fewstep")


def _ahead(pipe: Any, *, study: Study, full_steps: int) -> dict[str, Any]:
    plan = _calibrated(study, full_steps)
    cache = train_lookahead(study.pipeline(), study.calibration(), plan=plan)
    fewstep.patch(pipe, cache=cache)
    kept = ("plan_held_out_db", "held_out_db", "cost")
    return {name: cache.made[name] for name in kept} | {"schedule": list(cache.plan.full)}


def _routed(pipe: Any, *, study: Study, objective: str, compute: float) -> dict[str, Any]:
    router = train_router(
        study.pipeline(), study.calibration(), compute=compute, objective=objective, iterations=48
    )
    fewstep.patch(pipe, cache=router)
    return {"predicted_psnr_db": router.predicted["psnr"], "masks": dict(router.masks)}


def trained(study: Study) -> Iterator[Trial]:
    """Yield plans with look-ahead blocks; on few steps routers, and plans that cost as much."""
    for fewer in AHEAD:
        full_steps = max(1, study.steps // fewer)
        install = functools.partial(_ahead, study=study, full_steps=full_steps)
        yield Trial("look-ahead blocks", f"full_steps={full_steps}", install, "fewstep")
    if study.steps > FEW or study.is_unet():
        return
    for full_steps in sorted({round(compute * study.steps) for _, compute in ROUTED}):
        install = functools.partial(_plan, study=study, full_steps=full_steps, corrected=True)
        yield Trial(
            "calibrated plan of a router's work", f"full_steps={full_steps}", install, "fewstep"
        )
    for objective, compute in ROUTED:
        name = "router (HarmoniCa)" if objective == "final" else "router (Learning-to-Cache)"
        install = functools.partial(_routed, study=study, objective=objective, compute=compute)
        yield Trial(name, f"compute={compute:g}", install, "fewstep")


def fewer_steps(study: Study) -> Iterator[Trial]:
    """Yield the same sampler on coarser grids."""
    for count in sorted({max(1, study.steps // n) for n in (2, *FEWER)}, reverse=True):
        yield Trial("fewer steps", f"steps={count}", lambda pipe: None, None, count)
