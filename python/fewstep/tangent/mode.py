"""forward_mode: inside it, unmodified models use operators that have forward mode.

A TorchFunctionMode looks up each torch function in `interceptors.INTERCEPTORS` and hands the call
to fewstep's where something is being differentiated. That reaches models wherever they call
attention from: diffusers' dispatcher and its older processors, `sdpa_kernel` contexts,
torch.nn.MultiheadAttention. A call that nobody differentiates (a teacher under no_grad, say) stays
torch's own.

Four functions of torch are seen by no such mode. They are replaced in their modules while any
thread is inside: FlexAttention, what runs a checkpointed block again (`_checkpoint.py`), the
tangent of FSDP2's hook, and the entry of torch.inference_mode. So are the methods of diffusers that
spell out a fused op (`blocks.py`). The replacements do nothing for threads that are not inside.

torch.inference_mode drops tangents without a word. Inside forward_mode it is torch.no_grad, which
keeps them: a model whose forward is decorated with either has the derivative it should have.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from . import _checkpoint, blocks, deferred, interceptors


class _Mode(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return _intercepted(func, *args, **kwargs)
        if _checkpoint.is_watching():
            return _checkpoint.call(functools.partial(_call, func, types), *args, **kwargs)
        return _call(func, types, *args, **kwargs)


def _call(func: Any, types: Any, *args: Any, **kwargs: Any) -> Any:
    result = deferred.before(func, types, args, kwargs)
    return _intercepted(func, *args, **kwargs) if result is NotImplemented else result


def _intercepted(func: Any, *args: Any, **kwargs: Any) -> Any:
    handler = interceptors.INTERCEPTORS.get(func)
    return func(*args, **kwargs) if handler is None else handler(func, *args, **kwargs)


def is_active() -> bool:
    """Return whether the caller's thread is inside `forward_mode`."""
    return any(isinstance(mode, _Mode) for mode in _get_current_function_mode_stack())


@contextlib.contextmanager
def forward_mode() -> Iterator[None]:
    """Let models inside the context be differentiated in forward mode, unmodified.

        with fewstep.forward_mode():
            out, t_out = torch.func.jvp(model, (x, t), (v, torch.ones_like(t)))

    It may be entered inside or outside of torch.func.jvp, and more than once. It belongs to the
    thread that enters it. Outside the context nothing is changed and nothing costs anything.
    torch.inference_mode, around it or inside, has the effect of torch.no_grad.
    """
    if is_active():
        with deferred.settled():
            yield
        return
    with _replaced(), _tangents_kept(), _Mode(), deferred.settled():
        yield


@contextlib.contextmanager
def _tangents_kept() -> Iterator[None]:
    """Leave torch.inference_mode for torch.no_grad, if the caller is in it."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def _when_active(original: Callable[..., Any], handler: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        if not is_active():
            return original(*args, **kwargs)
        return handler(original, *args, **kwargs)

    return replacement


def _run_again(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return _checkpoint.generator(original, forward_mode, *args, **kwargs)


def _apply(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return _checkpoint.call(functools.partial(deferred.apply, original), *args, **kwargs)


def _enter_inference_mode(original: Callable[..., Any], context: torch.inference_mode) -> None:
    entered, context.mode = context.mode, False
    try:
        original(context)
    finally:
        context.mode = entered
    if entered:
        torch.set_grad_enabled(False)  # until the context restores what it found


def _pass_on(original: Callable[..., Any], ctx: Any, group: Any, *tangents: Any) -> Any:
    """The tangents of FSDP2's hook on the inputs of a module, which is the identity.

    Its own rule hands out its arguments; for plain dual numbers torch wants views of them.
    """
    del original, ctx, group
    return tuple(None if t is None else t.view_as(t) for t in tangents)


_FSDP = "torch.distributed.fsdp._fully_shard._fsdp_param_group"
_SEAMS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch.utils.checkpoint", "_checkpoint_without_reentrant_generator"): _run_again,
    ("torch.nn.attention.flex_attention", "flex_attention"): interceptors.flex_attention,
    ("torch.autograd.grad_mode", "inference_mode.__enter__"): _enter_inference_mode,
    (_FSDP, "RegisterPostBackwardFunction.jvp"): _pass_on,
    ("torch.autograd.forward_ad", "exit_dual_level"): deferred.settle_first,
    ("torch.nn.parallel.distributed", "DistributedDataParallel._post_forward"): (
        deferred.settle_first
    ),
    ("torch.autograd", "Function.apply"): _apply,
    **blocks.METHODS,
}
"""(module, name) -> handler(original, *args, **kwargs), if the module is imported."""

_MISSING = object()
_lock = threading.Lock()
_users = 0
_found: dict[tuple[str, str], tuple[Any, str, Any]] = {}


def _put_in() -> None:
    for (module, path), handler in _SEAMS.items():
        *parents, name = path.split(".")
        owner = functools.reduce(
            lambda x, part: getattr(x, part, None), parents, sys.modules.get(module)
        )
        original = getattr(owner, name, None)
        if (module, path) in _found or original is None:
            continue
        if (module, path) in blocks.METHODS and not blocks.is_own(original, module, path):
            continue
        _found[module, path] = owner, name, vars(owner).get(name, _MISSING)
        kind = type(inspect.getattr_static(owner, name))
        if kind in (staticmethod, classmethod):
            original = getattr(original, "__func__", original)
            setattr(owner, name, kind(_when_active(original, handler)))
        else:
            setattr(owner, name, _when_active(original, handler))


def _put_back() -> None:
    for owner, name, value in _found.values():
        if value is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, value)
    _found.clear()


@contextlib.contextmanager
def _replaced() -> Iterator[None]:
    """Put the seams in with the first thread that comes, and back after the last one."""
    global _users
    with _lock:
        _users += 1
        _put_in()
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _put_back()
