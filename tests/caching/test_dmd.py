"""DMD: exponentials are exact, weights sum to one, nothing is read back, samples apart."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fewstep
from caching.test_captured import TIMES, Net, loop
from fewstep.caching import PRESETS, Dmd, OutputStack, ScheduledPolicy, ScheduledSession, snapshots
from fewstep.caching.dmd import equally_spaced, exponential_weights
from fewstep.caching.ring import Ring
from patching.tiny_pipelines import call, digits

STEPS = 30


class Exponentials(nn.Module):
    """A model whose output is a sum of powers of the step, another one for every sample."""

    def __init__(self, roots):
        super().__init__()
        self.roots = [complex(root) for root in roots]
        count = 1 + sum(1 + bool(root.imag) for root in self.roots)
        generator = torch.Generator().manual_seed(count)
        self.parts = torch.randn(count, 2, 3, 4, 4, generator=generator).double()

    def forward(self, hidden_states, timestep):
        grown = [root ** (STEPS - float(timestep)) for root in self.roots]
        terms = [1.0, *(x for z in grown for x in ((z.real, z.imag) if z.imag else (z.real,)))]
        return sum(part * x for part, x in zip(self.parts, terms, strict=False))


def forecast(policy, roots, start=0):
    """Return what a run from a step on gives, what the model would have given, and the session."""
    model, plain = Exponentials(roots), Exponentials(roots)
    scheduler = SimpleNamespace(timesteps=STEPS - torch.arange(STEPS).double(), step_index=None)
    session = policy.session(policy, lambda: scheduler)
    for module, name, value in OutputStack(model).replacements(session):
        setattr(module, name, value)
    x, found, want = torch.zeros(2, 3, 4, 4), [], []
    for index, time in list(enumerate(scheduler.timesteps))[start:]:
        scheduler.step_index = index
        found.append(model(x, time))
        want.append(plain(x, time))
    return torch.stack(found), torch.stack(want), session


@pytest.mark.parametrize("clock", ["step", "time"])
@pytest.mark.parametrize(
    ("modes", "roots", "ridge", "error"),
    [
        # Modes are told apart by differences of down to 1e-2 of the outputs, whose squares stand in
        # the equations with a rounding of 1e-16.
        (1, [0.9], 0.0, 1e-12),
        (1, [1.05], 0.0, 1e-12),
        (2, [0.95, 0.8], 0.0, 1e-9),
        (2, [0.7, 1.1], 0.0, 1e-9),
        (2, [0.9 * np.exp(0.3j)], 0.0, 1e-9),
        # One mode too many: the ridge chooses, and costs its size.
        (1, [0.9], 1e-6, 3e-6),
        (2, [0.9], 1e-6, 3e-6),
    ],
)
def test_exponentials_are_exact(modes, roots, ridge, error, clock):
    policy = Dmd(every=3, warmup=4, modes=modes, ridge=ridge, clock=clock)
    assert isinstance(policy, ScheduledPolicy)
    found, want, session = forecast(policy, roots)
    times = [float(STEPS - i) for i in range(STEPS)]
    whole = [gap for gap in policy.gaps(times) if len(gap.rows) == modes + 2]
    steps = [gap.start + i for gap in whole for i in range(len(gap.ahead))]
    assert len(steps) >= 12
    assert session.report()["full"] == STEPS - session.report()["skipped"] <= 13
    atol = error * want.abs().max().item()
    torch.testing.assert_close(found[steps], want[steps], rtol=0, atol=atol)
    others = [i for i in range(STEPS) if not torch.equal(found[i], want[i]) and i not in steps]
    assert others  # a Taylor sum stood in, and is not exact


def test_a_run_that_starts_in_the_middle_counts_from_there():
    policy = Dmd(every=3, warmup=4, ridge=0.0)
    found, want, session = forecast(policy, [0.95, 0.8], start=7)
    (decisions,) = session.report()["branches"].values()
    assert "".join(d[0] for d in decisions) == "ffff" + "ssf" * 6 + "s"
    # As above, from the first steps on that four outputs at equal distances are known for.
    known = [*range(4, 6), *range(16, 18)]
    torch.testing.assert_close(found[known], want[known], rtol=0, atol=1e-9)


def test_where_a_second_model_takes_over_exponentials_start_anew():
    """As in Wan 2.2: gaps read the second model's outputs alone, by ranks of the whole run."""
    policy = Dmd(every=3, warmup=4, ridge=0.0)
    models = [Exponentials(roots) for roots in ([0.9, 0.7], [0.95, 0.8])]
    plain = Exponentials([0.95, 0.8])
    scheduler = SimpleNamespace(timesteps=STEPS - torch.arange(STEPS).double(), step_index=None)
    session = policy.session(policy, lambda: scheduler)
    for module, name, value in [r for m in models for r in OutputStack(m).replacements(session)]:
        setattr(module, name, value)
    x, wrong = torch.zeros(2, 3, 4, 4), []
    for index, time in enumerate(scheduler.timesteps):
        scheduler.step_index = index
        found, want = models[index >= 8](x, time), plain(x, time)
        if index >= 8 and (found - want).abs().max() > 1e-9:
            wrong.append(index)
    (decisions,) = session.report()["branches"].values()
    assert "".join(d[0] for d in decisions[8:]) == "ffff" + "ssf" * 6
    # As above, four outputs at equal distances are known from the first gap on, and again from the
    # fourth; a Taylor sum stands in, or one is interpolated, in between.
    assert set(wrong) <= set(range(14, 21))
    assert wrong


