"""forward_mode: inside it, unmodified models use operators that have forward mode.

A TorchFunctionMode looks up each torch function in INTERCEPTORS and hands the call to fewstep's
where something is being differentiated. That reaches models wherever they call attention from:
diffusers' dispatcher and its older processors, `sdpa_kernel` contexts, torch.nn.MultiheadAttention.
A call that nobody differentiates (a teacher under no_grad, say) stays torch's own.

Checkpointed blocks are run again during the backward pass, after the context and the derivative
being taken have ended. Inside the context a checkpoint remembers both (`_checkpoint.py`).
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from ..ops._autograd import is_differentiated, transform
from . import _checkpoint
from .attention import scaled_dot_product_attention, unpack


def _attention(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    tensors = [x for x in (*args[:4], *kwargs.values()) if isinstance(x, Tensor)]
    # Nested, sparse and quantised tensors are torch's business.
    if any(type(x).__name__ == "NestedTensor" or x.is_nested for x in tensors):
        return original(*args, **kwargs)
    if not is_differentiated(tensors):
        return original(*args, **kwargs)
    return scaled_dot_product_attention(*args, **kwargs)


@functools.cache
def _multi_head_attention_forward() -> Callable[..., Any]:
    """Return torch's function with fewstep's attention in it.

    It is Python that calls attention, and a mode is not active inside the function it intercepts;
    so this is the same code with two of its globals replaced.
    """
    original = F.multi_head_attention_forward
    names = {
        **original.__globals__,
        "scaled_dot_product_attention": functools.partial(
            _attention, F.scaled_dot_product_attention
        ),
        "has_torch_function": lambda args: False,
    }
    copy = types.FunctionType(
        original.__code__, names, original.__name__, original.__defaults__, original.__closure__
    )
    copy.__kwdefaults__ = original.__kwdefaults__
    return copy


def _multi_head_attention(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    del original
    return _multi_head_attention_forward()(*args, **kwargs)


def _softmax(original: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
    """p (t - sum p t). torch's rule for plain dual numbers writes over what backward needs."""
    if transform() is not None or forward_ad._current_level < 0:
        return original(x, *args, **kwargs)
    x, tangent = unpack(x)
    p = original(x, *args, **kwargs)
    if tangent is None:
        return p
    dim = kwargs.get("dim", args[0] if args else None)
    tangent = tangent.to(p.dtype)
    return forward_ad.make_dual(p, p * (tangent - (p * tangent).sum(dim, keepdim=True)))


INTERCEPTORS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head_attention,
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax), _softmax),
}
"""torch function -> handler(original, *args, **kwargs). The one place where a fused op enters.

A handler is called with the mode off. It is to return `original(*args, **kwargs)` for what it
doesn't serve; `attention.unpack` gives (primal, tangent) of a dual number at the current level.
"""


class _Mode(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        handler = INTERCEPTORS.get(func)
        if handler is None:
            return func(*args, **(kwargs or {}))
        return handler(func, *args, **(kwargs or {}))


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
    """
    if is_active():
        yield
        return
    with _checkpoint.remembered(forward_mode, is_active), _Mode():
        yield
