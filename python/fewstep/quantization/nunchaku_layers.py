"""Quantised layers of ours from packed layers of Nunchaku's in natural order (`nunchaku.py`).

mlp_fc2 of Nunchaku's FLUX multiplies gelu(x) + 0.171875, which is not negative, by the 4-bit
weight, and its bias takes that back (SHIFT_GELU in src/kernels/zgemm/gemm_w4a4_launch_impl.cuh; the
low-rank branch sees gelu(x) itself). diffusers' layer gets gelu(x), so

    bias = bias_file + (q s) @ (0.171875 / smooth)

An AWQ layer becomes W4A16: w = q s + z = (q - 8) s + (8 s + z), and the remainder, one value for
each output and group, is a low-rank branch over the sums of groups:

    down[g, k] = 1 where k is in group g, else 0        up = 8 s + z

up is rounded to the model's dtype, to no effect where z is between -16 s and -4 s (Sterbenz): the
converter writes -7 s. It takes a quarter of a bit a weight; dequantised to 16 bits instead, a layer
whose work is to read its weight would read four times as much.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.quantize_int4 import unpack_nibbles
from .layers import W4A8Linear, W4A16Linear
from .linear import QuantLinear
from .nunchaku import GROUP, TILE

SHIFT_GELU = 0.171875

Natural = dict[str, Tensor]


def cut(name: str, natural: Natural, rows: int, columns: int) -> Natural:
    """Return a layer without padding; refuse one of another size."""
    found = natural["weight_int4"].shape[0], 2 * natural["weight_int4"].shape[1]
    if columns % GROUP or found != tuple(-(-size // TILE) * TILE for size in (rows, columns)):
        raise ValueError(
            f"{name}.qweight: expected {rows} outputs and {columns} inputs (a multiple of {GROUP}) "
            f"padded to multiples of {TILE}, got {found[0]} and {found[1]}"
        )
    sizes = {
        "weight_int4": (rows, columns // 2),
        "weight_scale": (rows, columns // GROUP),
        "bias": (rows,),
        "smooth": (columns,),
        "down": (None, columns),
        "up": (rows, None),
    }
    natural = {
        field: natural[field][tuple(slice(size) for size in shape)]
        for field, shape in sizes.items()
        if field in natural
    }
    if (natural["weight_scale"] < 0).any():
        raise ValueError(f"{name}.wscales: expected no negative scales, got one")
    # Of a group without values any scale will do, but a large one would be the row's largest.
    used = (natural["weight_int4"] != 0).unflatten(1, (-1, GROUP // 2)).any(-1)
    natural["weight_scale"] = natural["weight_scale"].where(used, 0)
    if "smooth" in natural and (natural["smooth"] == 0).any():
        raise ValueError(f"{name}.smooth: expected no zeros to divide by, got one")
    return natural


def unshift(natural: Natural) -> Natural:
    """Return a layer for gelu(x) of one for gelu(x) + SHIFT_GELU."""
    q = unpack_nibbles(natural["weight_int4"]).double().unflatten(1, (-1, GROUP))
    weight = (q * natural["weight_scale"].double()[..., None]).flatten(1)
    bias = weight @ (SHIFT_GELU / _smooth(natural).double())
    return natural | {"bias": bias + natural["bias"].double() if "bias" in natural else bias}


def _smooth(natural: Natural) -> Tensor:
    columns = 2 * natural["weight_int4"].shape[1]
    return natural.get("smooth", natural["weight_scale"].new_ones(columns))


def take_rows(natural: Natural, start: int, stop: int) -> Natural:
    """Return the layer of some outputs."""
    split = ("weight_int4", "weight_scale", "bias", "up")
    return {field: x[start:stop] if field in split else x for field, x in natural.items()}


def beside(a: Natural, m: Natural) -> Natural:
    """Return the layer of inputs [x_a, x_m] that adds what the two make of them."""
    joined = {f: torch.cat([a[f], m[f]], 1) for f in ("weight_int4", "weight_scale")}
    joined["smooth"] = torch.cat([_smooth(a), _smooth(m)])
    branches = [part for part in (a, m) if "down" in part]
    if branches:
        downs = [
            part.get("down", part["weight_scale"].new_zeros((0, _smooth(part).numel())))
            for part in (a, m)
        ]
        joined["down"] = torch.block_diag(*downs)
        joined["up"] = torch.cat([part["up"] for part in branches], 1)
    biases = [part["bias"].double() for part in (a, m) if "bias" in part]
    return joined | ({"bias": sum(biases)} if biases else {})


def w4a8(name: str, natural: Natural, linear: nn.Linear) -> QuantLinear:
    """Return an SVDQuant layer for the place of a linear layer."""
    smooth = natural.get("smooth")
    if smooth is not None and (smooth == 1).all():
        smooth = None
    branch = natural.get("down"), natural.get("up")
    if branch[0] is not None and not branch[0].shape[0]:
        branch = None, None
    weight = natural["weight_int4"], natural["weight_scale"]
    return _layer(W4A8Linear, name, linear, weight, natural.get("bias"), *branch, smooth)


def w4a16(name: str, natural: Natural, linear: nn.Linear, chunks: int) -> QuantLinear:
    """Return an AWQ layer for the place of a linear layer.

    Args:
        name: of the packed layer, for messages.
        natural: what `unpack_awq` returns.
        linear: the layer to take the place of.
        chunks: output c of feature d is row chunks d + c of the file, and row c D + d here; the
            bias of scales has the 1 of x * (1 + scale) in it. 1: the file has diffusers' order.
    """
    N, K = linear.out_features, linear.in_features
    found = natural["weight_uint4"].shape[0], 2 * natural["weight_uint4"].shape[1]
    if found != (N, K) or N % chunks:
        raise ValueError(
            f"{name}.qweight: expected {N} outputs and {K} inputs, got {found[0]} and {found[1]}"
        )
    if chunks > 1:
        natural = {
            field: x.unflatten(0, (-1, chunks)).transpose(0, 1).flatten(0, 1)
            for field, x in natural.items()
        }
    bias = natural.get("bias")
    if chunks > 1 and bias is not None:
        ones = torch.zeros(chunks, dtype=torch.float64)
        ones[[1, -2]] = 1  # shift, scale, gate, shift, scale, gate; or the first three
        bias = bias.double() - ones.to(bias.device).repeat_interleave(N // chunks)
    scale, zero = (natural[field][:, : K // GROUP] for field in ("weight_scale", "weight_zero"))
    remainder, branch = 8 * scale.double() + zero.double(), (None, None)
    if remainder.any():
        groups = torch.eye(K // GROUP).repeat_interleave(GROUP, 1)
        branch = groups, remainder
    weight = natural["weight_uint4"] ^ 0x88, scale  # q - 8 in two's complement
    return _layer(W4A16Linear, name, linear, weight, bias, *branch, None)


def _layer(
    layer_type: type[QuantLinear],
    name: str,
    linear: nn.Linear,
    weight: tuple[Tensor, Tensor],
    *others: Tensor | None,
) -> QuantLinear:
    if others[0] is None and linear.bias is not None:
        raise ValueError(f"{name}.bias: expected {linear.out_features} values, got none")
    if linear.bias is None and others[0] is not None and not others[0].any():
        others = (None, *others[1:])  # the converter writes zeros for none
    dtype, device = linear.weight.dtype, loading_device(linear.weight)
    quantized, scale = (_copy(x, device) for x in weight)
    rest = [None if x is None else _copy(x, device, dtype) for x in others]
    return layer_type(quantized, scale, *rest, dtype=dtype).train(linear.training)


def _copy(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    # The parts of a fused layer share tensors of the file; safetensors saves none that are shared.
    return x.to(device, dtype or x.dtype).clone(memory_format=torch.contiguous_format)


def loading_device(x: Tensor) -> torch.device:
    """Return where what takes a tensor's place goes."""
    return torch.device("cpu") if x.is_meta else x.device
