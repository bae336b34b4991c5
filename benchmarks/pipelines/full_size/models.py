"""Models of diffusers by their published configurations, with random weights, and their inputs.

Images of 1024 x 1024 pixels, and a video. Texts are as long as the pipelines make them: 512 tokens
for FLUX.1, Wan and, at most, Qwen-Image; 77 for SDXL; 300 for PixArt-Sigma and SANA. SDXL, PixArt
and SANA see two samples, as classifier-free guidance has them; FLUX.1-dev is distilled from
guidance, and the pipelines of Qwen-Image and Wan call twice with one sample.

`small` makes each a few layers of 128 channels: the same code in a second on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

DTYPE = torch.bfloat16
SEED = 0
Draw = Callable[..., Tensor]


@dataclass(frozen=True)
class Model:
    """A class of diffusers with a configuration.

    inputs   (draw) -> the arguments of a call; draw(*shape) is normal noise on the device
    blocks   classes that are compiled, each once for all of its instances
    """

    kind: str
    config: dict[str, Any]
    inputs: Callable[[Draw], dict[str, Any]]
    blocks: tuple[str, ...]


def flux(small: bool) -> Model:
    """FLUX.1-dev."""
    tokens, text, wide = (16, 8, 128) if small else (4096, 512, 4096)
    config: dict[str, Any] = {"guidance_embeds": True, "joint_attention_dim": wide}
    if small:
        config |= {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2}
        config |= {"attention_head_dim": 64, "axes_dims_rope": (16, 24, 24)}

    def inputs(draw: Draw) -> dict[str, Any]:
        return {
            "hidden_states": draw(1, tokens, 64),
            "encoder_hidden_states": draw(1, text, wide),
            "pooled_projections": draw(1, 768),
            "timestep": draw(1).fill_(0.5),
            "guidance": draw(1).fill_(3.5),
            "img_ids": draw(tokens, 3).fill_(1),
            "txt_ids": draw(text, 3).fill_(0),
        }

    blocks = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    return Model("FluxTransformer2DModel", config, inputs, blocks)


def sdxl(small: bool) -> Model:
    """SDXL's UNet."""
    side, text, wide, pooled = (8, 8, 128, 80) if small else (128, 77, 2048, 1280)
    config: dict[str, Any] = {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": wide,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": side,
    }
    if small:
        config |= {"block_out_channels": (64, 128), "attention_head_dim": (1, 2)}
        config |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
        config |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
        config |= {"transformer_layers_per_block": (1, 1), "layers_per_block": 1}
        config |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 128}

    def inputs(draw: Draw) -> dict[str, Any]:
        added = {"text_embeds": draw(2, pooled), "time_ids": draw(2, 6).fill_(1024)}
        return {
            "sample": draw(2, 4, side, side),
            "timestep": draw(2).fill_(500),
            "encoder_hidden_states": draw(2, text, wide),
            "added_cond_kwargs": added,
        }

    return Model("UNet2DConditionModel", config, inputs, ("BasicTransformerBlock", "ResnetBlock2D"))


def sana(small: bool) -> Model:
    """SANA 1.6B: linear attention; feed-forward layers are convolutions."""
    side, text, wide = (4, 8, 128) if small else (32, 300, 2304)
    config: dict[str, Any] = {"sample_size": side, "caption_channels": wide}
    if small:
        config |= {"num_layers": 1, "num_attention_heads": 4, "num_cross_attention_heads": 2}
        config |= {"cross_attention_head_dim": 64, "cross_attention_dim": 128}

    def inputs(draw: Draw) -> dict[str, Any]:
        return {
            "hidden_states": draw(2, 32, side, side),
            "encoder_hidden_states": draw(2, text, wide),
            "timestep": draw(2).fill_(500),
        }

    return Model("SanaTransformer2DModel", config, inputs, ("SanaTransformerBlock",))


def pixart(small: bool) -> Model:
    """PixArt-Sigma XL at 1024 pixels."""
    side, text, wide = (8, 8, 128) if small else (128, 300, 4096)
    config: dict[str, Any] = {
        "sample_size": side,
        "caption_channels": wide,
        "interpolation_scale": 2,
        "use_additional_conditions": False,
    }
    if small:
        config |= {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 64}
        config |= {"cross_attention_dim": 128}

    def inputs(draw: Draw) -> dict[str, Any]:
        return {
            "hidden_states": draw(2, 4, side, side),
            "encoder_hidden_states": draw(2, text, wide),
            "timestep": draw(2).fill_(500),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }

    return Model("PixArtTransformer2DModel", config, inputs, ("BasicTransformerBlock",))


def qwen(small: bool) -> Model:
    """Qwen-Image."""
    side, text, wide = (4, 8, 128) if small else (64, 512, 3584)
    config: dict[str, Any] = {"joint_attention_dim": wide}
    if small:
        config |= {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 64}
        config |= {"axes_dims_rope": (16, 24, 24)}

    def inputs(draw: Draw) -> dict[str, Any]:
        return {
            "hidden_states": draw(1, side * side, 64),
            "encoder_hidden_states": draw(1, text, wide),
            "encoder_hidden_states_mask": None,
            "timestep": draw(1).fill_(0.5),
            "img_shapes": [[(1, side, side)]],
        }

    return Model("QwenImageTransformer2DModel", config, inputs, ("QwenImageTransformerBlock",))


def wan(small: bool) -> Model:
    """Wan 2.1 of 1.3B parameters: 81 frames of 480 x 832 pixels."""
    size, text, wide = ((1, 4, 4), 8, 128) if small else ((21, 60, 104), 512, 4096)
    config: dict[str, Any] = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
    if small:
        config = {"num_attention_heads": 1, "ffn_dim": 128, "num_layers": 1, "text_dim": wide}

    def inputs(draw: Draw) -> dict[str, Any]:
        return {
            "hidden_states": draw(1, 16, *size),
            "encoder_hidden_states": draw(1, text, wide),
            "timestep": draw(1).fill_(500),
        }

    return Model("WanTransformer3DModel", config, inputs, ("WanTransformerBlock",))


MODELS: dict[str, Callable[[bool], Model]] = {
    "FLUX.1-dev": flux,
    "SDXL": sdxl,
    "SANA-1.6B": sana,
    "PixArt-Sigma": pixart,
    "Qwen-Image": qwen,
    "Wan2.1-T2V-1.3B": wan,
}


def build(model: Model, device: torch.device | str) -> nn.Module:
    """Return the model with random weights, made in bfloat16 on the device where it will run."""
    before = torch.get_default_dtype()
    torch.manual_seed(SEED)
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(device):
            built = getattr(diffusers, model.kind)(**model.config)
    finally:
        torch.set_default_dtype(before)
    return built.eval().requires_grad_(False)


def arguments(model: Model, device: torch.device) -> dict[str, Any]:
    """Return the arguments of a call, the same ones each time."""
    generator = torch.Generator(device).manual_seed(SEED)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(DTYPE)

    return model.inputs(draw) | {"return_dict": False}


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes that a model's parameters and buffers take, shared memory once."""
    found: dict[Any, int] = {}
    tensors = [*model.parameters(), *model.buffers()]
    while tensors:
        tensor = tensors.pop()
        if hasattr(tensor, "__tensor_flatten__"):  # a subclass without memory of its own
            names, _ = tensor.__tensor_flatten__()
            tensors += [getattr(tensor, name) for name in names]
        elif tensor.device.type == "meta":
            found[id(tensor)] = tensor.numel() * tensor.element_size()
        else:
            memory = tensor.untyped_storage()
            found[memory.data_ptr()] = memory.nbytes()
    return sum(found.values())
