"""A trial: a pipeline with one cache on it draws held-out images, and its work is counted.

    PSNR = 10 log10(1 / mean (y - y_full)^2)    y, y_full in [0, 1]; dB, one value per image

Work is counted in the linear and convolution layers of the model's blocks (multiplications),
whoever calls them: `block_share` is a trial's over the uncached run's. A call of the model counts
as full if all of these layers ran, as partial if some did; one in which all ran on some of the
tokens counts as partial, and with its share of the work as full. `full_steps` is full calls over
the calls of one step. What lies outside the blocks (embeddings, output layer) is in neither;
embedders of the time, which a DiT keeps in its blocks and its output layer calls too, count as
outside.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOST_DB = 150.0  # of images that are equal, so that means stay finite
HELD_OUT_SEED = 20_000
BLOCKS = ("transformer_blocks", "down_blocks", "mid_block", "up_blocks")
_EMBEDS = re.compile(r"\.emb\.|time_emb_proj")


@dataclass(frozen=True)
class Trial:
    """One setting of one method."""

    method: str
    setting: str
    install: Callable[[Any], dict[str, Any] | None]
    """Puts the cache on a pipeline that nobody uses afterwards; returns notes for the record."""
    package: str | None = None
    steps: int | None = None
    """Steps to draw with, where they are not the model's."""
    batch: int | None = None
    """Images to draw at once, where they are not the study's."""


@dataclass(frozen=True)
class Study:
    """What all trials of one model share."""

    load: Callable[[], Any]
    steps: int
    images: int
    batch: int

    def pipeline(self) -> Any:
        """Return a pipeline of one's own."""
        pipe = self.load()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def is_unet(self) -> bool:
        """Return whether the model has an encoder and a decoder."""
        return _is_unet(self.load)

    def calibration(self, calls: int = 4, images: int = 8) -> list[dict[str, Any]]:
        """Return calls whose noise no held-out image has, all labels among them."""
        classes = self.pipeline().num_classes
        return [
            {
                "class_labels": [(call * images + index) % classes for index in range(images)],
                "num_inference_steps": self.steps,
                "generator": torch.Generator().manual_seed(1000 + call),
                "output_type": "pt",
            }
            for call in range(calls)
        ]


@functools.cache
def _is_unet(load: Callable[[], Any]) -> bool:
    return hasattr(load().transformer, "up_blocks")


@dataclass(frozen=True)
class Drawn:
    """Images [n, C, H, W] in [0, 1], and the work of every call of the transformer, per image."""

    images: Tensor
    work: list[float]
    layers: list[int]
    """Layers that ran, of every call."""


@contextmanager
def counted(transformer: torch.nn.Module) -> Iterator[tuple[list[float], list[int]]]:
    """Count each call's multiplications in the blocks' layers, per image, and layers that ran."""
    found: list[float] = []
    ran: list[int] = []
    images = 1

    def enter(module: Any, args: tuple[Tensor, ...], kwargs: Any) -> None:
        nonlocal images
        images = len(args[0])
        found.append(0.0)
        ran.append(0)

    def add(layer: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(layer, torch.nn.Linear):  # what a cache hands on may have more rows
            found[-1] += args[0].numel() * layer.out_features / images
        else:
            found[-1] += output.numel() * layer.weight[0].numel() / images
        ran[-1] += 1

    layers = [
        layer
        for lists in BLOCKS
        if hasattr(transformer, lists)
        for name, layer in getattr(transformer, lists).named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and not _EMBEDS.search(name)
    ]
    handles = [layer.register_forward_hook(add) for layer in layers]
    handles.append(transformer.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
    try:
        yield found, ran
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def draw(pipe: Any, study: Study, steps: int | None = None, batch: int | None = None) -> Drawn:
    """Draw the held-out images; what is drawn depends on the image's place alone."""
    config, drawn = pipe.transformer.config, []
    shape = (study.images, config.in_channels, config.sample_size, config.sample_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(HELD_OUT_SEED))
    labels = torch.arange(study.images) % pipe.num_classes
    with counted(pipe.transformer) as (work, layers):
        for rows in torch.arange(study.images).split(batch or study.batch):
            result = pipe(labels[rows], steps or study.steps, latents=noise[rows], output_type="pt")
            drawn.append(result.images)
    return Drawn(torch.cat(drawn), work, layers)


def decibels(images: Tensor, reference: Tensor) -> Tensor:
    """Return the PSNR of the module's header, [n]."""
    error = (images - reference).double().square().flatten(1).mean(1)
    return (-10 * error.log10()).clamp(max=MOST_DB)


def run(trial: Trial, study: Study, reference: Drawn) -> dict[str, Any]:
    """Return a trial's row of the record."""
    pipe = study.pipeline()
    notes = trial.install(pipe) or {}
    batch = trial.batch or study.batch
    drawn = draw(pipe, study, trial.steps, batch)
    batches, of_reference = (math.ceil(study.images / size) for size in (batch, study.batch))
    calls = len(reference.work) * batches / of_reference  # of a run in full, in these batches
    levels, whole = decibels(drawn.images, reference.images), max(reference.work)
    every = max(reference.layers)
    # All layers on some of the tokens are that share of a full call.
    full = sum(
        1 if work > 0.999 * whole else work / whole if layers == every else 0
        for work, layers in zip(drawn.work, drawn.layers, strict=True)
    )
    partial = sum(0 < work <= 0.999 * whole for work in drawn.work)
    return {
        "method": trial.method,
        "setting": trial.setting,
        "package": trial.package,
        "full_steps": full / calls * study.steps,
        "partial_steps": partial / calls * study.steps,
        "block_share": sum(drawn.work) / calls / (sum(reference.work) / len(reference.work)),
        "psnr_db": levels.mean().item(),
        "psnr_median_db": levels.median().item(),
        "psnr_worst_db": levels.min().item(),
        **notes,
    }
