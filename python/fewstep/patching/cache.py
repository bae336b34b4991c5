"""`cache=...`: leave out the denoiser, or its middle blocks, on steps that can be foretold."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ..caching import (
    BY_MODULE,
    PRESETS,
    LookAhead,
    ModuleSession,
    OutputStack,
    Plan,
    PlanChoice,
    Router,
    ScheduledPolicy,
    ScheduledSession,
    Session,
    find_plans,
    is_cached,
    load_cache,
    parse_target,
    resolve_policy,
)
from ..caching.fingerprint import active_adapters
from ..caching.plans import DEFAULT_TARGET, FOLDER
from .pipeline import GuidanceOf, SchedulerOf
from .recognise import Target
from .undo import Change, PatchError, Slot

__all__ = ["plan_cache"]

_SCOPES = ("output", "blocks", "levels", "encoder", "tokens", *BY_MODULE)


class _CacheChange(Change):
    def __init__(self, policy: Any, session: Session) -> None:
        super().__init__("cache", repr(policy))
        self.policy = policy
        self.session, self._undone = session, False
        self.plan: Callable[[], list[Any]] = list

    @property
    def gone(self) -> bool:
        """Whether `disable_cache`, `remove_cache`, a registry or another `forward` took it off."""
        lost = any(getattr(slot, "lost", False) for slot in self.slots)
        return (self.session.closed or lost) and not self._undone

    def apply(self) -> None:
        # Not before: `forward` of a module is its class's, which quantising may have changed.
        self.slots += self.plan()
        super().apply()

    def undo(self) -> None:
        # A wrapper that somebody else has wrapped stays below theirs: it must do nothing then.
        self.session.close()
        self._undone = True
        super().undo()

    def report(self) -> dict[str, Any]:
        return self.session.report()


class _Changed:
    """Says what a plan was calibrated for and is no longer so: looked at when a run starts."""

    def __init__(
        self, denoisers: tuple[nn.Module, ...], before: Any, scheduler: Callable[[], Any]
    ) -> None:
        self._denoisers = [weakref.ref(denoiser) for denoiser in denoisers]
        self._scheduler = scheduler
        self._kind, self._config = type(before), _settings(before)
        self._adapters = [active_adapters(denoiser) for denoiser in denoisers]

    def __call__(self) -> str | None:
        now = self._scheduler()
        if type(now) is not self._kind or _settings(now) != self._config:
            return "another scheduler"
        for reference, adapters in zip(self._denoisers, self._adapters, strict=True):
            denoiser = reference()
            if denoiser is not None and active_adapters(denoiser) != adapters:
                return "other adapters"
        return None


def _settings(scheduler: Any) -> dict[str, Any]:
    """A scheduler's configuration, without what schedulers write there themselves."""
    config = dict(getattr(scheduler, "config", {}))
    config.pop("lower_order_final", None)
    return config


class CacheOptions(NamedTuple):
    """What goes with `cache`."""

    target: str | None = None
    speedup: float | None = None
    verify: bool = False


def _resolve(cache: Any, options: CacheOptions, pipe: Any, target: Target, scheduler: Any) -> Any:
    """Return the policy that was asked for."""
    if isinstance(cache, str) and cache == "auto":
        place = getattr(pipe, "config", {}).get("_name_or_path")
        if not place or not Path(place).is_dir():
            what = "pipeline" if target.component else "model"
            raise ValueError(
                f'cache="auto": expected a {what} loaded from a folder, where its plans lie in '
                f"{FOLDER}, got one from {place!r}; give a Path of plans as cache"
            )
        return _choice(Path(place) / FOLDER, _denoisers(pipe, target), options, scheduler)
    if isinstance(cache, Path) and cache.is_dir():
        return _choice(cache, _denoisers(pipe, target), options, scheduler)
    for name in ("target", "speedup"):
        if getattr(options, name) is not None:
            raise ValueError(
                f'{name}: expected with cache="auto" or a folder of plans alone, got it with '
                f"{cache!r}; fewstep.caching.calibrate takes it, too"
            )
    if isinstance(cache, Path) or (isinstance(cache, str) and cache.endswith(".json")):
        if not Path(cache).is_file():
            raise ValueError(f"cache: expected a file with a plan, got {str(cache)!r}: none there")
        cache = load_cache(cache)
    if isinstance(cache, Plan | LookAhead | Router):
        _expect_fit(cache, _denoisers(pipe, target), scheduler)
    return resolve_policy(cache)


def _denoisers(pipe: Any, target: Target) -> tuple[nn.Module, ...]:
    """Return the models that share the steps."""
    more = () if target.second is None else (getattr(pipe, target.second),)
    return (target.denoiser, *more)


def _choice(
    folder: Path, denoisers: tuple[nn.Module, ...], options: CacheOptions, scheduler: Any
) -> PlanChoice:
    """Return the plans in a folder, with the target."""
    wanted, speedup = options.target, options.speedup
    if speedup is not None and not (isinstance(speedup, int | float) and 1 <= speedup < math.inf):
        raise ValueError(f"speedup: expected a finite number of at least 1, got {speedup!r}")
    if wanted is None and speedup is None:
        wanted = DEFAULT_TARGET
    psnr = None if wanted is None else parse_target(wanted)
    plans, refused = find_plans(folder, denoisers[0], scheduler, *denoisers[1:])
    if not plans:
        why = f" ({'; '.join(refused)})" if refused else ""
        raise ValueError(
            f"cache: expected plans for this pipeline in {folder}, got none"
            f"{why}; fewstep.caching.calibrate(pipe, calls) makes one, or name a preset: "
            f"{', '.join(PRESETS)}"
        )
    return PlanChoice(tuple(plans), psnr, speedup)


