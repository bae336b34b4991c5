"""Nunchaku's packed 4-bit layers and ours: permutations of bytes and of 16-bit values, both ways.

An SVDQuant layer (arXiv 2411.05007), with 16-bit factors and G = 64,

    y = ((x / smooth) @ (q s).T) + bias + (x @ down.T) @ up.T             s one for G inputs

down takes x as it is: the kernel projects before it smooths (EpilogueLoraDown and then
EpilogueQuantize in src/kernels/zgemm/gemm_w4a4.cuh, nunchaku 3a3cc3d), and the converter divides
down by smooth for that reason (deepcompressor, backend/nunchaku/convert.py).

Packed, a value lies where the lane of an mma that needs it reads it. Indices of the output n, the
input k and the rank r, split from the outermost to the innermost, and in the order of memory:

    qweight    n = (t:N/128 p:8 i:2 l:8)      k = (u:K/64 j:2 m:4 b:8)     t u p l m i j b
    wscales    n = (t:N/128 a:8 b:2 c:4 d:2)  g = k // 64                  t g a c b d
    bias       as wscales with one g; smooth so with k for n
    proj_down  r = (t:R/16 i:2 l:8)           k = (u:K/16 j:2 m:4 e:2)     u t l m i j e
    proj_up    n = (t:N/16 i:2 l:8)           r = (u:R/16 j:2 m:4 e:2)     t u l m i j e

(l, m) is the lane 4 l + m, (i, j) one of its four registers: of n8 tile i and k half j, as in the B
fragment of m16n8k64, and of m16n8k16 for the factors. Its eight nibbles b are neighbours in k, the
even one low, as in `ops/quantize_int4.py`, so bytes move whole. N and K are padded to multiples of
128, R to 16.

An AWQ layer (adaLN modulation), w = q s + z with q of 0 to 15:

    qweight    n = (t:N/4 r:4)                k = (u:K/64 h:2 e:4 j:8)     t u r h j e
    wscales, wzeros   [K / 64 or more, N] as they are: transposed, rows beyond K / 64 unused

Both directions keep every bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.quantize_int4 import SCALES, pack_nibbles, unpack_nibbles

GROUP = 64
TILE, RANK_TILE = 128, 16

# The natural name of each of a file's fields; the second of two is of diffusers' nunchaku_lite.
SVDQ_FIELDS = {
    "weight_int4": ("qweight", "qweight"),
    "weight_scale": ("wscales", "wscales"),
    "bias": ("bias", "bias"),
    "smooth": ("smooth", "smooth_factor"),
    "smooth_orig": ("smooth_orig", "smooth_factor_orig"),
    "down": ("lora_down", "proj_down"),
    "up": ("lora_up", "proj_up"),
}
AWQ_FIELDS = {
    "weight_uint4": ("qweight",),
    "weight_scale": ("wscales",),
    "weight_zero": ("wzeros",),
    "bias": ("bias",),
}


class _Layout(NamedTuple):
    """Sizes that rows and columns of a matrix split into, and the order of the axes in memory."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    order: tuple[int, ...]

    def _sizes(self, rows: int, columns: int) -> list[int]:
        outer = rows // math.prod(self.rows), columns // math.prod(self.columns)
        return [outer[0], *self.rows, outer[1], *self.columns]

    def pack(self, natural: Tensor) -> Tensor:
        """Return the values of a matrix as they lie in memory."""
        return natural.reshape(self._sizes(*natural.shape)).permute(self.order).flatten()

    def unpack(self, packed: Tensor, rows: int, columns: int) -> Tensor:
        """Return the matrix [rows, columns] of values in memory."""
        sizes = self._sizes(rows, columns)
        axes = packed.reshape([sizes[axis] for axis in self.order])
        back = sorted(range(len(sizes)), key=self.order.__getitem__)
        return axes.permute(back).reshape(rows, columns)


_WEIGHT = _Layout((8, 2, 8), (2, 4, 4), (0, 4, 1, 3, 6, 2, 5, 7))  # of bytes: two nibbles each
_SCALE = _Layout((8, 2, 4, 2), (), (0, 5, 1, 3, 2, 4))
_DOWN = _Layout((2, 8), (2, 4, 2), (3, 0, 2, 5, 1, 4, 6))
_UP = _Layout((2, 8), (2, 4, 2), (0, 3, 2, 5, 1, 4, 6))
_AWQ = _Layout((4,), (2, 4, 8), (0, 2, 1, 3, 5, 4))  # of nibbles


