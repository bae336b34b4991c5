"""A plan with a small trained block that looks ahead over each gap between two full steps.

    v^_i = sum_k w_ik v_f(k) + c_g           a < i < b, the skipped steps of gap g
    c_g  = block_g(x_{a+1}, v_f(0), .., v_f(K-1))     once per gap and guidance pass

    block(f) = s C3(h + silu(C2 h)),  h = silu(C1 (f - mean) / std)

x: what enters the model at the gap's first skipped step. C: convolutions of 3x3 on images and
videos (by frame), of 1x1 on sequences of tokens. Every gap has a block of its own, so a block knows
its times. C3 starts at zero: an untrained block is the plan. Trained by `train_lookahead`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .calls import Call
from .fingerprint import Fingerprint
from .plan import Plan
from .policy import Forecasts
from .scheduled import ScheduledSession

__all__ = ["LookAhead", "LookAheadBlocks", "LookAheadSession", "gap_of"]

_FORMAT = "fewstep look-ahead cache"
_VERSION = 1


def gap_of(steps: Forecasts, step: int) -> int:
    """Return the full step that a skipped one's gap begins with."""
    return max(index for index in range(step) if steps[index] is None)


def _as_planes(x: Tensor) -> Tensor:
    """[B, C, H, W] of an image; [B F, C, H, W] of a video; [B, C, N, 1] of tokens."""
    if x.dim() == 5:
        x = x.transpose(1, 2).flatten(0, 1)
    elif x.dim() == 3:
        x = x.transpose(1, 2)[..., None]
    return x.float()


def _as_output(planes: Tensor, like: Tensor) -> Tensor:
    if like.dim() == 5:
        planes = planes.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)
    elif like.dim() == 3:
        planes = planes[..., 0].transpose(1, 2)
    return planes.to(like.dtype)


class _Block(nn.Module):
    """A gap's; see the module's text."""

    def __init__(self, planes: int, channels: int, hidden: int, kernel: int) -> None:
        super().__init__()
        pad = kernel // 2
        self.enter = nn.Conv2d(planes, hidden, kernel, padding=pad)
        self.inner = nn.Conv2d(hidden, hidden, kernel, padding=pad)
        self.leave = nn.Conv2d(hidden, channels, kernel, padding=pad)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)
        self.register_buffer("mean", torch.zeros(planes))
        self.register_buffer("std", torch.ones(planes))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, planes: Tensor) -> Tensor:
        planes = (planes - self.mean[:, None, None]) / self.std[:, None, None]
        hidden = nn.functional.silu(self.enter(planes))
        hidden = hidden + nn.functional.silu(self.inner(hidden))
        return self.scale * self.leave(hidden)


class LookAheadBlocks(nn.Module):
    """A block for each gap.

    Args:
        starts: the full steps that the gaps begin with.
        entry: channels of what enters the model.
        channels: of its output.
        order: K, snapshots that a block is given; where there are fewer the oldest is repeated.
        hidden: width.
        kernel: of the convolutions, 3 or 1.
    """

    def __init__(
        self, starts: Iterable[int], entry: int, channels: int, order: int, hidden: int, kernel: int
    ) -> None:
        super().__init__()
        self.order = order
        self.settings = {
            "entry": entry,
            "channels": channels,
            "order": order,
            "hidden": hidden,
            "kernel": kernel,
        }
        planes = entry + order * channels
        self.gaps = nn.ModuleDict(
            {str(start): _Block(planes, channels, hidden, kernel) for start in starts}
        )

    def planes(self, entry: Tensor, snapshots: Sequence[Tensor]) -> Tensor:
        """Return what a block is given: the model's input, and its newest outputs, newest first."""
        given = [*snapshots[: self.order]]
        given += given[-1:] * (self.order - len(given))
        return torch.cat([_as_planes(x) for x in (entry, *given)], 1)

    def forward(self, start: int, entry: Tensor, snapshots: Sequence[Tensor]) -> Tensor:
        """Return what is added to every forecast of the gap."""
        made = self.gaps[str(start)](self.planes(entry, snapshots))
        return _as_output(made, snapshots[0])