def _expect_fit(
    plan: Plan | LookAhead | Router, denoisers: tuple[nn.Module, ...], scheduler: Any
) -> None:
    """Raise ValueError where a plan belongs to another pipeline."""
    mark = plan.fingerprint
    if mark is None:
        return
    if wrong := mark.differences(denoisers[0], scheduler, *denoisers[1:]):
        raise ValueError(
            f"cache: expected the pipeline that {plan!r} was calibrated on, got another: "
            f"{'; '.join(wrong[:3])}. fewstep.caching.calibrate makes a plan for this one"
        )


def _expect_plain(component: str, denoiser: nn.Module) -> None:
    model, place = type(denoiser).__name__, f"pipe.{component}" if component else "model"
    if hasattr(denoiser, "_orig_mod"):
        raise ValueError(
            f"cache: expected an uncompiled model in {place}, got {model}; patch first, "
            "then torch.compile"
        )
    from .hooks import expect_no_other, hook_of

    if is_cached(denoiser) or hook_of(denoiser):
        raise PatchError(
            f"cache: expected a {model} without a cache, got one that another pipeline's "
            "patch caches, or a deep copy of such a one; undo that patch, or call remove_cache"
        )
    expect_no_other(denoiser)


def plan_cache(
    pipe: Any,
    target: Target,
    cache: Any,
    options: CacheOptions,
    scheduler: Any,
    scheduler_of: Callable[[], Any] | None = None,
) -> _CacheChange:
    """Plan the replacements of `forward`; nothing is changed yet.

    Args:
        pipe: the pipeline, or a bare denoiser.
        target: its denoiser.
        cache: a preset's name, a policy, a plan or a file with one, or "auto".
        options: what was given beside it.
        scheduler: the one that the pipeline will have.
        scheduler_of: returns the present one; None for the pipeline's.

    Raises:
        TypeError, ValueError: not a preset or policy, or a model that it can't serve.
        PatchError: the model is cached already, by this library or by diffusers.
    """
    policy = _resolve(cache, options, pipe, target, scheduler)
    if hasattr(policy, "expect_scheduler"):
        policy.expect_scheduler(scheduler)
    scope = getattr(policy, "scope", "blocks")
    if scope not in _SCOPES:
        names = " or ".join(f'"{name}"' for name in _SCOPES)
        raise ValueError(f"cache: expected scope {names}, got {scope!r} in {policy!r}")
    if not isinstance(options.verify, bool):
        raise TypeError(f"verify: expected a bool, got {options.verify!r}")
    components = {target.component: target.denoiser}
    if scope == "output":
        target.require_eager("cache")
        if target.second is None:
            target.require_alone("cache")
        else:
            components[target.second] = getattr(pipe, target.second)
        layouts: dict[str, Any] = {name: OutputStack(part) for name, part in components.items()}
    elif scope in BY_MODULE:
        layouts = {target.component: target.modules(scope, getattr(policy, "modules", None))}
    else:
        layouts = {target.component: target.layout(scope)}
    for component, denoiser in components.items():
        _expect_plain(component, denoiser)
    scheduled = isinstance(policy, ScheduledPolicy)
    if scope in BY_MODULE and not scheduled:
        raise ValueError(f'cache: expected a schedule with scope "{scope}", got {policy!r}')
    if options.verify and not (scheduled and policy.scope == "output"):
        raise ValueError(
            f"verify: expected a cache that forecasts the model's output, got {policy!r}"
        )
    kind = getattr(policy, "session", _session_of(scope, scheduled))
    more = {"verify": options.verify} if scheduled else {}
    scheduler_of = scheduler_of or SchedulerOf(pipe)
    session: Session = kind(policy, scheduler_of, **more)
    fitted = isinstance(policy, Plan | PlanChoice | LookAhead | Router)
    if fitted and isinstance(session, ScheduledSession):
        session.changed = _Changed(tuple(components.values()), scheduler, scheduler_of)
        session.guidance = GuidanceOf(pipe)
    change = _CacheChange(policy, session)
    change.done += [layout.describe(session) for layout in layouts.values()]
    if len(layouts) > 1:
        change.done.append("where the second model takes over, the schedule starts anew")
    ends = "the first" if scheduled else "the first and the last"
    if options.verify:
        change.done.append("the model runs on skipped steps too, to measure the forecasts")
    change.done.append(
        f"{ends} step of an image runs in full; state is per guidance pass and starts anew with "
        "every image"
    )
    change.plan = lambda: [
        slot
        for component, layout in layouts.items()
        for slot in _slots(component, components[component], layout, session)
    ]
    for layout in layouts.values():
        change.left += getattr(layout, "left", [])
    change.left.append("weights, scheduler and step count")
    return change


def _session_of(scope: str, scheduled: bool) -> type[Session]:
    if scope in BY_MODULE:
        return ModuleSession
    return ScheduledSession if scheduled else Session


def _slots(component: str, denoiser: nn.Module, layout: Any, session: Session) -> list[Any]:
    from .hooks import CacheHook, HookSlot, RootHook, conventions

    names = {id(module): name for name, module in denoiser.named_modules()}
    whole = f"pipe.{component}" if component else "model"
    found: list[Any] = []
    for module, name, value in layout.replacements(session):
        where = ".".join(filter(None, (whole, names[id(module)], name)))
        if name != "forward":
            found.append(Slot(module, name, value, where))
            continue
        hook = RootHook(module, value) if module is denoiser else CacheHook(value)
        found.append(HookSlot(module, hook, where))
    return [*found, *conventions(denoiser, session.policy, whole)]
