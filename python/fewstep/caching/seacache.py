"""SeaCache: skip while the part of the latents that is signal has changed little (CVPR 2026).

    x = s x_0 + n noise        what enters the model; q = n / s, known from the scheduler
    F x                        x, each frequency f of an axis times 1 / (1 + q^2 |f|^p), Wiener's
                               gain for a signal of power |f|^-p; the mean of all gains is 1
    d_t = |F x_t - F x_{t-1}| / |F x_{t-1}|
    e := e + d_t, by sample;   skip while e < threshold;  a full step sets e := 0
    a skipped step t           r_1 + (r_1 - r_2) (t - t_1) / (t_1 - t_2),  r_1, r_2 what the newest
                               full steps t_1, t_2 of the sample have kept

SeaCache (arXiv 2602.18993), as diffusers 0.42 has it: a product of gains over the axes of space and
time, the residual of all blocks. Its hook asks the pipeline for the noise level, which one pipeline
gives; here the pipeline's scheduler is asked. Other streams than the first keep their newest value.

Tokens that are images in rows are taken apart where the model is told their grid (`token_grid`);
otherwise they are one axis.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import cache_metric, forecast_apply
from ._checks import check_choice, check_count, check_number
from .accumulated import InputSession, Memory
from .calls import Call
from .policy import Threshold
from .session import blend
from .steps import times_of

__all__ = [
    "SeaCache",
    "SeaSession",
    "expect_noise_levels",
    "gains",
    "noise_ratios",
    "token_grid",
    "wiener",
]

_MOST = 1e6  # q of pure noise


@dataclass
class SeaMemory(Memory):
    """Also what the two newest full steps have kept, and which steps they were, by sample."""

    ring: Tensor | None = None  # [2, B, ...], newest first
    at: tuple[int, ...] = ()
    before: tuple[int, ...] = ()


def noise_ratios(scheduler: Any) -> tuple[float, ...]:
    """Return q of every step of the scheduler's grid.

    Raises:
        ValueError: a scheduler that says nothing about noise.
    """
    config = getattr(scheduler, "config", {})
    kind = config.get("prediction_type")
    sigmas = getattr(scheduler, "sigmas", None)
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if sigmas is not None:
        levels = [float(level) for level in torch.as_tensor(sigmas).tolist()]
        flow = config.get("use_flow_sigmas") or kind == "flow_prediction"
        if flow or (alphas is None and max(levels) <= 1.001):  # x = (1 - sigma) x_0 + sigma noise
            return tuple(_ratio(level, 1 - level) for level in levels)
        return tuple(_ratio(level, 1.0) for level in levels)  # x ~ x_0 + sigma noise
    times = times_of(scheduler)
    if alphas is not None:
        table = [float(alpha) for alpha in torch.as_tensor(alphas).tolist()]
        known = (table[min(max(round(time), 0), len(table) - 1)] for time in times)
        return tuple(_ratio(math.sqrt(1 - alpha), math.sqrt(alpha)) for alpha in known)
    if kind == "trigflow":  # x = cos(t) x_0 + sin(t) noise
        return tuple(_ratio(math.sin(time), math.cos(time)) for time in times)
    raise _silent(scheduler)


def expect_noise_levels(scheduler: Any) -> None:
    """Raise ValueError where a scheduler will say nothing about noise, whatever its grid.

    Some have sigmas from the time on that timesteps are set: a copy is given some.
    """
    if _may_tell(scheduler):
        return
    probe = copy.deepcopy(scheduler)
    if hasattr(probe, "set_timesteps"):
        try:
            probe.set_timesteps(2)
        except Exception:  # it wants to know more, so nothing is known yet
            return
    if not _may_tell(probe):
        raise _silent(scheduler)


def _may_tell(scheduler: Any) -> bool:
    kind = getattr(scheduler, "config", {}).get("prediction_type")
    named = hasattr(scheduler, "sigmas") or hasattr(scheduler, "alphas_cumprod")
    return named or kind == "trigflow"


def _silent(scheduler: Any) -> ValueError:
    return ValueError(
        "cache: expected a scheduler with sigmas or alphas_cumprod, which tell SeaCache how much "
        f"of the latents is noise, got {type(scheduler).__name__}"
    )


def _ratio(noise: float, signal: float) -> float:
    return min(noise / max(signal, 1e-12), _MOST)


def token_grid(arguments: Mapping[str, Any], tokens: int) -> tuple[int, ...]:
    """Return the grid of a sequence of tokens, (tokens,) where the model is not told it.

    Args:
        arguments: of the model's call. Looked at: `img_shapes` (Qwen-Image), `num_frames`, `height`
            and `width` (LTX), `img_ids` (FLUX).
        tokens: how many there are.
    """
    grids: list[tuple[int, ...]] = []
    shapes = arguments.get("img_shapes")
    while isinstance(shapes, list) and len(shapes):
        shapes = shapes[0]
    if isinstance(shapes, tuple) and all(isinstance(size, int) for size in shapes):
        grids.append(shapes)
    sizes = tuple(arguments.get(name) for name in ("num_frames", "height", "width"))
    if all(isinstance(size, int) for size in sizes):
        grids.append(sizes)
    ids = arguments.get("img_ids")
    if isinstance(ids, Tensor) and ids.dim() > 1 and ids.shape[-2] == tokens:
        rows = ids.detach().float().reshape(-1, tokens, ids.shape[-1])[0]
        grids.append(tuple(int(size) for size in (rows.amax(0) - rows.amin(0) + 1).tolist()))
    for grid in grids:
        if math.prod(grid) == tokens:
            return tuple(size for size in grid if size > 1) or (1,)
    return (tokens,)


def wiener(x: Tensor, axes: tuple[int, ...], ratio: float, power: float) -> Tensor:
    """Return F x of the module's header, in float32 or float64.

    Args:
        x: [B, ...].
        axes: over which frequencies are taken.
        ratio: q.
        power: p.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    tables = [gains(x.shape[axis], (ratio,), power).to(x.device, x.dtype) for axis in axes]
    return _filtered(x, axes, [table[0] for table in tables])