def expect(
    key: str, x: Tensor | None, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...]
) -> Tensor:
    """Return x if it has one of the dtypes and the shape (None: any size); name the key if not."""
    wanted = f"{' or '.join(str(d).removeprefix('torch.') for d in dtypes)} " + str(
        ["any" if size is None else size for size in shape]
    ).replace("'", "")
    if x is None:
        raise ValueError(f"{key}: expected {wanted}, got none")
    fits = len(x.shape) == len(shape) and all(
        size in (None, found) for size, found in zip(shape, x.shape, strict=True)
    )
    if x.dtype not in dtypes or not fits:
        got = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
        raise ValueError(f"{key}: expected {wanted}, got {got}")
    return x


def _fields(
    state: Mapping[str, Tensor], fields: Mapping[str, tuple[str, ...]], name: str
) -> dict[str, tuple[str, Tensor]]:
    """Return natural name -> (key, tensor); every key of the state must be a field, once."""
    known = {alias: field for field, aliases in fields.items() for alias in aliases}
    found: dict[str, tuple[str, Tensor]] = {}
    for alias, value in state.items():
        key = f"{name}.{alias}" if name else alias
        field = known.get(alias)
        if field is None:
            raise ValueError(f"{key}: expected one of {', '.join(sorted(known))}, got {alias}")
        if field in found:
            raise ValueError(f"{key}: expected one tensor for {field}, got {found[field][0]} too")
        found[field] = key, value
    return found


def _multiple(key: str, what: str, size: int, of: int) -> int:
    if size % of:
        raise ValueError(f"{key}: expected {what} that are a multiple of {of}, got {size}")
    return size


