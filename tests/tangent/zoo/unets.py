"""UNets: two or three levels of a few channels each."""

from __future__ import annotations

import torch

from .audio import _plain
from .case import Case, N, at

_TEXT = {"encoder_hidden_states": N(1, 6, 16)}
_IMAGE = {"sample": N(1, 4, 8, 8), "timestep": at(2.5)}
_UNET = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 2,
    "cross_attention_dim": 16,
    "out_channels": 4,
    "in_channels": 4,
    "layers_per_block": 1,
    "sample_size": 8,
}


def _blocks(kind: str) -> dict[str, tuple[str, str]]:
    return {
        "down_block_types": (f"CrossAttnDownBlock{kind}", f"DownBlock{kind}"),
        "up_block_types": (f"UpBlock{kind}", f"CrossAttnUpBlock{kind}"),
    }


CASES: dict[str, Case] = {
    "UNet1DModel": Case(
        {
            "block_out_channels": (8, 32, 32),
            "in_channels": 4,
            "out_channels": 4,
            "extra_in_channels": 16,
            "norm_num_groups": 2,
            "sample_size": 32,
        },
        {"sample": N(1, 4, 32), "timestep": at(0.5)},
        attention="softmax",
    ),
    "UNet2DModel": Case(
        {
            "block_out_channels": (8, 16),
            "norm_num_groups": 2,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 4,
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 1,
            "sample_size": 8,
        },
        _IMAGE,
        note="its group norms get views after attention: F.group_norm's own forward mode raises on "
        "those, so they are made contiguous",
    ),
    "UNet2DConditionModel": Case(
        {**_UNET, **_blocks("2D"), "attention_head_dim": 2},
        _IMAGE,
        {**_TEXT, "encoder_attention_mask": torch.tensor([[1.0, 1, 1, 1, 1, 0]])},
    ),
    "UNet3DConditionModel": Case(
        {**_UNET, **_blocks("3D"), "attention_head_dim": 2},
        {"sample": N(1, 4, 2, 8, 8), "timestep": at(2.5)},
        _TEXT,
    ),
    "DreamLiteUNetModel": Case(
        {
            **_UNET,
            "down_block_types": (
                "DreamLiteCrossAttnNoSelfAttnDownBlock2D",
                "DreamLiteCrossAttnDownBlock2D",
            ),
            "up_block_types": ("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
            "attention_head_dim": 2,
            "ff_mult": 2,
        },
        _IMAGE,
        _TEXT,
    ),
    "I2VGenXLUNet": Case(
        {**_UNET, **_blocks("3D"), "attention_head_dim": 2},
        {"sample": N(1, 4, 2, 8, 8), "timestep": at(2.5)},
        {
            **_TEXT,
            "fps": torch.tensor([16]),
            "image_latents": N(1, 4, 2, 8, 8),
            "image_embeddings": N(1, 16),
        },
    ),
    "Kandinsky3UNet": Case(
        {
            "in_channels": 4,
            "time_embedding_dim": 16,
            "groups": 2,
            "attention_head_dim": 4,
            "layers_per_block": 3,
            "block_out_channels": (8, 16),
            "cross_attention_dim": 16,
            "encoder_hid_dim": 16,
        },
        _IMAGE,
        {**_TEXT, "encoder_attention_mask": torch.tensor([[1.0, 1, 1, 1, 1, 0]])},
    ),
    "UNetMotionModel": Case(
        {
            **_UNET,
            **_blocks("Motion"),
            "num_attention_heads": 2,
            "motion_num_attention_heads": 2,
        },
        {"sample": N(1, 4, 2, 8, 8), "timestep": at(2.5)},
        {"encoder_hidden_states": N(2, 6, 16)},
    ),
    "UNetSpatioTemporalConditionModel": Case(
        {
            # More channels than the 32 groups: a group of one would lose the time step.
            "block_out_channels": (64,),
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal",),
            "up_block_types": ("CrossAttnUpBlockSpatioTemporal",),
            "cross_attention_dim": 16,
            "num_attention_heads": 2,
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 1,
            "sample_size": 8,
            "projection_class_embeddings_input_dim": 24,
            "addition_time_embed_dim": 8,
        },
        {"sample": N(1, 2, 4, 8, 8), "timestep": at(2.5)},
        {
            "encoder_hidden_states": N(1, 1, 16),
            "added_time_ids": torch.tensor([[6.0, 12.0, 0.02]]),
        },
    ),
    "StableCascadeUNet": Case(
        {
            "in_channels": 4,
            "out_channels": 4,
            "timestep_ratio_embedding_dim": 8,
            "conditioning_dim": 16,
            "block_out_channels": (8, 16),
            "num_attention_heads": (2, 2),
            "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1),
            "clip_text_in_channels": 16,
            "clip_text_pooled_in_channels": 16,
            "clip_image_in_channels": 8,
            "dropout": (0.0, 0.0),
        },
        {"sample": N(1, 4, 8, 8), "timestep_ratio": at(1e-4)},
        {"clip_text_pooled": N(1, 1, 16), "clip_text": N(1, 6, 16), "clip_img": N(1, 1, 8)},
    ),
    "UVit2DModel": Case(
        {
            "hidden_size": 16,
            "cond_embed_dim": 16,
            "micro_cond_encode_dim": 2,
            "micro_cond_embed_dim": 10,
            "encoder_hidden_size": 16,
            "vocab_size": 32,
            "codebook_size": 32,
            "in_channels": 16,
            "block_out_channels": 16,
            "num_res_blocks": 1,
            "block_num_heads": 2,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "sample_size": 4,
        },
        {"encoder_hidden_states": N(1, 6, 16), "pooled_text_emb": N(1, 16)},
        {"input_ids": torch.arange(16).reshape(1, 4, 4), "micro_conds": at(1.0, 1, 5)},
        call=_plain,
        note="token ids are discrete: differentiated along the text embeddings",
    ),
}
