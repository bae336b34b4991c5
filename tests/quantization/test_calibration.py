"""calibrate: an even draw of what the layers saw, and a pipeline that is as it was."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fewstep.assets.digits import load_digits_pipeline
from fewstep.quantization import Calibration, calibrate
from fewstep.quantization.calibration import _Reservoir, choose


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 4)
        self.unused = nn.Linear(3, 3)

    def forward(self, x, *, scale=1.0):
        return self.second(self.first(x) * scale)


class Pipe:
    def __init__(self):
        self.transformer = Net()

    def __call__(self, *, steps, seed=0):
        x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(seed))
        for step in range(steps):
            x = self.transformer(x, scale=float(step))
        return x


def test_every_row_is_equally_likely():
    counts = torch.zeros(40)
    for seed in range(800):
        reservoir = _Reservoir(10, torch.Generator().manual_seed(seed))
        for start in (0, 7, 27, 35):  # batches that straddle the size
            stop = {0: 7, 7: 27, 27: 35, 35: 40}[start]
            reservoir.add(torch.arange(start, stop).float()[:, None])
        kept = reservoir.kept[:, 0].long()
        assert len(set(kept.tolist())) == 10
        counts[kept] += 1
    # Binomial(800, 1/4): 200 with a deviation of 12.2; five of those for 40 counts.
    assert ((counts - 200).abs() < 61).all()


def test_keeps_rows_of_all_steps_and_whole_evaluations():
    pipe = Pipe()
    before = [dict(m._forward_pre_hooks) for m in pipe.transformer.modules()]
    calls = [{"steps": 6, "seed": seed} for seed in range(3)]
    found = calibrate(pipe, calls, rows=64, evaluations=4)
    assert [dict(m._forward_pre_hooks) for m in pipe.transformer.modules()] == before
    assert set(found.inputs) == {"first", "second"}
    assert found.inputs["first"].shape == (64, 4)
    assert found.inputs["second"].shape == (64, 8)
    assert found.rows == {"first": 10.0, "second": 10.0}
    assert len(found.evaluations) == 4
    for args, kwargs in found.evaluations:
        assert args[0].shape == (2, 5, 4)
        assert kwargs.keys() == {"scale"}
    again = calibrate(pipe, calls, rows=64, evaluations=4)
    assert all(torch.equal(again.inputs[name], rows) for name, rows in found.inputs.items())
    other = calibrate(pipe, calls, rows=64, evaluations=4, seed=1)
    assert not torch.equal(other.inputs["first"], found.inputs["first"])


def test_fewer_rows_than_asked_for_are_all_kept():
    found = calibrate(Pipe(), [{"steps": 1}], rows=64)
    want = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)).reshape(10, 4)
    assert torch.equal(found.inputs["first"], want)


def test_a_module_is_its_own_pipeline_and_hooks_go_after_an_error():
    model = Net()
    found = calibrate(model, [{"x": torch.ones(1, 4)}])
    assert found.evaluations[0][1]["x"].tolist() == [[1, 1, 1, 1]]
    with pytest.raises(RuntimeError):
        calibrate(model, [{"x": torch.ones(1, 5)}])
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_bad_input_is_named():
    with pytest.raises(TypeError, match=r"pipe: expected a module, or a pipeline .* got object"):
        calibrate(object(), [{}])
    with pytest.raises(ValueError, match="calls: expected at least one call, got none"):
        calibrate(Pipe(), [])
    with pytest.raises(
        ValueError, match="calls: expected calls that evaluate Net, got none in call 2"
    ):
        calibrate(Pipe(), [{"steps": 1}, {"steps": 0}])
    with pytest.raises(ValueError, match="rows: expected an integer of at least 1, got 0"):
        calibrate(Pipe(), [{"steps": 1}], rows=0)


def test_largest_magnitudes_are_of_all_rows_seen_in_units_of_their_size():
    pipe = Pipe()
    seen = []
    hook = pipe.transformer.second.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].reshape(-1, 8))
    )
    found = calibrate(pipe, [{"steps": 5, "seed": seed} for seed in range(2)], rows=4)
    hook.remove()
    rows = torch.cat(seen).double()
    rows = rows[rows.any(1)]  # the first step's are zeros
    want = (rows / rows.square().mean(1, keepdim=True).sqrt()).abs().amax(0)
    assert torch.allclose(found.amax["second"].double(), want, rtol=1e-6)


def test_what_was_saved_is_loaded(tmp_path):
    found = calibrate(Pipe(), [{"steps": 3}], rows=8, evaluations=2)
    x = torch.arange(6.0).reshape(2, 3).t()
    nest = {"x": [x, (None, 2, 0.5, "text", True)], "y": {"z": x.to(torch.bfloat16)}}
    found.evaluations.append(((x,), nest))
    found.save(tmp_path / "seen.safetensors")
    again = Calibration.load(tmp_path / "seen.safetensors")
    assert again.rows == found.rows
    for kind in ("inputs", "amax"):
        here, there = getattr(found, kind), getattr(again, kind)
        assert here.keys() == there.keys()
        assert all(torch.equal(here[name], there[name]) for name in here)
    (args, nest), (was, saved) = again.evaluations[-1], found.evaluations[-1]
    assert torch.equal(args[0], was[0])
    assert type(args) is tuple
    assert torch.equal(nest["x"][0], x)
    assert nest["x"][1] == saved["x"][1]
    assert type(nest["x"][1]) is tuple
    assert nest["y"]["z"].dtype == torch.bfloat16
    assert len(again.evaluations) == 3


def test_a_layer_in_several_places_is_saved(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model.append(model[0])
    found = calibrate(model, [{"input": torch.randn(4, 8)}])
    found.save(tmp_path / "twice.safetensors")
    again = Calibration.load(tmp_path / "twice.safetensors")
    assert torch.equal(again.inputs["2"], found.inputs["0"])


def test_what_can_not_be_saved_or_loaded_is_named(tmp_path):
    found = calibrate(Pipe(), [{"steps": 1}])
    found.evaluations.append(((object(),), {}))
    with pytest.raises(TypeError, match=r"expected evaluations of tensors.* got object"):
        found.save(tmp_path / "no.safetensors")
    found.evaluations.pop()
    found.save(tmp_path / "seen.safetensors")
    whole = (tmp_path / "seen.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-5])
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    for name in ("cut", "other"):
        with pytest.raises(ValueError, match=f"Calibration.save writes it, got .*{name}"):
            Calibration.load(tmp_path / f"{name}.safetensors")


def test_chosen_points_stand_for_many_and_differ():
    # Three crowds of 12, 6 and 2 and a far point alone: one of each, and the crowds come first.
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [6.0, 0.0], [0.0, 6.0], [40.0, 40.0]])
    crowd = torch.tensor([0] * 12 + [1] * 6 + [2] * 2 + [3])
    points = centres[crowd] + 0.1 * torch.randn(21, 2, generator=generator)
    assert crowd[choose(points, 1)].tolist() == [0]
    assert sorted(crowd[choose(points, 4)].tolist()) == [0, 1, 2, 3]
    assert choose(points[:3], 3) == choose(points[:3], 5) == [0, 1, 2]
    assert len(set(choose(torch.zeros(6, 2), 4))) == 4  # all alike


def test_evaluations_that_are_kept_cover_the_path():
    pipe = load_digits_pipeline()
    pipe.set_progress_bar_config(disable=True)

    def times(seed):
        generator = torch.Generator().manual_seed(0)
        call = {"class_labels": [3], "num_inference_steps": 12, "generator": generator}
        found = calibrate(pipe, [call], rows=1, evaluations=6, seed=seed)
        return [float(kwargs["timestep"].flatten()[0]) for _, kwargs in found.evaluations]

    found = times(0)
    assert len(found) == 6
    # Thirds of the path from 16 down to 0, which has two evaluations a step: with guidance and
    # without. Six drawn blindly of 24 meet all of them in 82 % of draws.
    assert {int((16 - t) * 3 / 16) for t in found} == {0, 1, 2}
    assert found == times(0) == times(1)  # the pool holds all 24, so there is nothing to draw
