"""Following a plan reads nothing from the device, so that a whole loop fits into a CUDA graph.

Tensors on "meta" have no values: they raise where a program asks for them, as capturing does.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fewstep.caching import Fora, OutputStack, ScheduledSession, Taylor, scheduled
from fewstep.caching.plan import Plan

TIMES = (1000.0, 800.0, 600.0, 500.0, 300.0, 100.0)
PLAN = Plan(TIMES, (None, None, (2.0, -1.0), None, (0.5, 0.5), (1.0,)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(8, 8))

    def forward(self, hidden_states, timestep):
        return (hidden_states @ self.weight * timestep[:, None],)


def loop(model, scheduler, x):
    for index, time in enumerate(scheduler.timesteps):
        scheduler.step_index = index
        x = x - 0.1 * model(x, time.expand(2))[0]
    return x


@pytest.fixture
def on_device():
    """A model and a scheduler on a device whose values nobody may read."""
    with torch.device("meta"), torch.no_grad():
        yield Net(), SimpleNamespace(timesteps=torch.empty(len(TIMES)), step_index=None)


@pytest.mark.parametrize(
    "policy", [PLAN, Fora(every=2), Taylor(every=2, warmup=1, degree=1)], ids=repr
)
def test_a_loop_over_a_set_grid_reads_nothing(on_device, monkeypatch, policy):
    model, scheduler = on_device
    session = ScheduledSession(policy, lambda: scheduler)
    for module, name, value in OutputStack(model).replacements(session):
        setattr(module, name, value)
    read = []
    monkeypatch.setattr(scheduled, "times_of", lambda scheduler: read.append(1) or TIMES)
    for _ in range(3):
        assert loop(model, scheduler, torch.empty(2, 8)).device.type == "meta"
        report = session.report()
        assert report["full"] == 3, report
        assert report["skipped"] == 3
    assert len(read) == 1  # once per grid its times have to be known
    scheduler.timesteps.mul_(1)
    loop(model, scheduler, torch.empty(2, 8))
    assert len(read) == 2
    with pytest.raises((RuntimeError, NotImplementedError)):  # or this test could not fail
        float(scheduler.timesteps[0])
