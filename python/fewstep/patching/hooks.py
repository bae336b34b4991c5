"""A cache's wrappers in diffusers' hook registries.

Every module whose `forward` a cache wraps has a `CacheHook` in its registry, the denoiser a
`RootHook`. So `registry.remove_hook`, `disable_cache`, `reset_stateful_hooks` and `cache_context`
find them, hooks of others come and go above and below, and a copy of the model, which no handle
knows, can be rid of its cache. ADR 0009 says what is done otherwise than `register_hook` does it.

A registry is a chain: the k-th hook calls what was the module's forward when it was registered. Our
place in it is chosen:

    outermost   the denoiser's wrapper: it sees the whole input and output, on every rank
    outside of  group offloading: what a skipped step leaves out is not uploaded
    inside of   the hooks that shard inputs and gather outputs (context parallelism), and of a
                group offloading that uploads blocks which skipped steps run, too
    below       accelerate's hook (`enable_model_cpu_offload`), which pipelines take off and put
                on again after every image: what it wraps is `_old_forward`, our place then
"""

from __future__ import annotations

import weakref
from functools import partial
from types import MethodType
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, HookFunctionReference, StateManager
from torch import nn

from ..caching import Session
from .undo import PatchError, Slot

__all__ = [
    "NAME",
    "CacheHook",
    "HookSlot",
    "RootHook",
    "conventions",
    "expect_no_other",
    "hook_of",
    "remove",
]

NAME = "fewstep_cache"
_SHARDING = ("cp_input", "cp_output")
_OFFLOADING = "group_offloading"
# Modules of diffusers.hooks that decide what runs; that of text keys and values is exact.
_THEIRS = (
    "faster_cache",
    "first_block_cache",
    "mag_cache",
    "pyramid_attention_broadcast",
    "sea_cache",
    "taylorseer_cache",
)


class _Link(HookFunctionReference):
    """A wrapper's place in a registry's chain: relinking sets what the wrapper calls."""

    def __init__(self, hook: CacheHook) -> None:
        self.wrapper = hook.wrapper
        self.pre_forward, self.post_forward = hook.pre_forward, hook.post_forward
        self.original_forward = None

    @property
    def forward(self) -> Any:
        return self.wrapper.below

    @forward.setter
    def forward(self, value: Any) -> None:
        self.wrapper.below = value


class CacheHook(ModelHook):
    """Stands for a wrapper; the wrapper itself is the module's `forward`, or another hook's."""

    def __init__(self, wrapper: Any) -> None:
        super().__init__()
        self.wrapper = wrapper
        self.made_registry = self.made_forward = False  # entries of the module that are ours

    @property
    def session(self) -> Session:
        """What the wrapper asks."""
        return self.wrapper.session

    def deinitalize_hook(self, module: nn.Module) -> nn.Module:
        """Called by a registry that removes this hook: without one wrapper no other may skip."""
        self.session.close()
        if module.__dict__.get("_old_forward") is self.wrapper:  # accelerate's, which puts it back
            module.__dict__["_old_forward"] = self.wrapper.below
        _drop_forward(module, self)
        return module


class _Passes(StateManager):
    """Hands the session the name of `cache_context`; its states are the session's branches."""

    def __init__(self, session: Session) -> None:
        super().__init__(BaseState)
        self.session = session

    def set_context(self, context: Any) -> None:
        """Take a CacheContext, or None at the end of one."""
        super().set_context(context)
        self.session.context = None if context is None else context.name

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """Forget the run."""
        super().reset(*args, **kwargs)
        self.session.context = None
        self.session.reset()


class RootHook(CacheHook):
    """The hook of a denoiser, which knows those of its modules."""

    _is_stateful = True

    def __init__(self, module: nn.Module, wrapper: Any) -> None:
        super().__init__(wrapper)
        self.module = module
        self.passes = _Passes(wrapper.session)
        self.passes.session.on_run.append(self.settle)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The session of a copy is told by the copy alone: its model may have been one of two.
        self.__dict__.update(state)
        self.passes.session.on_run.append(self.settle)

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Called at the end of a pipeline's run."""
        self.passes.reset()
        return module

    def deinitalize_hook(self, module: nn.Module) -> nn.Module:
        """Take off the wrappers of the other modules, and of the other model that shares steps."""
        super().deinitalize_hook(module)
        session = self.session
        roots = [told.__self__ for told in session.on_run]
        session.on_run.clear()
        for root in roots:
            for child in root.module.modules():
                hook = hook_of(child)
                if hook is not None and hook is not self and hook.session is session:
                    _unlink(child, hook)
            for name in _CONVENTIONS:
                if isinstance(root.module.__dict__.get(name), _Convention):
                    del root.module.__dict__[name]
        return module

    def settle(self) -> None:
        """Look after the order of hooks, since others may have come; called as a run starts."""
        expect_no_other(self.module)
        self.session.group = _ranks(self.module)
        for module in self.module.modules():
            hook = hook_of(module)
            if hook is not None and hook is not self and hook.session is self.session:
                _settle(module, hook)
        # This call has come through its hooks already; in another order they would run again.
        self.session.after_call.append(self._settle_root)

    def _settle_root(self) -> None:
        if hook_of(self.module) is self:
            _settle(self.module, self)


