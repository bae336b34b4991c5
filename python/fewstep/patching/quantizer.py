"""fewstep's schemes as a diffusers quantisation config: quantise while loading, save, load again.

    config = fewstep.QuantizationConfig("w4a8", rank=32)
    model = FluxTransformer2DModel.from_pretrained(path, quantization_config=config)
    model.save_pretrained(folder)              # low-bit values as they are, in safetensors
    model = FluxTransformer2DModel.from_pretrained(folder)

A layer is quantised when its weight arrives, so the peak is the quantised model and one shard.
diffusers keeps its quantisers in two dictionaries and has no function to register another; the
entries are made when this module is imported, which `fewstep.QuantizationConfig` does. A program
that only loads saved models imports it too: `import fewstep; fewstep.QuantizationConfig`.

The names that diffusers looks up (`quant_method`, `check_if_quantized_param`, ...) are its own; see
`diffusers.quantizers.base.DiffusersQuantizer`.
"""

from __future__ import annotations

import copy
import enum
import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from ..quantization import QuantizedModules, QuantLinear, Scheme, choose_layers, default_skip
from ..quantization.scheme import BYTES
from .fusions import Fused, Fusions
from .parameters import count_as_before, count_quantized

__all__ = ["QuantizationConfig"]


class _Method(enum.StrEnum):
    FEWSTEP = "fewstep"


