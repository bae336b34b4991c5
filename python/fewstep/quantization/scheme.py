"""A scheme: how the weights and activations of a linear layer are stored and multiplied.

    w8a8    int8 weights, one scale per output          activations int8, one scale per row
    fp8     e4m3 weights, one scale per output          activations e4m3, one scale per row
    w4a8    4-bit weights, one scale per group          activations int8, one scale per row
    w4a16   4-bit weights, one scale per group          activations as they are; for few rows

`rank` adds a low-rank branch in the model's dtype that holds what quantising the weight would lose
of its largest directions (SVDQuant, arXiv 2411.05007). `smooth` divides the columns of the
activations by factors first, which are searched for on calibration data (`smoothing`) or come with
weights that someone else has quantised (`load_nunchaku`). `rotate` multiplies every so many
neighbours of the activations by a Hadamard matrix, and the weight likewise before it is quantised:
an outlier's size is shared by its block, without any data (QuaRot, arXiv 2404.00456). As text:
"w8a8", "w8a8-h128", "w4a8-g64-r32", "w4a8-g64-r32-h64-smooth"; "w8a8-h" is with the largest block
that divides a layer's inputs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from ..ops._prologue import ROTATIONS
from ..ops.quantize_int4 import GROUPS

KINDS = ("w8a8", "fp8", "w4a8", "w4a16")
BYTES = ("w8a8", "fp8")  # kinds with a byte a weight and no groups
DEFAULT_GROUP = 64


@dataclass(frozen=True)
class Scheme:
    """What `fewstep.quantize` does to a layer.

    kind    one of KINDS
    group   neighbours in a row of a 4-bit weight that share a scale: 32, 64 or 128; None for w8a8
            and fp8
    rank    of the low-rank branch; 0 for none
    smooth  whether the layer divides its input by smoothing factors
    rotate  block of neighbours that are rotated, 16, 32, 64, 128 or 256, or 0 for none; True for
            the largest that divides a layer's inputs. Not for w4a16, whose activations stay

    Raises:
        ValueError: an unknown kind, a group or a block that the kind does not have, or a negative
            rank.
    """

    kind: str
    group: int | None = None
    rank: int = 0
    smooth: bool = False
    rotate: int | bool = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"scheme: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.kind in BYTES:
            if self.group is not None:
                raise ValueError(f"group: expected none for {self.kind}, got {self.group!r}")
        elif self.group is None:
            object.__setattr__(self, "group", DEFAULT_GROUP)
        elif self.group not in GROUPS:
            raise ValueError(f"group: expected one of {GROUPS}, got {self.group!r}")
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 0:
            raise ValueError(f"rank: expected an integer of at least 0, got {self.rank!r}")
        if self.rotate is False:
            object.__setattr__(self, "rotate", 0)
        if self.rotate is not True and self.rotate not in (0, *ROTATIONS):
            raise ValueError(f"rotate: expected True, 0 or one of {ROTATIONS}, got {self.rotate!r}")
        if self.rotate and self.kind == "w4a16":
            raise ValueError(
                "rotate: expected none for w4a16, which does not quantise activations, got "
                f"{self.rotate}"
            )

    def of(self, inputs: int) -> Scheme:
        """Return this scheme for a layer of so many inputs: with a block, or none, for True."""
        if self.rotate is not True:
            return self
        fitting = [block for block in ROTATIONS if inputs % block == 0]
        return replace(self, rotate=max(fitting, default=0))

    @classmethod
    def parse(cls, text: str | Scheme, **given: Any) -> Scheme:
        """Return the scheme that a text names; `given` are group, rank and rotate, None if not.

        Raises:
            TypeError: no text.
            ValueError: no scheme, or an option that the text has already.
        """
        if isinstance(text, Scheme):
            found = {"kind": text.kind, "group": text.group, "rank": text.rank or None}
            found["rotate"] = text.rotate or None
            smooth = text.smooth
        elif isinstance(text, str):
            match = re.fullmatch(
                r"([a-z0-9]+?)(?:-g(\d+))?(?:-r(\d+))?(?:-h(\d*))?(-smooth)?", text
            )
            if match is None:
                raise ValueError(
                    f"scheme: expected one of {', '.join(KINDS)}, with options in the order of "
                    f"'w4a8-g64-r32-h64-smooth', got {text!r}"
                )
            kind, group, rank, block, suffix = match.groups()
            smooth = suffix is not None
            found = {"kind": kind, "group": group and int(group), "rank": rank and int(rank)}
            found["rotate"] = True if block == "" else block and int(block)
        else:
            raise TypeError(f"scheme: expected a text, got {type(text).__name__} {text!r}")
        for name, value in given.items():
            if value is None:
                continue
            if found[name] is not None and str(found[name]) != str(value):  # 1 is not True here
                raise ValueError(f"{name}: expected {found[name]} as in {str(text)!r}, got {value}")
            found[name] = value
        return cls(found["kind"], found["group"], found["rank"] or 0, smooth, found["rotate"] or 0)

    def __str__(self) -> str:
        group = "" if self.group is None else f"-g{self.group}"
        rank = f"-r{self.rank}" if self.rank else ""
        block = "" if self.rotate is True else self.rotate
        rotate = f"-h{block}" if self.rotate else ""
        return f"{self.kind}{group}{rank}{rotate}" + "-smooth" * self.smooth
