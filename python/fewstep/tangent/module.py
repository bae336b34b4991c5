"""jvp: a module's output and its derivative along tangents of its inputs, in one call.

    out, t_out = fewstep.jvp(model, (x, t), (v, torch.ones_like(t)), encoder_hidden_states=text)

Dual numbers rather than torch.func.jvp where it can be: tensors then stay what they are, so that
hooks, DDP's reducer, parametrisations and kernels that read pointers see ordinary tensors.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.autograd import forward_ad

from ..ops._autograd import transform
from .levels import unpack
from .mode import forward_mode


def jvp(
    function: Callable[..., Any],
    args: Tensor | Sequence[Any],
    tangents: Tensor | Sequence[Any],
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Return (out, t_out): `function(*args, **kwargs)` and its derivative along `tangents`.

    Args:
        function: a module or function. Its parameters are constant for the derivative; gradients
            flow to them through out and through t_out.
        args: its positional arguments, a tensor or a sequence. One may be a structure of tensors.
        tangents: the tangent of each argument: its shape, dtype and device, or None for a constant.
        kwargs: keyword arguments, all constant.

    Returns:
        out, and t_out in the structure of out (a tensor, tuple, dict, dataclass or one of
        diffusers' output classes); zeros where out doesn't depend on the arguments, None beside
        what is no tensor.

    Raises:
        ValueError: a tangent doesn't fit its argument; the message names it.
        TypeError: out holds a tensor with a tangent in an object that can't be taken apart.
        RuntimeError: called inside a level of dual numbers that is not its own, as torch can't nest
            them; or something inside `function` has no forward mode.
    """
    args, tangents = _as_tuple(args), _as_tuple(tangents)
    pairs, spec = _pair(args, tangents)

    def run(values: Sequence[Any]) -> Any:
        return function(*pytree.tree_unflatten(list(values), spec), **kwargs)

    with forward_mode():
        if transform() is not None:
            return _by_transform(run, pairs)
        if forward_ad._current_level >= 0:
            raise _NestedError(
                "fewstep.jvp can't be called inside a level of dual numbers: torch doesn't nest "
                "them. Use torch.func.jvp for the outer derivative"
            )
        try:
            return _by_duals(run, pairs)
        except _NestedError:
            # `function` calls fewstep.jvp itself: torch.func.jvp nests.
            return _by_transform(run, pairs)


class _NestedError(RuntimeError):
    """A level of dual numbers was about to be entered inside another."""


def _by_duals(
    run: Callable[[Sequence[Any]], Any], pairs: Sequence[tuple[Any, Tensor | None]]
) -> tuple[Any, Any]:
    with forward_ad.dual_level():
        out = run([x if t is None else forward_ad.make_dual(x, t) for x, t in pairs])
        leaves, rebuild = _take_apart(out)
        split = [forward_ad.unpack_dual(x) if _is_real(x) else (x, None) for x in leaves]
        t_leaves = [_tangent_of(primal, tangent) for primal, tangent in split]
        return rebuild([primal for primal, _ in split]), rebuild(t_leaves)


def _by_transform(
    run: Callable[[Sequence[Any]], Any], pairs: Sequence[tuple[Any, Tensor | None]]
) -> tuple[Any, Any]:
    """Inside other transforms, and inside itself: by torch.func.jvp, which nests."""
    where = [i for i, (_, t) in enumerate(pairs) if t is not None]
    found: dict[str, Any] = {}

    def outputs(*values: Tensor) -> tuple[Tensor, ...]:
        given = [x for x, _ in pairs]
        for i, value in zip(where, values, strict=True):
            given[i] = value
        found["leaves"], found["rebuild"] = _take_apart(run(given))
        return tuple(x for x in found["leaves"] if isinstance(x, Tensor))

    primals, tangents = (tuple(pairs[i][j] for i in where) for j in (0, 1))
    values, t_values = map(iter, torch.func.jvp(outputs, primals, tangents))
    tensors = [isinstance(x, Tensor) for x in found["leaves"]]
    out = [next(values) if yes else x for x, yes in zip(found["leaves"], tensors, strict=True)]
    t_out = [next(t_values) if yes else None for yes in tensors]
    return found["rebuild"](out), found["rebuild"](t_out)