def test_what_is_constant_stays():
    policy = Dmd(every=3)
    found, want, _ = forecast(policy, [])
    # The Taylor sum that stands in has weights in float32.
    torch.testing.assert_close(found, want, rtol=2**-23, atol=0)
    last = [gap.start for gap in policy.gaps([float(STEPS - i) for i in range(STEPS)])][-1]
    torch.testing.assert_close(found[last:], want[last:], rtol=2**-52, atol=0)


def products(differences):
    """Return [B, M, M]."""
    rows = torch.stack([d.double() for d in differences], dim=1)
    return rows @ rows.mT


class Longest(TorchDispatchMode):
    """Notes the most values of a tensor that a program makes, views of known ones aside."""

    def __init__(self, *known):
        super().__init__()
        self.known, self.values = {x.untyped_storage().data_ptr() for x in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in self.known:
            self.values = max(self.values, out.numel())
        return out


@pytest.mark.parametrize("kept", [None, "bfloat16", "fp8", "int8", "int4"])
@pytest.mark.parametrize("shape", [(2, 6, 512), (2, 4, 10, 18), (2, 3, 300)])
def test_products_are_taken_in_slices(monkeypatch, kept, shape):
    generator = torch.Generator().manual_seed(0)
    ring, second = Ring(4, kept), torch.randn(2, 5000, generator=generator)
    for rank in range(4):
        ring.push((torch.randn(shape, generator=generator), second), rank, form="form")
    weights = torch.randn(3, 4, generator=generator).double()
    sums = [ring.forecast(own.float())[0].flatten(1) for own in weights]
    monkeypatch.setattr(snapshots, "SLICE", 1024)
    with Longest(ring._slots[0].ring) as seen:
        found = ring.products(weights)
    assert 512 < seen.values <= 4 * 1024  # a slice of four slots, and nothing of the other stream
    torch.testing.assert_close(found, products(sums), rtol=1e-5, atol=1e-4)


def test_two_roots_are_those_of_the_companion_matrix():
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(4, 50, generator=generator).double() for _ in range(3)]
    ahead = torch.tensor([0.25, 1.0, 1.75], dtype=torch.float64)
    found = torch.stack(exponential_weights(products(noise), ahead, ridge=0.0))
    for b in range(4):
        target, one, two = (d[b].numpy() for d in noise)
        c, *_ = np.linalg.lstsq(np.stack([one, two], 1), target, rcond=None)
        values, vectors = np.linalg.eig(np.array([c, [1.0, 0.0]]).astype(complex))
        for i, h in enumerate(ahead.tolist()):
            f = np.diag(values * (values**h - 1) / (values - 1))
            want = (vectors @ f @ np.linalg.inv(vectors))[0].real
            np.testing.assert_allclose(found[:, i, b].numpy(), want, atol=1e-10)


