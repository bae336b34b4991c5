"""Audio, music and protein transformers, and the decoders that are no diffusion model."""

from __future__ import annotations

import torch

from .case import Case, N, at
from .image import HEADS, TEXT


def _plain(model, inputs):
    return model(**inputs)


_MASK = torch.tensor([[1, 1, 1, 1, 1, 0]], dtype=torch.bool)

CASES: dict[str, Case] = {
    "AceStepTransformer1DModel": Case(
        {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "in_channels": 12,
            "audio_acoustic_hidden_dim": 4,
            "sliding_window": 2,
        },
        {"hidden_states": N(1, 8, 4), "timestep": at(0.01), "timestep_r": at(0.004)},
        {**TEXT, "context_latents": N(1, 8, 8)},
    ),
    "LongCatAudioDiTTransformer": Case(
        {
            "dit_dim": 16,
            "dit_depth": 1,
            "dit_heads": 2,
            "dit_text_dim": 16,
            "latent_dim": 4,
            "text_conv": False,
        },
        {"hidden_states": N(1, 16, 4), "timestep": at(0.01)},
        {**TEXT, "encoder_attention_mask": _MASK, "latent_cond": N(1, 16, 4)},
    ),
    "MiniMaxMusic3Transformer1DModel": Case(
        {
            **HEADS,
            "in_channels": 4,
            "condition_dim": 16,
            "num_layers": 1,
            "ff_inner_dim": 32,
            "rotary_dim": 4,
            "fourier_embedding_dim": 8,
        },
        {"hidden_states": N(1, 4, 16), "timestep": at(0.5)},
        {"encoder_hidden_states": N(1, 16, 16)},
    ),
    "MiniMaxMusic3RVQDepthDecoder": Case(
        {
            "hidden_size": 16,
            "num_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "audio_vocab_size": 16,
        },
        {"inputs_embeds": N(1, 8, 16)},
        call=_plain,
    ),
    "RFD4ProteinaTransformer": Case(
        {
            "nlayers": 2,
            "token_dim": 16,
            "nheads": 2,
            "dim_cond": 8,
            "pair_repr_dim": 8,
            "latent_dim": 4,
            "t_emb_dim": 8,
            "tri_mult_c": 8,
            "feats_seq": ("xt_bb_ca", "xt_local_latents"),
            "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
            "feats_pair_repr": ("xt_bb_ca_pair_dists", "bond_mask"),
        },
        {
            "bb_ca": N(1, 8, 3),
            "local_latents": N(1, 8, 4),
            "bb_ca_time": at(0.003),
            "local_latents_time": at(0.002),
        },
        {
            "padding_mask": torch.tensor([[True] * 7 + [False]]),
            "conditioning": {
                "is_in_context_conditioning": torch.zeros(1, 8, dtype=torch.bool),
                "supports_local_latent": torch.ones(1, 8, dtype=torch.bool),
            },
        },
    ),
    "StableAudioDiTModel": Case(
        {
            **HEADS,
            "sample_size": 8,
            "in_channels": 4,
            "num_layers": 1,
            "num_key_value_attention_heads": 1,
            "out_channels": 4,
            "cross_attention_dim": 16,
            "time_proj_dim": 8,
            "global_states_input_dim": 16,
            "cross_attention_input_dim": 16,
        },
        {"hidden_states": N(1, 4, 8), "timestep": at(0.2)},
        {
            **TEXT,
            "global_hidden_states": N(1, 1, 16),
            "rotary_embedding": (N(9, 4), N(9, 4)),
        },
    ),
    "StableAudio3DiTModel": Case(
        {
            "io_channels": 4,
            "embed_dim": 16,
            "depth": 1,
            "num_heads": 2,
            "cond_token_dim": 16,
            "global_cond_dim": 8,
            "local_add_cond_dim": 5,
            "timestep_features_dim": 16,
            "ff_mult": 2,
            "num_memory_tokens": 3,
            "use_differential_attention": True,
        },
        {"hidden_states": N(1, 4, 16), "timestep": at(2e-5)},
        {**TEXT, "global_hidden_states": N(1, 8)},
    ),
    "T5FilmDecoder": Case(
        {
            "input_dims": 4,
            "targets_length": 8,
            "d_model": 16,
            "num_layers": 1,
            "num_heads": 2,
            "d_kv": 8,
            "d_ff": 32,
        },
        {"decoder_input_tokens": N(1, 8, 4), "decoder_noise_time": at(0.001)},
        {"encodings_and_masks": [(N(1, 6, 16), torch.ones(1, 6))]},
        call=_plain,
        attention="softmax",
    ),
}
