"""Linear layers with low-bit weights, drop-in for `nn.Linear`; `layers.py` has the kinds.

    y = ((x / smooth) H) @ W.T + bias + (x @ down.T) @ up.T

the low-rank branch where the scheme has a rank, smooth where it has smoothing, H where it rotates.

    W8A8Linear     weight_int8  [out, in]      int8    weight_scale  [out]          float32
    FP8Linear      weight_fp8   [out, in]      e4m3    weight_scale  [out]          float32
    W4A8Linear     weight_int4  [out, in / 2]  uint8   weight_scale  [out, in / G]  16-bit
    W4A16Linear    likewise; activations are not quantised

bias [out], down [R, in], up [out, R], smooth [in] are in the dtype that the module is cast to; the
quantised weight and its scale keep theirs. All are plain buffers of a plain module: state dicts,
safetensors, deepcopy, moves, offloading and torch.compile need nothing special.

smooth evens out the columns of x before they share a scale (SmoothQuant, arXiv 2211.10438;
SVDQuant, arXiv 2411.05007), and H, a Hadamard matrix for every block of neighbours, spreads what
is left of an outlier over its block (QuaRot, arXiv 2404.00456); W quantises (weight * smooth) H.
The branch takes x as it is. Both are done where x is quantised (`ops/_prologue.py`); w4a16, which
does not quantise it, divides in a pass of its own and has no H. The block is no tensor, so it is
part of the low-bit buffer's name, weight_int8_h128: a layer of another takes no file of this one.

The layers are subclasses of nn.Linear, so what looks for linear layers (peft's LoRA, diffusers'
loaders) finds them; a LoRA around one joins its branch (`lora.py`). They take gradients through to
x (the rounding of x counts as the identity), so a LoRA on top of them, or before them, trains; the
quantised weight itself does not.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..ops._expect import expect_tensor
from ..ops._gemm import MAX_K
from ..ops._gemm_short import run_short
from ..ops._layout import FLOATS
from ..ops._prologue import rotate_blocks
from .computed_weight import ComputedWeight
from .low_rank import split
from .rows import QuantizedRows
from .scheme import Scheme

Join = Callable[[Tensor | None, Tensor | None, torch.dtype], tuple[Tensor, Tensor]]
Options = dict[str, Any]
# What the short way runs instead of.
_BYPASSED = ("_multiply", "_activations", "_expect_input")


class QuantLinear(nn.Linear):
    """Base of the quantised layers; `QuantLinear.from_linear(linear, "w8a8")` makes one.

    `weight` reads as the dequantised weight with the low-rank branch and without the smoothing, in
    the dtype that the module was cast to, so code that asks for `layer.weight.dtype` or `.device`,
    or multiplies with it, gets what it expects. It is computed at every read and can't be written.
    """

    kinds: ClassVar[dict[str, type[QuantLinear]]] = {}  # by kind of scheme, of every subclass
    kind: ClassVar[str]
    storage: str  # name of the buffer with the low-bit values
    short: ClassVar[str | None] = None  # the product that `run_short` may run

    weight_scale: Tensor
    bias: Tensor | None
    down: Tensor | None
    up: Tensor | None
    smooth: Tensor | None

    def __init_subclass__(cls) -> None:
        """Enter a class that has a kind of its own; one that computes otherwise has no short way.

        `short` stands for what the class that set it does.
        """
        super().__init_subclass__()
        source = next(base for base in cls.__mro__ if "short" in base.__dict__)
        if any(getattr(cls, name) is not getattr(source, name) for name in _BYPASSED):
            cls.short = None
        if "kind" in cls.__dict__:
            QuantLinear.kinds[cls.kind] = cls

    def __init__(
        self,
        quantized: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None = None,
        down: Tensor | None = None,
        up: Tensor | None = None,
        smooth: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        rotate: int = 0,
    ):
        """Take a quantised weight as it is; `dtype` is what `weight` reads in (bias's if None).

        `rotate` says by which block the weight was rotated before it was quantised.
        """
        nn.Module.__init__(self)  # nn.Linear's would make a weight
        self.rotate = rotate
        if rotate:
            self.storage = f"{self.storage}_h{rotate}"
        self.register_buffer(self.storage, quantized)
        self.register_buffer("weight_scale", weight_scale)
        for name, value in (("bias", bias), ("down", down), ("up", up), ("smooth", smooth)):
            self.register_buffer(name, value)
        self.out_features, self.in_features = self._shape()
        if dtype is None:
            dtype = torch.float32 if bias is None else bias.dtype
        self._dtype = dtype  # follows .to(dtype) as a floating weight would

    @staticmethod
    def from_linear(
        linear: nn.Linear, scheme: str | Scheme = "w8a8", *, smooth: Tensor | None = None
    ) -> QuantLinear:
        """Return the quantised form of a linear layer; the layer is left as it is.

        Args:
            linear: the layer.
            scheme: how to quantise it.
            smooth: factors [in], positive, that the layer divides its input by;
                `smoothing.quantize_smoothed` finds them. A scheme with smoothing needs them, and a
                layer made with them has a scheme with smoothing.

        Raises:
            TypeError: not an `nn.Linear`.
            ValueError: its dtype, its size, a weight that is not finite or not there (meta), or
                that it is quantised already rules it out; smooth does not fit, or is missing.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
        scheme = Scheme.parse(scheme).of(linear.in_features)
        reason = refuse_linear(linear, scheme)
        if reason is not None:
            raise ValueError(f"linear: {reason}")
        if scheme.smooth and smooth is None:
            raise ValueError(f"smooth: expected factors for {scheme}, got none")
        layer_type = QuantLinear.kinds[scheme.kind]
        dtype = linear.weight.dtype
        with torch.no_grad():
            weight, down, up = linear.weight.detach(), None, None
            _expect_finite(weight)
            if smooth is not None:
                smooth = _expect_factors(smooth, linear).to(weight)
                weight = weight.float() * smooth.float()
            if scheme.rank:

                def requantized(rest: Tensor) -> Tensor:
                    found = layer_type.quantize_weight(rest, scheme)
                    return rotate_blocks(layer_type.dequantize_weight(*found), scheme.rotate)

                weight, down, up = split(weight.float(), scheme.rank, dtype, requantized, smooth)
            quantized, scale = layer_type.quantize_weight(weight, scheme)
            _expect_finite(scale)  # a scale that its dtype can't hold
            bias = None if linear.bias is None else linear.bias.detach().clone()
            branch = (down, up, smooth)
            layer = layer_type(quantized, scale, bias, *branch, dtype=dtype, rotate=scheme.rotate)
        return layer.train(linear.training)

    @staticmethod
    def empty(
        in_features: int,
        out_features: int,
        scheme: str | Scheme,
        *,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> QuantLinear:
        """Return a layer with memory for a state dict to fill."""
        scheme = Scheme.parse(scheme).of(in_features)
        layer_type, rank = QuantLinear.kinds[scheme.kind], scheme.rank

        def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        return layer_type(
            *layer_type.empty_weight(in_features, out_features, scheme, device),
            new(out_features) if bias else None,
            new(rank, in_features) if rank else None,
            new(out_features, rank) if rank else None,
            new(in_features) if scheme.smooth else None,
            dtype=dtype,
            rotate=scheme.rotate,
        )

    @staticmethod
    @abstractmethod
    def quantize_weight(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """Return the low-bit values and scales of a floating weight, rotated as the scheme says."""

    @staticmethod
    @abstractmethod
    def dequantize_weight(quantized: Tensor, scale: Tensor) -> Tensor:
        """Return the weight that these stand for, float32 [out, in]; rotated if it was."""

    @staticmethod
    @abstractmethod
    def empty_weight(
        in_features: int, out_features: int, scheme: Scheme, device: Any
    ) -> tuple[Tensor, Tensor]:
        """Return uninitialised values and scales."""

    @abstractmethod
    def _multiply(self, x: Tensor | QuantizedRows, options: Options) -> Any:
        """Return the layer's output for x as it is given, by the product with these options.

        Among them, for a tensor: up and down.
        """

    @property
    def quantized(self) -> Tensor:
        """The low-bit values."""
        return self._buffers[self.storage]

    @property
    def qweight(self) -> Tensor:
        """`quantized`, by the name by which peft asks where a layer is: `weight` is computed."""
        return self.quantized

    @property
    def scheme(self) -> Scheme:
        """How this layer is quantised."""
        rank = 0 if self.down is None else self.down.shape[0]
        return Scheme(self.kind, self._group(), rank, self.smooth is not None, self.rotate)

    def _group(self) -> int | None:
        return None

    def _shape(self) -> tuple[int, int]:
        return tuple(self.quantized.shape)

    @property
    def weight_dtype(self) -> torch.dtype:
        """What `weight` reads in: the dtype the module was cast to."""
        return self._dtype

    @property
    def weight(self) -> Tensor:
        """The dequantised weight [out, in], in the dtype the module was cast to."""
        with torch.no_grad():
            weight = self.dequantize_weight(self.quantized, self.weight_scale)
            weight = rotate_blocks(weight, self.rotate)
            if self.smooth is not None:
                weight = weight / self.smooth.float()
            if self.up is not None:
                weight = weight + self.up.float() @ self.down.float()
            return weight.to(self._dtype).as_subclass(ComputedWeight)

    def dequantize(self) -> nn.Linear:
        """Return a plain `nn.Linear` with the dequantised weight."""
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta"
        )
        linear.weight = nn.Parameter(self.weight.as_subclass(Tensor), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.clone(), requires_grad=False)
        return linear.train(self.training)

    def forward(
        self,
        input: Tensor | QuantizedRows,
        join: Join | None = None,
        *,
        activation: str | None = None,
        rows: bool = False,
    ) -> Tensor | QuantizedRows:
        """Return input @ weight.T + bias in input's dtype (autocast's, where it is on).

        Args:
            input: may be quantised already, where the layer needs no more of it (`refuse_rows`).
            join: adds rows to the low-rank branch: from (down, up, dtype) of the layer it makes
                the pair to use, as `lora.Linear` does for adapters.
            activation: of the output, before it is rounded: one of `ops/_epilogue.py`.
            rows: return `QuantizedRows` of the output, for another layer.
        """
        if join is None and not rows:
            out = self._forward_short(input, activation)
            if out is not None:
                return out
        x, options = input, {}
        if isinstance(x, QuantizedRows):
            self._expect_rows(x, join)
        else:
            x = self._expect_input(x)
            down, up = self.down, self.up
            if join is not None:
                down, up = join(down, up, x.dtype)
            options = {"up": up, "down": cast(down, x.dtype)}
        if activation is not None:
            options["activation"] = activation
        if not rows:
            return self._multiply(x, options)
        # Of int8 rows the products make int8 outputs as of bfloat16's.
        if isinstance(x, QuantizedRows) and x.dtype != torch.bfloat16:
            return QuantizedRows.of(self._multiply(x, options))
        q, scale = self._multiply(x, options | {"out_dtype": torch.int8})
        return QuantizedRows(q, scale, x.dtype)

    def _forward_short(self, x: Any, activation: str | None) -> Tensor | None:
        """Return the output where there is a short way to it, else None: see `_gemm_short.py`.

        What QuantLinear.forward checks is what the product checks, autocast apart.
        """
        if self.short is None or torch.compiler.is_compiling():
            return None
        try:
            own = self._buffers
            weight = own[self.storage], own["weight_scale"], own["bias"], own["smooth"]
            branch = own["down"], own["up"]
        except KeyError:  # something else has taken a buffer's place
            return None
        if torch.is_autocast_enabled("cpu"):
            return None
        return run_short(self.short, x, None, *weight, self.rotate, *branch, activation, None)

    def _expect_input(self, x: Tensor) -> Tensor:
        """Return x in the dtype to work in."""
        expect_tensor("input", x)
        autocast = autocast_dtype(x)
        if autocast is not None:
            x = x.to(autocast)
        if x.dtype not in FLOATS:
            raise ValueError(f"x: expected float32, bfloat16 or float16, got {x.dtype}")
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x: expected [..., {self.in_features}], got {list(x.shape)}")
        return x

    def _expect_rows(self, x: QuantizedRows, join: Join | None) -> None:
        reason = "has adapters" if join is not None else self.refuse_rows()
        if reason is not None:
            raise TypeError(f"x: expected a tensor, because the layer {reason}, got QuantizedRows")
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x: expected [..., {self.in_features}], got {list(x.shape)}")
        if x.rotate != self.rotate or x.smooth is not self.smooth:
            got = "none" if x.smooth is None else "others"
            raise ValueError(
                f"x: expected rows quantised for {self.scheme}, with its smoothing factors and "
                f"rotation, got factors: {got}, rotation: {x.rotate}"
            )

    def _activations(self, x: Tensor | QuantizedRows) -> dict[str, Any]:
        """Return x as the products with 8-bit activations take it."""
        if isinstance(x, QuantizedRows):
            return {"a": x.q, "a_scale": x.scale, "out_dtype": x.dtype}
        return {"a": x, "a_scale": None, "smooth": self.smooth, "rotate": self.rotate}

    def refuse_rows(self) -> str | None:
        """Return why `forward` needs its input as it is and takes no `QuantizedRows`, or None."""
        return None if self.down is None else "has a low-rank branch"

    def reset_parameters(self) -> None:
        """Refuse: there is no weight to initialise."""
        raise RuntimeError(
            f"reset_parameters: expected a layer with a floating weight, got one in {self.scheme}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Move or cast, but keep the weight and its scale to the last bit."""
        kept = {name: self._buffers[name] for name in (self.storage, "weight_scale")}
        super()._apply(fn, recurse)
        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        for name, before in kept.items():
            now = self._buffers[name]
            if now.dtype != before.dtype:
                self._buffers[name] = before.to(now.device)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        reasons = [
            f"{prefix}{name}: {reason}"
            for name in (self.storage, "weight_scale", "smooth")
            if (reason := self.refuse_tensor(name, state_dict.get(f"{prefix}{name}"))) is not None
        ]
        if reasons:  # a copy would convert the values
            args[-1].extend(reasons)
            return
        dtype = self._scale_dtype(state_dict.get(f"{prefix}weight_scale"))
        self.weight_scale = self.weight_scale.to(dtype)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.weight_scale.dtype != dtype:  # load_state_dict(assign=True)
            self.weight_scale = self.weight_scale.to(dtype)

    def refuse_tensor(self, name: str, value: Tensor | None) -> str | None:
        """Return why a tensor can't become the low-bit values, scales or factors, or None."""
        here = self._buffers[name]
        if value is None or here is None:  # too many or too few are torch's to name
            return None
        if name == "smooth":
            usable = value.is_meta or bool((value.isfinite() & (value > 0)).all())
            return None if usable else "expected finite positive factors, got others"
        dtype = self._scale_dtype(value) if name == "weight_scale" else here.dtype
        if value.dtype != dtype or value.shape != here.shape:
            return f"expected {dtype} {list(here.shape)}, got {value.dtype} {list(value.shape)}"
        if name == "weight_scale" and not value.is_meta:
            scale = value.float()
            if not (scale.isfinite() & (scale >= 0)).all():
                found = "a negative one" if scale.isfinite().all() else "inf or NaN"
                return f"expected finite scales of zero or more, got {found}"
        return None

    def _scale_dtype(self, saved: Tensor | None) -> torch.dtype:
        """Return the dtype that scales from a state dict are kept in."""
        return self.weight_scale.dtype

    def extra_repr(self) -> str:
        """Return what `print(module)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, scheme={self.scheme}"
        )


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast asks for on x's device, None where it is off."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def cast(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return value in dtype: itself where it is that already, or None."""
    return value if value is None or value.dtype == dtype else value.to(dtype)


def _adopt_adapter(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Have a LoRA that is being put around a quantised layer join the layer's branch.

    peft chooses a LoRA's class by the layer's and takes another only from the caller's own config,
    which diffusers' loaders make themselves. That a layer is put into one is seen here.
    """
    if name != "base_layer" or not isinstance(child, QuantLinear):
        return
    if type(parent).__module__.startswith("peft."):
        from .lora import adopt

        adopt(parent)


register_module_module_registration_hook(_adopt_adapter)


def _expect_finite(rows: Tensor) -> None:
    finite = rows.isfinite().reshape(rows.shape[0], -1).all(1)
    if not finite.all():
        row = int(finite.logical_not().nonzero()[0])
        raise ValueError(f"linear: expected finite weights, got inf or NaN in row {row}")


def _expect_factors(smooth: Tensor, linear: nn.Linear) -> Tensor:
    if smooth.shape != (linear.in_features,) or not smooth.is_floating_point():
        raise ValueError(
            f"smooth: expected floating [{linear.in_features}], got {smooth.dtype} "
            f"{list(smooth.shape)}"
        )
    # In the layer's dtype, where a factor can become 0 or inf.
    stored = smooth.detach().to(linear.weight.dtype)
    if not (stored.isfinite() & (stored > 0)).all():
        raise ValueError("smooth: expected positive finite factors, got others")
    return stored


def refuse_linear(linear: nn.Linear, scheme: Scheme) -> str | None:
    """Return why this layer can't be quantised so, or None."""
    if isinstance(linear, QuantLinear):
        return f"expected a layer that is not quantised, got one in {linear.scheme}"
    weight, inputs = linear.weight, linear.in_features
    if weight.dtype not in FLOATS:
        return f"expected float32, bfloat16 or float16 weights, got {weight.dtype}"
    if weight.numel() == 0:
        return f"expected weights, got an empty {list(weight.shape)}"
    if weight.is_meta:
        return "expected weights, got a layer on the meta device, which has none"
    if inputs >= MAX_K:
        return f"expected fewer than {MAX_K} inputs for exact sums, got {inputs}"
    if scheme.group is not None and inputs % scheme.group:
        return f"expected inputs that are a multiple of group {scheme.group}, got {inputs}"
    if scheme.rotate and inputs % scheme.rotate:
        return f"expected inputs that are a multiple of the rotation {scheme.rotate}, got {inputs}"
    if scheme.rank >= min(weight.shape):
        return f"expected a rank below {min(weight.shape)} for its shape, got {scheme.rank}"
    return None
