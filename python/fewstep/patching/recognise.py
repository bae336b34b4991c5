"""What knows diffusers' pipelines: where the denoiser is and how its blocks are laid out.

Families are told by the class name of the denoiser, its bases included, so that nothing of
diffusers' models is imported. Only families that the tests run are listed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..caching import (
    BlockStack,
    EncoderStack,
    Grid,
    ModuleStack,
    TokenStack,
    UNetStack,
    choose_modules,
    find_modules,
)

__all__ = ["FAMILIES", "Family", "Target", "recognise", "recognise_model"]

_COMPONENTS = ("transformer", "unet")
_DENOISERS = re.compile(r"(transformer|unet)(_\w+)?")
# Known to run before or after the denoising loop.
_OUTSIDE = re.compile(
    r"(vae|text_encoder|tokenizer|image_encoder|image_processor|feature_extractor|safety_checker)"
    r"(_\d+)?"
)


# What a denoiser without known blocks can have.
_WHOLE = (
    'Caches of the whole output serve every denoiser: presets with scope="output" ("taylor", '
    '"fora", "easycache", ...) and plans that fewstep.caching.calibrate makes'
)


@dataclass(frozen=True)
class Family:
    """A denoiser architecture.

    Args:
        name: as users call it.
        model: class name of the denoiser.
        lists: attributes that hold its blocks, in the order they run; empty for a UNet.
        two_streams: blocks take and return text and image states (see `BlockStack`).
    """

    name: str
    model: str
    lists: tuple[str, ...] = ()
    two_streams: bool = False


FAMILIES = (
    Family(
        "FLUX", "FluxTransformer2DModel", ("transformer_blocks", "single_transformer_blocks"), True
    ),
    Family("Stable Diffusion 3", "SD3Transformer2DModel", ("transformer_blocks",), True),
    Family("SANA", "SanaTransformer2DModel", ("transformer_blocks",)),
    Family("PixArt", "PixArtTransformer2DModel", ("transformer_blocks",)),
    Family("DiT", "DiTTransformer2DModel", ("transformer_blocks",)),
    Family("Stable Diffusion UNet", "UNet2DConditionModel"),
    Family("UNet without text", "UNet2DModel"),
)


@dataclass(frozen=True)
class Target:
    """The part of a pipeline that runs on every step."""

    component: str  # "" for a model without a pipeline
    denoiser: nn.Module
    family: Family | None
    others: tuple[str, ...] = ()  # components that look like denoisers too

    @property
    def model(self) -> str:
        """Class name of the denoiser."""
        return type(self.denoiser).__name__

    @property
    def path(self) -> str:
        """Where the denoiser is, as users would write it."""
        return f"pipe.{self.component}" if self.component else "model"

    def describe(self) -> str:
        """Say what was recognised."""
        place = f" in `{self.component}`" if self.component else ""
        if self.family is None:
            return f"{self.model}{place}, of no family with known blocks"
        return f"{self.family.name}: {self.model}{place}"

    def require_eager(self, argument: str) -> None:
        """Raise ValueError where the denoiser is a compiled copy of a module."""
        if hasattr(self.denoiser, "_orig_mod"):
            raise ValueError(
                f"{argument}: expected an uncompiled model in {self.path}, got "
                f"{self.model}; patch first, then torch.compile"
            )

    @property
    def second(self) -> str | None:
        """The component that takes over from the denoiser at some step, as in Wan 2.2."""
        name = f"{self.component}_2"
        return name if self.others == (name,) else None

    def require_alone(self, argument: str) -> None:
        """Raise ValueError where other components take a share of the steps or of the work."""
        if self.others:
            names = ", ".join(f"`{name}`" for name in (self.component, *self.others))
            in_turns = argument == "cache" and self.second is not None
            way_out = _WHOLE if in_turns else "A pipeline with several can have steps only"
            raise ValueError(
                f"{argument}: expected a pipeline with one denoiser, got one with {names}. "
                f"{way_out}"
            )

    def rest(self, pipe: Any) -> tuple[list[str], list[str]]:
        """Names of the other components: known to be outside the denoising loop, and not known."""
        names = [
            name
            for name, part in pipe.components.items()
            if part is not None and name not in (self.component, "scheduler")
        ]
        outside = [name for name in names if _OUTSIDE.fullmatch(name)]
        return outside, [name for name in names if name not in outside]

    def layout(self, scope: str = "blocks") -> BlockStack | UNetStack | EncoderStack | TokenStack:
        """Return the denoiser's blocks for caching, as a whole or by some of their "tokens".

        Of a UNet these are all of it, its "levels" or its "encoder".

        Raises:
            ValueError: the family is not known, or has none of these, or the model is compiled.
        """
        self.require_eager("cache")
        self.require_alone("cache")
        model = self.denoiser
        if self.family is None:
            raise self._not_known()
        if not self.family.lists:
            if scope == "tokens":
                raise ValueError(
                    f"cache: expected a transformer for scope {scope!r}, got {self.model}"
                )
            down, mid = list(model.down_blocks), model.mid_block
            if scope == "encoder":
                return EncoderStack(model, model.conv_in, down, mid)
            return UNetStack(model, down, mid, list(model.up_blocks))
        blocks = [block for name in self.family.lists for block in getattr(model, name)]
        if scope == "tokens":
            grid = Grid(getattr(model.config, "patch_size", 1), model.config.in_channels)
            return TokenStack(model, blocks, self.family.two_streams, grid)
        if scope != "blocks":
            raise ValueError(f"cache: expected a UNet for scope {scope!r}, got {self.model}")
        return BlockStack(model, blocks, self.family.two_streams)

    def _not_known(self) -> ValueError:
        known = ", ".join(family.model for family in FAMILIES)
        return ValueError(f"cache: expected a denoiser of {known}; got {self.model}. {_WHOLE}")

    def _blocks(self) -> dict[str, nn.Module] | None:
        """Return the transformer blocks by path, a UNet's among them; None where not known."""
        model = self.denoiser
        if self.family is None:
            return None
        if self.family.lists:
            lists = [(name, getattr(model, name)) for name in self.family.lists]
        else:
            lists = [
                (name, blocks)
                for name, blocks in model.named_modules()
                if name.endswith("transformer_blocks")
            ]
        return {f"{name}.{i}": block for name, blocks in lists for i, block in enumerate(blocks)}

    def modules(self, scope: str, pattern: Any = None) -> ModuleStack:
        """Return the blocks (scope "block") or their layers ("module") for caching one by one.

        Raises:
            ValueError: blocks of a family that is not known, a pattern that matches nothing, a
                model that has no such layers, or a compiled one.
        """
        self.require_eager("cache")
        self.require_alone("cache")
        blocks = self._blocks()
        if scope == "block":
            if self.family is None:
                raise self._not_known()
            if not blocks:
                raise ValueError(
                    f"cache: expected a denoiser with transformer blocks for scope {scope!r}, got "
                    f"{self.model} without"
                )
            chosen = choose_modules(blocks, pattern)
            return ModuleStack(self.denoiser, chosen, self.family.two_streams)
        found = find_modules(self.denoiser, blocks)
        if not found:
            raise ValueError(
                "cache: expected a denoiser with attention or feed-forward layers in lists of "
                f"blocks, got {self.model} without"
            )
        chosen = choose_modules(found, pattern)
        return ModuleStack(self.denoiser, chosen, blocks=blocks or {})


