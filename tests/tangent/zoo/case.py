"""One tiny model and its call: what a few-step trainer differentiates, and what it holds constant.

    f: primals -> one flat vector, every float tensor that the model returns, joined

A case is data. `N` stands for a normal draw; tensors, lists, tuples and dicts of them stand for
themselves; float tensors take the model's precision. Time steps are floats of order one: the
sinusoidal embedding multiplies them by frequencies up to 1 (up to 1000 where the model scales its
time), and fp32 loses eps * t * frequency of the phase, whoever computes the tangent.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

PACKAGES = ("diffusers.models.transformers", "diffusers.models.unets")


class N(tuple):
    """A normal draw of this shape, made when the case is built."""

    __slots__ = ()

    def __new__(cls, *shape: int) -> N:
        return super().__new__(cls, shape)


def at(value: float, *shape: int) -> torch.Tensor:
    """Return a constant, a time step of a batch of one if no shape is given."""
    return torch.full(shape or (1,), value)


def _call(model: torch.nn.Module, inputs: dict[str, Any]) -> Any:
    return model(**inputs, return_dict=False)


@dataclass(frozen=True)
class Case:
    """`config` builds the model; `primals` are differentiated along, `constants` are not."""

    config: Mapping[str, Any]
    primals: Mapping[str, Any]
    constants: Mapping[str, Any] = field(default_factory=dict)
    call: Callable[[torch.nn.Module, dict[str, Any]], Any] = _call
    attention: str = "sdpa"
    """How attention is computed, joined by +: `sdpa` and `flex` are F.scaled_dot_product_attention
    and flex_attention; `softmax` and `linear` are spelled out by the model in plain operations."""
    budget: float = 1e-5
    """Largest relative error of the fp32 tangent; above 1e-5 only with a `note`."""
    wide_tables: bool = True
    """Whether the oracle computes rotary tables and frequencies in fp64 as well."""
    note: str = ""


@cache
def classes() -> dict[str, type[torch.nn.Module]]:
    """Every model class defined under the packages, also those not exported at the top level."""
    from diffusers.models.modeling_utils import ModelMixin

    found: dict[str, type[torch.nn.Module]] = {}
    for package in map(importlib.import_module, PACKAGES):
        for info in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"{package.__name__}.{info.name}")
            for name, value in vars(module).items():
                here = inspect.isclass(value) and value.__module__ == module.__name__
                if here and issubclass(value, ModelMixin):
                    found[name] = value
    return found


@dataclass
class Built:
    """A model with its inputs in one precision."""

    model: torch.nn.Module
    case: Case
    names: tuple[str, ...]
    primals: tuple[torch.Tensor, ...]
    tangents: tuple[torch.Tensor, ...]
    constants: dict[str, Any]

    def __call__(self, *primals: torch.Tensor) -> torch.Tensor:
        """Run the model and join what it returns."""
        inputs = {**self.constants, **dict(zip(self.names, primals, strict=True))}
        # A model may write into its inputs; the caller's tensors and the next run stay clean.
        inputs = _tree(inputs, lambda leaf: leaf.clone() if torch.is_tensor(leaf) else leaf)
        return torch.cat([leaf.flatten() for leaf in _leaves(self.case.call(self.model, inputs))])


def build(name: str, case: Case) -> tuple[Built, Built]:
    """Return the same model and inputs in fp32 and in fp64."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = classes()[name.split()[0]](**copy.deepcopy(dict(case.config))).eval()
    randomize(model, generator)

    def draw(leaf: Any) -> Any:
        return torch.randn(leaf, generator=generator) if isinstance(leaf, N) else leaf

    primals = tuple(_tree(dict(case.primals), draw).values())
    # Tangents have the size of their primals: a time scaled by 1000 must not drown the sample.
    tangents = tuple(
        torch.randn(p.shape, generator=generator) * p.square().mean().sqrt() for p in primals
    )
    constants = _tree(dict(case.constants), draw)

    def cast(leaf: Any) -> Any:
        return leaf.double() if torch.is_tensor(leaf) and leaf.is_floating_point() else leaf

    single = Built(model, case, tuple(case.primals), primals, tangents, constants)
    wide = copy.deepcopy(model).double().requires_grad_(False)
    double = Built(wide, case, single.names, *_tree((primals, tangents, constants), cast))
    return single, double


def randomize(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Redraw matrices, perturb vectors: adaLN gates and output heads that start at zero count."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            else:
                parameter.add_(0.1 * noise)


def _tree(value: Any, leaf: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        return {key: _tree(item, leaf) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_tree(item, leaf) for item in value)
    return leaf(value)


def _leaves(value: Any) -> list[torch.Tensor]:
    if torch.is_tensor(value):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = tuple(value.values())
    return [t for item in value for t in _leaves(item)] if isinstance(value, list | tuple) else []
