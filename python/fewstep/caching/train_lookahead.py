"""Training look-ahead blocks on a few calls of a pipeline, through the whole run with the plan.

    min over blocks and shifts u_g of the weights, sum u_g = 0, of
        mean over images of log |x_S - x_S(full)|^2                x_S: the last latents

The gradient goes back through the plan's full steps, so a block answers the states that the plan,
the other blocks and it itself lead to, and learns what matters at the end. (Fitted gap by gap to
bring the latents back to those of the full run, blocks halve the errors of early gaps, and the
images are not better for it.) Calls at the end of the list are held out: what is kept is what does
best on them, the plan as it was among it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import check_count
from ._pipelines import expect_calls, only_denoiser_of, same_config
from .calibrate import calibrate
from .inputs import entry_of, input_of
from .lookahead import LookAhead, LookAheadBlocks, gap_of
from .output import take_apart
from .plan import Plan
from .record import repeatable
from .rollouts import Rollout, Runs, standing, work_in

__all__ = ["train_lookahead"]

_SHIFT_RATE, _BLOCK_RATE, _DECAY = 0.02, 2e-3, 1e-4  # of AdamW
_LOOKS = 6  # times that held-out calls are looked at
_SCALE = 0.1  # of a block's output, in that of the model's


class _Ahead(Rollout):
    """Runs with a plan, its shifts and its blocks; without a plan the model as it is."""

    def __init__(self, pipe: Any) -> None:
        self.plan: Plan | None = None
        self.blocks: LookAheadBlocks | None = None
        self.shifts: dict[int, Tensor] = {}
        self.seen: Callable[[int, Tensor, list[Tensor]], None] | None = None
        super().__init__(pipe)

    def start(self) -> None:
        """Forget the last run."""
        super().start()
        self._outputs: dict[int, list[tuple[Any, ...]]] = {}  # by guidance pass, newest first
        self._rebuild: dict[int, Any] = {}
        self._ahead: dict[int, Tensor | None] = {}

    def compute(self, below: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the model's output, or its forecast."""
        branch = self.branch
        weights = None if self.plan is None else self.plan.steps[self.step]
        if weights is None:
            output = self.kept(lambda: below(*args, **kwargs))
            if self.plan is not None:
                parts, self._rebuild[branch] = take_apart(output)
                outputs = self._outputs.setdefault(branch, [])
                outputs.insert(0, parts)
                del outputs[self.plan.order :]
                self._ahead.pop(branch, None)
            return output
        start = gap_of(self.plan.steps, self.step)
        outputs = self._outputs[branch]
        if branch not in self._ahead:
            given = inspect.signature(below).bind_partial(*args, **kwargs).arguments
            entry = entry_of(input_of(given))
            if entry is None:
                raise ValueError(
                    "pipe: expected a model that is given one tensor, or a list of samples of one "
                    f"size, got {', '.join(given)}"
                )
            newest = [parts[0] for parts in outputs]
            if self.seen is not None:
                self.seen(start, entry, newest)
            self._ahead[branch] = self.blocks and self.blocks(start, entry, newest)
        row = torch.tensor(weights, dtype=torch.float64)
        if start in self.shifts:
            row = row + self.shifts[start] - self.shifts[start].mean()
        forecast = [_sum(row, parts) for parts in zip(*outputs[: len(row)], strict=True)]
        if self._ahead[branch] is not None:
            forecast[0] = forecast[0] + self._ahead[branch]
        return self._rebuild[branch](tuple(forecast))


def _sum(row: Tensor, parts: tuple[Any, ...]) -> Any:
    """Return the forecast, summed in float32 as patched runs do: rounded weights aren't sum 1."""
    if not isinstance(parts[0], Tensor):
        return parts[0]
    dtype = torch.promote_types(parts[0].dtype, torch.float32)
    row = row.to(parts[0].device, dtype)
    summed = sum(weight * part.to(dtype) for weight, part in zip(row, parts, strict=True))
    return summed.to(parts[0].dtype)


def _new_blocks(runs: Runs, plan: Plan, indices: Iterable[int], hidden: int) -> LookAheadBlocks:
    """Return blocks that know the mean and spread of what they will be given."""
    ahead: _Ahead = runs.rollout
    found: dict[int, list[Tensor]] = {}
    sizes: dict[str, int] = {}

    def see(start: int, entry: Tensor, newest: list[Tensor]) -> None:
        channel = 2 if entry.dim() == 3 else 1
        inside = [list(x.shape) for x in (entry, newest[0])]
        for shape in inside:
            del shape[channel]
        if inside[0] != inside[1] or entry.dim() not in (3, 4, 5):
            raise ValueError(
                f"pipe: expected a model whose output is laid out as its input, got "
                f"{list(newest[0].shape)} for {list(entry.shape)}"
            )
        sizes.update(entry=entry.shape[channel], channels=newest[0].shape[channel])
        sizes["kernel"] = 1 if entry.dim() == 3 else 3
        blocks = LookAheadBlocks((), order=plan.order, hidden=hidden, **sizes)
        found.setdefault(start, []).append(blocks.planes(entry, newest))

    ahead.seen = see
    try:
        for index in indices:
            runs.draw(index)
    finally:
        ahead.seen = None
    blocks = LookAheadBlocks(found, order=plan.order, hidden=hidden, **sizes)
    for start, planes in found.items():
        block, values = blocks.gaps[str(start)], torch.cat(planes)
        block.mean.copy_(values.mean((0, 2, 3)))
        block.std.copy_(values.std((0, 2, 3)).clamp_min(1e-6))
        block.scale.copy_(_SCALE * values[:, sizes["entry"] :].std())
    return blocks.to(values.device)


