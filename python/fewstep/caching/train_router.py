"""Training a router's masks on a few calls of a pipeline.

    gates g [S, M] in [0, 1], g = sigmoid(l / T + tau), tau such that sum c g = compute
    final     min over l of  mean over images of log |x_S(g) - x_S|^2            x_S: final latents
    step      min over l of  mean over steps of  |v_s(g) - v_s|^2 / |v_s|^2      v_s: model's output

c_sm is a module's share of the work. Its price is no setting: it is -tau, solved for at every
iteration, so that the budget is met throughout; T falls, so that gates end near 0 and 1. What comes
of it is a mask: of those that a training passes by, the one that does best on the run itself.

"final" trains on the run itself with all reuse before a step in it, as HarmoniCa does (arXiv
2410.01723), and takes the gradient of the final latents through the whole run where HarmoniCa has a
proxy. "step" has Learning-to-Cache's loss (arXiv 2406.01733): steps come in pairs, the first in
full, the second with what the first gave; no step knows of other pairs' reuse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ._checks import check_choice, check_count, check_number
from ._pipelines import expect_calls, only_denoiser_of, same_config
from .fingerprint import Fingerprint
from .layers import choose_modules, find_modules
from .mixing import Mixing, mixing
from .record import repeatable
from .rollouts import Runs, work_in
from .router import Router

__all__ = ["train_router"]

_HOT, _COLD = 1.0, 0.1  # T of the first and the last iteration
_RATE, _MOMENTUM = 0.3, 0.8
_LOOKS = 6  # masks of a training that are tried
_LARGEST = 6.0  # logit

Mask = list[list[bool]]


class _Gated(Runs):
    """The calls in full, and with gates."""

    rollout: Mixing

    def __init__(self, mixed: Mixing, calls: list[Mapping[str, Any]], seed: int) -> None:
        with work_in(mixed.modules.values()) as work:
            super().__init__(mixed, calls, seed)
        each = np.array(work)
        if not each.all():  # layers of a kind that is not counted: all modules are alike then
            each = np.ones(len(each))
        self.costs = torch.from_numpy(np.tile(each / each.sum() / self.steps, (self.steps, 1)))

    def final_gradient(self, index: int, gates: Tensor) -> None:
        """Add the gradient of a call's loss at the end of the run to that of the gates."""
        self.rollout.gates = gates
        self.loss(index, gradient=True).backward()

    def step_gradient(self, index: int, gates: Tensor) -> None:
        """Add the gradient of a call's losses step by step to that of the gates."""

        def teach(step: int, output: Tensor, again: Callable[[], Tensor]) -> None:
            if step % 2:
                with torch.enable_grad():
                    error = (again() - output).float().square().mean()
                    (error / output.float().square().mean() / (self.steps // 2)).backward()

        self.rollout.gates, self.rollout.teach = gates, teach
        try:
            self.draw(index)
        finally:
            self.rollout.teach = None


def relaxed(logits: Tensor, costs: Tensor, share: float, heat: float, fixed: Tensor) -> Tensor:
    """Return gates of a share of the work: 1 where fixed, else sigmoid(l / T + tau).

    Args:
        logits: l [S, M].
        costs: [S, M], their sum is 1.
        share: what the costs of the gates sum to.
        heat: T.
        fixed: [S, M], True where a module always runs.
    """
    free, wanted = costs * ~fixed, share - (costs * fixed).sum()
    scaled = (logits / heat).double()
    low, high = -40.0 - scaled.max().item(), 40.0 - scaled.min().item()
    for _ in range(60):
        middle = (low + high) / 2
        if (free * torch.sigmoid(scaled.detach() + middle)).sum() > wanted:
            high = middle
        else:
            low = middle
    # A Newton step from the solution: worth nothing, but its derivative is that of tau.
    near = torch.sigmoid(scaled + low)
    slope = (free * near * (1 - near)).sum().detach().clamp_min(1e-12)
    gates = torch.sigmoid(scaled + low - ((free * near).sum() - wanted) / slope)
    return torch.where(fixed, 1.0, gates).to(logits)


def masked(logits: Tensor, costs: Tensor, share: float, fixed: Tensor) -> Mask:
    """Return the mask of the largest logits that a share of the work pays for."""
    mask, left = fixed.clone(), share - float((costs * fixed).sum()) + 1e-9
    for place in torch.argsort(logits.flatten(), descending=True, stable=True).tolist():
        step, module = divmod(place, logits.shape[1])
        cost = float(costs[step, module])
        if not mask[step, module] and cost <= left:
            mask[step, module], left = True, left - cost
    return mask.tolist()


def _train(runs: _Gated, share: float, objective: str, iterations: int) -> tuple[Mask, float]:
    """Return the best mask found, and its loss."""
    costs, shape = runs.costs, runs.costs.shape
    fixed = torch.zeros(shape, dtype=torch.bool)
    fixed[:: 2 if objective == "step" else runs.steps] = True
    least = float((costs * fixed).sum())
    if share < least - 1e-9:
        always = "the first of every two steps" if objective == "step" else "the first step"
        raise ValueError(
            f"compute: expected at least {least:.3g} on {runs.steps} steps, where {always} runs "
            f"in full, got {share:g}"
        )
    logits = nn.Parameter(torch.zeros(shape))
    # Of unit mean square as a whole: one by one, as Adam has it, the logits would lose their order.
    moved = torch.zeros(shape)
    gradient = runs.step_gradient if objective == "step" else runs.final_gradient
    looks = {round((look + 1) * iterations / _LOOKS) for look in range(_LOOKS)}
    tried: list[tuple[float, Mask]] = []
    for turn in range(iterations):
        heat = _HOT * (_COLD / _HOT) ** (turn / max(1, iterations - 1))
        gates = relaxed(logits, costs, share, heat, fixed)
        leaf = gates.detach().requires_grad_()
        gradient(turn % len(runs.calls), leaf)
        if leaf.grad is not None and leaf.grad.isfinite().all():
            logits.grad = None
            gates.backward(leaf.grad)
            size = logits.grad.square().mean().sqrt().clamp_min(1e-30)
            moved = _MOMENTUM * moved + (1 - _MOMENTUM) * logits.grad / size
            with torch.no_grad():
                logits.sub_(_RATE * moved).clamp_(-_LARGEST, _LARGEST)
        mask = masked(logits.detach(), costs, share, fixed)
        if turn + 1 in looks and all(mask != other for _, other in tried):
            runs.rollout.gates = mask
            tried.append((runs.losses(range(len(runs.calls))), mask))
    loss, mask = min(tried, key=lambda one: one[0])
    return mask, loss


@contextmanager
def _prepared(
    pipe: Any, modules: Any, calls: list[Mapping[str, Any]]
) -> Iterator[tuple[nn.Module, Mixing]]:
    denoiser = only_denoiser_of(pipe)
    # A block whose two layers share their last product has no output per layer to mix.
    found = {n: m for n, m in find_modules(denoiser).items() if not n.endswith(".proj_out")}
    if not found:
        raise ValueError(
            f"pipe: expected a model with attention or feed-forward layers in lists of blocks, got "
            f"none in {type(denoiser).__name__}"
        )
    chosen = choose_modules(found, modules)
    with repeatable(calls), same_config(pipe.scheduler), mixing(pipe, denoiser, chosen) as mixed:
        yield denoiser, mixed


def train_router(
    pipe: Any,
    calls: Iterable[Mapping[str, Any]],
    *,
    compute: float = 0.5,
    objective: str = "final",
    modules: str | Iterable[str] | None = None,
    iterations: int = 60,
    seed: int = 0,
) -> Router:
    """Learn which attention and feed-forward modules need to run at which step.

    An iteration is one call with gradients: three to four times a run. With "final" the gradient
    goes through the whole run, so this is for small models and few steps; from 32 evaluations of
    the model on, its inside is computed twice rather than kept.

    Args:
        pipe: a diffusers pipeline with a transformer, and a scheduler.
        calls: 4 to 16 keyword dicts, each run as `pipe(**call)`, all on the same grid.
        compute: the share of the modules' multiplications that the whole run may have, first step
            (in full) included.
        objective: "final", the error of the final latents, or "step", that of the model's output
            where every other step is in full.
        modules: a regular expression on paths, or names, of the modules; None takes all attention
            and feed-forward layers. Others run at every step.
        iterations: of the training.
        seed: of what calls draw without a generator.

    Returns:
        The router. The pipeline, its scheduler's configuration and the calls' generators are as
        they were.

    Raises:
        TypeError: not a pipeline with a model that can be cached.
        ValueError: a compiled model, two models, no such modules, no call, calls on several grids,
            a share or a count out of range.
    """
    check_number("compute", compute, 0, above=True)
    if compute > 1:
        raise ValueError(f"compute: expected at most 1, got {compute:g}")
    check_choice("objective", objective, ("final", "step"))
    check_count("iterations", iterations, 1)
    calls = expect_calls(calls)
    if modules is not None and not isinstance(modules, str):
        modules = tuple(modules)
    with _prepared(pipe, modules, calls) as (denoiser, mixed):
        mark = Fingerprint.of(denoiser, pipe.scheduler)
        runs = _Gated(mixed, calls, seed)
        mask, loss = _train(runs, float(compute), objective, iterations)
        mixed.gates = mask
        predicted = runs.quality()
        mark = mark.without_rewritten(pipe.scheduler)
    ran = float((runs.costs * torch.tensor(mask)).sum())
    rows = zip(*mask, strict=True)
    return Router(
        runs.times,
        {
            name: "".join("01"[runs_then] for runs_then in row)
            for name, row in zip(mixed.modules, rows, strict=True)
        },
        mark,
        predicted,
        made={
            "compute": float(f"{ran:.4g}"),
            "objective": objective,
            "iterations": iterations,
            "calls": len(calls),
            "log_error": float(f"{loss:.4g}"),
        },
    )