class LookAheadSession(ScheduledSession):
    """A schedule's session that adds what the gap's block gives."""

    policy: LookAhead

    @torch.compiler.disable
    def recall(self, call: Call) -> tuple[Any, ...]:
        """Return the forecast."""
        forecast = super().recall(call)
        if self.policy.blocks is None:
            return forecast
        start = gap_of(self.forecasts, call.step)
        known = call.branch.memory
        if known is None or known[:2] != (start, call.form):
            known = call.branch.memory = start, call.form, self._look_ahead(call, start)
        return forecast[0] + known[2], *forecast[1:]

    @torch.no_grad()
    def _look_ahead(self, call: Call, start: int) -> Tensor:
        if call.entry is None:
            raise ValueError(
                "cache: expected a model that is given one tensor, or a list of samples of one "
                f"size, got {call.form}; {self.policy!r} looks at them"
            )
        blocks, device = self._blocks_on(call.entry.device), call.entry.device
        rank, order = self._ranks[call.step], self.policy.order
        one = torch.eye(order, device=device)
        held = range(1, min(rank, order) + 1)
        newest = [call.branch.ring.forecast(one[(rank - back) % order])[0] for back in held]
        return blocks(start, call.entry, newest)

    def _blocks_on(self, device: torch.device) -> LookAheadBlocks:
        blocks = getattr(self, "_moved", None) or self.policy.blocks
        if next(blocks.parameters()).device != device:
            blocks = self._moved = copy.deepcopy(blocks).to(device)
        return blocks


@dataclass(frozen=True, eq=False)
class LookAhead:
    """A plan, and the blocks that look ahead over its gaps.

    Args:
        plan: which steps run in full, and the weights of the others. Its `predicted` is what was
            measured with the blocks.
        blocks: one for each gap; None where training found none that is better than the plan.
        made: how: settings of the training, "held_out_db" and "plan_held_out_db", the levels of
            the final latents' error on the calls kept for that, and "cost", what a skipped step
            costs on average as a share of the linear layers' work in a full one.
    """

    plan: Plan
    blocks: LookAheadBlocks | None = None
    made: dict[str, Any] = field(default_factory=dict)

    scope = "output"
    session = LookAheadSession

    @property
    def order(self) -> int:
        """Snapshots that are kept."""
        return self.plan.order

    @property
    def fingerprint(self) -> Fingerprint | None:
        """What it was trained for."""
        return self.plan.fingerprint

    @property
    def predicted(self) -> dict[str, Any]:
        """What was measured when it was trained."""
        return self.plan.predicted

    def __repr__(self) -> str:
        return f"LookAhead({'no blocks' if self.blocks is None else 'blocks'} on {self.plan!r})"

    def on(self, times: Sequence[float], start: int = 0) -> Plan:
        """Return the plan, for whole runs on its own grid.

        Raises:
            ValueError: another grid or a part of it, which the blocks don't know.
        """
        if self.blocks is not None and (start or not self.plan.is_on(times)):
            said = f"one that starts at step {start} of" if start else "one of"
            raise ValueError(
                f"cache: expected the grid of {len(self.plan.times)} steps that the look-ahead "
                f"blocks were trained on, got {said} {len(times)}; fewstep.caching.train_lookahead "
                "trains them for whole runs on a grid"
            )
        return self.plan.on(times, start)

    def forecasts(self, times: Sequence[float]) -> Forecasts:
        """Return the plan's decisions.

        Raises:
            ValueError: another grid.
        """
        return self.on(times).steps

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, and the blocks beside it as `<stem>.safetensors`."""
        from safetensors.torch import save_file

        path = Path(path)
        data = {
            "format": _FORMAT,
            "version": _VERSION,
            "made": self.made,
            "blocks": None,
            "plan": json.loads(self.plan.to_json()),
        }
        if self.blocks is not None:
            save_file(self.blocks.state_dict(), path.with_suffix(".safetensors"))
            starts = [int(start) for start in self.blocks.gaps]
            data["blocks"] = {"starts": starts, **self.blocks.settings}
        path.write_text(json.dumps(data) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> LookAhead:
        """Read what `save` has written.

        Raises:
            ValueError: something else, or of a version that is not known; files beside are missing.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(path)
        try:
            data = json.loads(path.read_text())
            if data["format"] != _FORMAT or data["version"] != _VERSION:
                raise KeyError("format, version")
            plan, blocks = Plan.of_json(json.dumps(data["plan"])), None
            if data["blocks"] is not None:
                blocks = LookAheadBlocks(**data["blocks"]).requires_grad_(False)
                blocks.load_state_dict(load_file(path.with_suffix(".safetensors")))
            return cls(plan, blocks, data["made"])
        except (
            ValueError,  # no JSON, or no plan
            KeyError,
            TypeError,
            RuntimeError,
            SafetensorError,
            FileNotFoundError,
        ) as error:
            raise ValueError(
                f"{path}: expected a {_FORMAT} of version {_VERSION} and the files beside it, got "
                f"something else ({type(error).__name__}: {error})"
            ) from error