def gains(size: int, ratios: Sequence[float], power: float) -> Tensor:
    """Return the gains [S, size] of an axis for every q, in float64."""
    known = {"dtype": torch.float64, "device": "cpu"}
    power_of_noise = torch.fft.fftfreq(size, **known).abs() ** power
    gain = 1 / (1 + torch.tensor(ratios, **known)[:, None] ** 2 * power_of_noise)
    return gain / gain.mean(1, keepdim=True)


def _filtered(x: Tensor, axes: tuple[int, ...], rows: Sequence[Tensor]) -> Tensor:
    """Return x with the frequencies of each axis times a row of gains."""
    spectrum = torch.fft.rfftn(x, dim=axes)
    for axis, row in zip(axes, rows, strict=True):
        gain = row[: spectrum.shape[axis]]
        spectrum = spectrum * gain.view(-1, *[1] * (x.dim() - 1 - axis))
    return torch.fft.irfftn(spectrum, s=[x.shape[axis] for axis in axes], dim=axes)


class SeaSession(InputSession):
    """Sums the change of the filtered latents.

    Gains of all steps of a grid are made and brought to the device once, and passes of a step that
    are given the very same tensor share what is filtered.
    """

    remember = SeaMemory

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._tables: dict[Any, Tensor] = {}  # gains, of the grid that was read last
        self._tabled: tuple[float, ...] = ()  # q of that
        super().__init__(*args, **kwargs)

    def _start_run(self, timesteps: Any) -> None:
        super()._start_run(timesteps)
        self._ratios: tuple[float, ...] | None = None
        self._times: tuple[float, ...] = ()
        self._grids: dict[int, tuple[int, ...]] = {}
        self._last: tuple[int, Any, int, Tensor] | None = None  # step, given, version, filtered

    def abort(self) -> None:
        """Close a call that raised: nothing of this run is used again."""
        super().abort()
        self._last = None

    def _place_now(self) -> int:
        """Return the place of the present step in the list of q, which is read once per run."""
        scheduler = self._scheduler()
        if self._ratios is None:
            self._ratios, self._times = noise_ratios(scheduler), times_of(scheduler)
            if self._ratios != self._tabled:
                self._tables, self._tabled = {}, self._ratios
        index, time = self._clock
        if not isinstance(index, int):  # the scheduler counts none
            index = self._times.index(time) if time in self._times else self._step
        return min(index, len(self._ratios) - 1)

    def _filter(self, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        """Return F x of the present step."""
        place, rows = self._place_now(), []
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        for axis in axes:
            key = x.shape[axis], x.device, x.dtype
            if key not in self._tables:
                table = gains(x.shape[axis], self._ratios, self.policy.power)
                self._tables[key] = table.to(x.device, x.dtype)
            rows.append(self._tables[key][place])
        return _filtered(x, axes, rows)

    def seen(self, call: Call, entry: Tensor) -> Tensor:
        """Return the filtered latents."""
        if entry.is_inference():  # nothing tells whether it was written to
            return self._look(call, entry)
        if self._last is not None:
            step, given, version, filtered = self._last
            if (step, version) == (call.step, entry._version) and given() is entry:
                return filtered
        found = self._look(call, entry)
        self._last = call.step, weakref.ref(entry), entry._version, found
        return found

    def _look(self, call: Call, entry: Tensor) -> Tensor:
        if entry.dim() < 2 or not entry.is_floating_point():
            raise ValueError(
                "cache: expected a model whose first tensor are latents [B, ...], got one of "
                f"{list(entry.shape)} in {entry.dtype}; SeaCache looks at them"
            )
        if entry.dim() != 3:
            axes = tuple(range(min(2, entry.dim() - 1), entry.dim()))
            return self._filter(entry.detach(), axes)
        tokens = entry.shape[1]
        if tokens not in self._grids:
            self._grids[tokens] = token_grid(call.arguments, tokens)
        grid = self._grids[tokens]
        apart = entry.detach().reshape(len(entry), *grid, entry.shape[2])
        return self._filter(apart, tuple(range(1, 1 + len(grid))))


@dataclass(frozen=True)
class SeaCache(Threshold):
    """Skip while the latents, without what is noise in them, have changed little.

    Args:
        threshold: of the accumulated change, exclusive; 0 never skips.
        max_skips: at most this many skipped steps in a row.
        warmup: steps at the start that always run in full.
        degree: 1 carries the last two full steps on along a line, 0 repeats the last one.
        power: p, how fast the power of a clean image is taken to fall with frequency.
        scope: "blocks" as published, or "output": what is carried on.
        first: blocks at the start that run on every step, with scope "blocks".
        last: blocks at the end that do.
    """

    threshold: float = 0.25
    max_skips: int = 2
    warmup: int = 1
    degree: int = 1
    power: float = 3.0
    scope: str = "blocks"
    first: int = 0
    last: int = 0

    early = True
    session = SeaSession

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("degree", "first", "last"):
            check_count(name, getattr(self, name), 0)
        if self.degree > 1:
            raise ValueError(f"degree: expected 0 or 1, got {self.degree}")
        check_number("power", self.power, 0, above=True)
        check_choice("scope", self.scope, ("output", "blocks"))

    def expect_scheduler(self, scheduler: Any) -> None:
        """Raise ValueError where a pipeline's scheduler does not tell its noise levels."""
        expect_noise_levels(scheduler)

    def increment(self, memory: SeaMemory, entry: Tensor) -> Tensor:
        """Return d [B]."""
        return cache_metric(entry, memory.entry, per_sample=True)

    def learn(self, memory: SeaMemory, call: Call, kept: tuple[Any, ...]) -> tuple[Any, ...]:
        """Take the first stream into the ring, for the samples that ran; return the others."""
        new, stays, ring = kept[0].detach(), call.stays, memory.ring
        now = (call.step,) * len(new)
        if ring is None or ring.shape[1:] != new.shape or ring.dtype != new.dtype:
            memory.ring = new.new_empty((2, *new.shape)).copy_(new)
            memory.at = memory.before = now
        elif stays is None:
            ring[1].copy_(ring[0])
            ring[0].copy_(new)
            memory.at, memory.before = now, memory.at
        else:
            ring[1].copy_(blend(stays, ring[1], ring[0]))
            ring[0].copy_(blend(stays, ring[0], new))
            ran = [since == call.step for since in call.since]
            pairs = zip(ran, memory.at, memory.before, strict=True)
            memory.before = tuple(at if mine else before for mine, at, before in pairs)
            memory.at = call.since
        return (None, *kept[1:])

    def carry(self, memory: SeaMemory, kept: None, call: Call) -> Tensor:
        """Return the first stream, carried on."""
        ring = memory.ring
        ahead = [
            self.degree * (call.step - at) / (at - before) if at > before else 0.0
            for at, before in zip(memory.at, memory.before, strict=True)
        ]
        dtype = torch.float64 if ring.dtype == torch.float64 else torch.float32
        if len(set(ahead)) == 1:  # filled there: nothing is copied to the device
            line = torch.full((len(ahead),), ahead[0], dtype=dtype, device=ring.device)
        else:
            line = torch.tensor(ahead, dtype=dtype, device=ring.device)
        return forecast_apply(ring, torch.stack((1 + line, -line), dim=1))
