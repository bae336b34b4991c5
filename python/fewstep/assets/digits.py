"""A digit generator with the interface of a diffusers pipeline: data, pipeline, packaged weights.

    x_s = (1 - s) x0 + s eps,   v = eps - x0          rectified flow, s in [0, 1], s = 1 is noise
    network: v(x_s, s * timestep_scale, label)        label 10 means "no label"
    guidance: v = v_null + g (v_label - v_null)       two calls per step while g > 1

x  [B, 1, 16, 16] fp32 in [-1, 1].  The network is a stock DiTTransformer2DModel: 64 tokens,
8 blocks of width 128. The student's output is the average velocity down to s = 0, so that
x0 = x - s F(x, s): it wants FlowConsistencyScheduler, which it is packaged with.

The data are scikit-learn's 1,797 handwritten digits, 8x8 with values 0..16, upsampled once to
16x16 (bicubic, no antialiasing, clamped to [-1, 1]) and split in two class-stratified halves.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    DiTTransformer2DModel,
    ImagePipelineOutput,
    UNet2DModel,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fewstep.sampling.consistency import FlowConsistencyScheduler  # noqa: F401 (loading needs it)

DIGITS_PATH = Path(__file__).parent / "digits"
NUM_CLASSES = 10
TIMESTEP_SCALE = 16.0
_SPLIT_SEED = 0


@lru_cache(maxsize=1)
def _digits_halves() -> dict[str, tuple[Tensor, Tensor]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("digits_data needs scikit-learn: pip install scikit-learn") from error

    pixels, targets = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 8 - 1
    images = torch.nn.functional.interpolate(images, size=(16, 16), mode="bicubic").clamp(-1, 1)
    labels = torch.from_numpy(targets).long()
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    halves: dict[str, list[Tensor]] = {"train": [], "held_out": []}
    odd_to_train = True
    for label in range(NUM_CLASSES):
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        # The odd image of a class goes to either half in turn, so that the halves stay equal.
        middle = len(members) // 2
        if len(members) % 2:
            middle += odd_to_train
            odd_to_train = not odd_to_train
        halves["train"].append(members[:middle])
        halves["held_out"].append(members[middle:])
    rows = {name: torch.cat(parts) for name, parts in halves.items()}
    return {name: (images[index], labels[index]) for name, index in rows.items()}


def digits_data(split: Literal["train", "held_out"] = "train") -> tuple[Tensor, Tensor]:
    """(images [N, 1, 16, 16] fp32 in [-1, 1], labels [N]) of one half, sorted by label.

    "train" trains everything the project ships; "held_out" trains nothing, it is the reference.
    """
    halves = _digits_halves()
    if split not in halves:
        raise ValueError(f"split: expected 'train' or 'held_out', got {split!r}")
    images, labels = halves[split]
    return images.clone(), labels.clone()


def digits_transformer(*, heads: int = 4, layers: int = 8) -> DiTTransformer2DModel:
    """The untrained network, in eval mode.

    Train it in eval mode too (it has no dropout): in train mode every block of diffusers' DiT
    draws its own label drop. Drop labels outside, by passing the null label 10.
    """
    return DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=32,
        in_channels=1,
        num_layers=layers,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=NUM_CLASSES,
    ).eval()


def null_label(network: torch.nn.Module) -> int:
    """Return the label that means "no label": the number of those that mean one."""
    labels = network.config.get("num_embeds_ada_norm")  # of a DiT, which adds the null label itself
    return network.config.num_class_embeds - 1 if labels is None else labels


class DigitsPipeline(DiffusionPipeline):
    """Class-conditional 16x16 digits from a DiT and any flow-matching scheduler of diffusers.

    Args:
        transformer: velocity (teacher) or average velocity (student) network; a class-conditional
            UNet2DModel will do, too.
        scheduler: a flow-matching scheduler; `timesteps = sigma * num_train_timesteps`.
        timestep_scale: the network's time is sigma * timestep_scale. Far below the usual 1000, so
            that the network's exact time derivative stays of the size of its output.
        default_steps: `num_inference_steps` where a call gives none.
        default_guidance: `guidance_scale` where a call gives none; 1 means no second evaluation.
    """

    model_cpu_offload_seq = "transformer"
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        transformer: DiTTransformer2DModel | UNet2DModel,
        scheduler: SchedulerMixin,
        timestep_scale: float = TIMESTEP_SCALE,
        default_steps: int = 50,
        default_guidance: float = 1.0,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.register_to_config(
            timestep_scale=timestep_scale,
            default_steps=default_steps,
            default_guidance=default_guidance,
        )

    @property
    def num_classes(self) -> int:
        """Number of labels; this number itself is the null label."""
        return null_label(self.transformer)

    @property
    def guidance_scale(self) -> float:
        """Scale of the call under way; a step callback may read and change it."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Steps of the last call."""
        return self._num_timesteps

    def _labels(self, class_labels: int | list[int] | Tensor) -> Tensor:
        labels = torch.as_tensor(class_labels)
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise TypeError(f"class_labels: expected integers, got {labels.dtype}")
        labels = labels.reshape(1) if labels.ndim == 0 else labels
        if labels.ndim != 1 or not len(labels):
            raise ValueError(
                f"class_labels: expected a non-empty list, got shape {tuple(labels.shape)}"
            )
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise ValueError(
                f"class_labels: expected values in 0..{self.num_classes - 1}, "
                f"got {labels.min().item()}..{labels.max().item()}"
            )
        return labels.long()

    def _set_timesteps(
        self,
        steps: int | None,
        device: torch.device,
        sigmas: list[float] | None,
        timesteps: list[float] | None,
    ) -> Tensor:
        if sigmas is not None and timesteps is not None:
            raise ValueError("sigmas, timesteps: expected at most one of them, got both")
        accepted = inspect.signature(self.scheduler.set_timesteps).parameters
        for name, value in (("sigmas", sigmas), ("timesteps", timesteps)):
            if value is None:
                continue
            if name not in accepted:
                raise ValueError(
                    f"{name}: expected a scheduler that accepts them, "
                    f"got {type(self.scheduler).__name__}"
                )
            self.scheduler.set_timesteps(device=device, **{name: value})
            return self.scheduler.timesteps
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"num_inference_steps: expected a positive integer, got {steps!r}")
        # A default flow grid ends with a network call that moves sigma by 0.001; 1 ... 1/n wastes
        # none. A scheduler that brings its own knots keeps them.
        if "sigmas" in accepted and not getattr(self.scheduler, "has_own_knots", False):
            grid = np.linspace(1.0, 1 / steps, steps).tolist()
            self.scheduler.set_timesteps(sigmas=grid, device=device)
        else:
            self.scheduler.set_timesteps(steps, device=device)
        return self.scheduler.timesteps

    def _latents(
        self,
        batch: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        device: torch.device,
    ) -> Tensor:
        config = self.transformer.config
        shape = (batch, config.in_channels, config.sample_size, config.sample_size)
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"generator: expected {batch} generators, got {len(generator)}")
        dtype = self.transformer.dtype
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents: expected shape {shape}, got {tuple(latents.shape)}")
        return latents.to(device=device, dtype=dtype)

    def _velocity(self, latents: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        guided = self._guidance_scale > 1
        v = self.transformer(latents, timestep=time, class_labels=labels, return_dict=False)[0]
        if not guided:
            return v
        null = torch.full_like(labels, self.num_classes)
        v_null = self.transformer(latents, timestep=time, class_labels=null, return_dict=False)[0]
        return v_null + self._guidance_scale * (v - v_null)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | list[int] | Tensor,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        sigmas: list[float] | None = None,
        timesteps: list[float] | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        callback_on_step_end: Callable[[Any, int, Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw one digit per label.

        Args:
            class_labels: digits 0..9, one image each.
            num_inference_steps: network steps; None takes `default_steps` of the config.
            guidance_scale: g; above 1 every step makes a second, label-free evaluation. None takes
                `default_guidance` of the config.
            generator: seeds the noise, one for all or one per image.
            latents: start noise [B, 1, 16, 16] instead of the generator's.
            sigmas: the grid itself, decreasing, without the final 0.
            timesteps: the grid as sigma * num_train_timesteps; not with `sigmas`.
            output_type: "pil", "np" [B, 16, 16, 1] or "pt" [B, 1, 16, 16], both in [0, 1];
                "latent" [B, 1, 16, 16] as sampled, about [-1, 1].
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": ...}).
            callback_on_step_end_tensor_inputs: what the callback is given.
            return_dict: False returns the plain tuple (images,).

        Raises:
            TypeError, ValueError: an argument does not fit; the message says what was expected.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(
                f"output_type: expected 'pil', 'np', 'pt' or 'latent', got {output_type!r}"
            )
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                "callback_on_step_end_tensor_inputs: expected a subset of "
                f"{list(self._callback_tensor_inputs)}, got {sorted(unknown)} too"
            )
        config = self.config
        device = self._execution_device
        steps = config.default_steps if num_inference_steps is None else num_inference_steps
        self._guidance_scale = config.default_guidance if guidance_scale is None else guidance_scale

        labels = self._labels(class_labels).to(device)
        latents = self._latents(len(labels), generator, latents, device)
        grid = self._set_timesteps(steps, device, sigmas, timesteps)
        self._num_timesteps = len(grid)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        step_kwargs = {"generator": generator} if takes_generator else {}
        to_network = config.timestep_scale / self.scheduler.config.num_train_timesteps

        with self.progress_bar(total=len(grid)) as progress:
            for i, timestep in enumerate(grid):
                time = (timestep.float() * to_network).expand(len(labels))
                v = self._velocity(latents, time, labels)
                dtype = latents.dtype
                latents = self.scheduler.step(
                    v, timestep, latents, return_dict=False, **step_kwargs
                )[0].to(dtype)
                if callback_on_step_end is not None:
                    changed = callback_on_step_end(self, i, timestep, {"latents": latents}) or {}
                    latents = changed.pop("latents", latents)
                progress.update()

        self.maybe_free_model_hooks()
        images: Any = latents
        if output_type != "latent":
            images = (latents / 2 + 0.5).clamp(0, 1)
        if output_type in ("np", "pil"):
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def load_digits_pipeline(name: Literal["teacher", "student"] = "teacher") -> DigitsPipeline:
    """The packaged pipeline in fp32 on the CPU: the 50-step teacher or the 1-2-step student."""
    if name not in ("teacher", "student"):
        raise ValueError(f"name: expected 'teacher' or 'student', got {name!r}")
    path = DIGITS_PATH / name
    if not (path / "model_index.json").exists():
        raise FileNotFoundError(f"no packaged {name} at {path}; examples/digits/train.py makes it")
    return DigitsPipeline.from_pretrained(path, dtype=torch.float32, local_files_only=True)