class _Convention:
    """An attribute of the denoiser that diffusers' `CacheMixin` has of its class."""


class _Config(_Convention):
    """`_cache_config`: makes `is_cache_enabled` true, and `enable_cache` refuse."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy

    def __repr__(self) -> str:
        return f"fewstep's {self.policy!r}"


class _Disable(_Convention):
    """`disable_cache`, which in diffusers knows its own configurations only."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self) -> None:
        """Take the cache off, whoever has a handle of it."""
        remove(self.module)


_CONVENTIONS = ("_cache_config", "disable_cache")


class _ConventionSlot(Slot):
    """A slot that may be emptied, and filled again, by others than its handle."""

    covered = False

    def restore(self) -> None:
        """Put back what was there, if ours is there now."""
        if super().covered:
            self._applied = False
        super().restore()


def conventions(module: nn.Module, policy: Any, where: str) -> list[Slot]:
    """Return what to set on a denoiser, called `where`, that has diffusers' `CacheMixin`."""
    if not hasattr(type(module), "is_cache_enabled"):
        return []
    values = {"_cache_config": _Config(policy), "disable_cache": _Disable(module)}
    return [_ConventionSlot(module, n, value, f"{where}.{n}") for n, value in values.items()]


def hook_of(module: nn.Module) -> CacheHook | None:
    """Return the hook of this package on a module."""
    registry = module.__dict__.get("_diffusers_hook")
    hook = None if registry is None else registry.get_hook(NAME)
    return hook if isinstance(hook, CacheHook) else None


def expect_no_other(module: nn.Module) -> None:
    """Raise PatchError where a cache of diffusers is on; `apply_*` of theirs leave no config."""
    theirs = module.__dict__.get("_cache_config")
    if theirs is not None and not isinstance(theirs, _Config):
        raise PatchError(
            f"cache: expected a {type(module).__name__} without a cache, got one with diffusers' "
            "enable_cache; call disable_cache first"
        )
    for name, child in module.named_modules():
        registry = child.__dict__.get("_diffusers_hook")
        for key, hook in () if registry is None else registry.hooks.items():
            if type(hook).__module__.removeprefix("diffusers.hooks.") in _THEIRS:
                raise PatchError(
                    f"cache: expected a {type(module).__name__} without a cache, got one with "
                    f"diffusers' hook {key!r} on {name or 'it'}; remove that first"
                )


def _ranks(module: nn.Module) -> Any:
    """Return the process group over which a model's tokens are sharded, or None."""
    config = getattr(module, "_parallel_config", None)
    mesh = getattr(getattr(config, "context_parallel_config", None), "_flattened_mesh", None)
    return None if mesh is None or mesh.size() == 1 else mesh.get_group()


def remove(module: nn.Module) -> bool:
    """Take a cache off a denoiser; whether there was one."""
    if not isinstance(hook_of(module), RootHook):
        return False
    hook = hook_of(module)
    hook.session.close()
    hook.deinitalize_hook(module)
    _unlink(module, hook)
    return True


# The chain of a registry. `place` counts hooks from the module's own forward outwards.


def _link_at(registry: HookRegistry, place: int) -> Any:
    """Return what the hook at a place calls, accelerate's among it; `forward` behind the last."""
    if place == len(registry._fn_refs):
        return registry._module_ref.forward
    link = registry._fn_refs[place]
    return link.forward if link.original_forward is None else link.original_forward


def _is_accelerates(module: nn.Module, forward: Any) -> bool:
    """Whether that is what accelerate has set for a module's `forward`, and not taken off since."""
    return (
        isinstance(forward, partial)
        and forward.func.__module__ == "accelerate.hooks"
        and forward.args[:1] == (module,)
        and "_old_forward" in module.__dict__
    )


def _called_by(registry: HookRegistry, place: int) -> Any:
    """Return what the hook at a place calls, or the model behind the last, below accelerate's."""
    module, forward = registry._module_ref, _link_at(registry, place)
    return module._old_forward if _is_accelerates(module, forward) else forward


def _let_call(registry: HookRegistry, place: int, forward: Any) -> None:
    if _is_accelerates(registry._module_ref, _link_at(registry, place)):
        registry._module_ref.__dict__["_old_forward"] = forward
        return
    if place == len(registry._fn_refs):
        registry._module_ref.__dict__["forward"] = forward
        return
    link = registry._fn_refs[place]
    if link.original_forward is None:
        link.forward = forward
    else:
        link.original_forward = forward


