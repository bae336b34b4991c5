"""One tensor's snapshots, as computed or in a lower precision.

    snapshots    a value of K slots                          error of a value v in a group
    None         as computed                                 0
    "float32"    4 bytes                                     rounding to it
    "bfloat16"   2 bytes                                     2^-8 |v|
    "fp8"        1 byte (e4m3), + 4 a group                  2^-4 |v| + 2^-10 s,  s = max |v| / 448
    "int8"       1 byte, + 4 a group                         s / 2,  s = max |v| / 127
    "int4"       1/2 byte, + 4 a group                       s / 2,  s = max |v| / 7

A group is 256 neighbours along the last axis of tokens [B, N, C], and of anything else along a
sample as it lies in memory: rows of images are too short to share a factor each. No group holds
values of two samples. `snapshot_store` writes, with the subtraction of a residual in the same pass,
and `forecast_apply` reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..ops import forecast_apply, snapshot_store

__all__ = ["FORMATS", "GROUP", "Slots"]

GROUP = 256
SLICE = 1 << 22  # values of a sum that are held at a time where sums themselves are not wanted
# The dtype that is kept.
FORMATS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
    "int4": torch.uint8,
}
_CODED = ("fp8", "int8", "int4")


class Slots:
    """K slots for tensors of one form.

    Args:
        like: such a tensor [B, ...].
        order: K.
        snapshots: a name of `FORMATS`, or None.

    Raises:
        ValueError: "int4" and an odd number of values in a row that can't be split in pairs.
    """

    def __init__(self, like: Tensor, order: int, snapshots: str | None = None) -> None:
        self.dtype, self.shape = like.dtype, like.shape
        self.scale: Tensor | None = None
        self._held = like.shape
        kept = FORMATS.get(snapshots, like.dtype)
        if snapshots not in _CODED:
            self.ring = like.new_empty((order, *like.shape), dtype=kept)
            return
        halves = 2 if snapshots == "int4" else 1
        batch, columns = like.shape[0], like.shape[-1]
        if like.dim() != 3 or columns < GROUP or columns % halves:
            columns = math.prod(like.shape[1:])
            self._held = torch.Size((batch, columns))
        if columns % halves:
            raise ValueError(
                'snapshots: expected an even number of values per sample for "int4", got '
                f"{columns} in a tensor of {list(like.shape)}"
            )
        rows = (order, *self._held[:-1])
        self.ring = like.new_empty((*rows, columns // halves), dtype=kept)
        self.scale = like.new_empty((*rows, -(-columns // GROUP)), dtype=torch.float32)

    @property
    def bytes(self) -> int:
        """What the slots take, factors of groups included."""
        return self.ring.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def put(self, x: Tensor, slot: int, base: Tensor | None = None) -> None:
        """Keep x, or x - base, in a slot."""
        x, base = x.detach(), base if base is None else base.detach()
        if self.scale is None and base is None:
            self.ring[slot].copy_(x)
        elif self.ring.dtype == x.dtype:
            torch.sub(x, base, out=self.ring[slot])
        else:
            options = {"slot": slot, "scale": self.scale, "group": GROUP}
            snapshot_store(self._flat(x), self.ring, base=self._flat(base), **options)

    def sum(self, weights: Tensor, base: Tensor | None = None) -> Tensor:
        """Return the weighted sum of the slots, plus base; weights [K] or [B, K]."""
        weights = weights.to(torch.float64 if self.ring.dtype == torch.float64 else torch.float32)
        if self.scale is None and self.ring.dtype == self.dtype:
            # In the dtype of what was computed, which under autocast is not that of the base.
            return forecast_apply(self.ring, weights, base=base, out_dtype=self.dtype)
        out = forecast_apply(
            self.ring,
            weights,
            base=self._flat(base),
            scale=self.scale,
            group=GROUP,
            out_dtype=torch.float32 if self.dtype == torch.float64 else self.dtype,
        )
        return out.view(self.shape).to(self.dtype)

    def products(self, weights: Tensor) -> Tensor:
        """Return the inner products [B, M, M] of M weighted sums of the slots, in float64.

        Of the sums no more than `SLICE` values each are held at a time.

        Args:
            weights: [M, K], on the device.
        """
        double = self.ring.dtype == torch.float64
        wide = torch.float64 if double else torch.float32
        count = len(weights)
        found = weights.new_zeros((self.shape[0], count, count), dtype=torch.float64)
        for ring, scale in self._slices():
            sums = [
                forecast_apply(ring, own.to(wide), scale=scale, group=GROUP, out_dtype=wide)
                for own in weights
            ]
            rows = [part.flatten(1) for part in sums]
            for i, one in enumerate(rows):
                for j, other in enumerate(rows[: i + 1]):
                    found[:, i, j] += (one * other).sum(1, dtype=torch.float64)
        return found + found.tril(-1).mT

    def _slices(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Cut the slots, and the factors of their groups, along the samples."""
        ring, step, values = self.ring, 1, 1  # entries of the ring and values, of a unit
        if self.scale is None:
            ring = ring.reshape(*ring.shape[:2], math.prod(ring.shape[2:]))
        elif len(self._held) == 3:
            values = self._held[-1]
        else:
            step, values = GROUP // (2 if ring.dtype == torch.uint8 else 1), GROUP
        units = max(1, SLICE // max(1, ring.shape[1] * values))
        for start in range(0, -(-ring.shape[2] // step), units):
            end = start + units
            scale = None if self.scale is None else self.scale[:, :, start:end].contiguous()
            yield ring[:, :, start * step : end * step].contiguous(), scale

    def _flat(self, x: Tensor | None) -> Tensor | None:
        """Return x as the slots hold it: float64, which codes are not made of, in float32."""
        if x is None:
            return None
        return (x.float() if x.dtype == torch.float64 else x).reshape(self._held)
