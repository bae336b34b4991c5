"""Registration with torch.library: schema, fake and kernel from Python, and the derivative guard.

Measured on torch 2.13: a registered op without derivative rules returns all-zero tangents under
`torch.func.jvp`, and an output without a graph in reverse mode. Both look plausible in a loss
curve. So every op gets a kernel at the Autograd key that raises when an input carries a tangent or
requires grad, and otherwise redispatches below autograd (docs/adr/0002-forward-mode.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._select import Implementation, by_name

NAMESPACE = "fewstep"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


class DerivativeError(RuntimeError):
    """An op was about to lose a derivative: it has no rule for the mode that reached it."""


def has_tangent(x: Tensor) -> bool:
    """Return whether `x` carries a forward-mode tangent at the current level."""
    return torch._VF._unpack_dual(x, level=0)[1] is not None  # type: ignore[attr-defined]


def refuse_derivatives(op: str, args: Sequence[Any]) -> None:
    """Raise DerivativeError if any tensor in `args` carries a tangent or needs a gradient."""
    for value in args:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if has_tangent(value):
            raise DerivativeError(
                f"fewstep.ops.{op} has no forward-mode rule: an input carries a tangent, which "
                "would be lost. Detach the input, or use an op that takes tangents explicitly"
            )
        if torch.is_grad_enabled() and value.requires_grad:
            raise DerivativeError(
                f"fewstep.ops.{op} has no backward: an input requires grad, and its gradient would "
                "be lost. Call it under torch.no_grad() or on detached inputs"
            )


def register(
    op: str,
    schema: str,
    implementations: Sequence[Implementation],
    fake: Callable[..., Any],
) -> Callable[..., Any]:
    """Define `fewstep::<op>` and return its overload.

    `schema` is "(Tensor x, ..., str impl) -> ..."; its last argument names the implementation,
    which the public function has selected. `fake` takes the same arguments.
    """

    def kernel(*args: Any) -> Any:
        *arguments, impl = args
        return by_name(implementations, impl).run(*arguments)

    def guard(keyset: Any, *args: Any) -> Any:
        refuse_derivatives(op, args)
        return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    _library.define(f"{op}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    overload = getattr(getattr(torch.ops, NAMESPACE), op).default
    _library.impl(op, kernel, "CompositeExplicitAutograd")
    _library.impl(op, guard, "Autograd", with_keyset=True)
    torch.library.register_fake(f"{NAMESPACE}::{op}", fake, lib=_library)
    return overload
