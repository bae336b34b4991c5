"""What the tests of time="cache" share: runs of a pipeline, and which module's values are kept."""

from patching.tiny_pipelines import call, denoiser

STEPS = 3
# A module whose values are kept, of each pipeline used below.
KEPT = {
    "digits": "transformer_blocks.1.norm1.emb.timestep_embedder",
    "pixart": "adaln_single",
    "sana": "time_embed",
    "sd-unet": "time_embedding",
}


def run(pipe, **kwargs):
    return call(pipe, num_inference_steps=STEPS, **kwargs)


def kept(pipe, name):
    return denoiser(pipe).get_submodule(KEPT[name])


def evaluations(patch):
    return patch.report()["time"]["evaluated"]
