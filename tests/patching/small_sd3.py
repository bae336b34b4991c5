"""An SD3 transformer of 128 channels with random weights, its inputs, and ways to quantise it."""

import torch
from diffusers import SD3Transformer2DModel

import fewstep
from fewstep.quantization import QuantLinear

SCHEMES = ["w8a8", "fp8", "w4a8-g64-r8-h64", "w4a16"]
INNER = "transformer_blocks.0.ff.net.2"


def build(model_type=SD3Transformer2DModel):
    torch.manual_seed(0)
    return model_type(
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=128,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=8,
    ).eval()


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "hidden_states": draw(2, 4, 8, 8),
        "encoder_hidden_states": draw(2, 7, 32),
        "pooled_projections": draw(2, 32),
        "timestep": torch.tensor([5, 500]),
    }


def quantised(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}


def load(path, scheme, model_type=SD3Transformer2DModel, **kwargs):
    config = fewstep.QuantizationConfig(scheme)
    return model_type.from_pretrained(path, quantization_config=config, **kwargs)
