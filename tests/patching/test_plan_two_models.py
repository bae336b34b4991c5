"""Pipelines whose steps are shared by two models, as those of Wan 2.2."""

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

import fewstep
from fewstep.caching import Fora, GuidanceReuse, Plan, calibrate
from fewstep.caching.quality import psnr
from fewstep.caching.solve import best_schedule, best_stages
from patching.tiny_pipelines import randomize

STEPS = 10
TAKEOVER = 4  # the boundary below is passed there


def transformer(seed):
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=16,
        num_layers=1,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    ).eval()
    randomize(model)
    with torch.no_grad():
        next(model.parameters()).mul_(1 + 0.5 * seed)
    return model


def build(boundary=0.6):
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=AutoencoderKLWan(
            base_dim=3,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        transformer=transformer(0),
        transformer_2=transformer(1),
        boundary_ratio=boundary,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def given(steps=STEPS):
    return {
        "prompt_embeds": torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(1)),
        "negative_prompt_embeds": torch.zeros(1, 4, 8),
        "height": 16,
        "width": 16,
        "num_frames": 5,
        "guidance_scale": 3.0,
        "guidance_scale_2": 2.0,
        "num_inference_steps": steps,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    }


def run(pipe, call, cache=None):
    call["generator"].manual_seed(0)
    if cache is None:
        return pipe(**call).frames
    with fewstep.patch(pipe, cache=cache) as patch:
        return pipe(**call).frames, patch.report()["cache"]


def marks(numbers):
    rows = numbers["branches"].values()
    return {"".join("F" if one == "full" else "-" for one in row) for row in rows}


@pytest.fixture(scope="module")
def calibrated():
    pipe = build()
    run(pipe, given())  # diffusers registers its own hooks
    before = {name: dict(vars(getattr(pipe, name))) for name in ("transformer", "transformer_2")}
    plan = calibrate(pipe, [given()], full_steps=5, passes=1)
    for name, attributes in before.items():
        assert dict(vars(getattr(pipe, name))) == attributes
    return pipe, plan


def test_the_second_model_starts_with_a_full_step(calibrated):
    pipe, plan = calibrated
    times = plan.times
    assert times[TAKEOVER - 1] >= 600 > times[TAKEOVER]
    assert {0, TAKEOVER} <= set(plan.full)
    assert len(plan.full) == 5
    for index, weights in enumerate(plan.steps):
        if weights is not None and index > TAKEOVER:  # of snapshots of this model alone
            assert len(weights) <= len([f for f in plan.full if TAKEOVER <= f < index])
    frames, numbers = run(pipe, given(), plan)
    assert marks(numbers) == {"".join("F" if own is None else "-" for own in plan.steps)}
    assert numbers["plan"]["full"] == list(plan.full)
    assert numbers["plan"]["starts_at"] == 0
    assert numbers["step_error"] == plan.predicted["step_error"]
    plain = run(pipe, given())
    assert psnr([plain], [frames]) == pytest.approx([plan.predicted["psnr"]], abs=1e-3)
    nothing, _ = run(pipe, given(), Plan(times, (None,) * STEPS))
    assert torch.equal(nothing, plain)


def test_a_plan_that_knows_nothing_of_it(calibrated):
    pipe, plan = calibrated
    steps = tuple(None if i % 3 == 0 else (1.0,) for i in range(STEPS))
    wrong = {"step_error": [0.0] * STEPS}
    unaware = Plan(plan.times, steps, gram=plan.gram, predicted=wrong)
    _, numbers = run(pipe, given(), unaware)
    assert "step_error" not in numbers  # that of other steps
    assert marks(numbers) == {"F--FF-F--F"}
    assert numbers["plan"]["full"] == [0, 3, 4, 6, 9]
    _, numbers = run(pipe, given(), Fora(every=3))  # starts anew
    assert marks(numbers) == {"F--FF--F--"}
    _, numbers = run(pipe, given(16), plan)
    (row,) = marks(numbers)
    assert row[next(i for i in range(16) if 1000 * (16 - i) / 16 < 600)] == "F"


def test_other_weights_of_the_second_model_are_noticed(calibrated, tmp_path):
    _, plan = calibrated
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    other = build()
    run(other, given(), tmp_path / "plan.json")
    with torch.no_grad():
        for parameter in other.transformer_2.parameters():
            parameter.mul_(1.5)
    with pytest.raises(ValueError, match=r"weights: expected .* to start"):
        fewstep.patch(other, cache=plan)
    other.transformer_2 = None
    with pytest.raises(ValueError, match="models: expected 2, got 1"):
        fewstep.patch(other, cache=plan)


def test_fewer_full_steps_than_models():
    with pytest.raises(ValueError, match="full_steps: expected at least 2, one for each model"):
        calibrate(build(), [given()], full_steps=1)


def test_both_models_on_one_step():
    pipe = build()
    first, second = pipe.transformer.forward, pipe.transformer_2

    def both(*args, **kwargs):
        second(*args, **kwargs)
        return first(*args, **kwargs)

    pipe.transformer.forward = both
    with pytest.raises(ValueError, match=r"expected models that take turns, .* got two .* step 0"):
        calibrate(pipe, [given()], full_steps=4)


def test_stages_are_the_cheapest_of_all_splits():
    def cost(known, end):
        return float((end - known[-1] - 1) * (3 if known[-1] < 4 else 1))

    found = best_stages([4, 10], 5, cost)
    assert {0, 4} <= set(found)
    assert len(found) == 5
    splits = []
    for count in range(1, 5):
        first = best_schedule(4, count, cost)
        second = tuple(
            4 + i
            for i in best_schedule(6, 5 - count, lambda k, e: cost(tuple(i + 4 for i in k), e + 4))
        )
        full = first + second
        splits.append(sum(cost((a,), b) for a, b in zip(full, (*full[1:], 10), strict=True)))
    assert sum(cost((a,), b) for a, b in zip(found, (*found[1:], 10), strict=True)) == min(splits)


def test_the_published_rule_of_guidance():
    """Passes in two calls, which nobody has said, before and behind the takeover."""
    pipe = build()
    wanted, _ = run(pipe, given(), GuidanceReuse(passes="calls"))
    found, numbers = run(pipe, given(), "guidance-reuse")
    assert torch.equal(found, wanted)
    assert numbers["branches"]["cond"] == ["full"] * STEPS
    assert numbers["branches"]["uncond"] == ["full"] * 6 + ["skip"] * 4