def _is_free(registry: HookRegistry, place: int) -> bool:
    """Whether nobody has wrapped our wrapper past the registry."""
    return _called_by(registry, place + 1) is registry._fn_refs[place].wrapper


def _place(registry: HookRegistry, hook: CacheHook, without: bool = False) -> int:
    """Return where our hook belongs; with `without`, as if it were not among them now."""
    names = [name for name in registry._hook_order if not (without and name == NAME)]
    if isinstance(hook, RootHook):
        return len(names)
    for place, name in enumerate(names):
        if name.startswith(_SHARDING):
            return place
        if name == _OFFLOADING and _shares_upload(registry, name, hook):
            return place
    return len(names)


def _shares_upload(registry: HookRegistry, name: str, hook: CacheHook) -> bool:
    """Whether what is uploaded together holds a module that skipped steps run."""
    hooks = [
        hook if module is registry._module_ref else hook_of(module)
        for module in registry.hooks[name].group.modules
    ]
    return any(other is None or other.wrapper.always for other in hooks)


def _put_in(registry: HookRegistry, hook: CacheHook) -> None:
    place = _place(registry, hook)
    hook.wrapper.below = _called_by(registry, place)
    registry.hooks[NAME] = hook
    registry._hook_order.insert(place, NAME)
    registry._fn_refs.insert(place, _Link(hook))
    hook.fn_ref = registry._fn_refs[place]
    _let_call(registry, place + 1, hook.wrapper)


def _settle(module: nn.Module, hook: CacheHook) -> None:
    """Move a hook to its place."""
    registry = module._diffusers_hook
    place = registry._hook_order.index(NAME)
    if place != _place(registry, hook, without=True) and _is_free(registry, place):
        _take_out(registry, place)
        _put_in(registry, hook)


def _take_out(registry: HookRegistry, place: int) -> None:
    """Unlink our hook; what others have put on top of its wrapper stays there, and calls it."""
    if _is_free(registry, place):
        _let_call(registry, place + 1, registry._fn_refs[place].wrapper.below)
    del registry.hooks[NAME], registry._hook_order[place], registry._fn_refs[place]


def _drop_forward(module: nn.Module, hook: CacheHook) -> None:
    """Delete a `forward` that is nothing but the class's, where there was none before.

    Of the class that the module had then: quantising may have given it another.
    """
    if hook.made_forward and getattr(module.__dict__.get("forward"), "__self__", None) is module:
        del module.__dict__["forward"]


def _link(module: nn.Module, hook: CacheHook) -> None:
    hook.made_forward = "forward" not in module.__dict__
    hook.made_registry = "_diffusers_hook" not in module.__dict__
    registry = HookRegistry.check_if_exists_or_initialize(module)
    if registry.get_hook(NAME) is not None:
        raise PatchError(f"cache: expected a {type(module).__name__} without a hook {NAME!r}")
    _put_in(registry, hook)
    registry.invalidate_child_registries_cache()


def _unlink(module: nn.Module, hook: CacheHook) -> None:
    registry = module.__dict__.get("_diffusers_hook")
    if registry is not None and registry.get_hook(NAME) is hook:
        _take_out(registry, registry._hook_order.index(NAME))
        _drop_forward(module, hook)
        registry.invalidate_child_registries_cache()
    if registry is not None and hook.made_registry and not registry.hooks:
        del module.__dict__["_diffusers_hook"]


class HookSlot:
    """A hook of a module, with the interface of `undo.Slot`; holds the hook's cycle weakly."""

    def __init__(self, module: nn.Module, hook: CacheHook, where: str) -> None:
        self._module, self._hook, self.where = weakref.ref(module), hook, where

    def apply(self) -> None:
        """Put the wrapper in its place."""
        _link(self._module(), self._hook)

    @property
    def lost(self) -> bool:
        """Whether somebody has set the module's own `forward` again, past the registry."""
        module = self._module()
        if module is None or hook_of(module) is not self._hook:
            return False
        registry = module._diffusers_hook
        forward = _called_by(registry, len(registry._fn_refs))
        return isinstance(forward, MethodType) and forward.__self__ is module

    @property
    def covered(self) -> bool:
        """Whether somebody has wrapped it past the registry."""
        module = self._module()
        if module is None or hook_of(module) is not self._hook or self.lost:
            return False
        registry = module._diffusers_hook
        return not _is_free(registry, registry._hook_order.index(NAME))

    def restore(self) -> None:
        """Take it out."""
        if (module := self._module()) is not None:
            _unlink(module, self._hook)