@pytest.mark.parametrize("modes", [1, 2])
def test_weights_are_finite_whatever_is_stored(modes):
    """Nothing has changed, nothing but noise has, or one difference is many times another."""
    generator = torch.Generator().manual_seed(0)
    some = torch.randn(3, 1, 20, generator=generator)
    for scales in ((0, 0, 0), (1, 0, 0), (0, 1, 1), (1, 1e-12, 1), (1e12, 1, 1), (1, 1, 1)):
        differences = [x * s for x, s in zip(some, scales, strict=True)][: modes + 1]
        ahead = torch.tensor([1.0, 8.0], dtype=torch.float64)
        found = torch.stack(exponential_weights(products(differences), ahead, ridge=1e-6))
        assert found.isfinite().all(), scales
        if not any(scales):
            assert found.abs().max() < 1e-9


def test_equal_distances():
    assert equally_spaced([9, 6, 3, 2], 4) == ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0))
    assert equally_spaced([6.0, 2.0, 1.0, 0.0], 4) == ((1, 0, 0, 0), (0, 1, 0, 0))
    known = [7.0, 5.5, 3.0, 2.0]
    rows = np.array(equally_spaced(known, 4))
    assert rows.shape == (4, 4)
    for degree in range(4):  # cubics go through
        want = np.array([7.0, 5.5, 4.0, 2.5]) ** degree
        np.testing.assert_allclose(rows @ np.array(known) ** degree, want, rtol=1e-12)


def test_a_loop_over_a_set_grid_reads_nothing(monkeypatch):
    """Tensors on "meta" have no values: they raise where a program asks for them."""
    from fewstep.caching import scheduled

    monkeypatch.setattr(scheduled, "times_of", lambda scheduler: TIMES)
    policy = Dmd(every=3, warmup=3)
    with torch.device("meta"), torch.no_grad():
        model, scheduler = Net(), SimpleNamespace(timesteps=torch.empty(6), step_index=None)
        session = policy.session(policy, lambda: scheduler)
        for module, name, value in OutputStack(model).replacements(session):
            setattr(module, name, value)
        for _ in range(2):
            assert loop(model, scheduler, torch.empty(2, 8)).device.type == "meta"
        assert session.report()["skipped"] == 2
        with pytest.raises((RuntimeError, NotImplementedError)):  # or this test could not fail
            float(scheduler.timesteps[0])


@pytest.mark.parametrize("scope", ["output", "blocks"])
def test_on_a_pipeline(scope):
    pipe = digits(layers=2)
    plain = call(pipe, num_inference_steps=12)
    with fewstep.patch(pipe, cache=Dmd(every=1, scope=scope)):
        assert torch.equal(call(pipe, num_inference_steps=12), plain)
    noise = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    images = []
    with fewstep.patch(pipe, cache=Dmd(every=3, scope=scope)) as patch:
        for latents in (noise, torch.cat([noise[:1], noise[1:] * 9])):
            given = {"latents": latents, "num_inference_steps": 12, "output_type": "latent"}
            images.append(pipe([4, 4, 4], **given).images[0])
        image = call(pipe, num_inference_steps=12)
        assert patch.report()["cache"]["skipped"] == 12
        call(pipe, num_inference_steps=9, seed=3)
        assert torch.equal(call(pipe, num_inference_steps=12), image)
    assert torch.equal(*images)  # batch-mates change no bit
    assert not torch.equal(image, plain)


def test_the_preset():
    assert PRESETS["dmd"]() == Dmd()
    assert issubclass(Dmd().session, ScheduledSession)
    with pytest.raises(ValueError, match="modes: expected 1 or 2, got 3"):
        Dmd(modes=3)
    with pytest.raises(ValueError, match=r"modes: expected 1 or 2, got 2\.0"):
        Dmd(modes=2.0)  # an order of 4.0 would fail in the middle of a run
    with pytest.raises(ValueError, match="ridge: expected a finite number >= 0"):
        Dmd(ridge=-1)
