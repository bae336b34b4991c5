"""Modulated norms and gated residuals, fused although a model writes them as single operations.

    norm(y) * (1 + scale) + shift       one norm_jvp
    x + gate * y                        one modulate_jvp

In forward mode the norm, 1 + scale and gate * y are not computed at once: each is a `Deferred`,
which holds its inputs. The addition at the end finds them and runs the fused op. Nothing else can
read a Deferred:

- Whatever torch function comes next, if it is not in `FUSIONS`, all that is deferred is computed
  first. A Deferred then turns into its value: the same Python object, now an ordinary tensor.
- What an op has taken in (spent) and is still held by a variable is computed if it is used again,
  from the same inputs: one that was written to meanwhile raises. Gradients with respect to it are
  not what they look like, as the result doesn't come from it, so asking for them raises
  (`Intermediate`).
- Where tensors are handed on without a torch function, what is deferred is computed there: an
  autograd.Function, a checkpoint, DDP, the end of a dual level, the end of forward_mode
  (`mode._SEAMS`). Below torch's functions, in C++, a Deferred has no memory and raises.

Only a write that torch can't know of (through a numpy array that shares memory) between the norm
and the addition would go unnoticed.

It happens with one level of forward derivatives and nothing else around it: plain dual numbers or
one torch.func.jvp; no vmap, no tracing, not inside an autograd.Function or a backward pass.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor
from torch._C._functorch import is_dead_tensor_wrapper, maybe_current_level
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd import forward_ad

from ..ops._layout import DTYPES
from ..ops.modulate_jvp import modulate_jvp
from ..ops.norm_jvp import norm_jvp
from .levels import is_forward, unpack

_PLAIN = (Tensor, torch.nn.Parameter)
_OF_GRADIENTS = (
    Tensor.register_hook,
    Tensor.retain_grad,
    Tensor.grad_fn.__get__,  # type: ignore[attr-defined]
)


class Deferred(Tensor):
    """A tensor that isn't computed yet. It has a `node` and nothing else."""

    node: _Node

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Compute it, where no mode has done so: another thread, or after forward_mode."""
        settle_in((args, kwargs))
        return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Refuse: whoever is here has gone around torch's functions."""
        raise RuntimeError(
            f"{func}: got a result that fewstep.forward_mode has not computed yet, in a way that "
            "torch functions aren't called; use it in a torch function first, x.clone() say"
        )


