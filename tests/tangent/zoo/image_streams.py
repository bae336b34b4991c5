"""Image transformers with packed sequences, interleaved streams, experts or linear attention."""

from __future__ import annotations

from dataclasses import replace

import torch

from .case import Case, N, at
from .image import HEADS, TEXT, grid

_IDEOGRAM_TEXT, _IDEOGRAM_IMAGE = 3, 2  # diffusers' token indicators: text feature, output image


def _joined(text: int, image: int, axes: int = 3) -> torch.Tensor:
    """Return position ids of `text` tokens followed by a square image of `image` x `image`."""
    return torch.cat([torch.zeros(text, axes), grid(image, image, axes)])


def _z_image(model, inputs):
    x = list(inputs.pop("x"))
    return model(x, return_dict=False, **inputs)


def _training(model, inputs):
    return model.train()(**inputs, return_dict=False)


_HIDREAM = Case(
    {
        **HEADS,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "caption_channels": [16, 4],
        "text_emb_dim": 8,
        "num_routed_experts": 2,
        "num_activated_experts": 1,
        "axes_dims_rope": (4, 2, 2),
        "max_resolution": (8, 8),
        "llama_layers": (0, 1),
    },
    {"hidden_states": N(1, 4, 8, 8), "timesteps": at(2.5)},
    {
        "encoder_hidden_states_t5": N(1, 6, 16),
        "encoder_hidden_states_llama3": N(2, 1, 6, 4),
        "pooled_embeds": N(1, 8),
    },
)

