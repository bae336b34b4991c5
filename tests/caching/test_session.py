"""Sessions on a toy stack of blocks: states per branch, boundaries of runs and steps, exactness."""

import pytest
import torch
from torch import nn

from fewstep.caching import BlockStack, FirstBlock, Interval, Session

SKIP_ALWAYS = FirstBlock(threshold=1e9, max_skips=10)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.runs = 0

    def forward(self, hidden_states, temb):
        self.runs += 1
        return hidden_states + torch.tanh(self.linear(hidden_states) * temb)


class Toy(nn.Module):
    def __init__(self, blocks=4, width=8):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.leave_out = ()

    def forward(self, hidden_states, timestep, encoder_hidden_states=None):
        for index, block in enumerate(self.blocks):
            if index not in self.leave_out:
                hidden_states = block(hidden_states, timestep)
        return hidden_states


class Scheduler:
    def __init__(self, steps):
        self.set_timesteps(steps)

    def set_timesteps(self, steps):
        self.timesteps = torch.linspace(1, 1 / steps, steps)
        self.step_index = None

    def step(self):
        self.step_index = (self.step_index or 0) + 1


def cached(policy, scheduler=None, model=None):
    """Return a toy with the cache on, and its session."""
    torch.manual_seed(0)
    model = model or Toy()
    session = Session(policy, lambda: scheduler)
    stack = BlockStack(model, list(model.blocks), two_streams=False)
    for module, name, value in stack.replacements(session):
        setattr(module, name, value)
    return model, session


def drive(model, scheduler, *inputs):
    """Call the model once per step and input; return the outputs by input."""
    outputs = [[] for _ in inputs]
    with torch.no_grad():
        for step, t in enumerate(scheduler.timesteps):
            for found, x in zip(outputs, inputs, strict=True):
                found.append(model(x + step / 10, t))
            scheduler.step()
    return [torch.stack(found) for found in outputs]


@pytest.mark.parametrize(
    "policy", [SKIP_ALWAYS, Interval(every=3)], ids=["first-block", "interval"]
)
def test_interleaved_branches_equal_each_alone(policy):
    a, b = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    scheduler = Scheduler(7)
    model, session = cached(policy, scheduler)
    both = drive(model, scheduler, a, b)
    assert session.report()["skipped"] > 0
    for x, found in zip((a, b), both, strict=True):
        scheduler.set_timesteps(7)
        model, _ = cached(policy, scheduler)
        assert torch.equal(drive(model, scheduler, x)[0], found)


def test_a_skipped_step_adds_the_last_full_residual():
    x = torch.randn(1, 3, 8)
    plain = cached(Interval(every=1))[0]
    scheduler = Scheduler(4)
    model, session = cached(Interval(every=2, first=1, last=1), scheduler)
    found = drive(model, scheduler, x)[0]
    assert session.report()["branches"]["call 0"] == ["full", "skip", "full", "full"]
    with torch.no_grad():
        heads, before_last = [], []
        for step in (0, 1):
            h = plain.blocks[0](x + step / 10, scheduler.timesteps[step])
            heads.append(h)
            for block in plain.blocks[1:3]:
                h = block(h, scheduler.timesteps[step])
            before_last.append(h)
        want = plain.blocks[3](heads[1] + (before_last[0] - heads[0]), scheduler.timesteps[1])
    assert torch.equal(found[1], want)


def test_blocks_that_run():
    scheduler = Scheduler(6)
    model, _ = cached(Interval(every=3), scheduler)
    drive(model, scheduler, torch.randn(1, 3, 8))
    # full: 0, 3 and the last; the first and the last block run on every step
    assert [block.runs for block in model.blocks] == [6, 3, 3, 6]
    scheduler.set_timesteps(6)
    model, _ = cached(SKIP_ALWAYS, scheduler)
    drive(model, scheduler, torch.randn(1, 3, 8))
    assert [block.runs for block in model.blocks] == [6, 2, 2, 2]


def wander(model, scheduler, noise, sizes):
    """Run a batch whose samples move by these sizes per step; return outputs [T, B, ...]."""
    scheduler.set_timesteps(len(scheduler.timesteps))
    outputs, hidden = [], noise.clone()
    with torch.no_grad():
        for step, t in enumerate(scheduler.timesteps):
            outputs.append(model(hidden, 1 - step / 100 + 0 * t))
            hidden = hidden + sizes.view(-1, 1, 1) * torch.cos(noise + step)
            scheduler.step()
    return torch.stack(outputs)