def _take_apart(out: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Return the leaves of a structure and what makes one like it of others.

    Dataclasses are taken apart too, which are leaves to torch.

    Raises:
        TypeError: a leaf is an object that holds a tensor with a tangent.
    """
    leaves, spec = pytree.tree_flatten(out)
    parts = [_fields(x) for x in leaves]

    def rebuild(values: list[Any]) -> Any:
        rest, found = iter(values), []
        for inner, build in parts:
            found.append(build([next(rest) for _ in inner]))
        return pytree.tree_unflatten(found, spec)

    return [x for inner, _ in parts for x in inner], rebuild


def _fields(leaf: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type):
        _expect_no_tangent_inside(leaf)
        return [leaf], lambda values: values[0]
    names = [field.name for field in dataclasses.fields(leaf) if hasattr(leaf, field.name)]
    leaves, rebuild = _take_apart([getattr(leaf, name) for name in names])

    def build(values: list[Any]) -> Any:
        other = copy.copy(leaf)
        for name, value in zip(names, rebuild(values), strict=True):
            object.__setattr__(other, name, value)  # it may be frozen
        return other

    return leaves, build


def _expect_no_tangent_inside(leaf: Any) -> None:
    if isinstance(leaf, Tensor):
        return
    inside = pytree.tree_leaves(getattr(leaf, "__dict__", None))
    if any(isinstance(x, Tensor) and unpack(x)[1] is not None for x in inside):
        kind = type(leaf)
        raise TypeError(
            "function: expected it to return tensors, alone or in tuples, dicts, dataclasses or "
            f"classes registered with torch.utils._pytree, got {kind.__module__}."
            f"{kind.__qualname__}, which holds a tensor whose tangent would be lost"
        )


def _as_tuple(x: Any) -> tuple[Any, ...]:
    return tuple(x) if isinstance(x, (tuple, list)) else (x,)


def _is_real(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def _tangent_of(primal: Any, tangent: Tensor | None) -> Any:
    if not isinstance(primal, Tensor):
        return None
    # A zero that torch never stored can't leave its level by itself.
    return torch.zeros_like(primal) if tangent is None or tangent._is_zerotensor() else tangent


def _pair(
    args: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[list[tuple[Any, Tensor | None]], Any]:
    """Return the leaves of args with their tangents, and the structure of args."""
    if len(tangents) != len(args):
        raise ValueError(
            f"tangents: expected one for each of the {len(args)} arguments, None for a constant, "
            f"got {len(tangents)}"
        )
    pairs: list[tuple[Any, Tensor | None]] = []
    for i, (arg, tangent) in enumerate(zip(args, tangents, strict=True)):
        leaves, spec = pytree.tree_flatten(arg)
        if tangent is None:
            pairs += [(x, None) for x in leaves]
            continue
        t_leaves, t_spec = pytree.tree_flatten(tangent)
        if t_spec != spec:
            raise ValueError(
                f"tangents[{i}]: expected the structure of args[{i}], {type(arg).__name__}, got "
                f"{type(tangent).__name__}"
            )
        for x, t in zip(leaves, t_leaves, strict=True):
            _expect_fit(i, x, t)
            pairs.append((x if t is None else _in_own_memory(x), t))
    if all(t is None for _, t in pairs):
        raise ValueError("tangents: expected at least one tensor, got None for every argument")
    return pairs, pytree.tree_flatten(args)[1]


def _in_own_memory(x: Tensor) -> Tensor:
    """Return x, or a copy if elements share memory: a dual number then has nowhere to be."""
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= reach:
            return x.clone(memory_format=torch.contiguous_format)
        reach += (size - 1) * stride
    return x


def _expect_fit(i: int, x: Any, t: Any) -> None:
    if t is None:
        return
    if not _is_real(x):
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"tangents[{i}]: expected None, as args[{i}] is not floating ({kind})")
    if not isinstance(t, Tensor):
        raise ValueError(f"tangents[{i}]: expected a tensor or None, got {type(t).__name__}")
    if (t.shape, t.dtype, t.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"tangents[{i}]: expected {x.dtype} {list(x.shape)} on {x.device} as args[{i}] is, got "
            f"{t.dtype} {list(t.shape)} on {t.device}"
        )
