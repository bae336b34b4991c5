"""Random-weight pipelines of a few thousand parameters, built from configs without any download.

Text encoders are None: every pipeline takes embeddings. `call` runs a pipeline to latents from a
fixed seed, `CALLS` holds what each wants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from fewstep.assets.digits import DigitsPipeline, digits_transformer
from fewstep.sampling import FlowConsistencyScheduler

TEXT = 6


def _vae(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=channels,
        sample_size=16,
        scaling_factor=1.0,
        shift_factor=0.0,
    ).eval()


def digits(layers: int = 4) -> DigitsPipeline:
    """Two calls per step at the default scale: a guided and an unguided pass."""
    transformer = digits_transformer(heads=1, layers=layers)
    randomize(transformer)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    return DigitsPipeline(transformer, scheduler, default_steps=6, default_guidance=2.0)


def digits_student() -> DigitsPipeline:
    transformer = digits_transformer(heads=1, layers=4)
    randomize(transformer)
    scheduler = FlowConsistencyScheduler(knots={"2": [1.0, 0.6]})
    return DigitsPipeline(transformer, scheduler, default_steps=2)


def flux() -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=_vae(4),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )


def sd3() -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=16,
    ).eval()
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(4),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def sana() -> SanaPipeline:
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=8,
    ).eval()
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(4, 8),
        decoder_block_out_channels=(4, 8),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        upsample_block_type="interpolate",
        downsample_block_type="stride_conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.5,
    ).eval()
    return SanaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def pixart() -> PixArtAlphaPipeline:
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=4,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=16,
        cross_attention_dim=16,
        in_channels=4,
        out_channels=8,
        use_additional_conditions=False,
    ).eval()
    return PixArtAlphaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=_vae(4),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )


def sd_unet() -> StableDiffusionPipeline:
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(4, 8, 8),
        norm_num_groups=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
    ).eval()
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=_vae(4),
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


BUILDERS: dict[str, Callable[[], Any]] = {
    "digits": digits,
    "flux": flux,
    "sd3": sd3,
    "sana": sana,
    "pixart": pixart,
    "sd-unet": sd_unet,
}


def randomize(model: torch.nn.Module) -> None:
    """Fill zero-initialised layers too (adaLN gates, output heads), so that every block matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def build(name: str) -> Any:
    torch.manual_seed(0)
    pipe = BUILDERS[name]()
    randomize(denoiser(pipe))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def denoiser(pipe: Any) -> torch.nn.Module:
    return pipe.transformer if hasattr(pipe, "transformer") else pipe.unet


def _embeds(batch: int, width: int, offset: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + offset)
    return torch.randn((1, TEXT, width), generator=generator).repeat(batch, 1, 1)


def arguments(pipe: Any, batch: int = 1) -> dict[str, Any]:
    """What the pipeline's call wants, guidance included."""
    name = type(pipe).__name__
    if name == "DigitsPipeline":
        return {"class_labels": [3, 7, 1, 5][:batch]}
    both = {
        "prompt_embeds": _embeds(batch, 16, 0),
        "negative_prompt_embeds": _embeds(batch, 16, 1),
        "height": 16,
        "width": 16,
    }
    pooled = {
        "pooled_prompt_embeds": _embeds(batch, 8, 2)[:, 0],
        "negative_pooled_prompt_embeds": _embeds(batch, 8, 3)[:, 0],
    }
    if name == "FluxPipeline":
        return {**both, **pooled, "true_cfg_scale": 2.0}
    if name == "StableDiffusion3Pipeline":
        return {**both, **pooled, "guidance_scale": 3.0}
    mask = torch.ones(batch, TEXT, dtype=torch.long)
    masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
    if name == "SanaPipeline":
        embeds = {
            "prompt_embeds": _embeds(batch, 8, 0),
            "negative_prompt_embeds": _embeds(batch, 8, 1),
        }
        extra = {"use_resolution_binning": False, "negative_prompt": None}
        return {**both, **embeds, **masks, **extra, "height": 32, "width": 32}
    if name == "PixArtAlphaPipeline":
        extra = {"use_resolution_binning": False, "negative_prompt": None}
        return {**both, **masks, **extra}
    return {**both, "guidance_scale": 3.0}


def call(pipe: Any, seed: int = 0, batch: int = 1, **kwargs: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(denoiser(pipe).parameters()).dtype
    embeds = {
        name: value.to(dtype)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in arguments(pipe, batch).items()
    }
    given = {**embeds, "output_type": "latent", "return_dict": False, **kwargs}
    return pipe(generator=generator, **given)[0]


def inner(pipe: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A submodule that every step runs and one that a skipped step leaves out."""
    model = denoiser(pipe)
    if hasattr(model, "mid_block"):
        return model.down_blocks[0].resnets[0], model.mid_block.resnets[0]
    blocks = model.transformer_blocks
    part = "attn" if hasattr(blocks[0], "attn") else "attn1"
    return getattr(blocks[0], part), getattr(blocks[1], part)


class Counter:
    """Counts calls of modules through forward pre-hooks; use as a context manager."""

    def __init__(self, *modules: torch.nn.Module) -> None:
        self.counts = [0] * len(modules)
        self._handles = [
            module.register_forward_pre_hook(self._hook(index))
            for index, module in enumerate(modules)
        ]

    def _hook(self, index: int) -> Callable[..., None]:
        def count(*_: Any) -> None:
            self.counts[index] += 1

        return count

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