class Intermediate(Tensor):
    """The value of something that a fused op has taken in, computed as it was used again."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Be a tensor in every way but one."""
        if func in _OF_GRADIENTS or (func is torch.autograd.grad and cls._is_input(args, kwargs)):
            raise RuntimeError(
                "a gradient with respect to the output of a norm, or to a gated branch, was asked "
                "for inside fewstep.forward_mode; a fused op has computed what comes after it from "
                "its inputs. Call x.clone() on it before it is used, and use the clone"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def _is_input(cls, args: tuple[Any, ...], kwargs: Any) -> bool:
        inputs = args[1] if len(args) > 1 else (kwargs or {}).get("inputs")
        return any(type(x) is cls for x in pytree.tree_leaves(inputs))


@dataclass(eq=False)
class _Node:
    """What a Deferred stands for. `inputs` are tensors, duals among them, or None."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    inputs: tuple[Tensor | None, ...]
    place: tuple[Any, ...] = field(default_factory=lambda: _place())
    spent: bool = False
    versions: tuple[int, ...] = ()
    ref: Any = None

    def compute(self) -> Tensor:
        raise NotImplementedError

    def is_fresh(self) -> bool:
        """Return whether no input was written to since."""
        return self.versions == _versions(self.inputs)

    def fits(self, v: Any) -> bool:
        """Return whether v is a plain tensor that the ops broadcast against this."""
        return (
            _is_plain(v)
            and v.dtype == self.dtype
            and v.device == self.device
            and _broadcasts(v.shape, self.shape)
        )


@dataclass(eq=False)
class _OnePlus(_Node):
    def compute(self) -> Tensor:
        return self.inputs[0] + 1  # type: ignore[operator]


@dataclass(eq=False)
class _Norm(_Node):
    """inputs: x, t_x, weight, bias, and scale once there is one."""

    kind: str = "layer"
    eps: float = 0.0

    def compute(self, shift: Tensor | None = None) -> Tensor:
        x, t_x, weight, bias, *rest = self.inputs
        scale, t_scale = unpack(rest[0]) if rest else (None, None)  # type: ignore[arg-type]
        shift, t_shift = (None, None) if shift is None else unpack(shift)
        y, t_y = norm_jvp(
            x, t_x, weight=weight, bias=bias, scale=scale, shift=shift, t_scale=t_scale,
            t_shift=t_shift, kind=self.kind, eps=self.eps,
        )  # fmt: skip
        return forward_ad.make_dual(y, t_y)


@dataclass(eq=False)
class _Product(_Node):
    """inputs: y and gate."""

    def compute(self) -> Tensor:
        y, gate = self.inputs
        return y * gate  # type: ignore[operator]

    def added_to(self, x: Tensor) -> Tensor:
        (x, t_x), (y, t_y), (gate, t_gate) = map(unpack, (x, *self.inputs))  # type: ignore
        return forward_ad.make_dual(*modulate_jvp(x, y, gate, t_x, t_y, t_gate))


class _State(threading.local):
    def __init__(self) -> None:
        self.nodes: list[_Node] = []
        self.blocked = 0
        self.again = 0


_state = _State()


def _place() -> tuple[Any, ...]:
    """Return what a value depends on beside its inputs."""
    grad = torch.is_grad_enabled()
    return threading.get_ident(), maybe_current_level(), forward_ad._current_level, grad


def _versions(tensors: tuple[Tensor | None, ...]) -> tuple[int, ...]:
    return tuple(x._version for x in tensors if x is not None)


def _is_plain(x: Any) -> bool:
    return type(x) in _PLAIN and x.device.type in ("cpu", "cuda") and not x.is_inference()


def _broadcasts(shape: torch.Size, onto: torch.Size) -> bool:
    return (
        1 <= len(shape) <= len(onto)
        and shape[-1] == onto[-1]
        and all(a in (1, b) for a, b in zip(reversed(shape), reversed(onto), strict=False))
    )


def _may_defer() -> bool:
    """Return whether there is one level of forward derivatives here and nothing unusual."""
    return (
        is_forward()
        and maybe_current_level() in (None, 1)
        and not _state.blocked
        and not torch.is_inference_mode_enabled()
        and not torch._C._len_torch_dispatch_stack()
        and (_state.again or torch._C._current_graph_task_id() == -1)
        and torch._C._get_tracing_state() is None
    )


def _defer(node: _Node) -> Tensor:
    node.versions = _versions(node.inputs)
    result = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
        Deferred, node.shape, dtype=node.dtype, device=node.device
    )
    result.node = node
    node.ref = weakref.ref(result)
    _state.nodes = [*(other for other in _state.nodes if other.ref() is not None), node]
    return result


@contextlib.contextmanager
def _there(node: _Node) -> Iterator[None]:
    """Go back to where the node was made, or raise."""
    thread, level, dual_level, grad = node.place
    with contextlib.ExitStack() as stack:
        while (here := maybe_current_level()) is not None and here > (level or 0):
            stack.enter_context(temporarily_pop_interpreter_stack())
        gone = (thread, level, dual_level) != _place()[:3] or any(
            is_dead_tensor_wrapper(x) for x in node.inputs if x is not None
        )
        if gone:
            raise RuntimeError(
                "the output of a norm, or a gated branch, was used where its derivative isn't "
                "taken any more; use it inside, x.clone() say"
            )
        if not node.is_fresh():
            raise RuntimeError(
                "the output of a norm, or a gated branch, is used after an input of it was changed "
                "in place inside fewstep.forward_mode; change a clone of the input"
            )
        stack.enter_context(torch.set_grad_enabled(grad))
        yield


@contextlib.contextmanager
def _blocked() -> Iterator[None]:
    _state.blocked += 1
    try:
        yield
    finally:
        _state.blocked -= 1


@contextlib.contextmanager
def in_forward() -> Iterator[None]:
    """Defer although this is a backward pass: a checkpoint runs its block again in one."""
    _state.again += 1
    try:
        yield
    finally:
        _state.again -= 1


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Leave nothing deferred before and after."""
    settle(spent=True)
    try:
        yield
    except BaseException:
        _state.nodes = []
        raise
    settle(spent=True)


def _settle(node: _Node) -> None:
    """Turn the Deferred of a node into its value."""
    result = node.ref()
    if result is None or type(result) is not Deferred:
        return
    with torch._C.DisableTorchFunction(), _blocked():
        with _there(node):
            value = node.compute()
        result.__class__ = Intermediate if node.spent else Tensor
        result.__dict__.clear()
        torch._C._swap_tensor_impl(result, value)


def settle(spent: bool = False) -> None:
    """Compute what this thread has deferred; what has been taken in by an op only if asked to."""
    if _state.blocked or not _state.nodes:
        return
    nodes = _state.nodes
    _state.nodes = [] if spent else [n for n in nodes if n.spent and n.ref() is not None]
    for node in nodes:
        if spent or not node.spent:
            _settle(node)


def settle_in(tree: Any) -> None:
    """Compute what this thread has deferred, and every Deferred in a structure."""
    settle()
    for x in pytree.tree_leaves(tree):
        if type(x) is Deferred:
            _settle(x.node)


def norm(
    x: Tensor, t_x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float
) -> Tensor:
    """Return the dual number of a norm, now or later."""
    node = _Norm(x.shape, x.dtype, x.device, (x, t_x, weight, bias), kind=kind, eps=eps)
    plain = all(_is_plain(v) for v in node.inputs if v is not None)
    return _defer(node) if plain and _may_defer() else node.compute()


def _node(x: Any, kind: type) -> Any:
    """Return the node of x if it is of a kind and can be taken in here."""
    if type(x) is not Deferred or not isinstance(x.node, kind):
        return None
    return x.node if x.node.place == _place() and x.node.is_fresh() else None


def _taken(*nodes: _Node) -> None:
    for node in nodes:
        node.spent = True


def _product(y: Tensor, gate: Tensor) -> _Node | None:
    """Return y * gate as a node if it may turn out to be a gated branch."""
    node = _Product(y.shape, y.dtype, y.device, (y, gate))
    worth = y.dim() > 2 and gate.numel() < y.numel() and y.dtype in DTYPES
    if not worth or y.stride(-1) != 1 or not _is_plain(y) or not node.fits(gate):
        return None
    if all(unpack(v)[1] is None for v in (y, gate)):
        return None
    return node


def _mul(func: Any, a: Any, b: Any) -> Any:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or not _may_defer():
        return NotImplemented
    for y, factor in ((a, b), (b, a)):
        base, one_plus = _node(y, _Norm), _node(factor, _OnePlus)
        if base is None or one_plus is None or len(base.inputs) > 4:
            continue
        if base.fits(one_plus.inputs[0]):
            _taken(base, one_plus)
            return _defer(
                replace(base, inputs=(*base.inputs, one_plus.inputs[0]), spent=False, ref=None)
            )
    settle_in((a, b))
    node = _product(a, b) or _product(b, a)
    return NotImplemented if node is None else _defer(node)


def _add(func: Any, a: Any, b: Any) -> Any:
    if not isinstance(a, Tensor) or not _may_defer():
        return NotImplemented
    if not isinstance(b, Tensor):
        is_one = type(b) in (int, float) and b == 1
        if not is_one or not _is_plain(a) or not a.is_floating_point() or a.dim() == 0:
            return NotImplemented
        return _defer(_OnePlus(a.shape, a.dtype, a.device, (a,)))
    for y, other in ((a, b), (b, a)):
        base = _node(y, _Norm)
        if base is not None and base.fits(other):
            _taken(base)
            with _blocked():
                return base.compute(other)
        branch = _node(y, _Product)
        if branch is not None and branch.fits(other) and other.shape == branch.shape:
            _taken(branch)
            with _blocked():
                return branch.added_to(other)
    return NotImplemented


def _view(func: Any, x: Any, *rest: Any) -> Any:
    """1 + scale, seen with more axes."""
    node = _node(x, _OnePlus)
    if node is None:
        return NotImplemented
    scale = func(node.inputs[0], *rest)
    _taken(node)
    return _defer(_OnePlus(scale.shape, scale.dtype, scale.device, (scale,)))


def _to(func: Any, x: Any, *rest: Any) -> Any:
    """A cast to the dtype that is there already is the tensor itself."""
    same = len(rest) == 1 and type(x) is Deferred and rest[0] is x.node.dtype
    return x if same else NotImplemented


FUSIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    **dict.fromkeys((Tensor.mul, torch.mul, torch.multiply, Tensor.multiply), _mul),
    **dict.fromkeys((Tensor.add, torch.add), _add),
    **dict.fromkeys((Tensor.__getitem__, Tensor.unsqueeze, torch.unsqueeze), _view),
    Tensor.to: _to,
}
"""torch function -> handler(func, *args), which returns NotImplemented for what it can't serve."""

_PURE = (Tensor.__getitem__, Tensor.unsqueeze, torch.unsqueeze, F.layer_norm, F.rms_norm)
"""What may come in between, on other tensors, as it changes nothing."""


def before(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what `func` returns if it could be deferred or fused, else NotImplemented.

    What the caller then gets on with may read all its arguments: no Deferred is among them.
    """
    handler = FUSIONS.get(func)
    if handler is not None and not kwargs:
        result = handler(func, *args)
        if result is not NotImplemented:
            return result
    if Deferred in types:
        settle_in((args, kwargs))
    elif _state.nodes and func not in _PURE:
        settle()
    return NotImplemented


def apply(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """autograd.Function.apply, which hands tensors to C++ without a torch function."""
    settle_in((args, kwargs))
    with _blocked():
        return original(*args, **kwargs)


def settle_first(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function behind which nothing may be deferred any more."""
    try:
        settle(spent=True)
        settle_in((args, kwargs))
    finally:
        result = original(*args, **kwargs)
    return result