def _family(denoiser: nn.Module) -> Family | None:
    names = {base.__name__ for base in type(denoiser).__mro__}
    return next((f for f in FAMILIES if f.model in names), None)


def recognise_model(model: Any) -> Target:
    """Return a denoiser that is given without its pipeline.

    Raises:
        TypeError: not a module.
    """
    if not isinstance(model, nn.Module):
        what = model.__name__ if isinstance(model, type) else type(model).__name__
        raise TypeError(f"model: expected a diffusers pipeline or its denoiser, got {what}")
    return Target("", model, _family(model))


def recognise(pipe: Any) -> Target:
    """Find the denoiser of a pipeline.

    Raises:
        TypeError: not a diffusers pipeline.
        ValueError: a pipeline without a denoiser in a place that is known.
    """
    from diffusers import DiffusionPipeline

    if not isinstance(pipe, DiffusionPipeline):
        what = pipe.__name__ if isinstance(pipe, type) else type(pipe).__name__
        kind = "the class" if isinstance(pipe, type) else "an object of type"
        raise TypeError(f"pipe: expected a diffusers DiffusionPipeline object, got {kind} {what}")
    for component in _COMPONENTS:
        denoiser = getattr(pipe, component, None)
        if isinstance(denoiser, nn.Module):
            others = tuple(
                name
                for name, part in pipe.components.items()
                if name != component and isinstance(part, nn.Module) and _DENOISERS.fullmatch(name)
            )
            return Target(component, denoiser, _family(denoiser), others)
    raise ValueError(
        f"pipe: expected a model in one of {', '.join(_COMPONENTS)}, got {type(pipe).__name__} "
        f"with {sorted(pipe.components)}"
    )
