"""What scheduled policies have in common: what of the model is kept, and in which precision."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ._checks import check_choice
from .snapshots import FORMATS

__all__ = ["BY_MODULE", "SCOPES", "Kept"]

BY_MODULE = ("block", "module")
SCOPES = ("output", "blocks", *BY_MODULE)


@dataclass(frozen=True)
class Kept:
    """What is kept, and how.

    Args:
        scope: "output", "blocks" (their stack), "block" (each) or "module" (each attention and
            feed-forward layer).
        modules: which blocks or layers where each has its own: a regular expression that is
            searched in their paths, or names (paths or their last parts); None is all.
        snapshots: how outputs are kept: "float32", "bfloat16", "fp8", "int8" or "int4"; None as
            they were computed.
    """

    scope: str = field(default="output", kw_only=True)
    modules: str | tuple[str, ...] | None = field(default=None, kw_only=True)
    snapshots: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_choice("scope", self.scope, SCOPES)
        _check_modules(self.modules, self.scope)
        if self.snapshots is not None:
            check_choice("snapshots", self.snapshots, tuple(FORMATS))


def _check_modules(modules: object, scope: str) -> None:
    if modules is None:
        return
    if scope not in BY_MODULE:
        raise ValueError(
            f'modules: expected with scope "block" or "module" alone, got it with {scope!r}'
        )
    if isinstance(modules, str):
        try:
            re.compile(modules)
        except re.error as error:
            raise ValueError(
                f"modules: expected a regular expression, got {modules!r} ({error})"
            ) from None
    elif not (
        isinstance(modules, tuple) and modules and all(isinstance(n, str) and n for n in modules)
    ):
        raise TypeError(
            f"modules: expected a regular expression or a tuple of names, got {modules!r}"
        )
