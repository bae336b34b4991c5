"""Layers of models that no family lists, found by diffusers' names: exactness and what is left."""

import diffusers
import pytest
import torch

from fewstep.caching import Fora, ModuleSession, ModuleStack, Taylor, find_modules
from patching.tiny_pipelines import randomize

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}


class Scheduler:
    step_index = None

    def __init__(self):
        self.timesteps = torch.tensor([1000.0, 900.0, 750.0, 500.0, 200.0])


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def chroma():
    model = diffusers.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
        **HEADS,
    )
    ids = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(6, 3)}
    return model, {"hidden_states": noise(1, 16, 4), "encoder_hidden_states": noise(1, 6, 32)} | ids


def flux2():
    model = diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        joint_attention_dim=32,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        **HEADS,
    )
    ids = {"img_ids": torch.zeros(1, 16, 4), "txt_ids": torch.zeros(1, 6, 4)}
    given = {"hidden_states": noise(1, 16, 4), "encoder_hidden_states": noise(1, 6, 32)}
    return model, given | ids | {"guidance": torch.ones(1)}


def hunyuan_video():
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    return model, {
        "hidden_states": noise(1, 4, 1, 4, 4),
        "encoder_hidden_states": noise(1, 6, 16),
        "encoder_attention_mask": torch.ones(1, 6),
        "pooled_projections": noise(1, 8),
        "guidance": torch.ones(1),
    }


def qwen_image():
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
        **HEADS,
    )
    return model, {
        "hidden_states": noise(1, 16, 16),
        "encoder_hidden_states": noise(1, 6, 16),
        "encoder_hidden_states_mask": torch.ones(1, 6, dtype=torch.long),
        "img_shapes": [(1, 4, 4)],
    }


def wan():
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return model, {
        "hidden_states": noise(1, 4, 2, 8, 8),
        "encoder_hidden_states": noise(1, 6, 16),
    }


MODELS = {
    chroma: ["attn", "ff", "ff_context", "proj_out", "proj_out"],
    flux2: ["attn", "ff", "ff_context", "attn", "attn"],
    hunyuan_video: ["attn", "ff", "attn", "ff", "ff_context", "proj_out", "proj_out"],
    qwen_image: ["attn", "img_mlp", "txt_mlp"] * 2,
    wan: ["attn1", "attn2", "ffn"] * 2,
}


@pytest.mark.parametrize("make", MODELS)
def test_layers_found_by_name(make):
    model, given = make()
    randomize(model.eval())
    found = find_modules(model)
    assert [name.rpartition(".")[2] for name in found] == MODELS[make]

    def outputs():
        made = []
        for index, time in enumerate(scheduler.timesteps):
            scheduler.step_index = index
            made.append(model(**given, timestep=time[None] / 1000, return_dict=False)[0])
        return torch.stack(made)

    with torch.no_grad():
        scheduler = Scheduler()
        plain = outputs()
        for policy in (Fora(every=1), Taylor(every=2, warmup=2, degree=1)):
            session = ModuleSession(policy, lambda: scheduler)
            slots = ModuleStack(model, found).replacements(session)
            for module, name, value in slots:
                setattr(module, name, value)
            made = outputs()
            for module, name, _ in slots:
                delattr(module, name)
            skipped = session.report()["forecast_modules"]["call 0"]
            if policy == Fora(every=1):
                assert torch.equal(made, plain)
                assert skipped == [0] * 5
            else:
                assert skipped == [0, 0, len(found), 0, len(found)]
                assert torch.equal(made[[0, 1, 3]], plain[[0, 1, 3]])
                assert made.isfinite().all()
                assert not torch.equal(made[4], plain[4])
