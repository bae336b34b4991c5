"""load_nunchaku(model, file): a whole model from a file of Nunchaku's SVDQuant layers.

By diffusers' names (nunchaku_lite) a packed layer is the layer of that name. By Nunchaku's own, for
FLUX, some are put together differently, and each goes back by a permutation:

    qkv_proj                   rows of to_q, to_k and to_v, which share smooth and down
    out_proj, mlp_fc2          of a single block: columns of proj_out, attention first, so

        smooth = [smooth_a, smooth_m]  down = [[down_a, 0], [0, down_m]]  up = [up_a, up_m]

    norm1.linear, norm.linear  output c of feature d is row C d + c instead of row c D + d, and the
                               bias of scales has the 1 of x * (1 + scale) in it

`nunchaku_layers.py` has what else differs: the shifted input of mlp_fc2, the zeros of AWQ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from .linear import QuantLinear
from .nunchaku import unpack_awq, unpack_svdq
from .nunchaku_layers import (
    Natural,
    beside,
    cut,
    loading_device,
    take_rows,
    unshift,
    w4a8,
    w4a16,
)
from .replace import QuantizedModules, find_slots

_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_FLUX = {
    "transformer_blocks": {
        "qkv_proj": _QKV,
        "qkv_proj_context": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "out_proj": ("attn.to_out.0",),
        "out_proj_context": ("attn.to_add_out",),
        "mlp_fc1": ("ff.net.0.proj",),
        "mlp_fc2": ("ff.net.2",),
        "mlp_context_fc1": ("ff_context.net.0.proj",),
        "mlp_context_fc2": ("ff_context.net.2",),
    },
    "single_transformer_blocks": {
        "qkv_proj": _QKV,
        "out_proj": ("proj_out",),
        "mlp_fc1": ("proj_mlp",),
        "mlp_fc2": ("proj_out",),
    },
}
_MODULATION = {"norm1.linear": 6, "norm1_context.linear": 6, "norm.linear": 3}
_BLOCK = re.compile(r"((single_)?transformer_blocks)\.(\d+)\.(.+)")


class _Target(NamedTuple):
    """Where a packed layer goes."""

    layers: tuple[str, ...]  # its outputs are theirs, one after another
    column: int | None = None  # its inputs are proj_out's: the first part, or the second
    shifted: bool = False
    chunks: int = 1


def _target(name: str, flux: bool) -> _Target:
    block = _BLOCK.fullmatch(name) if flux else None
    if block is None:
        return _Target((name,))
    kind, _, index, local = block.groups()
    layers = tuple(f"{kind}.{index}.{layer}" for layer in _FLUX[kind].get(local, (local,)))
    column = ("out_proj", "mlp_fc2").index(local) if layers[0].endswith(".proj_out") else None
    return _Target(layers, column, local.endswith("_fc2"), _MODULATION.get(local, 1))


def _plain_name(key: str, flux: bool) -> str:
    found = re.fullmatch(r"((?:single_)?transformer_blocks\.\d+\.)(norm_\w+\.weight)", key)
    return f"{found[1]}attn.{found[2]}" if flux and found else key


def _read(source: Any) -> Mapping[str, Tensor]:
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, (str, Path)):
        raise TypeError(f"source: expected a path or a state dict, got {type(source).__name__}")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(source)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{source}: expected a whole safetensors file, got {error}") from error


def _expect_finite(key: str, x: Tensor) -> None:
    if x.is_floating_point() and not x.isfinite().all():
        raise ValueError(f"{key}: expected finite values, got inf or NaN")


def _sort(state: Mapping[str, Tensor]) -> tuple[dict[str, Natural], Natural]:
    """Return name -> fields of the packed layers, and the plain tensors."""
    packed = {key.removesuffix(".qweight"): {} for key in state if key.endswith(".qweight")}
    plain = {}
    for key, value in state.items():
        owner, _, field = key.rpartition(".")
        if owner in packed:
            packed[owner][field] = value
        else:
            plain[key] = value
        if value.dtype.itemsize > 1:  # PyTorch can't ask float8, which no field has
            _expect_finite(key, value)
    if not packed:
        raise ValueError(
            f"source: expected packed layers (keys that end in .qweight), got {len(plain)} keys "
            "without one"
        )
    return packed, plain


class _Plan:
    """The layers and tensors to put into a model, all made before the first one is."""

    def __init__(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        slots, refused = find_slots(model)
        self.model, self.refused = model, refused
        self.slots = {slot.name: slot for slot in slots}
        self.layers: dict[str, QuantLinear] = {}
        self.tensors: dict[str, Tensor] = {}
        flux = any(_BLOCK.fullmatch(key) and ".qkv_proj." in key for key in state)
        packed, plain = _sort(state)
        halves: dict[str, list[tuple[str, Natural] | None]] = {}
        for name, fields in packed.items():
            self._pack(name, fields, _target(name, flux), halves)
        for layer, (attention, mlp) in halves.items():
            if attention is None or mlp is None:
                missing = "out_proj" if attention is None else "mlp_fc2"
                key = f"{layer.removesuffix('proj_out')}{missing}.qweight"
                raise ValueError(f"{key}: expected the other part of {layer}, got none")
            linear = self.slots[layer].linear
            self.layers[layer] = w4a8(mlp[0], beside(attention[1], mlp[1]), linear)
        for key, value in plain.items():
            self._plain(key, _plain_name(key, flux), value)
        self._expect_whole()

    def _linear(self, key: str, name: str) -> nn.Linear:
        slot = self.slots.get(name)
        if slot is None:
            raise ValueError(
                f"{key}: expected a linear layer {name} in {type(self.model).__name__}, got none"
            )
        if name in self.refused:
            raise ValueError(f"{name}: expected a layer to replace, got {self.refused[name]}")
        return slot.linear

    def _pack(
        self,
        name: str,
        fields: Natural,
        target: _Target,
        halves: dict[str, list[tuple[str, Natural] | None]],
    ) -> None:
        linears = [self._linear(f"{name}.qweight", layer) for layer in target.layers]
        if "wzeros" in fields:
            natural = unpack_awq(fields, name)
            if len(linears) > 1 or target.column is not None:
                raise ValueError(f"{name}.wzeros: expected an SVDQuant layer, got an AWQ layer")
            layer = target.layers[0]
            self.layers[layer] = w4a16(name, natural, linears[0], target.chunks)
            return
        rows, columns = sum(linear.out_features for linear in linears), linears[0].in_features
        if target.column is not None:
            mlp = self._linear(f"{name}.qweight", target.layers[0].replace("proj_out", "proj_mlp"))
            columns = (columns - mlp.out_features, mlp.out_features)[target.column]
        natural = cut(name, unpack_svdq(fields, name), rows, columns)
        if target.shifted:
            natural = unshift(natural)
        if target.column is not None:
            halves.setdefault(target.layers[0], [None, None])[target.column] = name, natural
            return
        start = 0
        for layer, linear in zip(target.layers, linears, strict=True):
            stop = start + linear.out_features
            self.layers[layer] = w4a8(name, take_rows(natural, start, stop), linear)
            start = stop

    def _plain(self, key: str, name: str, value: Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        try:
            module = self.model.get_submodule(owner)
        except AttributeError:
            module = None
        old = None
        if module is not None and owner not in self.layers:
            buffer = (
                None if leaf in module._non_persistent_buffers_set else module._buffers.get(leaf)
            )
            old = module._parameters.get(leaf, buffer)
        if old is None:
            raise ValueError(
                f"{key}: expected a tensor {name} of {type(self.model).__name__} that is not "
                "quantised, got none"
            )
        if old.shape != value.shape:
            raise ValueError(f"{key}: expected {list(old.shape)}, got {list(value.shape)}")
        value = value.to(loading_device(old), old.dtype, copy=True)
        if isinstance(old, nn.Parameter):
            value = nn.Parameter(value, requires_grad=old.requires_grad)
        self.tensors[name] = value

    def _expect_whole(self) -> None:
        for prefix, module in self.model.named_modules():
            if prefix in self.layers:
                continue
            for leaf, value in [*module._parameters.items(), *module._buffers.items()]:
                name = f"{prefix}.{leaf}" if prefix else leaf
                if value is not None and value.is_meta and name not in self.tensors:
                    raise ValueError(f"{name}: expected values for a meta tensor, got none")

    def apply(self) -> QuantizedModules:
        """Put everything into the model."""
        skipped = {
            name: self.refused.get(name, "not quantised in the file")
            for name in self.slots
            if name not in self.layers
        }
        handle = QuantizedModules(replaced=self.layers, skipped=skipped, _model=self.model)
        places = [_place(self.model, name) for name in self.tensors]
        before = [values[leaf] for values, leaf in places]

        def put_back() -> None:
            for (values, leaf), old in zip(places, before, strict=True):
                now = values[leaf]
                if not old.is_meta and (old.device, old.dtype) != (now.device, now.dtype):
                    old.data = old.data.to(now.device, now.dtype)
                values[leaf] = old

        for (values, leaf), value in zip(places, self.tensors.values(), strict=True):
            values[leaf] = value
        handle.put([self.slots[name] for name in self.layers])
        handle.at_undo(put_back)
        return handle


def _place(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    return module._parameters if leaf in module._parameters else module._buffers, leaf


def load_nunchaku(model: nn.Module, source: str | Path | Mapping[str, Tensor]) -> QuantizedModules:
    """Put a file of Nunchaku's packed 4-bit layers into a model of diffusers, in place.

    This knows of layers alone; `fewstep.load_nunchaku` does with the model what `fewstep.quantize`
    does besides.

    SVDQuant layers become `W4A8Linear`, AWQ layers `W4A16Linear`; other tensors of the file take
    the place of the model's. What the file does not name stays as it is. The model may be on the
    meta device; then the file must have all of it, and it comes to the CPU.

    Args:
        model: a FluxTransformer2DModel for Nunchaku's own names, any model for diffusers' names.
        source: a safetensors file, or its tensors. int4 with groups of 64; NVFP4 is refused.

    Returns:
        The handle, as of `quantize`; `undo()` puts the very layers and tensors back.

    Raises:
        TypeError: source is neither a path nor a mapping.
        ValueError: a file that is truncated or not packed so, or a tensor that is missing, belongs
            to no layer of the model, has another dtype or shape, or holds a NaN. The message names
            the key, what was expected and what came, and the model is unchanged.
    """
    return _Plan(model, _read(source)).apply()
