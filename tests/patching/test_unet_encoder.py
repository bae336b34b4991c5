"""UNets: the encoder on key steps alone, decoders of a gap at once, DeepCache's levels."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel

import fewstep
from fewstep.assets.digits import DigitsPipeline
from fewstep.caching import DeepCache, FasterDiffusion, Interval, Taylor, Tiue
from patching.tiny_pipelines import Counter, build, call, randomize

STEPS = 6


def class_unet(**settings):
    """Two calls a step, no text; its time is a sixteenth-thousandth of the scheduler's."""
    torch.manual_seed(0)
    options = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (4, 8, 8),
        "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        "norm_num_groups": 2,
        "attention_head_dim": 4,
        "num_class_embeds": 11,
    }
    unet = UNet2DModel(**options | settings).eval()
    randomize(unet)
    pipe = DigitsPipeline(
        unet, FlowMatchEulerDiscreteScheduler(), default_steps=STEPS, default_guidance=2.0
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text_unet():
    pipe = build("sd-unet")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


PIPES = {"text": text_unet, "classes": class_unet}


def run(pipe, **options):
    return call(pipe, num_inference_steps=STEPS, **options)


def unet_of(pipe):
    return pipe.transformer if hasattr(pipe, "transformer") else pipe.unet


def parts_of(pipe):
    """What runs inside the outermost and innermost down block, the mid block, and an up block."""
    unet = unet_of(pipe)
    blocks = unet.down_blocks[0], unet.down_blocks[-1], unet.mid_block, unet.up_blocks[-1]
    return [block.resnets[0] for block in blocks]


def steps_of(pipe, end, start=0):
    """The times as the model gets them, with the scheduler where a loop would have it."""
    pipe.scheduler.set_timesteps(STEPS)
    for index in range(start, end):
        pipe.scheduler._step_index = index
        yield pipe.scheduler.timesteps[index][None] * 0.016


@pytest.mark.parametrize("name", PIPES)
@pytest.mark.parametrize(
    "policy", [FasterDiffusion(every=1), FasterDiffusion(every=1, parallel=True), DeepCache(1)]
)
def test_no_skips_change_no_bit(name, policy):
    pipe = PIPES[name]()
    plain = run(pipe, batch=2)
    with fewstep.patch(pipe, cache=policy) as patch:
        assert torch.equal(run(pipe, batch=2), plain)
        assert patch.report()["cache"]["skipped"] == 0
    assert torch.equal(run(pipe, batch=2), plain)


@pytest.mark.parametrize("name", PIPES)
def test_decoders_at_once_draw_what_they_draw_one_by_one(name):
    pipe = PIPES[name]()
    plain = run(pipe, batch=2)
    passes = 1 if name == "text" else 2  # guidance in one batch, or in two calls
    with (
        fewstep.patch(pipe, cache=FasterDiffusion(key_steps=(0, 1, 4))),
        Counter(*parts_of(pipe)) as seen,
    ):
        serial = run(pipe, batch=2)
    assert seen.counts == [3 * passes] * 3 + [STEPS * passes]
    with (
        fewstep.patch(pipe, cache=FasterDiffusion(key_steps=(0, 1, 4), parallel=True)) as patch,
        Counter(*parts_of(pipe)) as seen,
    ):
        parallel = run(pipe, batch=2)
        report = patch.report()["cache"]
    assert seen.counts == [3 * passes] * 4
    assert report["ahead"] == 3 * passes
    assert report["branches"]["call 0"] == ["full", "full", "skip", "skip", "full", "skip"]
    assert not torch.allclose(serial, plain, rtol=0.05)
    # The same sums in batches of another size: their rounding, amplified by the steps.
    torch.testing.assert_close(parallel, serial, rtol=1e-3, atol=1e-3)


def test_a_skipped_step_is_the_decoder_of_kept_features_at_its_own_time():
    unet = text_unet().unet
    pipe = text_unet()
    x, y, text = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.randn(2, 6, 16)
    pipe.scheduler.set_timesteps(4)
    first, second = pipe.scheduler.timesteps[:2]
    kept = {}

    def keep(name):
        return lambda module, args, output: kept.__setitem__(name, output)

    parts = dict(unet.named_children())
    handles = [parts["conv_in"].register_forward_hook(keep("conv_in"))]
    handles += [b.register_forward_hook(keep(i)) for i, b in enumerate(unet.down_blocks)]
    handles += [unet.mid_block.register_forward_hook(keep("mid"))]
    with torch.no_grad(), fewstep.patch(pipe, cache=FasterDiffusion(every=2)):
        key = pipe.unet(x, first, text).sample
        skipped = pipe.unet(y, second, text).sample
        assert torch.equal(unet(x, first, text).sample, key)
        for handle in handles:
            handle.remove()
        for name, module in (("conv_in", unet.conv_in), ("mid", unet.mid_block)):
            module.forward = lambda *a, name=name, **k: kept[name]
        for index, block in enumerate(unet.down_blocks):
            block.forward = lambda *a, index=index, **k: kept[index]
        assert torch.equal(unet(y, second, text).sample, skipped)


def test_the_published_key_steps():
    full = [i for i, w in enumerate(FasterDiffusion().forecasts(range(50))) if w is None]
    assert full == [0, 1, 2, 3, 5, 10, 15, 25, 35]
    full = [i for i, w in enumerate(FasterDiffusion().forecasts(range(20))) if w is None]
    assert full == [0, 1, 2, 4, 6, 10, 14]
    assert Tiue().forecasts(range(4)) == (None, (1.0,), (1.0,), (1.0,))


def test_a_unified_encoder_runs_once():
    pipe = class_unet()
    with fewstep.patch(pipe, cache="tiue"), Counter(*parts_of(pipe)) as seen:
        at_once = run(pipe, batch=2)
    assert seen.counts == [2] * 4
    with fewstep.patch(pipe, cache=Tiue(parallel=False)), Counter(*parts_of(pipe)) as seen:
        torch.testing.assert_close(run(pipe, batch=2), at_once, rtol=1e-3, atol=1e-3)
    assert seen.counts == [2, 2, 2, 2 * STEPS]


@pytest.mark.parametrize("parallel", [False, True])
def test_every_guidance_pass_has_its_own_features(parallel):
    """With guidance, each pass is what it is without the other."""
    pipe = class_unet()
    policy = FasterDiffusion(every=3, parallel=parallel)
    labels = torch.tensor([3, 3])
    null = torch.full_like(labels, pipe.num_classes)
    x = torch.randn(2, 1, 8, 8)

    def outputs(*passes):
        found = []
        for index, time in enumerate(steps_of(pipe, 3)):
            given = [(x + index, time.expand(2), each) for each in passes]
            found.append([pipe.transformer(a, t, class_labels=c).sample for a, t, c in given])
        return found

    with torch.no_grad(), fewstep.patch(pipe, cache=policy) as patch:
        both = outputs(labels, null)
        assert patch.report()["cache"]["skipped"] == 4
        for alone, index in ((outputs(labels), 0), (outputs(null), 1)):
            for mine, theirs in zip(alone, both, strict=True):
                assert torch.equal(mine[0], theirs[index])


def test_a_step_at_another_time_than_foreseen_is_decoded_for_itself():
    pipe = class_unet()
    x, labels = torch.randn(1, 1, 8, 8), torch.tensor([3])
    found = {}
    for parallel in (False, True):
        policy = FasterDiffusion(every=4, parallel=parallel)
        with torch.no_grad(), fewstep.patch(pipe, cache=policy) as patch:
            found[parallel] = [
                pipe.transformer(x, time * late, class_labels=labels).sample
                for late, time in zip((1.0, 0.9, 1.0), steps_of(pipe, 3), strict=True)
            ]
            report = patch.report()["cache"]
        assert report["skipped"] == 2
        assert report["ahead"] == parallel
    for one, other in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_what_a_controlnet_adds_is_of_the_step():
    shapes = [(4, 8, 8), (4, 8, 8), (4, 4, 4), (8, 4, 4), (8, 2, 2), (8, 2, 2)]
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 6, 16)

    def outputs(pipe, *sizes):
        pipe.scheduler.set_timesteps(4)
        for time, size in zip(pipe.scheduler.timesteps, sizes, strict=False):
            extra = {
                "down_block_additional_residuals": tuple(size * torch.ones(1, *s) for s in shapes),
                "mid_block_additional_residual": size * torch.ones(1, 8, 2, 2),
            }
            last = pipe.unet(x, time, text, **extra).sample
        return last

    pipe = text_unet()
    policy = FasterDiffusion(every=2, parallel=True)
    with torch.no_grad(), fewstep.patch(pipe, cache=policy) as patch:
        # The same x: the features kept are right on the second step, up to its time.
        strong, weak = outputs(pipe, 1.0, 3.0), outputs(pipe, 1.0, 1.0)
        report = patch.report()["cache"]
        assert (report["skipped"], report["ahead"]) == (1, 0)
    assert not torch.allclose(strong, weak)


