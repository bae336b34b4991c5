"""`fewstep demo` on a tiny untrained pipeline: files, fields, and counts that are counted."""

import itertools
import json

import pytest
import torch
from typer.testing import CliRunner

import fewstep
from fewstep.assets.digits import DigitsPipeline, digits_transformer
from fewstep.cli import demo, demo_rows
from fewstep.cli.main import app
from fewstep.sampling.consistency import FlowConsistencyScheduler

runner = CliRunner()


def save(folder, heads, layers):
    """Write a folder as examples/digits/train.py leaves it, with a small random network."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    torch.manual_seed(0)
    network = digits_transformer(heads=heads, layers=layers)
    for parameter in network.parameters():  # diffusers starts the last layer at zero
        torch.nn.init.normal_(parameter, std=0.1)
    teacher = DigitsPipeline(network, FlowMatchEulerDiscreteScheduler(), default_guidance=1.2)
    student = DigitsPipeline(network, FlowConsistencyScheduler(), default_steps=2)
    teacher.save_pretrained(folder / "teacher")
    student.save_pretrained(folder / "student")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save(tmp_path_factory.mktemp("weights"), heads=1, layers=3)


class NoChange:
    """A patch that changes nothing but the step count."""

    def __init__(self, pipe, steps=None, **kwargs):
        if steps is not None:
            call = type(pipe).__call__

            class Patched(type(pipe)):
                def __call__(self, *args, **options):
                    return call(self, *args, **(options | {"num_inference_steps": steps}))

            pipe.__class__ = Patched

    def explain(self):
        return "nothing"


def run(weights, output, *more):
    options = f"--weights {weights} --output {output} --samples 40 --batch 20 --teacher-steps 5"
    options += " --device cpu"
    return runner.invoke(app, ["demo", *options.split(), *more], env={"COLUMNS": "200"})


def test_files_fields_and_honest_counts(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "apply", NoChange)
    threads = torch.get_num_threads()
    result = run(weights, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert torch.get_num_threads() == threads
    for name in ("samples.png", "tradeoff.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["samples"] == 40
    assert report["batches"] == 2
    assert report["environment"]["torch"] == torch.__version__
    assert report["real_frechet"] > 0
    rows = {row["key"]: row for row in report["rows"]}
    base = rows["teacher"]
    assert base["speedup"] == base["frechet_ratio"] == 1
    evaluations = {key: row["evaluations"] for key, row in rows.items()}
    expected = {"teacher": 10, "teacher-8": 16, "teacher-4": 8, "student-2": 2, "student-1": 1}
    assert evaluations.items() >= expected.items()
    # The stand-in patch neither caches nor quantises: the same images, and no credit for it.
    assert rows["teacher-cache"]["identical"]
    assert rows["teacher-cache"]["full_evaluations"] == evaluations["teacher-cache"] == 10
    assert rows["student-w8a8"]["against"] == rows["student-w8a8"]["adds_to"] == "student-2"
    assert rows["teacher-cache"]["relative_l2"] == 0
    assert rows["teacher-8"]["relative_l2"] > 0
    added = [row for row in rows.values() if row["adds_to"] is not None]
    assert all(row["distinct"] is False for row in added)
    assert result.output.count("as above") >= len(added)
    for row in rows.values():
        assert row["seconds_per_image"] > 0
        ratio = base["seconds_per_image"] / row["seconds_per_image"]
        assert row["speedup"] == pytest.approx(ratio)
    assert "On your own pipeline" in result.output


def test_the_real_patches(tmp_path):
    # Width 128: narrower layers are left alone by the int8 patch.
    result = run(save(tmp_path, heads=4, layers=2), tmp_path, "--teacher-steps", "3")
    assert result.exit_code == 0, result.output
    rows = {row["key"]: row for row in json.loads((tmp_path / "report.json").read_text())["rows"]}
    for row in rows.values():
        assert row["failure"] is None
        assert row["full_evaluations"] <= row["evaluations"]
        assert bool(row["explanation"]) == bool(row["patch"])
    # Steps come from the patch; a call's own count has no effect then.
    assert rows["teacher-8"]["evaluations"] == 16
    # int8 changes the images, and not beyond recognition.
    for key in ("teacher-8-w8a8", "student-w8a8"):
        assert not rows[key]["identical"]
        assert rows[key]["psnr_db"] > 10


def test_a_patch_that_fails_is_shown_and_sets_the_exit_code(weights, tmp_path, monkeypatch):
    def patch(pipe, **wanted):
        if "quantize" in wanted:
            raise NotImplementedError("no int8 here")
        return NoChange(pipe, **wanted)

    monkeypatch.setattr(demo, "apply", patch)
    result = run(weights, tmp_path)
    assert result.exit_code == 1
    assert (
        "not run: teacher, 8 guided steps + w8a8: NotImplementedError: no int8 here"
        in result.output
    )
    rows = {row["key"]: row for row in json.loads((tmp_path / "report.json").read_text())["rows"]}
    assert rows["teacher-8-w8a8"]["speedup"] is None
    assert rows["student-2"]["frechet"] > 0


def test_the_time_limit_stops_at_a_batch_and_says_so(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "apply", NoChange)
    result = run(weights, tmp_path, "--seconds", "0", "--samples", "100")
    assert result.exit_code == 0, result.output
    assert "stopped after 40 images" in result.output
    assert json.loads((tmp_path / "report.json").read_text())["samples"] == 40


def test_blocks_that_a_cache_skips_are_not_counted():
    network = digits_transformer(heads=1, layers=3)
    skipped = network.transformer_blocks[1]
    skipped.forward = lambda hidden_states, **kwargs: hidden_states
    x, y = torch.randn(2, 1, 16, 16), torch.tensor([1, 2])
    with demo_rows.counted(network) as count, torch.no_grad():
        network(x, timestep=torch.ones(2), class_labels=y)
    assert (count.calls, count.blocks) == (1, 2)
    assert not network._forward_pre_hooks


def sampled(seconds, shift=0.0):
    images = [torch.full((2, 1, 16, 16), shift)] * len(seconds)
    return demo_rows.Sampled(demo_rows.Row("x", "x", "x"), seconds=seconds, images=images)


@pytest.mark.parametrize(
    ("times", "other_times", "shift", "apart"),
    [
        ([1.0, 1.1, 1.2], [2.0, 2.1, 2.2], 0.5, True),
        ([2.0, 2.1, 2.2], [1.0, 1.1, 1.2], 0.5, True),  # slower is seen as well
        ([1.0, 1.1, 1.2], [2.0, 2.1, 2.2], 0.0, False),  # the same images: it did nothing
        ([1.0, 1.5, 2.0], [1.2, 1.9, 2.6], 0.5, False),
    ],
)
def test_rows_are_told_apart_by_images_and_quartiles(times, other_times, shift, apart):
    assert demo_rows.told_apart(sampled(times, shift), sampled(other_times)) is apart


def test_every_patch_of_the_plan_adds_to_the_row_above_and_none_caches_few_steps():
    rows = demo_rows.plan(50)
    for above, row in itertools.pairwise(rows):
        assert row.adds_to in (None, above.key)
        if row.adds_to is not None:
            assert len(row.patch.items() - above.patch.items()) == 1
        assert "cache" not in row.patch or row.patch.get("steps", 50) > 8
    assert {row.against for row in rows} <= {None, *(row.key for row in rows)}


def test_rows_use_calibrated_plans_where_there_are_some():
    rows = {row.key: row for row in demo_rows.plan(50, frozenset({8, 50}))}
    assert rows["teacher-cache"].patch == {"cache": "auto"}
    assert rows["teacher-8-cache"].patch == {"steps": 8, "cache": "auto"}
    assert demo_rows.plan(50)[1].patch == {"cache": "first-block"}
    assert demo.planned_steps(demo.load("teacher", None)) >= {8, 50}


def test_the_packaged_plans_hold_on_other_images():
    pipe = demo.load("teacher", None)
    for steps, patch in ((8, {"steps": 8}), (50, {})):
        call = {"class_labels": [3, 8], "output_type": "pt"}
        images = []
        for options in (patch, patch | {"cache": "auto"}):
            generator = torch.Generator().manual_seed(77)
            if not options:
                images.append(pipe(**call, generator=generator).images)
                continue
            with fewstep.patch(pipe, **options) as handle:
                images.append(pipe(**call, generator=generator).images)
                numbers = handle.report().get("cache", {"skipped": 0})
        assert numbers["skipped"] >= steps // 2
        error = (images[0] - images[1]).square().mean().item()
        assert error < 1e-4, (steps, error)


def test_the_record_goes_to_a_folder_of_the_device(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "apply", NoChange)
    result = run(weights, tmp_path / "out", "--record", str(tmp_path / "results"))
    assert result.exit_code == 0, result.output
    (record,) = tmp_path.glob("results/*/demo.json")
    assert record.read_text() == (tmp_path / "out" / "report.json").read_text()


def test_version():
    result = runner.invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"fewstep {fewstep.__version__}\n")


def test_bad_requests_are_refused(weights, tmp_path):
    result = run(weights, tmp_path, "--samples", "20")
    assert result.exit_code == 2
    assert "more than 32 images" in result.output
    result = run(tmp_path / "nothing", tmp_path)
    assert result.exit_code == 2
    (tmp_path / "file").write_text("")
    for options in ("--teacher-steps 0", "--batch 0", f"--output {tmp_path / 'file'}"):
        result = run(weights, tmp_path, *options.split())
        assert result.exit_code == 2, options
        assert options.split()[0] in result.output