def test_samples_decide_by_themselves_whatever_their_mates_do():
    torch.manual_seed(3)
    noise, scheduler = torch.randn(3, 3, 8), Scheduler(9)
    sizes = torch.tensor([0.02, 0.3, 0.001])
    policy = FirstBlock(threshold=0.1, max_skips=2)
    model, session = cached(policy, scheduler)
    want = wander(model, scheduler, noise, sizes)
    report = session.report()
    assert report["blended"] > 0
    alike = []
    for index in range(3):
        # A batch of three of one kind: they all skip, or all run, at the same steps.
        same = noise[index].expand(3, 3, 8).clone()
        got = wander(model, scheduler, same, sizes[index].expand(3))
        assert session.report()["blended"] == 0
        alike.append(session.report()["full"])
        assert torch.equal(got[:, 0], want[:, index])
    assert len(set(alike)) > 1
    assert report["full"] >= max(alike)
    # Other mates, and a NaN among them, change no bit either.
    for mates in (torch.randn(2, 3, 8) * 5, torch.full((2, 3, 8), float("nan"))):
        got = wander(model, scheduler, torch.cat([noise[:1], mates]), torch.tensor([0.02, 1, 2]))
        assert torch.equal(got[:, 0], want[:, 0])


def test_the_report_says_why_each_step_ran_and_what_was_measured():
    torch.manual_seed(3)
    scheduler = Scheduler(9)
    model, session = cached(FirstBlock(threshold=0.1, max_skips=2), scheduler)
    wander(model, scheduler, torch.randn(2, 3, 8), torch.tensor([0.02, 0.15]))
    report = session.report()
    (decisions,), (why,) = report["branches"].values(), report["why"].values()
    assert [reason is not None for reason in why] == [done == "full" for done in decisions]
    assert why[0] == "first step"
    assert why[-1] == "last step"
    assert {reason: why.count(reason) for reason in why if reason} == report["why_full"]
    (changes,) = report["measured_change"].values()
    for step, reason in enumerate(why):
        if reason == "changed too much":
            assert max(changes[step]) >= 0.1
        elif reason is None:
            assert max(changes[step]) < 0.1
    assert "changed too much" in why
    assert None in why


def test_a_step_that_one_sample_wants_is_computed_for_it_alone():
    scheduler = Scheduler(4)
    scheduler.timesteps = torch.tensor([1.0, 0.999, 0.998, 0.997])
    still = torch.randn(1, 3, 8)
    model, session = cached(FirstBlock(threshold=0.05), scheduler)
    plain = cached(Interval(every=1))[0]
    with torch.no_grad():
        first = torch.cat([still, torch.randn(1, 3, 8)])
        second = torch.cat([still, torch.randn(1, 3, 8)])
        model(first, scheduler.timesteps[0])
        scheduler.step()
        found = model(second, scheduler.timesteps[1])
        head = plain.blocks[0](second, scheduler.timesteps[1])
        before = plain.blocks[0](first, scheduler.timesteps[0])
        kept = plain(first, scheduler.timesteps[0]) - before
        assert torch.equal(found[0], (head + kept)[0])
        assert torch.equal(found[1], plain(second, scheduler.timesteps[1])[1])
    assert session.report()["branches"]["call 0"] == ["full", "full"]
    assert session.report()["blended"] == 1
    assert session._branches[("call", 0)].full_at == (0, 1)


def test_new_timesteps_start_a_new_image():
    x = torch.randn(1, 3, 8)
    scheduler = Scheduler(5)
    model, session = cached(SKIP_ALWAYS, scheduler)
    first = drive(model, scheduler, x)[0]
    scheduler.set_timesteps(5)
    with torch.no_grad():  # an image that is never finished
        model(x * 3, scheduler.timesteps[0])
    scheduler.set_timesteps(5)
    assert torch.equal(drive(model, scheduler, x)[0], first)
    assert session.report()["full"] == 2