CASES: dict[str, Case] = {
    "HiDreamImageTransformer2DModel": _HIDREAM,
    "HiDreamImageTransformer2DModel (training)": replace(_HIDREAM, call=_training),
    "HunyuanImageTransformer2DModel": Case(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "patch_size": (1, 1),
            "text_embed_dim": 16,
            "text_embed_2_dim": 8,
            "rope_axes_dim": (4, 4),
            "guidance_embeds": True,
            "use_meanflow": True,
        },
        {"hidden_states": N(1, 4, 4, 4), "timestep": at(2.5), "timestep_r": at(1.5)},
        {
            **TEXT,
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]]),
            "encoder_hidden_states_2": N(1, 4, 8),
            "encoder_attention_mask_2": torch.tensor([[1, 1, 1, 0]]),
            "guidance": at(3.5),
        },
    ),
    "Ideogram4Transformer2DModel": Case(
        {
            **HEADS,
            "in_channels": 4,
            "num_layers": 1,
            "intermediate_size": 32,
            "adaln_dim": 16,
            "llm_features_dim": 16,
            "rope_theta": 10_000,
            "mrope_section": (2, 1, 1),
        },
        {"hidden_states": N(1, 10, 4), "timestep": at(0.001)},
        {
            "encoder_hidden_states": N(1, 10, 16),
            "position_ids": _joined(6, 2).long()[None],
            "segment_ids": torch.ones(1, 10, dtype=torch.long),
            "indicator": torch.tensor([[_IDEOGRAM_TEXT] * 6 + [_IDEOGRAM_IMAGE] * 4]),
        },
    ),
    "JoyImageEditTransformer3DModel": Case(
        {
            "in_channels": 4,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "text_dim": 16,
            "num_layers": 1,
            "rope_dim_list": [4, 2, 2],
            "theta": 256,
        },
        {"hidden_states": N(1, 4, 1, 8, 8), "timestep": at(2.5)},
        TEXT,
    ),
    "JoyImageEditPlusTransformer3DModel": Case(
        {
            "in_channels": 4,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "text_dim": 16,
            "num_layers": 1,
            "rope_dim_list": [4, 2, 2],
            "theta": 256,
        },
        {"hidden_states": N(1, 6, 4, 1, 2, 2), "timestep": at(2.5)},
        {**TEXT, "shape_list": [[(1, 2, 2), (1, 1, 2)]]},
    ),
    "Krea2Transformer2DModel": Case(
        {
            **HEADS,
            "in_channels": 4,
            "num_layers": 1,
            "num_key_value_heads": 1,
            "intermediate_size": 32,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 16,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 16,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 2, 2),
        },
        {"hidden_states": N(1, 16, 4), "timestep": at(0.01)},
        {
            "encoder_hidden_states": N(1, 6, 2, 16),
            "position_ids": _joined(6, 4),
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]], dtype=torch.bool),
        },
    ),
    "LuminaNextDiT2DModel": Case(
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "learn_sigma": False,
            "cross_attention_dim": 16,
        },
        {"hidden_states": N(1, 4, 8, 8), "timestep": at(0.5)},
        {
            **TEXT,
            "encoder_mask": torch.tensor([[1, 1, 1, 1, 1, 0]], dtype=torch.bool),
            "image_rotary_emb": torch.polar(torch.ones(16, 16, 4), torch.rand(16, 16, 4)),
            "cross_attention_kwargs": {},
        },
    ),
    "Lumina2Transformer2DModel": Case(
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 2,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (32, 32, 32),
            "cap_feat_dim": 16,
        },
        {"hidden_states": N(2, 4, 8, 8), "timestep": at(0.5, 2)},
        {
            "encoder_hidden_states": N(2, 6, 16),
            "encoder_attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2], dtype=torch.bool),
        },
    ),
    "NucleusMoEImageTransformer2DModel": Case(
        {
            **HEADS,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (4, 2, 2),
            "moe_enabled": True,
            "dense_moe_strategy": "all_moe",
            "num_experts": 4,
            "moe_intermediate_dim": 8,
            "capacity_factors": [2.0, 2.0],
        },
        {"hidden_states": N(1, 16, 16), "timestep": at(0.01)},
        {
            **TEXT,
            "encoder_hidden_states_mask": torch.tensor([[1, 1, 1, 1, 1, 0]]),
            "img_shapes": [(1, 4, 4)],
        },
    ),
    "OmniGenTransformer2DModel": Case(
        {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "num_layers": 1,
            "pad_token_id": 0,
            "vocab_size": 32,
            "in_channels": 4,
            "time_step_dim": 4,
            "rope_scaling": {"long_factor": [1, 2, 3, 4], "short_factor": [1, 2, 3, 4]},
            "pos_embed_max_size": 8,
        },
        {"hidden_states": N(1, 4, 8, 8), "timestep": at(0.5)},
        {
            "input_ids": torch.arange(6)[None],
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": torch.ones(1, 23, 23).tril(),
            "position_ids": torch.arange(23)[None],
        },
    ),
    "QwenImageTransformer2DModel": Case(
        {
            **HEADS,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 1,
            "joint_attention_dim": 16,
            "axes_dims_rope": (4, 2, 2),
        },
        {"hidden_states": N(1, 16, 16), "timestep": at(0.01)},
        {
            **TEXT,
            "encoder_hidden_states_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]),
            "img_shapes": [(1, 4, 4)],
        },
    ),
    "QwenImage21Transformer2DModel": Case(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "context_in_dim": 16,
            "axes_dims_rope": (4, 2, 2),
        },
        {"hidden_states": N(1, 16, 4), "timestep": at(0.01)},
        {
            **TEXT,
            "img_shapes": [[(1, 4, 4)]],
            "img_mask": torch.tensor([[False] * 6 + [True] * 4]),
        },
    ),
    "SanaTransformer2DModel": Case(
        {
            "patch_size": 1,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 16,
            "sample_size": 4,
        },
        {"hidden_states": N(1, 4, 4, 4), "timestep": at(2.5)},
        {**TEXT, "encoder_attention_mask": torch.tensor([[1.0, 1, 1, 1, 1, 0]])},
        attention="sdpa+linear",
    ),
    "ZImageTransformer2DModel": Case(
        {
            "all_patch_size": (2,),
            "all_f_patch_size": (1,),
            "in_channels": 4,
            "dim": 16,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 1,
            "n_kv_heads": 1,
            "cap_feat_dim": 16,
            "axes_dims": [8, 4, 4],
            "axes_lens": [64, 32, 32],
        },
        {"x": N(1, 4, 1, 8, 8), "t": at(0.002)},
        {"cap_feats": [N(6, 16)]},
        call=_z_image,
    ),
    "Transformer2DModel": Case(
        {
            **HEADS,
            "in_channels": 8,
            "num_layers": 1,
            "norm_num_groups": 2,
            "cross_attention_dim": 16,
        },
        {"hidden_states": N(1, 8, 4, 4)},
        {**TEXT, "encoder_attention_mask": torch.tensor([[1.0, 1, 1, 1, 1, 0]])},
    ),
    "DreamLiteTransformer2DModel": Case(
        {
            **HEADS,
            "in_channels": 16,
            "num_layers": 1,
            "norm_num_groups": 2,
            "cross_attention_dim": 16,
            "num_kv_heads": 2,
            "qk_norm": "rms_norm",
        },
        {"hidden_states": N(1, 16, 4, 4)},
        TEXT,
    ),
    "PriorTransformer": Case(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,  # one token is read out, and in the first layer its query is constant
            "embedding_dim": 16,
            "num_embeddings": 6,
            "additional_embeddings": 4,
        },
        {"hidden_states": N(1, 16), "timestep": at(2.5)},
        {**TEXT, "proj_embedding": N(1, 16), "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]])},
    ),
}