def driven(pipe, every, **steps):
    """Return the outputs of a run serially and in parallel, by `every` key steps, and `ahead`.

    Args:
        steps: arguments of the UNet; a function gives each step its own.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((2, 4, 8, 8), generator=generator).to(pipe.unet.device)
    found, ahead = [], None
    for parallel in (False, True):
        policy = FasterDiffusion(every=every, parallel=parallel)
        with torch.no_grad(), fewstep.patch(pipe, cache=policy) as patch:
            pipe.scheduler.set_timesteps(4)
            outputs = []
            for index, time in enumerate(pipe.scheduler.timesteps):
                given = {k: v(index) if callable(v) else v for k, v in steps.items()}
                outputs.append(pipe.unet(x, time, **given).sample)
            ahead = patch.report()["cache"]["ahead"]
            kept = [each.memory for each in pipe.unet.forward.session._branches.values()]
        assert not any(kept)
        found.append(torch.stack(outputs))
    return *found, ahead


def controlled(step):
    """A ControlNet's residuals, from the second step on."""
    shapes = [(4, 8, 8), (4, 8, 8), (4, 4, 4), (8, 4, 4), (8, 2, 2), (8, 2, 2)]
    return tuple(3 * torch.ones(2, *shape) for shape in shapes) if step else None