def unpack_svdq(state: Mapping[str, Tensor], name: str = "") -> dict[str, Tensor]:
    """Return the tensors of an SVDQuant layer in natural order.

    Args:
        state: qweight int8 [N, K / 2], wscales [K / 64, N], and, where there are, bias [N], smooth
            and smooth_orig [K], lora_down [K, R], lora_up [N, R]; or by nunchaku_lite's names.
        name: of the layer, for messages.

    Returns:
        weight_int4 uint8 [N, K / 2] as of `quantize_int4`, weight_scale [N, K / 64], and, where
        given, bias [N], smooth [K], smooth_orig [K], down [R, K], up [N, R].

    Raises:
        ValueError: a field is unknown or missing, or its dtype or shape does not fit.
    """
    fields = _fields(state, SVDQ_FIELDS, name)

    def take(field: str, dtypes: tuple[torch.dtype, ...], *shape: int | None) -> Tensor:
        prefix = f"{name}." if name else ""
        key, value = fields.get(field, (prefix + SVDQ_FIELDS[field][0], None))
        return expect(key, value, dtypes, shape)

    weight = take("weight_int4", (torch.int8,), None, None)
    key = fields["weight_int4"][0]
    N = _multiple(key, "padded outputs", weight.shape[0], TILE)
    K = _multiple(key, "padded inputs", 2 * weight.shape[1], TILE)
    natural = {"weight_int4": _WEIGHT.unpack(weight.contiguous().view(torch.uint8), N, K // 2)}
    scale = take("weight_scale", SCALES, K // GROUP, N)
    natural["weight_scale"] = _SCALE.unpack(scale, N, K // GROUP)
    for field, size in (("bias", N), ("smooth", K), ("smooth_orig", K)):
        if field in fields:
            natural[field] = _SCALE.unpack(take(field, SCALES, size), size, 1)[:, 0]
    if "down" in fields or "up" in fields:
        down = take("down", SCALES, K, None)
        R = _multiple(fields["down"][0], "ranks", down.shape[1], RANK_TILE)
        natural["down"] = _DOWN.unpack(down, R, K)
        natural["up"] = _UP.unpack(take("up", SCALES, N, R), N, R)
    return natural


def _padded(x: Tensor, rows: int, columns: int, value: float = 0) -> Tensor:
    """Return a matrix with sizes rounded up to multiples."""
    right, below = -x.shape[1] % columns, -x.shape[0] % rows
    return F.pad(x, (0, right, 0, below), value=value)


def pack_svdq(natural: Mapping[str, Tensor], *, lite: bool = False) -> dict[str, Tensor]:
    """Return the state of which `unpack_svdq` makes these tensors, to the last bit.

    Args:
        natural: what `unpack_svdq` returns. Sizes that are no multiples of the tiles are padded:
            q 0, scales and smooth 1, the rest 0.
        lite: by nunchaku_lite's names instead of Nunchaku's own.

    Raises:
        ValueError: a field is unknown or missing, or its dtype or shape does not fit.
    """
    fields = _fields(natural, {field: (field,) for field in SVDQ_FIELDS}, "")
    weight = expect("weight_int4", natural.get("weight_int4"), (torch.uint8,), (None, None))
    N, K = weight.shape[0], _multiple("weight_int4", "inputs", 2 * weight.shape[1], GROUP)
    scale = expect("weight_scale", natural.get("weight_scale"), SCALES, (N, K // GROUP))
    weight = _padded(weight, TILE, TILE // 2)
    scale = _padded(scale, TILE, TILE // GROUP, 1)
    packed = {
        "weight_int4": _WEIGHT.pack(weight).view(torch.int8).view(weight.shape),
        "weight_scale": _SCALE.pack(scale).view(scale.shape[::-1]),
    }
    for field, size, fill in (("bias", N, 0), ("smooth", K, 1), ("smooth_orig", K, 1)):
        if field in fields:
            column = expect(field, natural[field], SCALES, (size,))[:, None]
            packed[field] = _SCALE.pack(_padded(column, TILE, 1, fill))
    if "down" in fields or "up" in fields:
        down = expect("down", natural.get("down"), SCALES, (None, K))
        up = expect("up", natural.get("up"), SCALES, (N, down.shape[0]))
        down, up = _padded(down, RANK_TILE, TILE), _padded(up, TILE, RANK_TILE)
        packed["down"] = _DOWN.pack(down).view(down.shape[::-1])
        packed["up"] = _UP.pack(up).view(up.shape)
    return {SVDQ_FIELDS[field][int(lite)]: value for field, value in packed.items()}


def unpack_awq(state: Mapping[str, Tensor], name: str = "") -> dict[str, Tensor]:
    """Return the tensors of an AWQ layer in natural order.

    Args:
        state: qweight int32 [N / 4, K / 2], wscales and wzeros [K / 64 or more, N], and bias [N]
            where there is one.
        name: of the layer, for messages.

    Returns:
        weight_uint4 uint8 [N, K / 2] with values of 0 to 15, the even column in the low half;
        weight_scale and weight_zero [N, K / 64 or more], bias [N]: w = q scale + zero.

    Raises:
        ValueError: a field is unknown or missing, or its dtype or shape does not fit.
    """
    fields = _fields(state, AWQ_FIELDS, name)
    prefix = f"{name}." if name else ""
    weight = expect(f"{prefix}qweight", state.get("qweight"), (torch.int32,), (None, None))
    N, K = 4 * weight.shape[0], _multiple(f"{prefix}qweight", "inputs", 2 * weight.shape[1], GROUP)
    nibbles = unpack_nibbles(weight.contiguous().view(torch.uint8))
    natural = {"weight_uint4": pack_nibbles(_AWQ.unpack(nibbles, N, K))}
    scale = expect(f"{prefix}wscales", state.get("wscales"), SCALES, (None, N))
    if scale.shape[0] < K // GROUP:
        raise ValueError(
            f"{prefix}wscales: expected at least {K // GROUP} rows, got {scale.shape[0]}"
        )
    zero = expect(f"{prefix}wzeros", state.get("wzeros"), (scale.dtype,), tuple(scale.shape))
    natural |= {"weight_scale": scale.T.contiguous(), "weight_zero": zero.T.contiguous()}
    if "bias" in fields:
        natural["bias"] = expect(*fields["bias"], SCALES, (N,))
    return natural


def pack_awq(natural: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of which `unpack_awq` makes these tensors, to the last bit.

    Raises:
        ValueError: a field is unknown or missing, or its dtype or shape does not fit.
    """
    fields = _fields(natural, {field: (field,) for field in AWQ_FIELDS}, "")
    weight = expect("weight_uint4", natural.get("weight_uint4"), (torch.uint8,), (None, None))
    N = _multiple("weight_uint4", "outputs", weight.shape[0], 4)
    K = _multiple("weight_uint4", "inputs", 2 * weight.shape[1], GROUP)
    scale = expect("weight_scale", natural.get("weight_scale"), SCALES, (N, None))
    zero = expect("weight_zero", natural.get("weight_zero"), (scale.dtype,), tuple(scale.shape))
    packed = pack_nibbles(_AWQ.pack(unpack_nibbles(weight)))
    state = {
        "qweight": packed.view(torch.int32).view(N // 4, K // 2),
        "wscales": scale.T.contiguous(),
        "wzeros": zero.T.contiguous(),
    }
    if "bias" in fields:
        state["bias"] = expect("bias", natural["bias"], SCALES, (N,))
    return state