@pytest.mark.parametrize("times", [(1.0, 0.6, 0.3), (0.1, 0.5, 0.9)], ids=["falling", "rising"])
def test_without_a_scheduler_time_tells_steps_and_images(times):
    x = torch.randn(1, 3, 8)
    model, session = cached(SKIP_ALWAYS)
    with torch.no_grad():
        first = [model(x, torch.tensor(t)) for t in times]
        again = [model(x, torch.tensor(t)) for t in times]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert session.report()["branches"] == {"call 0": ["full", "skip", "skip"]}


def test_the_same_time_again_is_another_branch_and_never_reuse():
    model, session = cached(SKIP_ALWAYS)
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(1, 3, 8), torch.tensor(1.0))
    assert session.report()["skipped"] == 0
    assert session.report()["why_full"]["no step boundary seen"] == 12


def test_conditioning_finds_its_branch_when_a_pass_is_dropped():
    x, scheduler = torch.randn(1, 3, 8), Scheduler(5)
    off, on = torch.zeros(1), torch.ones(1)
    model, session = cached(SKIP_ALWAYS, scheduler)
    with torch.no_grad():
        for step, t in enumerate(scheduler.timesteps):
            for conditioning in (off, on) if step < 2 else (on,):
                model(x, t, encoder_hidden_states=conditioning)
            scheduler.step()
    decisions = session.report()["branches"]
    assert [len(decisions["call 0"]), len(decisions["call 1"])] == [2, 5]


class Told:
    """Takes its decisions, one [B] per measured call, from a list."""

    first, last, measures = 1, 0, True

    def __init__(self, *answers):
        self.answers = list(answers)

    def must_run(self, step, since_full):
        return None

    def small_change(self, change):
        return torch.tensor(self.answers.pop(0))


def test_passes_on_equal_inputs_share_the_first_ones_decision():
    x, scheduler = torch.randn(2, 3, 8), Scheduler(6)
    policy = Told([True, True], [False, False], [True, False], [True, True])
    model, session = cached(policy, scheduler)
    first, second = drive(model, scheduler, x, x.clone())
    report = session.report()
    assert report["branches"]["call 0"] == report["branches"]["call 1"]
    assert report["branches"]["call 0"] == ["full", "skip", "full", "full", "skip", "full"]
    assert report["blended"] == 2
    assert policy.answers == []  # asked once per step
    assert torch.equal(first, second)
    assert session._decided is None


def test_a_pass_shares_the_decision_of_equal_samples_alone():
    """Two groups of passes in one step, too: each goes by its own first one."""
    x, scheduler = torch.randn(2, 3, 8), Scheduler(4)
    mixed = torch.cat([x[:1], torch.randn(1, 3, 8)])
    # The second pass is asked, and its answer counts for its own sample only; the third is not.
    policy = Told(*[[False, True], [True, True]] * 2)
    model, session = cached(policy, scheduler)
    drive(model, scheduler, x, mixed, mixed.clone())
    assert policy.answers == []
    for index in range(3):
        decisions = session.report()["branches"][f"call {index}"]
        assert decisions == ["full"] * 4
    assert session.report()["blended"] == 6
    assert session.report()["why_full"]["changed too much"] == 6


def test_a_pass_without_a_state_runs_beside_a_skipped_one():
    x, scheduler = torch.randn(1, 3, 8), Scheduler(5)
    off, on = torch.zeros(1), torch.ones(1)
    model, session = cached(SKIP_ALWAYS, scheduler)
    with torch.no_grad():
        for step, t in enumerate(scheduler.timesteps):
            for conditioning in (off,) if step < 2 else (off, on):
                model(x, t, encoder_hidden_states=conditioning)
            scheduler.step()
    decisions = session.report()["branches"]
    assert decisions["call 0"] == ["full", "skip", "skip", "skip", "full"]
    assert decisions["call 1"] == ["full", "skip", "full"]


@pytest.mark.parametrize("mate", [0.0, float("nan")])
def test_halves_of_a_batch_run_together_where_their_inputs_are_equal(mate):
    scheduler, noise = Scheduler(3), torch.randn(2, 3, 8)
    other = noise.clone()
    other[1] += 1 + mate
    model, session = cached(Told([True, False, False, True]), scheduler)
    with torch.no_grad():
        for t in scheduler.timesteps[:2]:
            model(torch.cat([noise, other]), t)
            scheduler.step()
    # 0 and 2 are one image's passes, 1 and 3 two images
    assert session._branches[("call", 0)].full_at == (1, 1, 1, 0)