def test_residuals_that_start_after_a_key_step_are_not_left_out():
    text = torch.randn(2, 6, 16)
    serial, parallel, ahead = driven(
        text_unet(),
        4,
        encoder_hidden_states=text,
        down_block_additional_residuals=controlled,
        mid_block_additional_residual=lambda i: 3 * torch.ones(2, 8, 2, 2) if i else None,
    )
    assert ahead == 0
    torch.testing.assert_close(parallel, serial, rtol=1e-3, atol=1e-3)


def test_conditioning_that_changes_after_a_key_step_is_decoded_with():
    first, other = torch.randn(2, 2, 6, 16)
    pipe = text_unet()
    options = {"rtol": 1e-3, "atol": 1e-3}
    switched = driven(pipe, 4, encoder_hidden_states=lambda i: other if i > 1 else first)
    torch.testing.assert_close(switched[1], switched[0], **options)
    assert switched[2] == 1
    plain = driven(pipe, 4, encoder_hidden_states=first)
    assert plain[2] == 3
    assert not torch.allclose(plain[1][-1], switched[1][-1], **options)
    # Written to in place, by the second step.
    given = first.clone()
    written = driven(
        pipe, 4, encoder_hidden_states=lambda i: given.copy_(first) if i == 0 else given
    )
    assert torch.equal(written[1], plain[1])
    written = driven(pipe, 4, encoder_hidden_states=lambda i: given.copy_(other if i else first))
    torch.testing.assert_close(written[1], written[0], **options)
    assert written[2] == 0


def test_conditioning_made_anew_at_every_step():
    """It is compared on the host; elsewhere that would wait, so its decoders run one by one."""
    text, pipe = torch.randn(2, 6, 16), text_unet()
    serial, parallel, ahead = driven(pipe, 2, encoder_hidden_states=lambda i: text.clone())
    assert ahead == 2
    torch.testing.assert_close(parallel, serial, rtol=1e-3, atol=1e-3)
    rows = []
    layer = pipe.unet.to("meta").up_blocks[-1].resnets[0]
    layer.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    made = driven(pipe, 2, encoder_hidden_states=lambda i: text.to("meta", copy=True))
    assert made[2] == 0
    assert rows[4:] == [4, 2, 2, 2]  # at the second key step it is known to be in vain


