"""A linear layer with int8 weights and activations quantised as they come (W8A8).

    q, s = quantize_int8(x)                        one scale per row of x
    y = (q * s) @ (W * S).T + bias                 exact integer sums, in x's dtype

weight_int8   [out, in]  int8       weight_scale  [out]  float32, whatever the module is cast to
bias          [out]      as in the source layer

Inference only: an input that requires grad or carries a tangent is refused by the ops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import _native, ops
from ..ops.gemm_w8a8 import MAX_K, pack_w8

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class QuantLinear(nn.Module):
    """Drop-in for `nn.Linear`, made by `from_linear`.

    `weight` reads as the dequantised weight in the dtype that the module was cast to, so code that
    asks for `layer.weight.dtype` or `.device`, or multiplies with it, gets what it expects. It is
    computed at every read; the state dict holds `weight_int8`, `weight_scale` and `bias`.

    On the CPU a rearranged copy of the int8 weight (`ops.gemm_w8a8.pack_w8`) is kept beside it, so
    the weight takes two bytes per element there. It is derived: never saved, dropped by a move, and
    made again by the first call on the CPU that finds none or an old one. (Such a call must be an
    eager one: a compiled graph can't keep it, and packs in every call instead.)
    """

    weight_int8: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, weight_int8: Tensor, weight_scale: Tensor, bias: Tensor | None = None):
        """Take a quantised weight as it is; `bias` also tells the dtype that `weight` reads in."""
        super().__init__()
        self.out_features, self.in_features = weight_int8.shape
        self.register_buffer("weight_int8", weight_int8)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)
        # Empty; follows .to(dtype) and .to(device) as a floating weight would.
        dtype = torch.float32 if bias is None else bias.dtype
        like = torch.empty(0, dtype=dtype, device=weight_int8.device)
        self.register_buffer("_like", like, persistent=False)
        self.register_buffer("_packed", None, persistent=False)
        self._packed_from: tuple[Tensor, int] | None = None
        self._pack()

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> QuantLinear:
        """Return the quantised form of a linear layer; the layer is left as it is.

        Raises:
            TypeError: not an `nn.Linear`.
            ValueError: its dtype, its size or a weight that is not finite rules it out.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
        reason = refuse_linear(linear)
        if reason is not None:
            raise ValueError(f"linear: {reason}")
        with torch.no_grad():
            weight_int8, weight_scale = ops.quantize_int8(linear.weight.detach())
            if not weight_scale.is_meta and not weight_scale.isfinite().all():
                row = int(weight_scale.isfinite().logical_not().nonzero()[0])
                raise ValueError(f"linear: expected finite weights, got inf or NaN in row {row}")
            bias = None if linear.bias is None else linear.bias.detach()
            quantized = cls(weight_int8, weight_scale, bias)
            quantized._like = quantized._like.to(linear.weight.dtype)
        return quantized.train(linear.training)

    @property
    def weight_dtype(self) -> torch.dtype:
        """What `weight` reads in: the dtype the module was cast to."""
        return self._like.dtype

    @property
    def weight(self) -> Tensor:
        """The dequantised weight [out, in], in the dtype the module was cast to."""
        return (self.weight_int8.float() * self.weight_scale[:, None]).to(self._like.dtype)

    def dequantize(self) -> nn.Linear:
        """Return a plain `nn.Linear` with the dequantised weight."""
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta"
        )
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.clone(), requires_grad=False)
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ weight.T + bias in x's dtype (autocast's, where it is on)."""
        kind = x.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        if x.dtype not in DTYPES:
            raise ValueError(f"x: expected float32, bfloat16 or float16, got {x.dtype}")
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x: expected [..., {self.in_features}], got {list(x.shape)}")
        weight, scale, packed = self.weight_int8, self.weight_scale, self._current_pack(x)
        return ops.gemm_w8a8(x, None, weight, scale, bias=self.bias, packed=packed)

    def _current_pack(self, x: Tensor) -> Tensor | None:
        if x.device.type != "cpu":
            return None
        if not torch.compiler.is_compiling():
            weight, version = self._packed_from or (None, 0)
            # Offloading hooks replace buffers without telling the module.
            if weight is not self.weight_int8 or _version(weight) != version:
                self._pack()
        return self._packed

    def _pack(self) -> None:
        """Rebuild what is derived from the weight."""
        weight = self.weight_int8
        native = _native.unavailable("gemm_w8a8", weight.device) is None
        self._packed = pack_w8(weight) if native and weight.device.type == "cpu" else None
        self._packed_from = (weight, _version(weight))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Move or cast, but keep the weight int8 and its scale float32 to the last bit."""
        weight_int8, weight_scale = self.weight_int8, self.weight_scale
        packed, packed_from = self._packed, self._packed_from
        self._packed = self._packed_from = None  # moving it too would be a transfer for nothing
        super()._apply(fn, recurse)
        if self.weight_int8.dtype != torch.int8:
            self.weight_int8 = weight_int8.to(self.weight_int8.device)
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale = weight_scale.to(self.weight_scale.device)
        if self.weight_int8 is weight_int8:  # a cast, or a move to where it is
            self._packed, self._packed_from = packed, packed_from
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.weight_scale.dtype != torch.float32:  # load_state_dict(assign=True)
            self.weight_scale = self.weight_scale.float()
        self._pack()

    def extra_repr(self) -> str:
        """Return what `print(module)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, scheme=w8a8"
        )


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


def refuse_linear(linear: nn.Linear) -> str | None:
    """Return why this layer's numbers can't be quantised, or None."""
    if linear.weight.dtype not in DTYPES:
        return f"expected float32, bfloat16 or float16 weights, got {linear.weight.dtype}"
    if linear.weight.numel() == 0:
        return f"expected weights, got an empty {list(linear.weight.shape)}"
    if linear.in_features >= MAX_K:
        return f"expected fewer than {MAX_K} inputs for exact sums, got {linear.in_features}"
    return None