class QuantizationConfig(QuantizationConfigMixin):
    """What `from_pretrained(..., quantization_config=)` does to a model's linear layers.

    Args:
        scheme: "w8a8", "fp8", "w4a8" or "w4a16", or with options as in "w4a8-g64-r32".
        rank: of the low-rank branch.
        group: neighbours that share a scale of a 4-bit weight: 32, 64 or 128.
        rotate: block of neighbours that are rotated, or True for the largest that fits a layer.
        modules_to_not_convert: names, or parts of names between dots, of layers to leave alone
            besides those of `fewstep.quantization.default_skip`.
        layers: scheme -> names of a model that is quantised already; written by save_pretrained.
        norms: None, "share" or "fuse": whether norms quantise for the layers behind them.
        activations: "fuse" or None: whether products compute the activations behind them.
        modulations: "group" or None: whether modulation layers share a launch.

    Raises:
        TypeError, ValueError: no scheme; the message names the argument.
    """

    def __init__(
        self,
        scheme: str | Scheme = "w8a8",
        rank: int | None = None,
        group: int | None = None,
        modules_to_not_convert: Sequence[str] | None = None,
        layers: dict[str, list[str]] | None = None,
        rotate: int | bool | None = None,
        norms: str | None = None,
        activations: str | None = "fuse",
        modulations: str | None = None,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        if unknown:
            raise TypeError(f"QuantizationConfig: unknown arguments {', '.join(sorted(unknown))}")
        self.quant_method = _Method.FEWSTEP
        self.scheme = str(Scheme.parse(scheme, rank=rank, group=group, rotate=rotate or None))
        self.modules_to_not_convert = list(modules_to_not_convert or ())
        self.layers = layers
        fusions = Fusions(norms, activations, modulations).expect()
        self.norms, self.activations, self.modulations = fusions

    @property
    def fusions(self) -> Fusions:
        """What happens around the layers."""
        return Fusions(self.norms, self.activations, self.modulations)

    def to_dict(self) -> dict[str, Any]:
        """Return what goes into config.json."""
        return super().to_dict() | {"quant_method": self.quant_method.value}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what is shown: the scheme, and what differs from the defaults."""
        plain = type(self)().to_dict()
        return {
            name: value
            for name, value in self.to_dict().items()
            if name in ("quant_method", "scheme") or value != plain.get(name)
        }

    def skip(self, name: str, linear: nn.Linear) -> str | None:
        """Return why a layer is left alone, or None."""
        for part in self.modules_to_not_convert:
            if re.search(rf"(^|\.){re.escape(part)}(\.|$)", name):
                return f"{part} is not to be converted"
        return default_skip(name, linear)


class FewstepQuantizer(DiffusersQuantizer):
    """Replaces linear layers while diffusers loads a model."""

    use_keep_in_fp32_modules = True
    required_packages: ClassVar[list[str]] = ["accelerate"]

    def __init__(self, quantization_config: QuantizationConfig, **kwargs: Any) -> None:
        # Each model records its own layers in it, and the caller's may serve several.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self._schemes: dict[str, Scheme] = {}  # of the layers to quantise as they arrive
        self._fused: list[Fused] = []
        self._dequantized: dict[str, nn.Linear] = {}  # name -> what `dequantize` has put there

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """Return the dtype of what is not quantised, which the config records."""
        return torch.get_default_dtype() if torch_dtype is None else torch_dtype

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> Any:
        """Tell accelerate how much memory a weight takes."""
        if Scheme.parse(self.quantization_config.scheme).kind in BYTES:
            return torch.int8
        from accelerate.utils import CustomDtype

        return CustomDtype.INT4

    def _process_model_before_weight_loading(
        self, model: nn.Module, keep_in_fp32_modules: Sequence[str] = (), **kwargs: Any
    ) -> None:
        config = self.quantization_config
        config.fusions.expect(model)
        self.modules_to_not_convert = [*config.modules_to_not_convert, *keep_in_fp32_modules]
        if self.pre_quantized:
            for name, scheme in _by_name(config.layers or {}):
                linear = _linear(model, name)
                sizes = linear.in_features, linear.out_features
                _put(model, name, _empty(sizes, scheme, linear))
        else:
            config.modules_to_not_convert = self.modules_to_not_convert
            self._schemes, _ = choose_layers(model, Scheme.parse(config.scheme), config.skip)

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, *args: Any, **kwargs: Any
    ) -> bool:
        """Return whether `create_quantized_param` takes this one."""
        owner, _, name = param_name.rpartition(".")
        if not self.pre_quantized:
            return name == "weight" and owner in self._schemes
        layer = model.get_submodule(owner)
        return isinstance(layer, QuantLinear) and name in (layer.storage, "weight_scale")

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Put a low-bit tensor in its place, or the quantised layer of a weight that arrives."""
        owner, _, name = param_name.rpartition(".")
        layer = model.get_submodule(owner)
        if isinstance(layer, QuantLinear):
            # As saved: diffusers has cast what it hands over to the model's dtype.
            saved = state_dict[param_name]
            reason = layer.refuse_tensor(name, saved)
            if reason is not None:
                raise ValueError(f"{param_name}: {reason}")
            layer._buffers[name] = saved.to(target_device)
            return
        # Its bias may be here already, or come later.
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(param_value.to(target_device), requires_grad=False)
        try:
            quantized = QuantLinear.from_linear(linear, self._schemes[owner])
        except ValueError as error:
            raise ValueError(f"{owner}: {error}") from error
        if layer.bias is not None:
            quantized.bias = layer.bias.detach()
        _put(model, owner, quantized.train(layer.training))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name, layer in _quantized(model):
            missing = [f"{name}.{key}" for key, x in layer.named_buffers() if x.is_meta]
            if missing:
                raise ValueError(
                    f"{missing[0]}: expected it among the saved tensors, got a file without"
                )
        describe(model, self.quantization_config)
        count_quantized(model)
        self._fused = self.quantization_config.fusions.apply(model)
        return model

    def _dequantize(self, model: nn.Module) -> nn.Module:
        for part in self._fused:
            part.undo()
        plain: dict[QuantLinear, nn.Linear] = {}  # one layer can sit in several places
        for name, layer in list(_quantized(model)):
            if layer not in plain:
                plain[layer] = layer.dequantize()
            _put(model, name, plain[layer])
            self._dequantized[name] = plain[layer]
        model._internal_dict = _without_config(model)
        count_as_before(model)
        return model

    @property
    def is_serializable(self) -> bool:
        """Low-bit values are plain tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients pass through to inputs and adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The layers are ordinary modules over registered ops."""
        return True


def make_savable(
    model: nn.Module, handle: QuantizedModules, fusions: Fusions, fused: list[Fused]
) -> None:
    """Let save_pretrained of a model that `quantize` changed write what from_pretrained reads.

    `model.dequantize()` then undoes what `fusions` has `fused`, and the handle, which knows what it
    put in the places of the layers, can still put the original ones there.
    """
    schemes = sorted({str(layer.scheme) for layer in handle.replaced.values()})
    config, before = QuantizationConfig(schemes[0], **fusions._asdict()), model.config
    describe(model, config)
    model.hf_quantizer = quantizer = FewstepQuantizer(config)
    quantizer._fused, quantizer._dequantized = list(fused), handle.dequantized
    model.is_quantized, model.quantization_method = True, config.quant_method
    count_quantized(model)

    def forget() -> None:
        if model.__dict__.get("hf_quantizer", quantizer) is not quantizer:
            return  # dequantised, and quantised again by another call, whose state it is now
        for name in ("hf_quantizer", "is_quantized", "quantization_method"):
            model.__dict__.pop(name, None)  # dequantize() has taken the first already
        count_as_before(model)
        now = _without_config(model)
        model._internal_dict = before if now == before else now

    handle.at_undo(forget)


def describe(model: nn.Module, config: QuantizationConfig) -> None:
    """Write into a model's config which layers are quantised, and how."""
    layers: dict[str, list[str]] = {}
    for name, layer in _quantized(model):
        layers.setdefault(str(layer.scheme), []).append(name)
    config.layers = layers
    model.register_to_config(quantization_config=config)


def _without_config(model: nn.Module) -> FrozenDict:
    return FrozenDict({k: v for k, v in model.config.items() if k != "quantization_config"})


def _quantized(model: nn.Module) -> Iterator[tuple[str, QuantLinear]]:
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantLinear):
            yield name, module


def _by_name(layers: dict[str, list[str]]) -> Iterator[tuple[str, Scheme]]:
    for scheme, names in layers.items():
        for name in names:
            yield name, Scheme.parse(scheme)


def _linear(model: nn.Module, name: str) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        raise ValueError(
            f"quantization_config: expected a linear layer {name} in {type(model).__name__}, got "
            f"{'none' if module is None else type(module).__name__}"
        )
    return module


def _empty(sizes: tuple[int, int], scheme: Scheme, linear: nn.Linear) -> QuantLinear:
    weight = linear.weight
    return QuantLinear.empty(
        *sizes, scheme, bias=linear.bias is not None, dtype=weight.dtype, device=weight.device
    )


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, key = name.rpartition(".")
    model.get_submodule(parent)._modules[key] = layer


AUTO_QUANTIZATION_CONFIG_MAPPING[_Method.FEWSTEP.value] = QuantizationConfig
AUTO_QUANTIZER_MAPPING[_Method.FEWSTEP.value] = FewstepQuantizer
