"""Every layout after an exception, under torch.compile, and with more than two guidance passes."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

import fewstep
from fewstep.caching import DeepCache, FasterDiffusion, FirstBlock, Fora, Interval, Ras, Taylor
from patching.tiny_models import inputs, model
from patching.tiny_pipelines import build, call, denoiser, digits

STEPS = 6
LAYOUTS = [
    ("flux", Taylor(every=3, warmup=2, degree=1)),
    ("flux", Taylor(every=3, warmup=2, degree=1, scope="blocks")),
    ("flux", Fora(every=2, scope="block")),
    ("flux", Fora(every=2, scope="module")),
    ("sd3", FirstBlock(threshold=1e9, max_skips=2)),
    ("sd3", "easycache"),
    ("sd3", "seacache"),
    ("sd3", Ras(share=0.5)),
    ("pixart", "teacache"),
    ("sd-unet", Interval()),
    ("sd-unet", DeepCache()),
    ("sd-unet", FasterDiffusion()),
]


def run(pipe, **options):
    return call(pipe, num_inference_steps=STEPS, **options)


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    ("name", "cache"), LAYOUTS, ids=[f"{n}-{getattr(c, 'scope', c)}" for n, c in LAYOUTS]
)
def test_after_an_exception_in_any_call_of_the_run(name, cache):
    """Also where the next run is of another size."""
    pipe = build(name)
    if name == "sd-unet":
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with fewstep.patch(pipe, cache=cache) as patch:
        want = run(pipe)
        half = run(pipe, batch=2)
        for fatal in (2, 5):
            seen = 0

            def fail(*_, fatal=fatal):
                nonlocal seen
                seen += 1
                if seen == fatal:
                    raise Stop

            # What every layout but that of the whole output runs on each step ends the call.
            last = denoiser(pipe).conv_out if name == "sd-unet" else denoiser(pipe).proj_out
            handle = last.register_forward_hook(fail)
            with pytest.raises(Stop):
                call(pipe, num_inference_steps=3 * STEPS)  # enough calls that are not forecast
            handle.remove()
            assert torch.equal(run(pipe, batch=2), half)
            assert torch.equal(run(pipe), want)
        assert patch.report()["cache"]["full"]


@pytest.mark.parametrize("name", ["pixart", "dit"])
def test_three_guidance_passes_in_calls_of_their_own(name):
    """Told by their conditioning, in whatever order they come."""
    condition = "class_labels" if name == "dit" else "encoder_hidden_states"
    given = inputs(name)
    texts = [
        given[condition] + i if name == "dit" else given[condition] * (i + 1) for i in range(3)
    ]

    def outputs(orders):
        denoiser, scheduler = model(name), FlowMatchEulerDiscreteScheduler()
        patch = fewstep.apply_cache(denoiser, Interval(every=3, first=1, last=0), scheduler)
        scheduler.set_timesteps(STEPS)
        found = []
        for step, time in enumerate(scheduler.timesteps):
            row = {}
            for index in orders[step % len(orders)]:
                own = {"timestep": time.expand(1), condition: texts[index]}
                own["hidden_states"] = given["hidden_states"] * (1 + 0.1 * step)
                row[index] = denoiser(**{**given, **own}, return_dict=False)[0]
            found += [row[index] for index in sorted(row)]
            scheduler.step(torch.zeros(1), time, torch.zeros(1))
        return found, patch.report()["cache"]

    with torch.no_grad():
        plain, seen = outputs([(0, 1, 2)])
        turned, again = outputs([(0, 1, 2), (2, 0, 1), (1, 2, 0)])
    assert seen["skipped"] == again["skipped"] == 3 * 3
    assert len(seen["branches"]) == len(again["branches"]) == 3
    assert all(map(torch.equal, plain, turned))


def test_three_guidance_passes_in_one_batch():
    """Each is a sample of its own: as it would be decided alone."""
    given, name = inputs("pixart", batch=3), "pixart"
    scale = torch.tensor([1.0, 1.001, 3.0]).view(3, 1, 1)  # the third changes most
    given["encoder_hidden_states"] = given["encoder_hidden_states"] * scale

    def outputs(rows):
        denoiser, scheduler = model(name), FlowMatchEulerDiscreteScheduler()
        fewstep.apply_cache(denoiser, FirstBlock(threshold=0.35, max_skips=2), scheduler)
        scheduler.set_timesteps(STEPS)
        found = []
        for step, time in enumerate(scheduler.timesteps):
            own = {k: v[rows] if isinstance(v, torch.Tensor) else v for k, v in given.items()}
            own["timestep"] = time.expand(len(rows))
            own["hidden_states"] = own["hidden_states"] * (1 + 0.2 * step)
            found.append(denoiser(**own, return_dict=False)[0])
            scheduler.step(torch.zeros(1), time, torch.zeros(1))
        return torch.stack(found)

    with torch.no_grad():
        together = outputs([0, 1, 2])
        for row in range(3):
            alone = outputs([row, row, row])  # the same size of batch: the same bits
            assert torch.equal(together[:, row], alone[:, row])


def test_regional_compilation_stays_whole():
    """diffusers' own way, `fullgraph` too: no break, and as many operations compiled as without."""

    def compiled(cache):
        torch.compiler.reset()
        counters.clear()
        pipe, compiler = build("flux"), CompileCounter()
        if cache is not None:
            fewstep.patch(pipe, cache=cache)
        want = call(pipe, num_inference_steps=4)
        pipe.transformer.compile_repeated_blocks(backend=compiler, fullgraph=True)
        assert torch.equal(call(pipe, num_inference_steps=4), want)
        frames = compiler.frame_count
        assert torch.equal(call(pipe, num_inference_steps=4), want)
        assert compiler.frame_count == frames
        assert not counters["graph_break"]
        return compiler.op_count

    # Beside the blocks', those of two kinds that add what was kept.
    plain, cached = compiled(None), compiled(FirstBlock(threshold=1e9, max_skips=1))
    assert plain <= cached <= 1.2 * plain
    torch.compiler.reset()


def test_a_compiled_model_whose_output_is_cached_stays_one_graph():
    def compiled(cache):
        torch.compiler.reset()
        pipe, compiler = digits(layers=2), CompileCounter()
        pipe.set_progress_bar_config(disable=True)
        if cache is not None:
            fewstep.patch(pipe, cache=cache)
        want = call(pipe, num_inference_steps=4)
        pipe.transformer.compile(backend=compiler)
        assert torch.equal(call(pipe, num_inference_steps=4), want)
        return compiler.frame_count, compiler.op_count

    assert compiled(Fora(every=2)) == compiled(None)
    torch.compiler.reset()