def _train(runs: Runs, held: int, iterations: int, hidden: int) -> tuple[float, float]:
    """Train the rollout's shifts and blocks; return held-out losses before and after."""
    ahead: _Ahead = runs.rollout
    plan, count = ahead.plan, len(runs.calls) - held
    tested = range(count, len(runs.calls))
    before = best = runs.losses(tested)
    kept: tuple[Any, Any] | None = None
    shifts = {
        start: nn.Parameter(torch.zeros(len(plan.steps[start + 1]), dtype=torch.float64))
        for start in plan.full
        if start + 1 < runs.steps and plan.steps[start + 1] is not None
    }
    blocks = _new_blocks(runs, plan, range(count), hidden)
    ahead.shifts, ahead.blocks = shifts, blocks
    groups = [
        {"params": list(shifts.values()), "lr": _SHIFT_RATE},
        {"params": list(blocks.parameters()), "lr": _BLOCK_RATE},
    ]
    adam = torch.optim.AdamW(groups, weight_decay=_DECAY)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, iterations)
    looks = {round((look + 1) * iterations / _LOOKS) for look in range(_LOOKS)}
    for turn in range(iterations):
        loss = runs.loss(turn % count, gradient=True)
        adam.zero_grad()
        loss.backward()
        adam.step()
        falling.step()
        if turn + 1 in looks and (now := runs.losses(tested)) < best:
            best = now
            kept = (
                {start: shift.detach().clone() for start, shift in shifts.items()},
                {name: value.clone() for name, value in blocks.state_dict().items()},
            )
    ahead.shifts, ahead.blocks = {}, None
    if kept is not None:
        steps = list(plan.steps)
        for index, weights in enumerate(steps):
            if weights is not None:
                shift = kept[0][gap_of(plan.steps, index)]
                moved = torch.tensor(weights, dtype=torch.float64) + shift - shift.mean()
                steps[index] = tuple(float(f"{weight:.7g}") for weight in moved.tolist())
        blocks.load_state_dict(kept[1])
        ahead.plan, ahead.blocks = replace(plan, steps=tuple(steps)), blocks.requires_grad_(False)
    return before, best


def train_lookahead(
    pipe: Any,
    calls: Iterable[Mapping[str, Any]],
    *,
    full_steps: int | None = None,
    plan: Plan | None = None,
    hidden: int = 8,
    iterations: int = 60,
    seed: int = 0,
) -> LookAhead:
    """Calibrate a plan, and train a small block per gap that adds to its forecasts.

    An iteration is one call with gradients through the plan's full steps; from 32 evaluations of
    the model on, its inside is computed twice rather than kept.

    Args:
        pipe: a diffusers pipeline with a transformer or UNet, and a scheduler.
        calls: 4 to 16 keyword dicts, each run as `pipe(**call)`, all on the same grid and of one
            size. The last quarter of them, one at least, is not trained on.
        full_steps: how many steps run in full; a quarter of them where nothing is said.
        plan: instead of it, a plan that `calibrate` has made of these calls.
        hidden: width of the blocks.
        iterations: of the training.
        seed: of the blocks' first values, and of what calls draw without a generator.

    Returns:
        The plan with shifted weights and blocks; as it was and without blocks where these are no
        better on the held-out calls. The pipeline, its scheduler's configuration and the calls'
        generators are as they were.

    Raises:
        TypeError: not a pipeline with a model that can be cached, or no plan.
        ValueError: what `calibrate` raises; two models, less than two calls, a plan of another
            grid, without skipped steps or with half ones, a model whose output is not laid out as
            its input.
    """
    check_count("hidden", hidden, 1)
    check_count("iterations", iterations, 1)
    calls = expect_calls(calls)
    if len(calls) < 2:
        raise ValueError("calls: expected at least 2, one of them to be held out, got 1")
    denoiser = only_denoiser_of(pipe)
    if plan is None:
        plan = calibrate(pipe, calls, full_steps=full_steps, seed=seed)
    elif full_steps is not None:
        raise ValueError("full_steps: expected full_steps or plan, got both")
    elif not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a Plan, got {type(plan).__name__}")
    if plan.guidance:
        raise ValueError(f"plan: expected one without half steps, got {plan!r}")
    if len(plan.full) == len(plan.steps):
        raise ValueError("plan: expected one that skips steps, got one in full")
    wrong = plan.fingerprint.differences(denoiser, pipe.scheduler) if plan.fingerprint else []
    if wrong:
        raise ValueError(f"plan: expected one of this pipeline, got one of another: {wrong[0]}")
    ahead, held = _Ahead(pipe), -(-len(calls) // 4)
    with repeatable(calls), same_config(pipe.scheduler), standing(denoiser, ahead):
        runs = Runs(ahead, calls, seed)
        if plan.part is not None or not plan.is_on(runs.times):
            raise ValueError(
                f"plan: expected one of the calls' grid, {runs.steps} steps from "
                f"{runs.times[0]:g}, got {len(plan.times)} from {plan.times[0]:g}"
            )
        ahead.plan = plan
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            before, after = _train(runs, held, iterations, hidden)
        with work_in([denoiser, *([ahead.blocks] if ahead.blocks else [])]) as work:
            predicted = runs.quality()
    skipped = 1 - len(plan.full) / len(plan.steps)
    cost = work[1] / skipped / (work[0] / (1 - skipped)) if ahead.blocks else 0.0
    per_log = 10 / math.log(10)
    return LookAhead(
        replace(ahead.plan, predicted=predicted),
        ahead.blocks,
        made={
            "calls": len(calls),
            "held_out": held,
            "hidden": hidden,
            "iterations": iterations,
            "plan_held_out_db": round(-per_log * before, 2),
            "held_out_db": round(-per_log * after, 2),
            "cost": float(f"{cost:.3g}"),
        },
    )