def test_a_changed_shape_runs_in_full():
    scheduler = Scheduler(4)
    model, session = cached(SKIP_ALWAYS, scheduler)
    with torch.no_grad():
        for batch, t in zip((2, 1, 1, 1), scheduler.timesteps, strict=True):
            model(torch.randn(batch, 3, 8), t)
            scheduler.step()
    assert session.report()["branches"]["call 0"] == ["full", "full", "skip", "full"]
    assert session.report()["why_full"]["shape changed"] == 1


def test_a_model_that_leaves_the_last_block_out_is_told():
    scheduler = Scheduler(4)
    model, _ = cached(SKIP_ALWAYS, scheduler)
    with torch.no_grad():
        model(torch.randn(1, 3, 8), scheduler.timesteps[0])
        scheduler.step()
        model.leave_out = (3,)
        with pytest.raises(RuntimeError, match="expected the model to run all blocks in order"):
            model(torch.randn(1, 3, 8), scheduler.timesteps[1])
        model.leave_out = ()
        model(torch.randn(1, 3, 8), scheduler.timesteps[1])


def test_the_tensors_are_gone_after_the_last_step():
    scheduler = Scheduler(3)
    model, session = cached(SKIP_ALWAYS, scheduler)
    drive(model, scheduler, torch.randn(1, 3, 8))
    branch = session._branches[("call", 0)]
    assert branch.probe is None
    assert branch.kept == ()


def test_a_closed_session_stays_out():
    scheduler = Scheduler(3)
    model, session = cached(SKIP_ALWAYS, scheduler)
    session.close()
    drive(model, scheduler, torch.randn(1, 3, 8))
    assert [block.runs for block in model.blocks] == [3, 3, 3, 3]
    assert session.report()["full"] == 0


def test_too_few_blocks_are_refused():
    model = Toy(blocks=2)
    session = Session(Interval(), lambda: None)
    with pytest.raises(ValueError, match=r"expected more than 2 blocks .*got 2 in Toy"):
        BlockStack(model, list(model.blocks), two_streams=False).replacements(session)


@pytest.mark.parametrize(
    "policy", [SKIP_ALWAYS, Interval(every=3)], ids=["first-block", "interval"]
)
def test_a_pipeline_with_a_scheduler_of_its_own_runs_in_full_beside_it(policy):
    """After a finished run, after one that was left in the middle, and between two of its steps."""
    mine, theirs = Scheduler(6), Scheduler(5)
    x, y = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    us, them = torch.zeros(1), torch.ones(1)
    model, session = cached(policy, mine)
    plain = cached(Interval(every=1))[0]

    def run(network, scheduler, start, conditioning, stop=None, between=None):
        scheduler.set_timesteps(len(scheduler.timesteps))
        found = []
        with torch.no_grad():
            for step, t in enumerate(scheduler.timesteps):
                found.append(network(start + step / 10, t, conditioning))
                scheduler.step()
                if step == stop:
                    if between is None:
                        break
                    between()
        return torch.stack(found)

    want = run(model, mine, x, us)
    assert session.report()["skipped"] > 0
    other = run(plain, theirs, y, them)
    assert torch.equal(run(model, theirs, y, them), other)
    assert session.report()["why_full"]["another scheduler's step"] == 5
    run(model, mine, x, us, stop=2)
    assert torch.equal(run(model, theirs, y, them), other)
    seen = []
    nested = run(model, mine, x, us, 2, lambda: seen.append(run(model, theirs, y, them)))
    assert torch.equal(seen[0], other)
    assert torch.equal(nested[:3], want[:3])
    assert torch.equal(run(model, mine, x, us), want)


def test_a_new_conditioning_in_mid_run_is_another_image():
    scheduler = Scheduler(5)
    model, session = cached(SKIP_ALWAYS, scheduler)
    first, second = torch.zeros(1), torch.ones(1)
    with torch.no_grad():
        for conditioning, t in zip(
            (first, first, second, second), scheduler.timesteps[:4], strict=True
        ):
            model(torch.randn(1, 3, 8), t, conditioning)
            scheduler.step()
    assert session.report()["branches"]["call 0"] == ["full", "skip", "full", "skip"]
    assert session.report()["why_full"]["conditioning changed"] == 1
