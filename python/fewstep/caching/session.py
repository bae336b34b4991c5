"""What a cache remembers during one image, and how it knows where in the image it is.

A call of the denoiser belongs to a step and to a branch:

    run     starts when the pipeline's scheduler gets new timesteps, or when time turns round
    step    advances when the scheduler's step index or the timestep given to the model changes
    branch  the name of the `cache_context` that the pipeline opened, and how many calls of that
            name this step has seen: so the guided and the unguided pass never share a state

Every `set_timesteps` of diffusers makes a new `timesteps` tensor, so comparing identities is enough
to notice a new image, whoever calls it, and also after an exception left the last one unfinished.
The step index lives on the host; the timestep is read only where that needs no device sync, or
where the scheduler has no step index.

Another pipeline may use the same model. With the same scheduler its runs are followed like any
other; with one of its own they are not this scheduler's steps and run in full: the index stands at
the end, or still while time goes on. Where a run was left in the middle, the first call of another
pipeline is told by its conditioning: once that was the same tensor on two steps of a run, another
tensor is another image's. Where nothing counts steps (`by_call`), a pass that this one has seen
begins the next.

A pipeline may have one model for its first steps and another for the others (Wan 2.2): where the
next takes over, everything starts anew, since another model's features, and as a rule another
guidance scale, say little about its own.

Every guidance pass has a state of its own, but a sample has one decision per step: the first pass
that measures takes it for all that get the same input. Guidance, a difference of passes, cancels
most of the error of two forecasts; of one forecast beside one computed pass it cancels none. Passes
that are halves of one batch run where either of the two wants to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .calls import Branch, Call, Decided
from .guard import halves
from .policy import CachePolicy, ScheduledPolicy
from .shards import measure
from .steps import counts, step_now, times_of

__all__ = ["Session"]

# More calls than this in one step mean that the session can't see the steps: it then stays out.
_MAX_CALLS_PER_STEP = 8


class Session:
    """Follows the denoising runs of one pipeline and decides every call of its denoiser.

    Args:
        policy: when to skip.
        scheduler: returns the pipeline's present scheduler, or None.
    """

    def __init__(self, policy: CachePolicy | ScheduledPolicy, scheduler: Callable[[], Any]) -> None:
        self.policy = policy
        self.context: str | None = None
        self.on_run: list[Callable[[], Any]] = []  # told of every run's first call,
        self.after_call: list[Callable[[], Any]] = []  # and once of the end of a call
        self.group: Any = None  # of the ranks, where each has some of the blocks' tokens
        self.call: Call | None = None
        self.closed = False
        self.reasons: Counter[str] = Counter()
        self.blended = 0
        self._scheduler = scheduler
        self._branches: dict[tuple[str, int], Branch] = {}
        self._listed: tuple[Any, tuple[float, ...]] = (None, ())  # a grid that was read
        self._start_run(None)

    # Where in the image are we?

    def _start_run(self, timesteps: Any) -> None:
        self._timesteps = timesteps
        self._clock: tuple[Any, Any] | None = None
        self._direction = 0.0
        self._step = -1
        self._seen: Counter[str] = Counter()
        self._used: set[tuple[str, int]] = set()
        self._decided: Decided | None = None
        self._model: Any = None  # that evaluates the present steps
        for branch in self._branches.values():
            branch.forget()
        self._stale = True  # the record of the last run is kept until the next one starts

    def _read_clock(self, timestep: Any) -> tuple[Any, tuple[Any, Any]]:
        scheduler = self._scheduler()
        timesteps = getattr(scheduler, "timesteps", None)
        index = getattr(scheduler, "step_index", "absent")
        if index is None:
            index = getattr(scheduler, "begin_index", None)
        value = None
        if not isinstance(timestep, Tensor):
            value = timestep
        elif timestep.device.type == "cpu" or index in ("absent", None):
            value = timestep.detach().reshape(-1)[0].item()
        has_counter = index == "absent" and counts(scheduler)
        if has_counter and self._listed[0] is not timesteps:
            self._listed = (timesteps, times_of(scheduler))
        if has_counter:
            place = step_now(scheduler, value, self._listed[1])
            index = index if place is None else place
        elif index is None:
            index = step_now(scheduler, value, times_of(scheduler))
        return timesteps, (index, value)

    def _is_last(self, timesteps: Any, index: Any) -> bool:
        if timesteps is None:
            return False
        total = len(timesteps)
        scheduler = self._scheduler()
        # SCM lists the final 0 as one more timestep; PNDM takes one twice.
        more = getattr(scheduler, "num_inference_steps", None) == total - 1
        if more and not counts(scheduler):
            total -= 1
        return (self._step if index == "absent" else index) >= total - 1

    def _is_elsewhere(self, timesteps: Any, clock: tuple[Any, Any]) -> bool:
        """Whether the model is called by something that this scheduler does not drive."""
        taken = getattr(self._scheduler(), "step_index", None)
        if not isinstance(taken, int) or timesteps is None:
            return False
        if taken >= len(timesteps):
            return True
        if timesteps is not self._timesteps or self._clock is None:
            return False
        (index, value), (old_index, old_value) = clock, self._clock
        moved = value is not None and old_value is not None and value != old_value
        return moved and index == old_index

    def _turned_round(self, clock: tuple[Any, Any]) -> bool:
        if self._clock is None:
            return False
        (index, value), (old_index, old_value) = clock, self._clock
        if isinstance(index, int) and isinstance(old_index, int) and index < old_index:
            return True
        if value is None or old_value is None or value == old_value:
            return False
        direction = 1.0 if value > old_value else -1.0
        turned = self._direction * direction < 0
        self._direction = direction
        return turned

    @torch.compiler.disable
    def begin(
        self, timestep: Any, conditioning: Any, form: tuple[Any, ...] = (), model: Any = None
    ) -> Call:
        """Open the record of a call of the denoiser; `finish` or `abort` closes it.

        Args:
            timestep: the time that the model was given.
            conditioning: what tells the guided from the unguided pass, or None.
            form: shape, dtype and device of what entered the model.
            model: tells the pipeline's models apart, where it has several.
        """
        timesteps, clock = self._read_clock(timestep)
        if self._is_elsewhere(timesteps, clock):
            self.reasons["another scheduler's step"] += 1
            self.call = Call(None)
            return self.call
        if timesteps is not self._timesteps or self._turned_round(clock):
            self._start_run(timesteps)
        if clock != self._clock or (self.by_call and self._seen_before(conditioning)):
            self._clock = clock
            self._step += 1
            self._seen.clear()
            self._used.clear()
            self._decided = None
        if self._stale:
            for told in self.on_run:
                told()
            self._branches.clear()
            self.reasons.clear()
            self.blended = 0
            self._stale = False
        if model is not self._model:
            if self._model is not None:
                self._take_over()
            self._model = model
        branch = self._branch(conditioning)
        place = sum(self._seen.values()) - 1
        is_last = self._is_last(timesteps, clock[0])
        self.call = Call(branch, self._step, is_last, form=form, place=place)
        if branch is not None:
            try:
                self._foresee(self.call, timesteps, clock[0])
            except BaseException:
                self.abort()
                raise
        return self.call

    def _take_over(self) -> None:
        """Start anew with another model in the middle of a run."""
        self._decided = None
        for branch in self._branches.values():
            branch.forget()

    by_call = False  # whether the same pass again is another step, also at the same time
    verify = False  # whether the model runs on skipped steps too, to measure

    def enter(self, call: Call) -> None:
        """Decide what needs `call.entry`, the model's input, alone: here, nothing."""

    def _foresee(self, call: Call, timesteps: Any, index: Any) -> None:
        """Decide what can be decided before the model runs: here, nothing."""

    def _seen_before(self, conditioning: Any) -> bool:
        """Whether a pass of this step was the same: by its name, or else by its conditioning."""
        if self.context is not None or conditioning is None:
            return self._seen[self.context or "call"] > 0
        return any(self._branches[key].conditioning is conditioning for key in self._used)

    def _branch(self, conditioning: Any) -> Branch | None:
        name = self.context or "call"
        key = (name, self._seen[name])
        self._seen[name] += 1
        if key[1] >= _MAX_CALLS_PER_STEP:
            self.reasons["no step boundary seen"] += 1
            return None
        if self.context is None and conditioning is not None:
            # A pipeline that drops a guidance pass in mid-run shifts the order of its calls; the
            # very same conditioning tensor tells which branch this is.
            for other, branch in self._branches.items():
                if branch.conditioning is conditioning and other not in self._used:
                    key = other
                    break
        self._used.add(key)
        if key not in self._branches:
            label = key[0] if key[1] == 0 and self.context else f"{key[0]} {key[1]}"
            self._branches[key] = Branch(label)
        branch = self._branches[key]
        same = branch.conditioning is conditioning
        branch.steady |= same and conditioning is not None
        branch.replaced = branch.steady and not same and branch.conditioning is not None
        if branch.replaced:  # the guided and the unguided pass are another image's alike
            for every in self._branches.values():
                every.forget()
        branch.conditioning = conditioning
        return branch

    # What does this call do?

    @torch.compiler.disable
    def decide(self, call: Call, entry: Tensor, output: Tensor) -> None:
        """Set `call.skip` from what entered and left the first blocks."""
        branch, form = call.branch, self._form(call, output)
        if form is None:
            return
        reasons = self._must_run(call, branch, form)
        residual = None
        if self.policy.measures and not call.is_last:
            previous = None if all(reasons) else branch.probe
            change, residual = measure(
                output, entry, previous=previous, group=None if previous is None else self.group
            )
            if previous is not None:
                reasons = self._judge(call, reasons, change)
        probe = branch.probe
        self._settle(call, reasons, output.device)
        if not call.skip:
            branch.form = form
            branch.probe = residual if call.stays is None else blend(call.stays, probe, residual)

    def _form(self, call: Call, output: Tensor) -> tuple[Any, ...] | None:
        """Return shape, dtype and device; None where the call is not to be decided."""
        if call.branch is None:
            return None
        if output.requires_grad:
            self.reasons["gradients wanted"] += 1
            call.branch = None
            return None
        return output.shape, output.dtype, output.device

    def _must_run(self, call: Call, branch: Branch, form: tuple[Any, ...]) -> list[str | None]:
        """Return, by sample, why it must run in full; None where it may skip."""
        if branch.replaced:
            reason = "conditioning changed"
        elif branch.full_at is None:
            reason = "first step"
        elif branch.form != form:
            reason = "shape changed"
        elif call.is_last:
            reason = "last step"
        else:
            return [self.policy.must_run(call.step, call.step - at) for at in branch.full_at]
        return [reason] * form[0][0]

    def _judge(self, call: Call, reasons: list[str | None], change: Tensor) -> list[str | None]:
        """Decide for the samples that may skip: as an earlier pass of this step, or by the change.

        Reads back [B], twice only where a pass shares some of its samples.
        """
        call.branch.changes[len(call.branch.decisions)] = change.detach().clone()
        decided = self._decided
        shared = self._shared(decided, call, len(reasons))
        if not any(shared):
            own = self._judge_alone(call, reasons, change)
        else:
            own = reasons if all(shared) else self._judge_alone(call, reasons, change)
            each = zip(reasons, shared, decided.reasons, own, strict=True)
            own = [reason or (theirs if same else mine) for reason, same, theirs, mine in each]
        if not all(shared):
            self._decided = None  # the passes behind this one look at it
        return own

    def _shared(self, decided: Decided | None, call: Call, count: int) -> list[bool]:
        """Return which samples are given what the pass before was given; reads back [B]."""
        if decided is None or call.given is None or call.given.shape != decided.given.shape:
            return [False] * count
        return (call.given == decided.given).flatten(1).all(1).tolist()

    def _judge_alone(
        self, call: Call, reasons: list[str | None], change: Tensor
    ) -> list[str | None]:
        """Let the policy look at the change; halves of a batch with equal inputs are tied."""
        small = self.policy.small_change(change)
        if not isinstance(small, Tensor):
            return [reason or (None if small else "changed too much") for reason in reasons]
        tied = halves(call.given, len(reasons))
        each, *ties = (small[None] if tied is None else torch.stack((small, tied))).tolist()
        own = [
            reason or (None if fine else "changed too much")
            for reason, fine in zip(reasons, each, strict=True)
        ]
        for tie in ties:
            half = len(own) // 2
            pairs = zip(own, own[half:] + own[:half], tie, strict=True)
            own = [reason or (other if both else None) for reason, other, both in pairs]
        return own

    def _settle(self, call: Call, reasons: list[str | None], device: torch.device) -> None:
        """Skip where no sample wants a full step; else run, for those that want it.

        So whether a sample's output is computed or forecast depends on this sample alone.
        """
        branch, given = call.branch, call.given
        leads = self.policy.measures and self._decided is None and not call.is_last
        if leads and given is not None and len(given) == len(reasons):
            self._decided = Decided(given.detach().clone(), reasons)
        wanted = [reason for reason in reasons if reason]
        if not wanted:
            call.skip = True
            branch.note("skip")
            return
        batched = all(part.shape[0] == len(reasons) for part in branch.kept if part is not None)
        if len(wanted) < len(reasons) and batched:
            call.stays = torch.tensor([reason is None for reason in reasons], device=device)
            call.before = branch.kept
            pairs = zip(reasons, branch.full_at, strict=True)
            call.since = tuple(call.step if reason else at for reason, at in pairs)
            self.blended += 1
        self.reasons[wanted[0]] += 1
        branch.note("full", wanted[0])
        branch.full_at, branch.kept = None, ()

    @torch.compiler.disable
    def keep(self, call: Call, *kept: Any) -> None:
        """Store the features of a full step for the steps after it; the last step stores none."""
        branch = call.branch
        if branch is None or call.is_last:
            return
        if call.stays is not None:
            kept = tuple(map(partial(blend, call.stays), call.before, kept))
        branch.kept = kept
        branch.full_at = call.since or (call.step,) * branch.form[0][0]

    def recall(self, call: Call) -> tuple[Any, ...]:
        """Return what a skipped call puts in, in the order in which `keep` was given it."""
        return call.branch.kept

    @torch.compiler.disable
    def finish(self, call: Call) -> None:
        """Close a call; a skipped one must have put the stored features in."""
        self.call = None
        if (call.skip or call.stays is not None) and not call.done:
            self.abort()
            raise RuntimeError(
                "cache: expected the model to run all blocks in order, but a skipped step never "
                "reached the block that puts the stored features in; undo the cache patch to use "
                "options that leave blocks out"
            )

    def abort(self) -> None:
        """Close a call that raised: nothing of this run is used again."""
        self.call = self._decided = None
        for branch in self._branches.values():
            branch.forget()

    def reset(self) -> None:
        """Take the next call for the first of a run; what was decided can still be reported."""
        self.abort()
        self._start_run(None)

    def close(self) -> None:
        """Stay out of every call from now on, and drop the tensors."""
        self.closed = True
        self.abort()

    carried: tuple[str, ...] = ("closed", "by_call")  # what copies take over besides

    def __reduce__(self) -> tuple[Any, ...]:
        """A session of its own for a copy of the model, without what this one has seen."""
        carried = {name: getattr(self, name) for name in self.carried}
        return type(self), (self.policy, self._scheduler), carried

    # What was done?

    def report(self) -> dict[str, Any]:
        """Return the decisions of the present or last run.

        By branch and step: `branches`, `why` steps ran in full, and where steps are decided by a
        measurement `measured_change`, by sample: what was held against the threshold.
        """
        branches = {branch.name: list(branch.decisions) for branch in self._branches.values()}
        every = [decision for decisions in branches.values() for decision in decisions]
        numbers = {
            "full": every.count("full"),
            "skipped": every.count("skip"),
            "blended": self.blended,  # full steps that some samples took no part in
            "branches": branches,
            "why": {branch.name: list(branch.why) for branch in self._branches.values()},
            "why_full": dict(self.reasons),
        }
        changes = {
            branch.name: {step: change.tolist() for step, change in branch.changes.items()}
            for branch in self._branches.values()
        }
        return numbers | ({"measured_change": changes} if any(changes.values()) else {})


def add_residual(head: Any, tail: Any) -> Any:
    """head + tail of one stream; a stream that the model ends early is None in `tail`."""
    return None if tail is None else head + tail


def blend(stays: Tensor, old: Any, new: Any) -> Any:
    """Return `old` for the samples that stay and `new` for the others, None where there is none."""
    if new is None:
        return None
    return torch.where(stays.view(-1, *[1] * (new.dim() - 1)), old, new)


def residual_of(output: Any, head: Any) -> Any:
    """output - head of one stream, None where the last block returns none."""
    return None if output is None else torch.sub(output, head)