def test_an_image_prompts_tokens_stay_with_their_samples():
    """IP-Adapter: cross-attention reads them from a list beside the text."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

    pipe = text_unet()
    unet = pipe.unet
    projection = ImageProjection(image_embed_dim=8, cross_attention_dim=16, num_image_text_embeds=4)
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    processors = dict(unet.attn_processors)
    for name in processors:
        if name.endswith("attn2.processor"):
            width = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
            processors[name] = IPAdapterAttnProcessor2_0(
                width, cross_attention_dim=16, num_tokens=(4,)
            )
    unet.set_attn_processor(processors)
    image = [torch.cat([torch.zeros(1, 1, 8), 3 * torch.randn(1, 1, 8)])]
    serial, parallel, ahead = driven(
        pipe,
        2,
        encoder_hidden_states=torch.randn(2, 6, 16),
        added_cond_kwargs={"image_embeds": image},
    )
    assert ahead == 2
    torch.testing.assert_close(parallel, serial, rtol=1e-4, atol=1e-4)


def test_times_on_the_host_are_not_compared_on_the_device():
    """On "meta", as on a GPU, a value can't be had without more; the times are on the CPU."""
    pipe = text_unet()
    pipe.unet.to("meta")
    x, text = torch.randn(2, 4, 8, 8, device="meta"), torch.randn(2, 6, 16, device="meta")
    policy = FasterDiffusion(every=2, parallel=True)
    with torch.no_grad(), fewstep.patch(pipe, cache=policy) as patch:
        pipe.scheduler.set_timesteps(4)
        for index, time in enumerate(pipe.scheduler.timesteps):
            late = index == 3  # another time than foreseen is seen all the same
            assert pipe.unet(x, time - int(late), text).sample.shape == x.shape
        assert patch.report()["cache"]["ahead"] == 1


@pytest.mark.parametrize("parallel", [False, True])
def test_an_adapters_features_are_added_once(parallel):
    """Some blocks' outputs are added to in place; kept features must not grow by it."""
    pipe = text_unet()
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 6, 16)
    shapes = [(4, 8, 8), (8, 4, 4), (8, 2, 2)]

    def last(count):
        pipe.scheduler.set_timesteps(8)
        for time in pipe.scheduler.timesteps[:count]:
            extra = [torch.ones(1, *shape) for shape in shapes]
            pipe.unet(x, time, text, down_intrablock_additional_residuals=extra)
        extra = [torch.ones(1, *shape) for shape in shapes]
        return pipe.unet(x, 5, text, down_intrablock_additional_residuals=extra).sample

    policy = FasterDiffusion(every=8, parallel=parallel)
    with torch.no_grad(), fewstep.patch(pipe, cache=policy):
        assert torch.equal(last(1), last(4))


def test_features_in_eight_bits():
    pipe = text_unet()
    found = {}
    for snapshots in (None, "int8"):
        policy = FasterDiffusion(every=2, snapshots=snapshots)
        with fewstep.patch(pipe, cache=policy) as patch:
            found[snapshots] = run(pipe, batch=2), patch.report()["cache"]["snapshot_bytes"]
    (exact, whole), (rounded, small) = found.values()
    assert small < 0.4 * whole
    assert not torch.equal(rounded, exact)
    error = (rounded - exact).norm() / exact.norm()
    assert error < 0.05  # 1/254 of a group's largest value a key step, amplified by the steps


@pytest.mark.parametrize("parallel", [False, True])
def test_a_run_of_a_grids_last_steps_has_key_steps_of_its_own(parallel):
    pipe = class_unet()
    x, labels = torch.randn(1, 1, 8, 8), torch.tensor([3])
    policy = FasterDiffusion(key_steps=(0, 2), parallel=parallel)
    with torch.no_grad(), fewstep.patch(pipe, cache=policy) as patch:
        for time in steps_of(pipe, STEPS, start=2):
            pipe.transformer(x, time, class_labels=labels)
        report = patch.report()["cache"]
    assert report["branches"]["call 0"] == ["full", "skip", "full", "skip"]
    assert report["ahead"] == 2 * parallel


