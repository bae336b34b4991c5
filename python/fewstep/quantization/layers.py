"""The kinds of quantised layers: what each stores and which product it runs (`linear.py`)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from ..ops._gemm import bits
from ..ops.gemm_w4a8 import fold_int4
from ..ops.gemm_w4a16 import dequantize_int4
from ..ops.quantize_int4 import SCALES
from .linear import Options, QuantLinear, cast
from .rows import QuantizedRows
from .scheme import Scheme


class _ByteLinear(QuantLinear):
    """A byte a weight, one scale per output."""

    byte: ClassVar[torch.dtype]

    @staticmethod
    def dequantize_weight(quantized: Tensor, scale: Tensor) -> Tensor:
        """Return the weight that these stand for, float32 [out, in]."""
        return quantized.float() * scale[:, None]

    @classmethod
    def empty_weight(
        cls, in_features: int, out_features: int, scheme: Scheme, device: Any
    ) -> tuple[Tensor, Tensor]:
        """Return uninitialised values and scales."""
        return (
            torch.empty((out_features, in_features), dtype=cls.byte, device=device),
            torch.empty(out_features, dtype=torch.float32, device=device),
        )


class W8A8Linear(_ByteLinear):
    """int8 weights, activations quantised to int8 as they come (`ops.gemm_w8a8`)."""

    kind, storage, byte, short = "w8a8", "weight_int8", torch.int8, "gemm_w8a8"

    @staticmethod
    def quantize_weight(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """Return the low-bit values and scales of a floating weight."""
        return ops.quantize_int8(weight, rotate=scheme.rotate)

    def _multiply(self, x: Tensor | QuantizedRows, options: Options) -> Any:
        given = {"w": self.quantized, "w_scale": self.weight_scale, "bias": self.bias}
        return ops.gemm_w8a8(**(self._activations(x) | given | options))


class FP8Linear(_ByteLinear):
    """e4m3 weights, activations quantised to e4m3 as they come (`ops.gemm_fp8`)."""

    kind, storage, byte = "fp8", "weight_fp8", torch.float8_e4m3fn

    @staticmethod
    def quantize_weight(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """Return the low-bit values and scales of a floating weight."""
        return ops.quantize_fp8(weight, rotate=scheme.rotate)

    def refuse_rows(self) -> str | None:
        """Return why `forward` takes no `QuantizedRows`."""
        return "takes activations in e4m3"

    # pickle, unlike torch.save, can't read tensors in e4m3: bytes stand for them.
    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return state | {"_buffers": self._buffers | {self.storage: bits(self.quantized)}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._buffers[self.storage] = self.quantized.view(self.byte)

    def _multiply(self, x: Tensor | QuantizedRows, options: Options) -> Any:
        given = {"w": self.quantized, "w_scale": self.weight_scale, "bias": self.bias}
        return ops.gemm_fp8(**(self._activations(x) | given | options))


class _Int4Linear(QuantLinear):
    """4-bit weights in groups; `ops.quantize_int4` has the format."""

    storage = "weight_int4"

    @staticmethod
    def quantize_weight(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """Return the low-bit values and scales of a floating weight."""
        assert scheme.group is not None
        return ops.quantize_int4(weight, group=scheme.group, rotate=scheme.rotate)

    @staticmethod
    def empty_weight(
        in_features: int, out_features: int, scheme: Scheme, device: Any
    ) -> tuple[Tensor, Tensor]:
        """Return uninitialised values and scales."""
        assert scheme.group is not None
        groups = in_features // scheme.group
        return (
            torch.empty((out_features, in_features // 2), dtype=torch.uint8, device=device),
            torch.empty((out_features, groups), dtype=torch.bfloat16, device=device),
        )

    def _scale_dtype(self, saved: Tensor | None) -> torch.dtype:
        # Files of others have float16 scales, which bfloat16 would round.
        known = saved is not None and saved.dtype in SCALES
        return saved.dtype if known else self.weight_scale.dtype

    def _group(self) -> int | None:
        return 2 * self.quantized.shape[1] // self.weight_scale.shape[1]

    def _shape(self) -> tuple[int, int]:
        return self.quantized.shape[0], 2 * self.quantized.shape[1]


class W4A8Linear(_Int4Linear):
    """4-bit weights, activations quantised to int8 as they come (`ops.gemm_w4a8`)."""

    kind, short = "w4a8", "gemm_w4a8"

    @staticmethod
    def dequantize_weight(quantized: Tensor, scale: Tensor) -> Tensor:
        """Return the weight that these stand for, float32 [out, in]: as the product folds it."""
        folded, row_scale = fold_int4(quantized, scale)
        return folded.float() * row_scale[:, None]

    def _multiply(self, x: Tensor | QuantizedRows, options: Options) -> Any:
        given = {"w": self.quantized, "w_scale": self.weight_scale, "bias": self.bias}
        return ops.gemm_w4a8(**(self._activations(x) | given | options))


class W4A16Linear(_Int4Linear):
    """4-bit weights, activations as they are (`ops.gemm_w4a16`): for layers that see few rows."""

    kind = "w4a16"

    @staticmethod
    def dequantize_weight(quantized: Tensor, scale: Tensor) -> Tensor:
        """Return the weight that these stand for, float32 [out, in]."""
        return dequantize_int4(quantized, scale).float()

    def refuse_rows(self) -> str | None:
        """Return why `forward` needs its input as it is."""
        return "takes activations as they are"

    def _multiply(self, x: Tensor, options: Options) -> Any:
        if self.smooth is not None:
            if options["up"] is not None:
                options = options | {"down": None, "low": F.linear(x, options["down"])}
            x = x / cast(self.smooth, x.dtype)
        return ops.gemm_w4a16(x, self.quantized, self.weight_scale, bias=self.bias, **options)
