"""A scheme: how the weights and activations of a linear layer are stored and multiplied.

    w8a8    int8 weights, one scale per output          activations int8, one scale per row
    w4a8    4-bit weights, one scale per group          activations int8, one scale per row
    w4a16   4-bit weights, one scale per group          activations as they are; for few rows

`rank` adds a low-rank branch in the model's dtype that holds what quantising the weight would lose
of its largest directions (SVDQuant, arXiv 2411.05007). `smooth` divides the columns of the
activations by factors first, which are searched for on calibration data (`smoothing`) or come with
weights that someone else has quantised (`load_nunchaku`). As text: "w8a8", "w4a8-g64-r32",
"w4a8-g64-r32-smooth".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..ops.quantize_int4 import GROUPS

KINDS = ("w8a8", "w4a8", "w4a16")
DEFAULT_GROUP = 64


@dataclass(frozen=True)
class Scheme:
    """What `fewstep.quantize` does to a layer.

    kind    one of KINDS
    group   neighbours in a row of a 4-bit weight that share a scale: 32, 64 or 128; None for w8a8
    rank    of the low-rank branch; 0 for none
    smooth  whether the layer divides its input by smoothing factors

    Raises:
        ValueError: an unknown kind, a group that the kind does not have, or a negative rank.
    """

    kind: str
    group: int | None = None
    rank: int = 0
    smooth: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"scheme: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.kind == "w8a8":
            if self.group is not None:
                raise ValueError(f"group: expected none for w8a8, got {self.group!r}")
        elif self.group is None:
            object.__setattr__(self, "group", DEFAULT_GROUP)
        elif self.group not in GROUPS:
            raise ValueError(f"group: expected one of {GROUPS}, got {self.group!r}")
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 0:
            raise ValueError(f"rank: expected an integer of at least 0, got {self.rank!r}")

    @classmethod
    def parse(cls, text: str | Scheme, **given: Any) -> Scheme:
        """Return the scheme that a text names; `given` are group and rank, None where not given.

        Raises:
            TypeError: no text.
            ValueError: no scheme, or an option that the text has already.
        """
        if isinstance(text, Scheme):
            found = {"kind": text.kind, "group": text.group, "rank": text.rank or None}
            smooth = text.smooth
        elif isinstance(text, str):
            match = re.fullmatch(r"([a-z0-9]+?)(?:-g(\d+))?(?:-r(\d+))?(-smooth)?", text)
            if match is None:
                raise ValueError(f"scheme: expected one of {', '.join(KINDS)}, got {text!r}")
            kind, group, rank, suffix = match.groups()
            smooth = suffix is not None
            found = {"kind": kind, "group": group and int(group), "rank": rank and int(rank)}
        else:
            raise TypeError(f"scheme: expected a text, got {type(text).__name__} {text!r}")
        for name, value in given.items():
            if value is None:
                continue
            if found[name] not in (None, value):
                raise ValueError(f"{name}: expected {found[name]} as in {str(text)!r}, got {value}")
            found[name] = value
        return cls(found["kind"], found["group"], found["rank"] or 0, smooth)

    def __str__(self) -> str:
        group = "" if self.group is None else f"-g{self.group}"
        rank = f"-r{self.rank}" if self.rank else ""
        return f"{self.kind}{group}{rank}" + "-smooth" * self.smooth