def test_gradients_keep_the_encoder_running():
    pipe = class_unet()
    with fewstep.patch(pipe, cache=FasterDiffusion(every=4, parallel=True)) as patch:
        pipe.scheduler.set_timesteps(STEPS)
        for time in (16.0, 13.3, 10.7):
            pipe.transformer(
                torch.randn(1, 1, 8, 8), torch.tensor([time]), class_labels=torch.tensor([3])
            ).sample.sum().backward()
        report = patch.report()["cache"]
    assert (report["full"], report["ahead"]) == (3, 0)
    assert pipe.transformer.conv_in.weight.grad is not None


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("name", PIPES)
def test_batch_mates_and_copies(name, parallel):
    pipe = PIPES[name]()
    channels = unet_of(pipe).config.in_channels
    latents = torch.randn(2, channels, 8, 8)
    patch = fewstep.patch(pipe, cache=FasterDiffusion(every=3, parallel=parallel))
    both = run(pipe, batch=2, latents=latents)
    other = run(pipe, batch=2, latents=torch.stack([latents[0], 5 * latents[1]]))
    assert torch.equal(both[0], other[0])
    twin = copy.deepcopy(pipe)
    assert torch.equal(run(twin, batch=2, latents=latents), both)
    patch.undo()
    assert torch.equal(run(twin, batch=2, latents=latents), both)
    assert not torch.equal(run(pipe, batch=2, latents=latents), both)
    assert all("forward" not in module.__dict__ for module in unet_of(pipe).modules())


def test_a_unet_without_a_mid_block():
    pipe = class_unet(mid_block_type=None)
    with fewstep.patch(pipe, cache=FasterDiffusion(every=1)):
        plain = run(pipe)
    assert torch.equal(run(pipe), plain)
    with fewstep.patch(pipe, cache=FasterDiffusion(every=3)):
        serial = run(pipe)
    with fewstep.patch(pipe, cache=FasterDiffusion(every=3, parallel=True)):
        torch.testing.assert_close(run(pipe), serial, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(serial, plain, rtol=0.05)


@pytest.mark.parametrize("name", PIPES)
def test_deepcache_runs_the_outermost_levels(name):
    pipe = PIPES[name]()
    unet = unet_of(pipe)
    with fewstep.patch(pipe, cache=Interval(every=3)):
        interval = run(pipe)
    with fewstep.patch(pipe, cache="deepcache"):
        assert torch.equal(run(pipe), interval)
    passes = 1 if name == "text" else 2
    blocks = [*unet.down_blocks, *unet.up_blocks]
    insides = [block.resnets[0] for block in blocks]
    with fewstep.patch(pipe, cache=DeepCache(every=3, level=1)), Counter(*insides) as seen:
        inner = run(pipe)
    full = 3 * passes  # steps 0, 3 and the last
    assert seen.counts == [6 * passes, 6 * passes, full, full, 6 * passes, 6 * passes]
    assert not torch.equal(inner, interval)


def test_what_is_refused():
    pipe = class_unet()
    with pytest.raises(ValueError, match=r"time: expected a denoiser .* got UNet2DModel"):
        fewstep.patch(pipe, time="cache")
    with pytest.raises(ValueError, match=r"a level of at most 1, so that .* of the 3 levels"):
        fewstep.patch(pipe, cache=DeepCache(level=2))
    with pytest.raises(ValueError, match=r'expected a UNet for scope "?.encoder'):
        fewstep.patch(build("digits"), cache="faster-diffusion")
    with pytest.raises(ValueError, match=r"expected a UNet for scope .levels"):
        fewstep.patch(build("digits"), cache="deepcache")
    with pytest.raises(ValueError, match="key_steps: expected 0 among them"):
        FasterDiffusion(key_steps=(1, 3))
    with pytest.raises(ValueError, match="every: expected it or key_steps, got both"):
        FasterDiffusion(every=2, key_steps=(0,))
    with pytest.raises(TypeError, match="parallel: expected a bool"):
        FasterDiffusion(parallel=3)
    with pytest.raises(ValueError, match=r"transformer blocks for scope .block., got UNet2DModel"):
        fewstep.patch(pipe, cache=Taylor(scope="block"))
    odd = class_unet(
        down_block_types=("SkipDownBlock2D",) * 3, up_block_types=("SkipUpBlock2D",) * 3
    )
    with pytest.raises(ValueError, match="got SkipDownBlock2D"):
        fewstep.patch(odd, cache="faster-diffusion")
    with (
        fewstep.patch(pipe, cache=FasterDiffusion(key_steps=(0, 9))),
        pytest.raises(ValueError, match="expected a run of more than 9 steps"),
    ):
        run(pipe)
