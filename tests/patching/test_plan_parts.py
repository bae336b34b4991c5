"""Plans on runs of a part of a grid: image to image, and pipelines that share a grid."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

import fewstep
from fewstep.caching import Plan, Taylor, calibrate
from fewstep.caching.quality import psnr
from patching.test_image_to_image import image_to_image
from patching.tiny_pipelines import arguments, build

STEPS = 10
SKIPPED = (3, 4, 6, 8)  # of a plan of all steps
SCHEDULERS = {
    "sd-unet": (DDIMScheduler, PNDMScheduler),
    "flux": (None,),
}
CASES = [(name, kind) for name, kinds in SCHEDULERS.items() for kind in kinds]


def pipelines(name, kind):
    """From text and from images, on one model and scheduler."""
    source = build(name)
    if kind is not None:
        source.scheduler = kind.from_config(source.scheduler.config)
    return source, image_to_image(source, name)


def given(source, strength=None, steps=STEPS):
    kwargs = {**arguments(source), "output_type": "latent", "num_inference_steps": steps}
    if strength is not None:
        if "UNet" in type(getattr(source, "unet", None)).__name__:
            del kwargs["height"], kwargs["width"]
        kwargs["image"] = torch.linspace(0, 1, 16 * 16 * 3).reshape(1, 3, 16, 16)
        kwargs["strength"] = strength
    return {**kwargs, "generator": torch.Generator().manual_seed(0)}


def run(pipe, call, cache=None, **options):
    call["generator"].manual_seed(0)
    if cache is None:
        return pipe(**call).images
    with fewstep.patch(pipe, cache=cache, **options) as patch:
        return pipe(**call).images, patch.report()["cache"]


def marks(numbers):
    """What was done, by guidance pass, in one word each."""
    rows = numbers["branches"].values()
    return {"".join("F" if one == "full" else "-" for one in row) for row in rows}


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_plan_of_the_whole_grid_serves_its_end(name, kind):
    source, pipe = pipelines(name, kind)
    plan = calibrate(source, [given(source)], full_steps=6, passes=0)
    call = given(source, 0.6)
    plain = run(pipe, call)
    steps = len(plan.times)
    cached, numbers = run(pipe, call, plan)
    start = numbers["plan"]["starts_at"]
    assert start == 4
    expected = ["F" if i == start or i in plan.full else "-" for i in range(start, steps)]
    assert marks(numbers) == {"".join(expected)}
    assert numbers["skipped"] > 0
    assert cached.isfinite().all()
    nothing, _ = run(pipe, call, Plan(plan.times, (None,) * steps))
    assert torch.equal(nothing, plain)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_calibrated_on_a_part(name, kind, tmp_path):
    source, pipe = pipelines(name, kind)
    call = given(source, 0.6)
    plan = calibrate(pipe, [call], full_steps=4, passes=1)
    start, total = plan.part
    assert (start, total) == (4, STEPS + (kind is PNDMScheduler))
    assert len(plan.times) == total - start
    cached, numbers = run(pipe, call, plan)
    assert marks(numbers) == {"".join("F" if own is None else "-" for own in plan.steps)}
    assert psnr([run(pipe, call)], [cached]) == pytest.approx([plan.predicted["psnr"]], abs=1e-3)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    # From further ahead the steps before the part run in full, from further back it starts later.
    _, numbers = run(pipe, given(source, 0.8), plan)
    (row,) = marks(numbers)
    assert row == "FF" + "".join("F" if own is None else "-" for own in plan.steps)
    _, numbers = run(pipe, given(source, 0.5), plan)
    (row,) = marks(numbers)
    assert row == "".join("F" if i in {1, *plan.full} else "-" for i in range(1, len(plan.steps)))


def test_a_part_is_carried_over():
    source, pipe = pipelines("sd3", None)
    plan = calibrate(pipe, [given(source, 0.6)], full_steps=4, passes=0)
    call = given(source, 0.6, steps=15)
    _, numbers = run(pipe, call, plan)
    assert numbers["plan"]["carried_over_from"] == STEPS
    (row,) = marks(numbers)
    assert (len(row), row[0]) == (9, "F")
    assert row.count("F") < 7


def test_published_schedules_start_with_the_run():
    source, pipe = pipelines("sd3", None)
    _, numbers = run(pipe, given(source, 0.6), Taylor(every=3, warmup=2, degree=1))
    assert marks(numbers) == {"FF--F-"}


def test_calls_that_start_at_several_steps():
    source, pipe = pipelines("sd3", None)
    with pytest.raises(ValueError, match=r"one start in all calls, step 4, got 5 in call 1"):
        calibrate(pipe, [given(source, 0.6), given(source, 0.5)])


def xl(kind, model):
    return kind(
        vae=build("sd-unet").vae,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=model,
        scheduler=DDIMScheduler(clip_sample=False),
        add_watermarker=False,
    )


def test_two_pipelines_that_share_a_grid():
    """The base model runs the first steps (`denoising_end`), the refiner the others."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 + 6 * 8,
    ).eval()
    call = {
        "prompt_embeds": torch.randn(1, 6, 16),
        "pooled_prompt_embeds": torch.randn(1, 8),
        "guidance_scale": 1.0,
        "num_inference_steps": STEPS,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    }
    base = xl(StableDiffusionXLPipeline, unet)
    first = {**call, "height": 16, "width": 16, "denoising_end": 0.6}
    plan = calibrate(base, [first], full_steps=4, passes=0)
    assert plan.part == (0, STEPS)
    assert len(plan.times) == 6
    half, numbers = run(base, first, plan)
    assert marks(numbers) == {"".join("F" if own is None else "-" for own in plan.steps)}
    assert psnr([run(base, first)], [half]) == pytest.approx([plan.predicted["psnr"]], abs=1e-3)

    refiner = xl(StableDiffusionXLImg2ImgPipeline, unet)
    second = {**call, "image": half, "denoising_start": 0.6}
    plan = calibrate(refiner, [second], full_steps=2, passes=0)
    assert plan.part == (6, STEPS)
    _, numbers = run(refiner, second, plan)
    assert marks(numbers) == {"".join("F" if own is None else "-" for own in plan.steps)}
    assert numbers["plan"]["starts_at"] == 6
