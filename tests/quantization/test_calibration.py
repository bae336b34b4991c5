"""calibrate: an even draw of what the layers saw, and a pipeline that is as it was."""

import pytest
import torch
from torch import nn

from fewstep.quantization import calibrate
from fewstep.quantization.calibration import _Reservoir


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
