"""A forecast for every module: exact to its degree, schedules of their own, names and refusals."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fewstep.caching import (
    FoCa,
    Fora,
    HiCache,
    ModuleSession,
    ModuleStack,
    Newton,
    Scm,
    Taylor,
    choose_modules,
    find_modules,
)

# A shifted flow's grid: its steps grow to more than four times the first.
TIMES = [1000 * 3 * s / (1 + 2 * s) for s in np.linspace(1, 0.05, 20)]
SHAPE = (2, 3, 8)

METHODS = [
    (Fora, {}, 0),
    (Taylor, {}, 1),
    (Newton, {}, 2),
    (Newton, {"degree": 3, "warmup": 4}, 3),
    (HiCache, {}, 0),
    (FoCa, {}, 1),
    (Scm, {"mask": "11100" * 4, "degree": 1}, 1),
]


class Polynomial(nn.Module):
    """A layer whose outputs are polynomials of the time, whatever it gets; counts its runs."""

    def __init__(self, seed, degree, outputs):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.factors = torch.randn(outputs, degree + 1, *SHAPE, generator=generator).double()
        self.inner = nn.Identity()
        self.clock, self.runs = [0.0], 0

    def forward(self, hidden_states, encoder_hidden_states=None):
        self.runs += 1
        made = [sum(f * (self.clock[0] / 300) ** i for i, f in enumerate(x)) for x in self.factors]
        made = [x[:, : hidden_states.shape[1]] for x in made]
        return made[0] if len(made) == 1 else tuple(made)


class Block(nn.Module):
    """Joint attention of two streams, and a feed-forward layer for the first; gates of the time."""

    def __init__(self, seed, degree, clock):
        super().__init__()
        self.attn, self.ff = Polynomial(seed, degree, 2), Polynomial(seed + 1, degree, 1)
        self.attn.clock = self.ff.clock = self.clock = clock

    def forward(self, hidden_states, encoder_hidden_states):
        gate = np.sin(self.clock[0])
        x, c = self.attn(hidden_states, encoder_hidden_states=encoder_hidden_states)
        hidden_states = hidden_states + gate * x
        hidden_states = hidden_states + gate * self.ff(hidden_states)
        return encoder_hidden_states + gate * c, hidden_states


class Model(nn.Module):
    def __init__(self, degree):
        super().__init__()
        self.clock = [0.0]
        blocks = [Block(10 * i, degree, self.clock) for i in range(3)]
        self.transformer_blocks = nn.ModuleList(blocks)

    def forward(self, hidden_states, timestep, encoder_hidden_states=None):
        self.clock[0] = float(timestep)
        if encoder_hidden_states is None:
            encoder_hidden_states = hidden_states
        for block in self.transformer_blocks:
            encoder_hidden_states, hidden_states = block(hidden_states, encoder_hidden_states)
        return hidden_states + encoder_hidden_states


class Scheduler:
    step_index = None

    def __init__(self, times=TIMES):
        self.timesteps = torch.tensor(times, dtype=torch.float64)


def cached(policy, degree=1, model=None):
    """Return a model with a cache, its scheduler and the session."""
    model, scheduler = model or Model(degree), Scheduler()
    session = ModuleSession(policy, lambda: scheduler)
    modules = choose_modules(find_modules(model), getattr(policy, "modules", None))
    for module, name, value in ModuleStack(model, modules).replacements(session):
        setattr(module, name, value)
    return model, scheduler, session


def run(model, scheduler, x=None):
    outputs = []
    x = torch.zeros(SHAPE).double() if x is None else x
    for index, time in enumerate(scheduler.timesteps):
        scheduler.step_index = index
        outputs.append(model(x, time))
    return torch.stack(outputs)


@pytest.mark.parametrize(("kind", "settings", "degree"), METHODS)
def test_every_module_is_exact_to_the_degree_and_gates_are_fresh(kind, settings, degree):
    policy = kind(scope="module", **settings)
    model, scheduler, session = cached(policy, degree)
    found, want = run(model, scheduler), run(Model(degree), Scheduler())
    numbers = session.report()
    assert numbers["skipped"] >= 8
    assert numbers["forecast_modules"]["call 0"].count(6) == numbers["skipped"]
    # Weights are float32 on the device: each is off by 2^-24 of itself at most, in nine outputs
    # that are added.
    largest = max(sum(map(abs, w)) for w in policy.forecasts(TIMES) if w is not None)
    size = max(f.abs().sum(1).max().item() * (1000 / 300) ** degree for f in factors(model))
    torch.testing.assert_close(found, want, rtol=0, atol=9 * 2**-24 * largest * size)
    model, scheduler, _ = cached(policy, degree + 1)
    assert (run(model, scheduler) - run(Model(degree + 1), Scheduler())).abs().max() > 1e-2


def factors(model):
    return [part.factors for part in model.modules() if isinstance(part, Polynomial)]


class Masks:
    """Repeats the attention of block 1 on even steps, and every third output of feed-forwards."""

    scope, order = "module", 1

    def forecasts(self, times):
        return (None,) * len(times)

    def forecasts_for(self, name, times):
        every = {"transformer_blocks.1.attn": 2, "transformer_blocks.0.attn": 1}.get(name, 3)
        return tuple(None if i % every == 0 else (1.0,) for i in range(len(times)))


def test_every_module_may_have_a_schedule_of_its_own():
    model, scheduler, session = cached(Masks(), degree=0)
    found, want = run(model, scheduler), run(Model(0), Scheduler())
    torch.testing.assert_close(found, want, rtol=0, atol=1e-6)
    runs = {name: module.runs for name, module in find_modules(model).items()}
    assert runs["transformer_blocks.0.attn"] == 20
    assert runs["transformer_blocks.1.attn"] == 10
    assert runs["transformer_blocks.2.ff"] == 7
    decisions = session.report()["branches"]["call 0"]
    assert decisions == ["full", *["part", "part", "part", "part", "part", "full"] * 3, "part"]
    assert session.report()["partly"] == 16
    assert session.report()["forecast_modules"]["call 0"][:4] == [0, 5, 4, 1]


def test_a_module_that_runs_twice_in_a_call_has_two_rings():
    class Twice(Model):
        def forward(self, hidden_states, timestep):
            self.clock[0] = float(timestep)
            ff = self.transformer_blocks[0].ff
            first = ff(hidden_states)
            self.clock[0] *= 2
            return first + 10 * ff(hidden_states)

    policy = Newton(degree=1, scope="module")
    model, scheduler, session = cached(policy, model=Twice(1))
    found, want = run(model, scheduler), run(Twice(1), Scheduler())
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-4)
    assert session.report()["forecast_modules"]["call 0"].count(2) == 13


def test_an_exception_drops_what_was_kept():
    policy = Fora(every=4, scope="module")
    model, scheduler, session = cached(policy)
    want = run(model, scheduler)
    layer = model.transformer_blocks[1].ff
    scheduler.timesteps = scheduler.timesteps.clone()
    for index in range(2):
        scheduler.step_index = index
        model(torch.zeros(SHAPE).double(), scheduler.timesteps[index])
    layer.factors = None
    scheduler.step_index = 4
    with pytest.raises(TypeError):
        model(torch.zeros(SHAPE).double(), scheduler.timesteps[4])
    assert session.tally is None
    assert session.call is None
    rings = [ring for b in session._branches.values() for ring in b.ring.own.values()]
    assert all(ring.count(1) == 0 and not ring._slots for ring in rings)
    layer.factors = Model(1).transformer_blocks[1].ff.factors
    # The run goes on: what lies between here and its next full step runs.
    scheduler.step_index = 5
    model(torch.zeros(SHAPE).double(), scheduler.timesteps[5])
    assert session.report()["why_full"]["too few snapshots"] == 1
    scheduler.timesteps = scheduler.timesteps.clone()
    assert torch.equal(run(model, scheduler), want)


def test_another_form_of_input_runs_in_full():
    model, scheduler, session = cached(Fora(every=4, scope="module"))
    x = torch.zeros(SHAPE).double()
    for index, given in enumerate((x, x, x[:, :2], x)):
        scheduler.step_index = index
        assert model(given, scheduler.timesteps[index]).shape == given.shape
    assert session.report()["branches"]["call 0"] == ["full", "skip", "full", "skip"]
    assert session.report()["why_full"] == {"scheduled": 1, "shape changed": 1}


def test_the_report_says_why_some_modules_ran_where_others_did_not():
    class Cut(Model):
        def forward(self, hidden_states, timestep):
            self.clock[0] = float(timestep)
            block = self.transformer_blocks[0]
            block.ff(hidden_states[:, : 2 if self.clock[0] == TIMES[2] else 3])
            return block.attn(hidden_states, encoder_hidden_states=hidden_states)[0]

    model, scheduler, session = cached(Fora(every=4, scope="module"), model=Cut(0))
    run(model, scheduler)
    numbers = session.report()
    assert numbers["branches"]["call 0"][:4] == ["full", "skip", "part", "skip"]
    assert numbers["why"]["call 0"][:4] == ["scheduled", None, "shape changed", None]
    assert numbers["why_part"] == {"shape changed": 1}
    assert set(numbers["why_full"]) == {"scheduled"}
    scheduler.timesteps = scheduler.timesteps.clone() + 1  # the next run has its own record
    run(model, scheduler)
    assert session.report()["why_part"] == {}


def test_what_is_not_tensors_and_what_wants_gradients_is_left_to_run():
    class Odd(Model):
        def __init__(self):
            super().__init__(0)
            ff = self.transformer_blocks[2].ff
            ff.forward = lambda x: (x, "name")

        def forward(self, hidden_states, timestep):
            self.clock[0] = float(timestep)
            return self.transformer_blocks[2].ff(hidden_states)[0]

    model, scheduler, session = cached(Fora(every=4, scope="module"), model=Odd())
    x = torch.ones(SHAPE).double()
    run(model, scheduler, x)
    assert session.report()["skipped"] == 0
    assert session.report()["why_full"]["a module returns more than tensors"] == 5
    model, scheduler, session = cached(Fora(every=4, scope="module"))
    layer = model.transformer_blocks[0].ff
    layer.factors = nn.Parameter(layer.factors)
    run(model, scheduler)
    assert session.report()["skipped"] == 0
    assert max(session.report()["forecast_modules"]["call 0"]) == 5
    with torch.no_grad():
        scheduler.timesteps = scheduler.timesteps.clone()
        run(model, scheduler)
    assert session.report()["skipped"] == 15


def test_a_copy_has_a_session_of_its_own():
    model, scheduler, session = cached(Fora(every=4, scope="module"))
    twin = copy.deepcopy(model)
    first = twin.forward.session
    assert first is not session
    assert first.names == session.names
    assert twin.transformer_blocks[0].attn.forward.session is first
    assert twin.transformer_blocks[0].attn.forward.below.__self__ is twin.transformer_blocks[0].attn
    run(model, scheduler)
    assert not first.report()["branches"]


def test_names():
    found = find_modules(Model(0))
    assert list(found)[:2] == ["transformer_blocks.0.attn", "transformer_blocks.0.ff"]
    assert len(found) == 6
    assert list(choose_modules(found, r"[12]\.ff")) == [
        "transformer_blocks.1.ff",
        "transformer_blocks.2.ff",
    ]
    assert list(choose_modules(found, ("transformer_blocks.2.attn", "ff"))) == [
        "transformer_blocks.0.ff",
        "transformer_blocks.1.ff",
        "transformer_blocks.2.attn",
        "transformer_blocks.2.ff",
    ]
    message = r"got 'nets', which matches none of 3 attn, 3 ff \(such as transformer_blocks\.0\.att"
    for pattern in ("nets", ("attn", "nets")):
        with pytest.raises(ValueError, match=message):
            choose_modules(found, pattern)


def test_what_has_changed_since_a_policy_was_fitted_runs_in_full():
    model, scheduler, session = cached(Fora(every=4, scope="module"))
    session.changed = lambda: "other adapters"
    run(model, scheduler)
    assert session.report()["skipped"] == 0
    assert session.report()["why_full"] == {"other adapters": 20}
    session.changed = lambda: None
    scheduler.timesteps = scheduler.timesteps.clone()
    run(model, scheduler)
    assert session.report()["skipped"] == 15
