"""Blocks of diffusers in forward mode: which ops run in them, values and gradients against fp64."""

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    CogVideoXLayerNormZero,
    LuminaRMSNormZero,
    SD35AdaLayerNormZeroX,
)
from diffusers.models.transformers.sana_transformer import SanaTransformerBlock
from diffusers.models.transformers.transformer_flux import (
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from diffusers.models.transformers.transformer_wan import WanTransformerBlock

from tangent.zoo.oracle import Wide
from tangent_nets import by_duals, by_transform, unfused_jvp

WIDTH, HEADS = 16, 2
HEAD = WIDTH // HEADS
FULL = "norm scale shift"
ROTARY = tuple(torch.rand(4, HEAD, generator=torch.Generator().manual_seed(1)) for _ in range(2))


def basic(kind):
    number = {"num_embeds_ada_norm": 10} if kind == "ada_norm_zero" else {}
    return BasicTransformerBlock(WIDTH, HEADS, HEAD, norm_type=kind, **number, **PLAIN)


PLAIN = {"norm_elementwise_affine": False, "cross_attention_dim": None}


def labelled(module, x, emb):
    """Time embedding and label embedding are the module's own; the time has the tangent."""
    labels = torch.zeros(2, dtype=torch.long)
    return module(x, timestep=emb.sum(-1), class_labels=labels)


def ada_norm_single(module, x, emb):
    return module(x, timestep=emb.repeat(1, 6))


def wan(module, x, emb):
    angles = tuple(v.to(x.dtype)[None, :, None] for v in ROTARY)
    return module(x, x.sin(), emb.repeat(1, 6).unflatten(1, (6, -1)), angles)


def sana(module, x, emb):
    return module(x, encoder_hidden_states=x.sin(), timestep=emb.repeat(1, 6), height=2, width=2)


BLOCKS = {
    "AdaLayerNormZero": (
        lambda: AdaLayerNormZero(WIDTH),
        lambda m, x, emb: m(x, emb=emb),
        [FULL],
    ),
    "AdaLayerNormZero in float32": (
        lambda: AdaLayerNormZero(WIDTH, norm_type="fp32_layer_norm"),
        lambda m, x, emb: m(x, emb=emb),
        [FULL],
    ),
    "AdaLayerNormZeroSingle": (lambda: AdaLayerNormZeroSingle(WIDTH), None, [FULL]),
    "AdaLayerNormContinuous": (
        lambda: AdaLayerNormContinuous(WIDTH, WIDTH, elementwise_affine=False),
        None,
        [FULL],
    ),
    "SD35AdaLayerNormZeroX": (lambda: SD35AdaLayerNormZeroX(WIDTH), None, [FULL, FULL]),
    "LuminaRMSNormZero": (lambda: LuminaRMSNormZero(WIDTH, 1e-5, True), None, ["norm scale"]),
    "CogVideoXLayerNormZero": (
        lambda: CogVideoXLayerNormZero(WIDTH, WIDTH),
        lambda m, x, emb: m(x, x.sin(), emb),
        [FULL, FULL],
    ),
    "BasicTransformerBlock, ada_norm_zero": (
        lambda: basic("ada_norm_zero"),
        labelled,
        [FULL, "gate", FULL, "gate"],
    ),
    "BasicTransformerBlock, ada_norm_single": (
        lambda: basic("ada_norm_single"),
        ada_norm_single,
        [FULL, "gate", FULL, "gate"],
    ),
    "FluxTransformerBlock": (
        lambda: FluxTransformerBlock(WIDTH, HEADS, HEAD),
        lambda m, x, emb: m(x, x.sin(), emb),
        [FULL] * 2 + ["norm"] * 4 + ["gate", FULL, "gate"] * 2,
    ),
    "FluxSingleTransformerBlock": (
        lambda: FluxSingleTransformerBlock(WIDTH, HEADS, HEAD),
        lambda m, x, emb: m(x, x.sin(), emb),
        [FULL, "norm", "norm", "gate"],
    ),
    "JointTransformerBlock": (
        lambda: JointTransformerBlock(WIDTH, HEADS, HEAD, qk_norm="rms_norm"),
        lambda m, x, emb: m(x, x.sin(), emb),
        [FULL] * 2 + ["norm"] * 4 + ["gate", FULL, "gate"] * 2,
    ),
    "JointTransformerBlock, dual": (
        lambda: JointTransformerBlock(WIDTH, HEADS, HEAD, use_dual_attention=True),
        lambda m, x, emb: m(x, x.sin(), emb),
        [FULL] * 3 + ["gate"] * 2 + [FULL, "gate"] + ["gate", FULL, "gate"],
    ),
    "SanaTransformerBlock": (
        lambda: SanaTransformerBlock(
            WIDTH,
            HEADS,
            HEAD,
            num_cross_attention_heads=HEADS,
            cross_attention_head_dim=HEAD,
            cross_attention_dim=WIDTH,
        ),
        sana,
        [FULL, "linear attention", "gate", FULL, "gate"],
    ),
    "WanTransformerBlock": (
        lambda: WanTransformerBlock(WIDTH, 32, HEADS, cross_attn_norm=True),
        wan,
        [FULL] + ["norm"] * 2 + ["gate"] + ["norm"] * 3 + [FULL, "gate"],
    ),
}


@pytest.mark.parametrize("way", [by_duals, by_transform])
@pytest.mark.parametrize("name", BLOCKS)
def test_block(name, way, calls):
    build, call, ops = BLOCKS[name]
    torch.manual_seed(0)
    module = build().double().eval()
    x, t = (torch.randn(2, 4, WIDTH, dtype=torch.float64).requires_grad_() for _ in range(2))
    parameters = list(module.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn_like(parameter))

    def f(x):
        emb = x.mean(1)
        out = call(module, x, emb) if call else module(x, emb)
        return torch.cat([v.flatten() for v in ([out] if torch.is_tensor(out) else out)])

    with Wide():  # what a model casts to float32 by name stays in float64
        want, got = unfused_jvp(f, x, t), way(f, x, t)
        torch.testing.assert_close(tuple(got), want)
        grads = [
            torch.autograd.grad(
                out.sin().sum() + t_out.cos().sum(), (x, t, *parameters), allow_unused=True
            )
            for out, t_out in (got, want)
        ]
    torch.testing.assert_close(*grads)
    assert calls == ops, calls
