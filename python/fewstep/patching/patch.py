"""patch(pipe, steps=, quantize=, cache=, ...) and the handle that takes it back.

    with fewstep.patch(pipe, quantize="w8a8", cache="taylor") as patch:
        images = pipe(prompt).images
    print(patch.explain())

Every feature is planned first, which checks everything and changes nothing, and only then applied;
a feature that fails while it is applied takes the earlier ones back. Features own disjoint parts of
the pipeline (scheduler; config entries; linear layers; `forward` of blocks, of embeddings), so
several patches on one pipeline are undone in any order.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from ..quantization import Calibration, Plan, Scheme
from .cache import CacheOptions, plan_cache
from .fusions import Fusions
from .grid import fixed_steps
from .guidance import plan_guidance
from .quantize import plan_quantize
from .recognise import recognise
from .saving import PERSISTENT, SaveGuard
from .steps import plan_steps
from .text import plan_text
from .timestep import plan_time
from .undo import Change, ConfigStack, PatchError, Slot

__all__ = ["Patch", "active_patches", "patch"]


@dataclass
class _Record:
    """What is known about one pipeline, kept outside it so that its `__dict__` stays its own."""

    patches: list[Patch] = field(default_factory=list)
    config: ConfigStack = field(default_factory=ConfigStack)
    saving: Slot | None = None  # while a patch would go into saved files

    def refresh_saving(self, pipe: Any) -> None:
        """Put the guard of `save_pretrained` in place or out of it, as the patches want."""
        kept = [f for patch in self.patches for f in patch.features if f in PERSISTENT]
        if kept and self.saving is None:
            guard = SaveGuard(pipe)
            self.saving = Slot(pipe, "save_pretrained", guard, "pipe.save_pretrained")
            self.saving.apply()
        if self.saving is not None:
            self.saving.value.features = kept
            if not kept:
                self.saving.restore()
                self.saving = None


_records: weakref.WeakKeyDictionary[Any, _Record] = weakref.WeakKeyDictionary()


class Patch:
    """What `patch` did to a pipeline: says it, and takes it back. A context manager."""

    def __init__(self, pipe: Any, recognised: str, changes: list[Change], left: list[str]) -> None:
        self._pipe = weakref.ref(pipe)
        self._name = type(pipe).__name__
        self._recognised, self._left = recognised, left
        self._changes = changes
        self._active = True

    @property
    def active(self) -> bool:
        """Whether the changes are in place."""
        return self._active

    @property
    def features(self) -> tuple[str, ...]:
        """Keywords of `patch` that this handle stands for."""
        return tuple(change.feature for change in self._changes if not change.gone)

    def undo(self, *, force: bool = False) -> None:
        """Put back the very objects that were there; a second call does nothing.

        Args:
            force: where somebody else has replaced or wrapped what this patch set, leave theirs in
                place and only switch this patch's part off below it.

        Raises:
            PatchError: somebody else has, and `force` is not given or can't help (quantised layers
                that were replaced again). Nothing is undone then.
        """
        if not self._active:
            return
        conflicts = [
            where
            for change in self._changes
            if not (force and change.can_leave)
            for where in change.conflicts()
        ]
        if conflicts:
            raise PatchError(
                "undo: expected the objects that this patch set, got others in "
                f"{', '.join(conflicts[:4])}{' and more' if len(conflicts) > 4 else ''}: something "
                "was set or hooked after the patch. Remove that first, or call undo(force=True) "
                "to leave it and switch this patch off below it"
            )
        for change in reversed(self._changes):
            change.undo()
        self._active = False
        pipe = self._pipe()
        record = None if pipe is None else _records.get(pipe)
        if record is not None and self in record.patches:
            record.patches.remove(self)
            record.refresh_saving(pipe)
            if not record.patches:
                del _records[pipe]

    def report(self) -> dict[str, Any]:
        """Numbers seen so far, by feature; for a cache, the steps of the last image."""
        return {change.feature: numbers for change in self._changes if (numbers := change.report())}

    def explain(self) -> str:
        """Say what was recognised, what was changed and why, and what was left alone and why."""
        state = "active" if self._active else "undone"
        lines = [f"fewstep patch on {self._name} ({state})", f"  recognised: {self._recognised}"]
        for change in self._changes:
            lines.append(f"  {change.feature}: {change.summary}")
            lines += [f"    {line}" for line in change.done]
            lines += [f"    {line}" for line in self._remarks(change)]
            lines += [f"    seen: {line}" for line in _seen(change.report())]
            lines += [f"    left alone: {line}" for line in change.left]
        lines += [f"  left alone: {line}" for line in self._left]
        return "\n".join(lines)

    def _remarks(self, change: Change) -> list[str]:
        """What follows from the other patches in place."""
        if change.gone:
            return [
                "taken off since: by disable_cache, remove_cache, a hook registry, or by setting "
                "the model's own forward again"
            ]
        steps = fixed_steps(getattr(self._pipe(), "scheduler", None))
        if change.feature == "cache" and self._active and steps is not None and steps <= 2:
            return [
                f"it can never act while steps={steps} is patched: an image has no step between "
                "the first and the last"
            ]
        return []

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        what = "; ".join(f"{change.feature}: {change.summary}" for change in self._changes)
        return f"<Patch on {self._name}, {'active' if self._active else 'undone'}: {what}>"


def _seen(numbers: dict[str, Any]) -> list[str]:
    lines = []
    for branch, decisions in numbers.get("branches", {}).items():
        marks = "".join({"full": "F", "part": "p"}.get(decision, "-") for decision in decisions)
        said = f"{decisions.count('skip')} of {len(decisions)} steps skipped"
        partly = decisions.count("part")
        lines.append(f"{branch}: {marks} ({said}{f', {partly} in part' if partly else ''})")
    if numbers.get("why_full"):
        lines.append(f"in full because of: {_counted(numbers['why_full'])}")
    if numbers.get("why_part"):
        lines.append(f"in part because of: {_counted(numbers['why_part'])}")
    plan = numbers.get("plan", {})
    if plan.get("carried_over_from"):
        lines.append(
            f"a plan for {plan['carried_over_from']} steps, carried over to {plan['steps']}: what "
            "that loses has not been measured"
        )
    lines += [f"unlike the plan's calibration: {remark}" for remark in plan.get("remarks", ())]
    errors = [e for steps in numbers.get("measured_error", {}).values() for e in steps.values()]
    if flat := [x for error in errors for x in error]:
        lines.append(
            f"relative error of forecasts: {sum(flat) / len(flat):.4f} on average, "
            f"{max(flat):.4f} at most ({len(flat)} seen)"
        )
    if numbers.get("blended"):
        lines.append(f"{numbers['blended']} full steps in which some samples took no part")
    if "saved" in numbers:
        lines.append(
            f"{numbers['evaluated']} evaluations, {numbers['saved']} saved; "
            f"{numbers['values']} values, {numbers['bytes'] / 2**20:.2f} MiB"
        )
    if numbers.get("not_kept"):
        lines.append(f"not kept because of: {_counted(numbers['not_kept'])}")
    return lines


def _counted(reasons: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in reasons.items())


def _scheduler_after(pipe: Any, changes: list[Change]) -> Any:
    """The scheduler that the pipeline will have once the changes are applied."""
    slots = [slot for change in changes for slot in change.slots]
    new = [slot.value for slot in slots if getattr(slot, "where", "") == "pipe.scheduler"]
    return new[-1] if new else getattr(pipe, "scheduler", None)


def active_patches(pipe: Any) -> list[Patch]:
    """Return the patches in place on a pipeline, oldest first."""
    record = _records.get(pipe)
    return [] if record is None else list(record.patches)


def _check_not_patched(record: _Record, wanted: dict[str, Any]) -> None:
    for earlier in record.patches:
        twice = [name for name in wanted if name in earlier.features]
        if twice:
            raise PatchError(
                f"{', '.join(twice)}: expected a pipeline not yet patched with it, got one with "
                f"{earlier!r}; call undo() on that (fewstep.patching.active_patches(pipe) finds it)"
            )


def patch(
    pipe: Any,
    *,
    steps: int | None = None,
    quantize: str | Scheme | Plan | None = None,
    smooth: Calibration | str | Path | None = None,
    compensate: Calibration | str | Path | None = None,
    norms: str | None = None,
    activations: str | None = "fuse",
    modulations: str | None = None,
    cache: Any = None,
    target: str | None = None,
    speedup: float | None = None,
    verify: bool = False,
    time: str | None = None,
    text: str | None = None,
    guidance: str | float | None = None,
) -> Patch:
    """Make a diffusers pipeline fast, in place, and return the handle that undoes it.

    Args:
        pipe: a `DiffusionPipeline` object. Only this object and its components change, the latter
            also for other pipelines that share them.
        steps: every call takes this many, with the scheduler and grid that fit the checkpoint.
        quantize: a scheme for the denoiser's linear layers: "w8a8", "fp8", "w4a8", "w4a16", or with
            options as in "w4a8-g64-r32" (`fewstep.quantization.Scheme`), or a plan. Memory rises
            meanwhile: the original layers are kept for `undo`.
        smooth: a calibration of this pipeline, or a file with it, for `quantize` to choose
            smoothing factors with (`fewstep.quantization.calibrate`).
        compensate: the same, for `quantize` to round weights with so that their errors make up for
            each other; usually the calibration that `smooth` has.
        norms: "share" or "fuse", for `quantize`: norms quantise for the layers behind them
            (`fewstep.quantize`).
        activations: "fuse" or None, for `quantize`: whether products compute the activations
            behind them.
        modulations: "group" or None, for `quantize`: whether modulation layers in w4a16 that read
            the same row are evaluated in one launch.
        cache: a plan of `fewstep.caching.calibrate` or a file with one: run the plan's steps in
            full and forecast the model's output at the others. Or a published method, by the name
            of its preset, such as "taylor" or "first-block", or as a policy of
            `fewstep.caching` with settings of your own. "auto" takes one of the plans that lie in
            the folder `cache_plans` of the pipeline's checkpoint.
        target: for cache="auto": the fastest plan that was measured to reach it, such as
            "psnr>=30"; without it and without `speedup`, "psnr>=40".
        speedup: for cache="auto": the best plan that leaves out so much, in steps per full step.
        verify: for plans: run the model on skipped steps too, and report how far the forecasts are
            off; nothing is saved then.
        time: "cache": modules whose output depends on the time alone are evaluated once per step of
            the grid, and their values used by all later calls and images. The same bits.
        text: "cache": keys and values of cross-attention, and the text's tokens in front of the
            blocks, are computed on the first step of a run and used by all later ones. The same
            bits.
        guidance: "off" or a scale for calls that give none, on pipelines that keep that in their
            config.

    Raises:
        TypeError, ValueError: an argument does not fit this pipeline, or one that is for `quantize`
            is given without it.
        PatchError: the same feature is on this pipeline already.
    """
    found = recognise(pipe)
    seen = {"smooth": smooth, "compensate": compensate}
    fusions = Fusions(norms, activations, modulations)
    for name, option in (seen | fusions._asdict()).items():
        if quantize is None and option != Fusions._field_defaults.get(name):
            raise ValueError(f"{name}: expected quantize beside it, got none")
    fusions.expect()
    options = CacheOptions(target, speedup, verify)
    for name, option in options._asdict().items():
        if cache is None and option != CacheOptions._field_defaults[name]:
            raise ValueError(f"{name}: expected cache beside it, got none")
    given = {
        "steps": steps,
        "quantize": quantize,
        "cache": cache,
        "time": time,
        "text": text,
        "guidance": guidance,
    }
    wanted = {name: value for name, value in given.items() if value is not None}
    if not wanted:
        raise ValueError(f"patch: expected at least one of {', '.join(given)}; got none")
    record = _records.get(pipe) or _Record()
    _check_not_patched(record, wanted)

    recognised = f"{found.describe()}; {type(getattr(pipe, 'scheduler', None)).__name__}"
    changes: list[Change] = []
    if steps is not None:
        changes.append(plan_steps(pipe, steps, record.config))
    if guidance is not None:
        changes.append(plan_guidance(pipe, guidance, record.config))
    if quantize is not None:
        changes.append(plan_quantize(found, quantize, seen, fusions))
    if cache is not None:
        changes.append(plan_cache(pipe, found, cache, options, _scheduler_after(pipe, changes)))
    if time is not None:
        changes.append(plan_time(pipe, found, time))
    if text is not None:
        changes.append(plan_text(pipe, found, text))

    left = []
    if missing := [name for name in given if name not in wanted]:
        left.append(f"{', '.join(missing)}: not asked for")
    outside, unknown = found.rest(pipe)
    if outside:
        left.append(f"{', '.join(outside)}: not part of the denoising loop")
    if unknown:
        left.append(f"{', '.join(unknown)}: not recognised, left as it is")

    applied: list[Change] = []
    try:
        for change in changes:
            applied.append(change)
            change.apply()
    except BaseException:
        for change in reversed(applied):
            change.undo()
        raise
    handle = Patch(pipe, recognised, changes, left)
    record.patches.append(handle)
    record.refresh_saving(pipe)
    _records[pipe] = record
    return handle
