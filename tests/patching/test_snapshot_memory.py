"""What snapshots take on a model of full size, counted on shapes alone, and formats by scope."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

import fewstep
from fewstep.caching import Taylor
from patching.tiny_pipelines import build, call

# GB (10^9 bytes) of FLUX.1-dev at 1024 x 1024, three snapshots; what the others have is 6.5 GB.
LIMITS = {None: 6.5, "bfloat16": 6.5, "fp8": 3.3, "int8": 3.3, "int4": 1.7}


def kept(single, snapshots):
    """Return the bytes for FLUX's widths with one double and so many single blocks."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=single, guidance_embeds=True)
    model.to(torch.bfloat16)
    assert model.inner_dim == 3072
    none = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = FluxPipeline(scheduler=scheduler, transformer=model, **none)
    shapes = {
        "hidden_states": (1, 4096, 64),
        "encoder_hidden_states": (1, 512, 4096),
        "pooled_projections": (1, 768),
        "timestep": (1,),
        "guidance": (1,),
        "img_ids": (4096, 3),
        "txt_ids": (512, 3),
    }
    given = {k: torch.empty(s, device="meta", dtype=torch.bfloat16) for k, s in shapes.items()}
    policy = Taylor(degree=2, warmup=1, scope="module", snapshots=snapshots)
    with fewstep.patch(pipe, cache=policy) as patch, torch.no_grad():
        scheduler.set_timesteps(4)
        for index in range(2):
            scheduler._step_index = index
            model(**given)
        numbers = patch.report()["cache"]
    assert numbers["forecast_modules"]["call 0"] == [0, 3 + single]
    return numbers["snapshot_bytes"]


@pytest.mark.parametrize("snapshots", LIMITS)
def test_flux_per_layer_at_order_2(snapshots):
    one, two = kept(1, snapshots), kept(2, snapshots)
    single = two - one
    # FLUX.1-dev has 19 double and 38 single blocks; all of a kind keep the same.
    total = 19 * (one - single) + 38 * single
    assert 0.95 * LIMITS[snapshots] < total / 1e9 <= LIMITS[snapshots]


@pytest.mark.parametrize("scope", ["output", "blocks", "block", "module"])
def test_every_scope_keeps_every_format(scope):
    pipe = build("flux")
    images, bytes_ = {}, {}
    for snapshots in LIMITS:
        policy = Taylor(every=3, warmup=2, degree=1, scope=scope, snapshots=snapshots)
        with fewstep.patch(pipe, cache=policy) as patch:
            images[snapshots] = call(pipe, num_inference_steps=6)
            bytes_[snapshots] = patch.report()["cache"]["snapshot_bytes"]
            assert patch.report()["cache"]["skipped"] == 6  # of both guidance passes
    assert bytes_["bfloat16"] == bytes_[None] / 2
    assert bytes_["fp8"] == bytes_["int8"] < bytes_["bfloat16"]
    assert bytes_["int4"] < bytes_["int8"]
    error = {s: (image - images[None]).norm().item() for s, image in images.items()}
    assert error[None] == 0 < error["bfloat16"] < error["fp8"]
    assert error["int8"] < error["int4"] < 0.2 * images[None].norm()
