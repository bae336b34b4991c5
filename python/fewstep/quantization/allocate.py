"""allocate(pipe, calibration, budget): the scheme of every layer that errs least within a budget.

    minimise  sum_l error_l(s_l)      over one scheme s_l a layer
    with      sum_l bytes_l(s_l) <= budget["bytes"] * bytes of the layers as they are
              sum_l time_l(s_l)  <= budget["time"]  * their time

error_l(s) is measured at the model's output with layer l alone in scheme s, over the calibration's
evaluations. The change is taken apart into content (its means over blocks of 4 along every axis of
space or tokens) and quality (the rest), each in units of that part's energy in the output, and
added: so a layer that moves objects does not hide behind the energy of textures. Noise of different
layers is nearly independent, so energies add; nearly: errors of 4-bit weights are the same at every
step and can line up. So the programme is solved for several objectives,

    output   content + quality, to powers from independent (1) to all in line (1/2)
    groups   content alone for cross-attention and feed-forward layers, quality alone for the rest:
             the two groups that MixDQ (arXiv 2405.17873) measures apart, by SSIM and SQNR of images
    layer    1 / SQNR at the layer's own output (the ranking of arXiv 2312.05431)

and the plan whose layers together err least at the model's output is kept, uniform schemes that fit
the budget among them: a plan is never worse than they are.

time_l(s) is measured on this machine once for every shape and count of rows, interleaved, medians
of rounds. With no budget of time, the same calls and seed give the same plan.

scipy's milp (HiGHS) solves it: an integer programme with thousands of binary unknowns is what it is
made for, and nothing to write again.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import Calibration, denoiser_of, first_tensor, to_device
from .errors import output_error, split_error, sqnr
from .linear import QuantLinear, refuse_linear
from .plan import Plan
from .recipe import Recipe
from .replace import Skip, choose_layers
from .samples import splits
from .scheme import Scheme

CANDIDATES = (
    *("w8a8", "fp8", "w4a8-g128", "w4a8-g64", "w4a8-g32", "w4a8-g64-r16", "w4a8-g64-r32"),
    "w4a16-g64",  # for time, at few rows
)
POWERS = (1.0, 0.75, 0.5)
CONTENT_LAYERS = r"(^|\.)(attn2|cross_attn\w*|ff\w*|mlp\w*|feed_forward\w*|ffn)(\.|$)"
RESOURCES = {"bytes": "bytes", "time": "seconds"}  # of a budget -> field of a choice
_ROUNDS = 7


@dataclass(frozen=True)
class Choice:
    """One scheme for one layer, measured. `scheme` None is the layer as it is.

    error     at the model's output, content and quality added
    sqnr      at the layer's own output, over its calibration rows, in dB; where rounding is
              compensated, over those that were not fitted to
    content   the part of error that moves objects
    quality   the part of error that changes textures
    """

    scheme: Scheme | None
    error: float
    bytes: int
    seconds: float
    sqnr: float = math.inf
    content: float = 0.0
    quality: float = 0.0


Objective = Callable[[str, Choice], float]


def _powered(power: float) -> Objective:
    return lambda name, choice: choice.error**power


def _grouped(name: str, choice: Choice) -> float:
    return choice.content if re.search(CONTENT_LAYERS, name) else choice.quality


def _at_layer(name: str, choice: Choice) -> float:
    # A layer that gives nothing but zeros has no SQNR; the programme wants finite numbers.
    return min(10 ** (-choice.sqnr / 10), 1e6)


OBJECTIVES: tuple[Objective, ...] = (*map(_powered, POWERS), _grouped, _at_layer)


def weight_bytes(layer: nn.Module) -> int:
    """Return the bytes that a checkpoint holds for a layer."""
    return sum(x.numel() * x.element_size() for x in layer.state_dict().values())


@contextlib.contextmanager
def _in_place(model: nn.Module, name: str, layer: nn.Module) -> Iterator[None]:
    """Have a layer in every place of the one that is called `name`."""
    before = model.get_submodule(name)
    places = [
        (modules, key)
        for modules in (module._modules for module in model.modules())
        for key, child in modules.items()
        if child is before
    ]
    for modules, key in places:
        modules[key] = layer
    try:
        yield
    finally:
        for modules, key in places:
            modules[key] = before


def _evaluate(model: nn.Module, calibration: Calibration, device: torch.device) -> list[Tensor]:
    outputs = []
    for args, kwargs in calibration.evaluations:
        args, kwargs = to_device((args, kwargs), device)
        outputs.append(first_tensor(model(*args, **kwargs)).float())
    return outputs


def _time_all(layers: Sequence[nn.Module], x: Tensor) -> list[float]:
    """Return the median seconds of each layer on x, called in turn."""

    def synchronize() -> None:
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)

    samples: list[list[float]] = [[] for _ in layers]
    for round_ in range(1 + _ROUNDS):
        for layer, seconds in zip(layers, samples, strict=True):
            synchronize()
            start = time.perf_counter()
            layer(x)
            synchronize()
            if round_:  # the first one warms up
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in samples]


@torch.no_grad()
def measure(
    pipe: Any,
    calibration: Calibration,
    *,
    candidates: Sequence[str | Scheme] = CANDIDATES,
    skip: Skip | None = None,
    compensate: bool = False,
    timed: bool = False,
    on_layer: Callable[[str, int, int], None] = lambda name, done, total: None,
    made: _Layers | None = None,
) -> dict[str, list[Choice]]:
    """Return the measured choices of every layer that can be quantised; the first is as it is.

    A layer that sits in several places stands under its first name.

    Args:
        pipe: a pipeline, or the model itself.
        calibration: of this model.
        candidates: schemes; those that a layer's shape refuses are left out for it.
        skip: as in `quantize`; layers that it names have no choice and do not count.
        compensate: with rounding compensated on the calibration.
        timed: measure seconds too; they are 0 otherwise.
        on_layer: (name, layers done, layers) before each, for progress.
        made: makes the layers, and keeps them for later.

    Raises:
        ValueError: the calibration is of another model or holds no evaluations.
    """
    model = denoiser_of(pipe)
    parsed = [Scheme.parse(text) for text in candidates]
    schemes, _ = choose_layers(model, Scheme("w8a8"), skip)
    names = list({model.get_submodule(name): name for name in reversed(schemes)}.values())[::-1]
    _check(model, calibration, names)
    device = next(model.parameters()).device
    made = made or _Layers(model, calibration, compensate)
    want = _evaluate(model, calibration, device)
    times: dict[Any, list[float]] = {}  # layers of one shape are timed once
    choices: dict[str, list[Choice]] = {}
    for done, name in enumerate(names):
        on_layer(name, done, len(names))
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        fitting = [scheme for scheme in parsed if refuse_linear(linear, scheme) is None]
        layers = [made(name, scheme) for scheme in fitting]
        rows = calibration.inputs[name]
        sample = rows.to(linear.weight)
        judge = sample
        if compensate:  # told apart as they are, before a cast can make two of them one
            ways = splits(rows, calibration.runs.get(name))
            judge = ways[0].held_out.all_rows().to(linear.weight) if ways else sample
        exact = linear(judge)
        found = []
        for layer in layers:
            with _in_place(model, name, layer):
                got = _evaluate(model, calibration, device)
            parts = [split_error(*pair) for pair in zip(got, want, strict=True)]
            found.append(tuple(map(statistics.fmean, zip(*parts, strict=True))))
        seconds = [0.0] * (1 + len(layers))
        if timed:
            count = max(1, round(calibration.rows[name]))
            shape = (*linear.weight.shape, linear.weight.dtype, linear.bias is None, count)
            if shape not in times:
                x = sample.repeat(math.ceil(count / sample.shape[0]), 1)[:count]
                times[shape] = _time_all([linear, *layers], x)
            seconds = times[shape]
        choices[name] = [Choice(None, 0.0, weight_bytes(linear), seconds[0])]
        for scheme, parts, layer, s in zip(fitting, found, layers, seconds[1:], strict=True):
            own = sqnr(layer(judge), exact)
            choices[name].append(Choice(scheme, sum(parts), weight_bytes(layer), s, own, *parts))
    return choices


class _Layers:
    """Makes the layers of a model in any scheme.

    Compensation takes time, and every candidate plan wants its layers again. So compensated layers
    are kept on the CPU, as long as they take no more memory than the model's linear layers do.
    """

    def __init__(self, model: nn.Module, calibration: Calibration, compensate: bool) -> None:
        self._model, self._calibration, self._compensate = model, calibration, compensate
        self._kept: dict[tuple[str, Scheme], QuantLinear] = {}
        linears = {module for module in model.modules() if isinstance(module, nn.Linear)}
        self._room = sum(map(weight_bytes, linears)) if compensate else 0

    def __call__(self, name: str, scheme: Scheme) -> QuantLinear:
        """Return the layer of this name in this scheme."""
        linear = self._model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        kept = self._kept.get((name, scheme))
        if kept is not None:
            return copy.deepcopy(kept).to(linear.weight.device)
        compensate = self._calibration if self._compensate else None
        layer = Recipe({name: scheme}, self._calibration, compensate, literal=True).make(
            name, linear
        )
        size = weight_bytes(layer)
        if size <= self._room:
            self._room -= size
            self._kept[name, scheme] = copy.deepcopy(layer).to("cpu")
        return layer


def _check(model: nn.Module, calibration: Calibration, names: Sequence[str]) -> None:
    if not names:
        raise ValueError(
            f"pipe: expected linear layers that can be quantised, got a {type(model).__name__} "
            "with none"
        )
    if not calibration.evaluations:
        raise ValueError("calibration: expected at least one evaluation of the model, got none")
    for name in names:
        rows, columns = calibration.inputs.get(name), model.get_submodule(name).in_features
        if rows is None or rows.shape[1] != columns:
            raise ValueError(
                f"calibration: expected rows of {columns} for {name}, got "
                f"{'none' if rows is None else f'rows of {rows.shape[1]}'}"
            )


def solve(
    choices: Mapping[str, Sequence[Choice]],
    budget: Mapping[str, float],
    objective: Objective = OBJECTIVES[0],
) -> dict[str, Choice]:
    """Return the choice of every layer with the least sum of an objective within the budget.

    Raises:
        ValueError: an unknown resource, a share that is not above 0, or no choice that fits.
        ImportError: scipy is not installed.
    """
    if not budget or not set(budget) <= set(RESOURCES):
        raise ValueError(f"budget: expected shares of bytes or time, got {dict(budget)}")
    for name, share in budget.items():
        if not share > 0:
            raise ValueError(f"budget: expected a share of {name} above 0, got {share!r}")
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError as error:
        raise ImportError(
            f"allocate: expected scipy to be installed ({error}); pip install fewstep[allocate]"
        ) from error

    flat = [(layer, choice) for layer, options in choices.items() for choice in options]
    index = {layer: i for i, layer in enumerate(choices)}
    one_each = np.zeros((len(index), len(flat)))
    for column, (layer, _) in enumerate(flat):
        one_each[index[layer], column] = 1
    constraints = [LinearConstraint(one_each, 1, 1)]
    for name, share in budget.items():
        cost = np.array([getattr(choice, RESOURCES[name]) for _, choice in flat], dtype=float)
        whole = _total(choices, RESOURCES[name])
        if not whole:
            raise ValueError(f"budget: expected choices that were measured for {name}, got none")
        # In units of the whole: HiGHS's tolerances are absolute.
        constraints.append(LinearConstraint(cost[None] / whole, -np.inf, share))
    error = np.array([objective(*item) for item in flat])
    scale = error.max() or 1.0
    found = milp(
        error / scale,
        constraints=constraints,
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-6},
    )
    if found.x is None:
        raise ValueError(f"budget: expected one that some choice fits, got {dict(budget)}")
    return {layer: choice for (layer, choice), x in zip(flat, found.x, strict=True) if x > 0.5}


def allocate(
    pipe: Any,
    calibration: Calibration,
    budget: Mapping[str, float],
    *,
    candidates: Sequence[str | Scheme] = CANDIDATES,
    skip: Skip | None = None,
    compensate: bool = False,
    on_layer: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Plan:
    """Return the plan that errs least within a budget.

    Args:
        pipe: a pipeline, or the model itself; it is as it was afterwards.
        calibration: what `calibrate` returned for it.
        budget: {"bytes": 0.3} and / or {"time": 0.7}: shares of what the layers take as they are.
        candidates: the schemes to choose from; leaving a layer as it is is always one. With
            smoothing ("w8a8-smooth"), the plan needs this calibration too where it is applied:
            `quantize(model, plan=plan, smooth=calibration)`.
        skip: (name, layer) -> why to leave the layer alone, or None; `default_skip` if not given.
        compensate: measure layers whose rounding is compensated, for a plan that is applied so:
            `quantize(model, plan=plan, compensate=calibration)`. Takes longer. The error at the
            model's output is measured on the calibration's evaluations, some of whose rows the
            rounding was fitted to, so it is a little lower than on others; SQNR is not.
        on_layer: (name, layers done, layers) before each layer is measured.

    Returns:
        The plan, for `quantize(model, plan=plan)`; `plan.notes` holds the budget, the error at the
        model's output that was measured with it, its shares, and what was measured of each layer
        in its scheme (`plan.explain()` shows that).

    Raises:
        ValueError: no scheme, a calibration of another model, or a budget that nothing fits.
        ImportError: scipy is not installed.
    """
    model = denoiser_of(pipe)
    made = _Layers(model, calibration, compensate)
    choices = measure(
        model,
        calibration,
        candidates=candidates,
        skip=skip,
        compensate=compensate,
        timed="time" in budget,
        on_layer=on_layer,
        made=made,
    )
    plans = [solve(choices, budget, objective) for objective in OBJECTIVES]
    for found in _uniform(choices, candidates):
        if _fits(found, choices, budget) and found not in plans:
            plans.append(found)
    plans = [plan for i, plan in enumerate(plans) if plan not in plans[:i]]
    best, error = None, math.inf
    with torch.no_grad():
        want = _evaluate(model, calibration, next(model.parameters()).device)
        for chosen in plans:
            found = _joint_error(model, calibration, want, chosen, made)
            if found < error:
                best, error = chosen, found
    if best is None:
        raise ValueError("calibration: expected finite outputs of the model, got inf or NaN")
    notes: dict[str, Any] = {"budget": dict(budget), "error": error, "compensated": compensate}
    for name, field in RESOURCES.items():
        if _total(choices, field):
            notes[name] = _share(best, choices, field)
    notes["layers"] = {
        name: {
            "sqnr_db": c.sqnr if math.isfinite(c.sqnr) else None,  # JSON has no infinity
            "content": c.content,
            "quality": c.quality,
        }
        for name, c in best.items()
        if c.scheme is not None
    }
    chosen = {model.get_submodule(name): choice.scheme for name, choice in best.items()}
    everywhere = {
        name: chosen[module]
        for name, module in model.named_modules(remove_duplicate=False)
        if module in chosen
    }
    return Plan.of(model, everywhere, notes)


def _total(choices: Mapping[str, Sequence[Choice]], field: str) -> float:
    return sum(getattr(options[0], field) for options in choices.values())


def _share(
    chosen: Mapping[str, Choice], choices: Mapping[str, Sequence[Choice]], field: str
) -> float:
    return sum(getattr(choice, field) for choice in chosen.values()) / _total(choices, field)


def _fits(
    chosen: Mapping[str, Choice],
    choices: Mapping[str, Sequence[Choice]],
    budget: Mapping[str, float],
) -> bool:
    return all(_share(chosen, choices, RESOURCES[name]) <= share for name, share in budget.items())


def _uniform(
    choices: Mapping[str, Sequence[Choice]], candidates: Sequence[str | Scheme]
) -> Iterator[dict[str, Choice]]:
    for scheme in map(Scheme.parse, candidates):
        yield {
            layer: next((c for c in options if c.scheme == scheme), options[0])
            for layer, options in choices.items()
        }


def _joint_error(
    model: nn.Module,
    calibration: Calibration,
    want: list[Tensor],
    chosen: Mapping[str, Choice],
    made: _Layers,
) -> float:
    """Return the error at the output with every layer in its scheme."""
    with contextlib.ExitStack() as stack:
        for name, choice in chosen.items():
            if choice.scheme is not None:
                stack.enter_context(_in_place(model, name, made(name, choice.scheme)))
        got = _evaluate(model, calibration, next(model.parameters()).device)
    return statistics.fmean(map(output_error, got, want))
