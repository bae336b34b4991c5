"""What settings of policies must be; errors name the setting, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["check_choice", "check_count", "check_number"]


def check_count(name: str, value: object, least: int) -> None:
    """Raise where a setting is no integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__} {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise where a setting is none of its choices."""
    if value not in choices:
        raise ValueError(f"{name}: expected {' or '.join(map(repr, choices))}, got {value!r}")


def check_number(name: str, value: object, least: float, *, above: bool = False) -> None:
    """Raise where a setting is no finite number of at least (or above) `least`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__} {value!r}")
    if not math.isfinite(value) or value < least or (above and value == least):
        said = ">" if above else ">="
        raise ValueError(f"{name}: expected a finite number {said} {least:g}, got {value}")
