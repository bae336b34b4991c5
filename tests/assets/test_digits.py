"""The digits data, the pipeline's contract, and the quality of the packaged weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
)
from PIL import Image

from fewstep.assets.digits import (
    DIGITS_PATH,
    DigitsPipeline,
    digits_data,
    digits_transformer,
    load_digits_pipeline,
)
from fewstep.metrics import class_accuracy
from fewstep.sampling import FlowConsistencyScheduler


@pytest.fixture
def pipeline() -> DigitsPipeline:
    torch.manual_seed(0)
    pipe = DigitsPipeline(digits_transformer(heads=1, layers=1), FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def count_calls(pipe: DigitsPipeline) -> list:
    calls: list = []
    pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, out: calls.append(kwargs["class_labels"].tolist()),
        with_kwargs=True,
    )
    return calls


def latent(pipe: DigitsPipeline, labels, **kwargs) -> torch.Tensor:
    kwargs.setdefault("generator", torch.Generator().manual_seed(0))
    return pipe(labels, output_type="latent", **kwargs).images


def test_the_halves_are_stratified_disjoint_and_fixed():
    train, train_labels = digits_data("train")
    held_out, held_out_labels = digits_data("held_out")
    assert len(train) + len(held_out) == 1797
    assert abs(len(train) - len(held_out)) == 1
    counts = torch.bincount(train_labels) - torch.bincount(held_out_labels)
    assert counts.abs().max() <= 1
    assert train.shape[1:] == (1, 16, 16)
    assert train.dtype == torch.float32
    assert train.min() == -1
    assert train.max() == 1
    # A digit drawn twice by chance would be a leak between the halves.
    assert torch.cdist(train.flatten(1), held_out.flatten(1)).min() > 0
    train.zero_()
    assert digits_data("train")[0].abs().max() == 1
    with pytest.raises(ValueError, match="split: expected 'train' or 'held_out'"):
        digits_data("test")


def test_output_types(pipeline):
    call = {"class_labels": [1, 2], "num_inference_steps": 2}
    pt = pipeline(**call, generator=torch.Generator().manual_seed(0), output_type="pt").images
    array = pipeline(**call, generator=torch.Generator().manual_seed(0), output_type="np").images
    pil = pipeline(**call, generator=torch.Generator().manual_seed(0)).images
    (plain,) = pipeline(
        **call, generator=torch.Generator().manual_seed(0), output_type="pt", return_dict=False
    )
    assert pt.shape == (2, 1, 16, 16)
    assert 0 <= pt.min() <= pt.max() <= 1
    assert torch.equal(pt, plain)
    np.testing.assert_allclose(array[..., 0], pt[:, 0].numpy())
    assert isinstance(pil[0], Image.Image)
    assert pil[0].size == (16, 16)


def test_evaluations_per_call(pipeline):
    calls = count_calls(pipeline)
    latent(pipeline, [3, 4], num_inference_steps=3)
    assert calls == [[3, 4]] * 3
    calls.clear()
    latent(pipeline, [3, 4], num_inference_steps=2, guidance_scale=2.0)
    assert calls == [[3, 4], [10, 10]] * 2


def test_guidance_is_linear_in_the_scale(pipeline):
    noise = torch.randn(1, 1, 16, 16)
    v = [
        (latent(pipeline, [3], num_inference_steps=1, guidance_scale=g, latents=noise) - noise)
        for g in (1.0, 2.0, 3.0)
    ]
    torch.testing.assert_close(v[2] - v[1], v[1] - v[0], atol=1e-5, rtol=1e-4)


def test_no_wasted_evaluation_and_own_grids(pipeline):
    latent(pipeline, [3], num_inference_steps=4)
    assert pipeline.scheduler.sigmas.tolist() == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    latent(pipeline, [3], sigmas=[1.0, 0.3])
    assert pipeline.scheduler.sigmas.tolist() == pytest.approx([1.0, 0.3, 0.0])
    latent(pipeline, [3], timesteps=[1000.0, 400.0])
    assert pipeline.scheduler.timesteps.tolist() == pytest.approx([1000.0, 400.0])


def test_network_time_follows_sigma(pipeline):
    seen = []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["timestep"]), with_kwargs=True
    )
    latent(pipeline, [3, 5], sigmas=[1.0, 0.25])
    scale = pipeline.config.timestep_scale
    assert [t.tolist() for t in seen] == [[scale] * 2, [scale / 4] * 2]


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchLCMScheduler(),
        FlowMatchHeunDiscreteScheduler(),
        DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
        ),
        FlowConsistencyScheduler(),
        FlowConsistencyScheduler(knots={"2": [1.0, 0.6]}),
    ],
)
def test_any_flow_scheduler_can_be_swapped_in(pipeline, scheduler):
    pipeline.scheduler = scheduler
    out = latent(pipeline, [1, 2], num_inference_steps=2)
    assert torch.isfinite(out).all()
    if isinstance(scheduler, FlowConsistencyScheduler):
        assert scheduler.sigmas[1].item() == pytest.approx(0.6 if scheduler.config.knots else 0.5)


def test_callback_may_replace_latents(pipeline):
    steps = []

    def callback(pipe, step, timestep, tensors):
        steps.append((step, float(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    out = latent(pipeline, [1], num_inference_steps=2, callback_on_step_end=callback)
    assert steps == [(0, 1000.0), (1, 500.0)]
    assert not out.any()


def test_seeds(pipeline):
    a, b = (latent(pipeline, [1, 2], num_inference_steps=2) for _ in range(2))
    assert torch.equal(a, b)
    one_each = [torch.Generator().manual_seed(s) for s in (0, 1)]
    c = latent(pipeline, [1, 2], num_inference_steps=1, generator=one_each)
    d = latent(pipeline, [2], num_inference_steps=1, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(c[1:], d, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"class_labels": [10]}, ValueError, r"class_labels: expected values in 0\.\.9"),
        ({"class_labels": []}, (ValueError, TypeError), "class_labels: expected"),
        ({"class_labels": [0.5]}, TypeError, "class_labels: expected integers"),
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps: expected a positive"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, ValueError, "latents: expected shape"),
        ({"output_type": "jpeg"}, ValueError, "output_type: expected"),
        ({"sigmas": [1.0], "timesteps": [1000.0]}, ValueError, "at most one"),
        ({"generator": [torch.Generator()] * 3}, ValueError, "generator: expected 1"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, ValueError, "got .'noise'"),
    ],
)
def test_errors_name_the_argument(pipeline, kwargs, error, message):
    with pytest.raises(error, match=message):
        pipeline(**({"class_labels": [1]} | kwargs))


def test_round_trip_through_diffusers(pipeline, tmp_path):
    pipe = DigitsPipeline(
        pipeline.transformer,
        FlowConsistencyScheduler(knots={"2": [1.0, 0.6]}),
        timestep_scale=8.0,
        default_steps=2,
    )
    pipe.save_pretrained(tmp_path)
    again = DigitsPipeline.from_pretrained(tmp_path)
    assert isinstance(again.scheduler, FlowConsistencyScheduler)
    assert (again.config.timestep_scale, again.config.default_steps) == (8.0, 2)
    for p in (pipe, again):
        p.set_progress_bar_config(disable=True)
    assert torch.equal(latent(pipe, [4, 5]), latent(again, [4, 5]))


def test_packaged_pipelines():
    files = sum(f.stat().st_size for f in DIGITS_PATH.rglob("*.safetensors"))
    assert files < 20e6
    labels = torch.arange(10).repeat(4)
    for name, steps, least in (("student", 2, 0.9), ("student", 1, 0.85), ("teacher", 8, 0.9)):
        pipe = load_digits_pipeline(name)
        pipe.set_progress_bar_config(disable=True)
        assert pipe.transformer.dtype == torch.float32
        assert not pipe.transformer.training
        images = latent(pipe, labels, num_inference_steps=steps)
        assert class_accuracy(images, labels) >= least
    with pytest.raises(ValueError, match="name: expected 'teacher' or 'student'"):
        load_digits_pipeline("judge")
