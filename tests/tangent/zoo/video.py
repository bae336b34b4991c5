"""Video transformers: one or two frames, text constant."""

from __future__ import annotations

import torch

from .case import Case, N, at
from .image import HEADS, TEXT

LATENT = {"hidden_states": N(1, 4, 2, 8, 8), "timestep": at(2.5)}
FRAMES_FIRST = {"hidden_states": N(1, 2, 4, 8, 8), "timestep": at(2.5)}
WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 1,
    "rope_max_seq_len": 32,
}
_COGVIDEO = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 2,
    "text_embed_dim": 16,
    "num_layers": 1,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 5,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": 6,
}
_HUNYUAN = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (2, 2, 4),
}
_HUNYUAN_TEXT = {
    **TEXT,
    "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]]),
    "pooled_projections": N(1, 8),
    "guidance": at(3.5),
}

_KANDINSKY5 = {
    "in_visual_dim": 4,
    "in_text_dim": 16,
    "in_text_dim2": 8,
    "time_dim": 16,
    "out_visual_dim": 4,
    "model_dim": 16,
    "ff_dim": 32,
    "num_text_blocks": 1,
    "num_visual_blocks": 1,
    "axes_dims": (2, 2, 4),
}
_KANDINSKY5_CONSTANTS = {
    **TEXT,
    "pooled_projections": N(1, 8),
    "text_rope_pos": torch.arange(6),
}


def _sparse(model, inputs):
    """Send the visual self-attention to FlexAttention, which alone reads a block mask."""
    for block in model.visual_transformer_blocks:
        block.self_attention.processor._attention_backend = "flex"
    return model(**inputs, return_dict=False)


