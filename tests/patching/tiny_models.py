"""Denoisers of a few thousand parameters with what their `forward` takes, for bare-model tests."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    QwenImageTransformer2DModel,
    WanTransformer3DModel,
)
from torch import Tensor, nn

from patching.tiny_pipelines import TEXT, build, randomize

FAMILIES = ("flux", "sd3", "sana", "pixart", "dit")  # whose blocks are known
OTHERS = ("wan", "qwen")


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model(name: str) -> nn.Module:
    """Return a denoiser with random weights, in eval mode."""
    torch.manual_seed(0)
    if name == "dit":
        found: nn.Module = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=4,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=10,
        )
    elif name == "wan":
        found = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=8,
            ffn_dim=32,
            num_layers=4,
            rope_max_seq_len=32,
        )
    elif name == "qwen":
        found = QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=4,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
        )
    else:
        return build(name).transformer
    randomize(found)
    return found.eval()


def inputs(name: str, batch: int = 1) -> dict[str, Any]:
    """Return what one call of `model(name)` is given."""
    time = torch.full((batch,), 500.0)
    text = _randn(batch, TEXT, 16, seed=1)
    image = _randn(batch, 4, 8, 8)
    if name == "flux":
        return {
            "hidden_states": _randn(batch, 16, 16),
            "encoder_hidden_states": text,
            "pooled_projections": _randn(batch, 8, seed=2),
            "timestep": time / 1000,
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(TEXT, 3),
        }
    if name == "sd3":
        pooled = _randn(batch, 8, seed=2)
        given = {"hidden_states": image, "encoder_hidden_states": text, "timestep": time}
        return {**given, "pooled_projections": pooled}
    if name == "sana":
        text = _randn(batch, TEXT, 8, seed=1)
        return {"hidden_states": image, "encoder_hidden_states": text, "timestep": time}
    if name == "pixart":
        kinds = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        return {"hidden_states": image, "encoder_hidden_states": text, "timestep": time, **kinds}
    if name == "dit":
        labels = torch.arange(batch) + 3
        return {"hidden_states": image, "timestep": time.long(), "class_labels": labels}
    if name == "wan":
        video = _randn(batch, 4, 1, 8, 8)
        return {"hidden_states": video, "timestep": time, "encoder_hidden_states": text}
    if name == "qwen":
        return {
            "hidden_states": _randn(batch, 16, 16),
            "encoder_hidden_states": text,
            "encoder_hidden_states_mask": torch.ones(batch, TEXT, dtype=torch.long),
            "timestep": time / 1000,
            "img_shapes": [[(1, 4, 4)]] * batch,
        }
    raise KeyError(name)
