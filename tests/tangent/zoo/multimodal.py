"""Video transformers with history, caches, control signals or several modalities."""

from __future__ import annotations

import torch

from .case import Case, N, at
from .image import HEADS, TEXT
from .video import FRAMES_FIRST, LATENT, WAN

_LTX2 = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8,
    "num_layers": 1,
    "caption_channels": 16,
    "rope_double_precision": False,
}
_TABLES = "rotary angles reach 1e4 rad, so fp32 rounds them by 1e-3: both runs use the fp32 tables"


def _wan_animate_2(model, inputs):
    """Fill the cache from the driving video, then denoise against it, as the pipeline does."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    cache = WanAnimate2KVCache(len(model.blocks))
    shared = {
        "encoder_hidden_states": [inputs["text"]],
        "encoder_hidden_states_image": inputs["image"],
        "kv_cache": cache,
        "return_dict": False,
    }
    grid = torch.tensor([[2, 2, 2]])
    model(
        [inputs["driving"]],
        timestep=torch.ones_like(inputs["timestep"]),
        condition_latents=[inputs["driving_condition"]],
        kv_cache_mode="extract",
        seq_len=8,
        offset_grid_sizes=grid,
        **shared,
    )
    return model(
        [inputs["hidden_states"]],
        timestep=inputs["timestep"],
        condition_latents=[inputs["condition"]],
        kv_cache_mode="cached",
        seq_len=12,
        reference_grid_sizes=grid,
        origin_len=5,
        origin_area=[32, 32],
        **shared,
    )


def _refiner(model, inputs):
    rotary = model.build_rotary_emb_for_absolute_positions(
        1, [0, 1], 4, 4, inputs["hidden_states"].device, 24.0
    )
    return model(**inputs, video_rotary_emb=rotary, return_dict=False)


_CAMERA = torch.cat([torch.eye(4).flatten(), torch.tensor([4.0, 4.0, 2.0, 2.0])]).repeat(1, 3, 1)

_SANA_WM = {
    "in_channels": 4,
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "linear_head_dim": 16,
    "chunk_plucker_channels": 6,
    "chunk_plucker_post_attn_blocks": 2,
    "caption_channels": 16,
}
_SANA_WM_PRIMALS = {"hidden_states": N(1, 4, 3, 4, 4)}
_SANA_WM_CONSTANTS = {
    "timestep": at(2.0, 1, 1, 3),  # cast to integers inside: nothing to differentiate
    "encoder_hidden_states": N(1, 1, 6, 16),
    "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]]),
    "camera_conditions": _CAMERA,
    "chunk_plucker": N(1, 6, 3, 4, 4),
}

CASES: dict[str, Case] = {
    "AnyFlowTransformer3DModel": Case(
        WAN,
        {**FRAMES_FIRST, "timestep": at(2.5, 1, 2), "r_timestep": at(1.5, 1, 2)},
        TEXT,
    ),
    "AnyFlowFARTransformer3DModel": Case(
        {**WAN, "compressed_patch_size": (1, 4, 4), "full_chunk_limit": 1},
        {
            "hidden_states": N(1, 2, 4, 8, 8),
            "timestep": at(2.5, 1, 2),
            "r_timestep": at(1.5, 1, 2),
        },
        {**TEXT, "chunk_partition": [1, 1]},
        attention="sdpa+flex",
    ),
    "HeliosTransformer3DModel": Case(
        {
            **{key: value for key, value in WAN.items() if key != "rope_max_seq_len"},
            "rope_dim": (4, 4, 4),
        },
        LATENT,
        {
            **TEXT,
            "indices_hidden_states": at(1.0, 1, 2),
            "indices_latents_history_short": at(1.0, 1, 1),
            "indices_latents_history_mid": at(1.0, 1, 1),
            "indices_latents_history_long": at(1.0, 1, 4),
            "latents_history_short": N(1, 4, 1, 8, 8),
            "latents_history_mid": N(1, 4, 1, 8, 8),
            "latents_history_long": N(1, 4, 4, 8, 8),
        },
    ),
    "LTXVideoTransformer3DModel": Case(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 16,
            "num_layers": 1,
            "caption_channels": 16,
        },
        {"hidden_states": N(1, 32, 4), "timestep": at(2.5)},
        {
            **TEXT,
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]]),
            "num_frames": 2,
            "height": 4,
            "width": 4,
        },
        wide_tables=False,
        note=_TABLES,
    ),
    "LTX2VideoTransformer3DModel": Case(
        _LTX2,
        {
            "hidden_states": N(1, 32, 4),
            "audio_hidden_states": N(1, 5, 4),
            "timestep": at(2.5),
        },
        {
            **TEXT,
            "audio_encoder_hidden_states": N(1, 6, 16),
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]]),
            "num_frames": 2,
            "height": 4,
            "width": 4,
            "audio_num_frames": 5,
        },
        wide_tables=False,
        note=_TABLES,
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Case(
        _LTX2,
        {"hidden_states": N(1, 32, 4), "timestep": at(2.5, 1, 32)},
        {**TEXT, "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]])},
        call=_refiner,
        wide_tables=False,
        note=_TABLES,
    ),
    "SanaWMTransformer3DModel": Case(
        {**_SANA_WM, "softmax_every_n": 2},
        _SANA_WM_PRIMALS,
        _SANA_WM_CONSTANTS,
        attention="sdpa+linear",
        budget=2**-9,
        note="softmax blocks round fp32 queries, keys and values to bf16: bound 2^-9, one rounding",
    ),
    "SanaWMTransformer3DModel (linear blocks)": Case(
        {**_SANA_WM, "softmax_every_n": 0},
        _SANA_WM_PRIMALS,
        _SANA_WM_CONSTANTS,
        attention="sdpa+linear",
        note="casts its time steps to integers: differentiated along the sample",
    ),
    "MiniMaxH3Transformer3DModel": Case(
        {
            **HEADS,
            "hidden_size": 24,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "ffn_dim": 32,
            "in_channels": 4,
            "audio_in_channels": 6,
            "text_dim": 16,
            "freq_dim": 8,
            "time_embed_hidden_dim": 24,
            "time_embed_dim": 16,
            "rope_freq_dim": 1,
        },
        {
            "hidden_states": N(1, 8, 16),
            "audio_hidden_states": N(1, 5, 6),
            "timestep": torch.tensor([0.7, 0.3]),
        },
        {
            **TEXT,
            "timestep_indices": torch.tensor([0] * 6 + [1] * 5 + [0] * 8),
            "token_tags": torch.tensor([1] * 6 + [2] * 5 + [0] * 8),
            "position_ids": torch.arange(19.0)[:, None].repeat(1, 3),
            "text_indices": torch.arange(6),
            "audio_indices": torch.arange(6, 11),
            "video_indices": torch.arange(11, 19),
        },
    ),
    "WanAnimateTransformer3DModel": Case(
        {
            **WAN,
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": 8,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 1,
        },
        {"hidden_states": N(1, 12, 3, 8, 8), "timestep": at(2.5)},
        {
            **TEXT,
            "encoder_hidden_states_image": N(1, 5, 8),
            "pose_hidden_states": N(1, 4, 2, 8, 8),
            "face_pixel_values": N(1, 3, 5, 16, 16),
        },
    ),
    "WanAnimate2Transformer3DModel": Case(
        {
            "text_len": 6,
            "in_dim": 12,
            "dim": 24,
            "ffn_dim": 32,
            "freq_dim": 16,
            "text_dim": 16,
            "out_dim": 4,
            "num_heads": 2,
            "num_layers": 1,
            "use_img_emb": True,
        },
        {"hidden_states": N(4, 3, 4, 4), "timestep": at(2.5)},
        {
            "text": N(6, 16),
            "image": N(1, 4, 1280),
            "driving": N(4, 2, 4, 4),
            "driving_condition": N(8, 2, 4, 4),
            "condition": N(8, 3, 4, 4),
        },
        call=_wan_animate_2,
        attention="sdpa+flex",
    ),
    "Cosmos3OmniTransformer": Case(
        {
            "head_dim": 8,
            "hidden_size": 16,
            "intermediate_size": 24,
            "latent_channel": 2,
            "latent_patch_size": 1,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "num_key_value_heads": 1,
            "patch_latent_dim": 2,
            "rope_axes_dim": [2, 1, 1],
            "vocab_size": 32,
            "timestep_scale": 1.0,
        },
        {"vision_tokens": N(1, 2, 1, 4, 4), "vision_timesteps": at(2.5, 16)},
        {
            "input_ids": torch.tensor([1, 2, 3]),
            "text_indexes": torch.arange(3),
            "position_ids": torch.arange(19).repeat(3, 1),
            "und_len": 3,
            "sequence_length": 19,
            "vision_token_shapes": [(1, 4, 4)],
            "vision_sequence_indexes": torch.arange(3, 19),
            "vision_mse_loss_indexes": torch.arange(3, 19),
            "vision_noisy_frame_indexes": [torch.tensor([0])],
        },
        call=lambda model, x: model(
            **{**x, "vision_tokens": [x["vision_tokens"]]}, return_dict=False
        ),
    ),
}
