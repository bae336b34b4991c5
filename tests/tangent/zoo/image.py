"""Image transformers with joint or cross attention, as in their pipelines: text is constant."""

from __future__ import annotations

import torch

from .case import Case, N, at

LATENT = {"hidden_states": N(1, 4, 8, 8), "timestep": at(2.5)}
TOKENS = {"hidden_states": N(1, 16, 4), "timestep": at(0.01)}
TEXT = {"encoder_hidden_states": N(1, 6, 16)}


def grid(height: int, width: int, axes: int = 3) -> torch.Tensor:
    """Return position ids (height * width, axes) whose last two columns are row and column."""
    ids = torch.zeros(height, width, axes)
    ids[..., -2] = torch.arange(height)[:, None]
    ids[..., -1] = torch.arange(width)[None]
    return ids.reshape(-1, axes)


FLUX = {"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1}
HEADS = {"attention_head_dim": 8, "num_attention_heads": 2}
FLUX_ROPE = {**FLUX, **HEADS, "joint_attention_dim": 16, "axes_dims_rope": (2, 2, 4)}
IDS = {"img_ids": grid(4, 4), "txt_ids": torch.zeros(6, 3)}

_SIZES = {
    "original_size": at(64.0, 1, 2),
    "target_size": at(64.0, 1, 2),
    "crop_coords": at(0.0, 1, 2),
}
_PIXART = {
    **HEADS,
    "sample_size": 8,
    "num_layers": 1,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 8,
    "norm_type": "ada_norm_single",
    "caption_channels": 16,
    "cross_attention_dim": 16,
}

CASES: dict[str, Case] = {
    "AuraFlowTransformer2DModel": Case(
        {
            **HEADS,
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "caption_projection_dim": 16,
            "joint_attention_dim": 16,
            "out_channels": 4,
            "pos_embed_max_size": 16,
        },
        {"hidden_states": N(1, 4, 8, 8), "timestep": at(0.01)},
        TEXT,
    ),
    "BriaTransformer2DModel": Case(
        {**FLUX, **HEADS, "joint_attention_dim": 16, "axes_dims_rope": [0, 4, 4]},
        {**TOKENS, "timestep": at(2.5)},
        {**TEXT, **IDS},
    ),
    "BriaFiboTransformer2DModel": Case(
        {
            **FLUX,
            **HEADS,
            "joint_attention_dim": 16,
            "text_encoder_dim": 8,
            "axes_dims_rope": [0, 4, 4],
        },
        {**TOKENS, "timestep": at(2.5)},
        {**TEXT, **IDS, "text_encoder_layers": [N(1, 6, 8), N(1, 6, 8)]},
    ),
    "BriaFibo2Transformer2DModel": Case(
        {
            "in_channels": 4,
            "patch_size": 2,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "cap_feat_dim": 16,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 2,
            "gist_min_text_len": 4,
            "gist_max_text_len": 32,
            "axes_dims": (8, 4, 4),
            "axes_lens": (32, 32, 32),
        },
        {"hidden_states": N(1, 4, 8, 8), "timestep": at(0.01)},
        {"encoder_hidden_states": N(1, 2, 6, 16)},
    ),
    "ChromaTransformer2DModel": Case(
        {
            **FLUX_ROPE,
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
        {**TOKENS, "timestep": at(0.001)},
        {**TEXT, **IDS},
    ),
    "CogView3PlusTransformer2DModel": Case(
        {
            **HEADS,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 1,
            "out_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "condition_dim": 2,
            "pos_embed_max_size": 8,
            "sample_size": 8,
        },
        LATENT,
        {**TEXT, **_SIZES},
    ),
    "CogView4Transformer2DModel": Case(
        {
            **HEADS,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 1,
            "out_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "rope_axes_dim": (16, 16),
        },
        LATENT,
        {**TEXT, **_SIZES},
    ),
    "DiTTransformer2DModel": Case(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 1,
            "num_embeds_ada_norm": 8,
            "patch_size": 2,
            "sample_size": 8,
        },
        LATENT,
        {"class_labels": torch.tensor([3])},
    ),
    "ErnieImageTransformer2DModel": Case(
        {
            "hidden_size": 16,
            "num_attention_heads": 1,
            "num_layers": 1,
            "ffn_hidden_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 1,
            "text_in_dim": 16,
            "rope_axes_dim": (8, 4, 4),
        },
        {"hidden_states": N(1, 4, 4, 4), "timestep": at(2.5)},
        {"text_bth": N(1, 6, 16), "text_lens": torch.tensor([6])},
    ),
    "FluxTransformer2DModel": Case(
        {**FLUX_ROPE, "pooled_projection_dim": 8, "guidance_embeds": True},
        TOKENS,
        {**TEXT, **IDS, "pooled_projections": N(1, 8), "guidance": at(0.0035)},
    ),
    "Flux2Transformer2DModel": Case(
        {**FLUX, **HEADS, "joint_attention_dim": 16, "axes_dims_rope": (2, 2, 2, 2)},
        TOKENS,
        {**TEXT, "img_ids": grid(4, 4, 4), "txt_ids": torch.zeros(6, 4), "guidance": at(0.0035)},
    ),
    "Flux3Transformer2DModel": Case(
        {
            **HEADS,
            "in_channels": 4,
            "cond_in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "joint_attention_dim": 16,
            "axes_dims_rope": (2, 2, 2, 2),
            "flow_map": True,
        },
        {**TOKENS, "target_timestep": at(0.004)},
        {**TEXT, "img_ids": grid(4, 4, 4), "txt_ids": torch.zeros(6, 4)},
    ),
    "GlmImageTransformer2DModel": Case(
        {
            **HEADS,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "text_embed_dim": 16,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "prior_vq_quantizer_codebook_size": 64,
        },
        LATENT,
        {
            **TEXT,
            "prior_token_id": torch.arange(16)[None],
            "prior_token_drop": torch.zeros(1, 16, dtype=torch.bool),
            "target_size": at(8.0, 1, 2),
            "crop_coords": at(0.0, 1, 2),
        },
    ),
    "HunyuanDiT2DModel": Case(
        {
            **HEADS,
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "cross_attention_dim": 16,
            "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 4,
            "hidden_size": 16,
            "text_len": 6,
            "text_len_t5": 4,
            "activation_fn": "gelu-approximate",
        },
        LATENT,
        {
            **TEXT,
            "text_embedding_mask": at(1.0, 1, 6),
            "encoder_hidden_states_t5": N(1, 4, 8),
            "text_embedding_mask_t5": at(1.0, 1, 4),
            "image_meta_size": torch.tensor([[4.0, 4.0, 2.0, 2.0, 0.0, 0.0]]),
            "style": torch.zeros(1, dtype=torch.long),
            "image_rotary_emb": (N(16, 8), N(16, 8)),
        },
    ),
    "LongCatImageTransformer2DModel": Case(
        {**FLUX_ROPE, "pooled_projection_dim": 8}, TOKENS, {**TEXT, **IDS}
    ),
    "OvisImageTransformer2DModel": Case({**FLUX_ROPE, "out_channels": 4}, TOKENS, {**TEXT, **IDS}),
    "PixArtTransformer2DModel": Case(
        {**_PIXART, "use_additional_conditions": False},
        LATENT,
        {**TEXT, "encoder_attention_mask": torch.tensor([[1.0, 1, 1, 1, 1, 0]])},
    ),
    "PRXTransformer2DModel": Case(
        {
            "in_channels": 4,
            "patch_size": 2,
            "context_in_dim": 16,
            "hidden_size": 16,
            "num_heads": 2,
            "depth": 1,
            "axes_dim": [4, 4],
        },
        {"hidden_states": N(1, 4, 8, 8), "timestep": at(0.01)},
        {**TEXT, "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]], dtype=torch.bool)},
    ),
    "SD3Transformer2DModel": Case(
        {
            **HEADS,
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "joint_attention_dim": 16,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 8,
            "pos_embed_max_size": 16,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        LATENT,
        {**TEXT, "pooled_projections": N(1, 8)},
    ),
}