CASES: dict[str, Case] = {
    "AllegroTransformer3DModel": Case(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "cross_attention_dim": 16,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 2,
            "caption_channels": 16,
        },
        LATENT,
        {**TEXT, "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]])},
    ),
    "ChronoEditTransformer3DModel": Case({**WAN, "rope_temporal_skip_len": 2}, LATENT, TEXT),
    "CogVideoXTransformer3DModel": Case(_COGVIDEO, FRAMES_FIRST, TEXT),
    "ConsisIDTransformer3DModel": Case(
        {
            **_COGVIDEO,
            "cross_attn_interval": 1,
            "is_train_face": True,
            "cross_attn_dim_head": 4,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 2,
            "LFE_vit_dim": 2,
            "LFE_depth": 5,
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 1,
            "LFE_num_querie": 2,
            "LFE_output_dim": 10,
            "LFE_ff_mult": 1,
            "LFE_num_scale": 1,
        },
        FRAMES_FIRST,
        {**TEXT, "id_vit_hidden": [N(1, 2, 2)], "id_cond": N(1, 2)},
        attention="sdpa+softmax",
    ),
    "CosmosTransformer3DModel": Case(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "mlp_ratio": 2,
            "text_embed_dim": 16,
            "adaln_lora_dim": 4,
            "max_size": (4, 16, 16),
            "extra_pos_embed_type": "learnable",
            "concat_padding_mask": False,
        },
        LATENT,
        {**TEXT, "fps": 30},
    ),
    "EasyAnimateTransformer3DModel": Case(
        {
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "in_channels": 4,
            "mmdit_layers": 1,
            "num_layers": 1,
            "out_channels": 4,
            "patch_size": 2,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
        },
        LATENT,
        TEXT,
    ),
    "HunyuanVideoTransformer3DModel": Case(_HUNYUAN, LATENT, _HUNYUAN_TEXT),
    "HunyuanVideo15Transformer3DModel": Case(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "patch_size": 2,
            "text_embed_dim": 16,
            "text_embed_2_dim": 8,
            "image_embed_dim": 12,
            "rope_axes_dim": (2, 2, 4),
            "target_size": 16,
            "task_type": "t2v",
            "use_meanflow": True,
        },
        {**LATENT, "timestep_r": at(1.5)},
        {
            **TEXT,
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]]),
            "encoder_hidden_states_2": N(1, 4, 8),
            "encoder_attention_mask_2": torch.tensor([[1, 1, 1, 0]]),
            "image_embeds": at(0.0, 1, 3, 12),
        },
    ),
    "HunyuanVideoFramepackTransformer3DModel": Case(
        {**_HUNYUAN, "has_image_proj": True, "image_proj_dim": 8, "has_clean_x_embedder": True},
        {"hidden_states": N(1, 4, 2, 4, 4), "timestep": at(2.5)},
        {
            **_HUNYUAN_TEXT,
            "image_embeds": N(1, 3, 8),
            "indices_latents": torch.arange(8, 10),
            "latents_clean": N(1, 4, 1, 4, 4),
            "indices_latents_clean": torch.tensor([0]),
            "latents_history_2x": N(1, 4, 2, 4, 4),
            "indices_latents_history_2x": torch.arange(1, 3),
            "latents_history_4x": N(1, 4, 4, 4, 4),
            "indices_latents_history_4x": torch.arange(3, 7),
        },
    ),
    "Kandinsky5Transformer3DModel": Case(
        _KANDINSKY5,
        {"hidden_states": N(1, 2, 8, 8, 4), "timestep": at(2.5)},
        {
            **_KANDINSKY5_CONSTANTS,
            "visual_rope_pos": (torch.arange(2), torch.arange(4), torch.arange(4)),
        },
    ),
    "Kandinsky5Transformer3DModel (sparse)": Case(
        {**_KANDINSKY5, "attention_type": "nabla"},
        {"hidden_states": N(1, 2, 16, 16, 4), "timestep": at(2.5)},
        {
            **_KANDINSKY5_CONSTANTS,
            "visual_rope_pos": (torch.arange(2), torch.arange(8), torch.arange(8)),
            "sparse_params": {
                "to_fractal": True,
                "sta_mask": torch.eye(2, dtype=torch.bool)[None, None],
                "attention_type": "nabla",
                "method": "topcdf",
                "P": 0.3,
            },
        },
        call=_sparse,
        attention="sdpa+flex",
        note="the block mask is chosen by the data: its choice has no derivative",
    ),
    "Kandinsky6Transformer3DModel": Case(
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 16,
            "model_dim": 16,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 1,
            "axes_dims": (2, 2, 4),
            "visual_cond": False,
            "in_audio_dim": 4,
            "out_audio_dim": 4,
            "ca_rope": True,
            "cross_gates": True,
        },
        {
            "hidden_states": N(1, 2, 8, 8, 4),
            "timestep": at(2.5),
            "audio_hidden_states": N(1, 5, 4),
        },
        {**TEXT, "pooled_projections": N(1, 8)},
    ),
    "Kandinsky6SRTransformer3DModel": Case(
        {
            "in_visual_dim": 2,
            "out_visual_dim": 2,
            "time_dim": 16,
            "model_dim": 16,
            "ff_dim": 32,
            "num_visual_blocks": 1,
            "axes_dims": (2, 2, 4),
            "nabla_window": (1, 1, 1),
            "nabla_threshold": 0.3,
        },
        {"hidden_states": N(1, 2, 8, 8, 5), "timestep": at(2.5)},
        attention="flex",
        note="the block mask is chosen by the data: its choice has no derivative",
    ),
    "LatteTransformer3DModel": Case(
        {
            **HEADS,
            "sample_size": 8,
            "num_layers": 1,
            "patch_size": 2,
            "caption_channels": 16,
            "in_channels": 4,
            "cross_attention_dim": 16,
            "out_channels": 8,
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "video_length": 2,
        },
        LATENT,
        TEXT,
    ),
    "MochiTransformer3DModel": Case(
        {
            **HEADS,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 4,
            "max_sequence_length": 6,
        },
        LATENT,
        {**TEXT, "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]], dtype=torch.bool)},
    ),
    "MotifVideoTransformer3DModel": Case(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "num_single_layers": 1,
            "text_embed_dim": 16,
            "rope_axes_dim": (4, 4, 4),
            "enable_text_cross_attention_dual": True,
            "enable_text_cross_attention_single": True,
        },
        LATENT,
        {**TEXT, "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]])},
    ),
    "SanaVideoTransformer3DModel": Case(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": 16,
            "sample_size": 8,
            "rope_max_seq_len": 32,
        },
        LATENT,
        TEXT,
        attention="sdpa+linear",
    ),
    "TransformerTemporalModel": Case(
        {**HEADS, "in_channels": 8, "num_layers": 1, "norm_num_groups": 2},
        {"hidden_states": N(4, 8, 4, 4)},
        {"num_frames": 4},
    ),
    "SkyReelsV2Transformer3DModel": Case(WAN, LATENT, TEXT),
    "WanTransformer3DModel": Case(
        {**WAN, "added_kv_proj_dim": 24, "image_dim": 8},
        LATENT,
        {**TEXT, "encoder_hidden_states_image": N(1, 5, 8)},
    ),
    "WanVACETransformer3DModel": Case(
        {**WAN, "num_layers": 2, "vace_layers": [0], "vace_in_channels": 12},
        LATENT,
        {**TEXT, "control_hidden_states": N(1, 12, 2, 8, 8)},
    ),
}
