"""What settings of policies must be; errors name the setting, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

__all__ = ["check_choice", "check_count", "check_number", "to_numbers"]


def check_count(name: str, value: object, least: int) -> None:
    """Raise where a setting is no integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__} {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise where a setting is none of its choices; 1.0 and True are not the choice 1."""
    if isinstance(value, bool) or not any(
        isinstance(value, type(choice)) and value == choice for choice in choices
    ):
        raise ValueError(f"{name}: expected {' or '.join(map(repr, choices))}, got {value!r}")


def check_number(
    name: str,
    value: object,
    least: float = -math.inf,
    *,
    above: bool = False,
    most: float = math.inf,
) -> None:
    """Raise where a setting is no finite number of at least (or above) `least`, up to `most`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__} {value!r}")
    inside = least < value <= most or (value == least and not above)
    if not math.isfinite(value) or not inside:
        said = "" if least == -math.inf else f" {'>' if above else '>='} {least:g}"
        said += "" if most == math.inf else f" and <= {most:g}"
        raise ValueError(f"{name}: expected a finite number{said}, got {value}")


def to_numbers(
    name: str, values: object, least: float = -math.inf, *, above: bool = False
) -> tuple[float, ...]:
    """Return a setting of several numbers as floats, each as `check_number` asks."""
    entries = tuple(values) if isinstance(values, Iterable) else ()
    # Those of NumPy and torch are numbers, too; text and bools are none.
    plain = all(hasattr(x, "__float__") and not isinstance(x, bool) for x in entries)
    if not (isinstance(values, Iterable) and plain):
        raise TypeError(f"{name}: expected numbers, got {values!r}")
    for entry in entries:
        check_number(name, float(entry), least, above=above)
    return tuple(map(float, entries))
