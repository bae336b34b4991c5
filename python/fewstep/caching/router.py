"""A learned router: per step, which attention and feed-forward modules run, the others reuse.

    y_sm = module_m(x)              where the mask of module m says 1 at step s
    y_sm = its newest output        where it says 0

Masks are trained (`train_router`) after HarmoniCa (arXiv 2410.01723) and Learning-to-Cache (arXiv
2406.01733). A router is data, saved as JSON: a row of 0 and 1 per module, what it was trained for
(`Fingerprint`, grid), and what was measured with it. It belongs to its own grid alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .fingerprint import Fingerprint
from .plan import Plan
from .policy import Forecasts

__all__ = ["Router"]

_FORMAT = "fewstep cache router"
_VERSION = 1
_REUSE = (1.0,)


@dataclass(frozen=True)
class Router:
    """Which modules run at every step of one grid.

    Args:
        times: the scheduler's timesteps.
        masks: by module, named by its path in the denoiser: one character per time, "1" where it
            runs and "0" where its newest output stands for it.
        fingerprint: what it was trained for; None fits every model with such modules.
        predicted: what was measured when it was trained: "psnr" and "psnr_min" in dB over its
            samples, and "of" what ("images" or "latents").
        made: how: settings of the training, and "compute", the share of the modules' work done.

    Raises:
        ValueError: no time, no module, or a mask that is no row of 0 and 1 that starts with 1.
    """

    times: tuple[float, ...]
    masks: Mapping[str, str]
    fingerprint: Fingerprint | None = None
    predicted: dict[str, Any] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)

    scope = "module"
    order = 1

    def __post_init__(self) -> None:
        if not self.masks or not self.times:
            raise ValueError(
                f"masks: expected at least one module and one time, got {len(self.masks)} and "
                f"{len(self.times)}"
            )
        for name, mask in self.masks.items():
            is_row = isinstance(mask, str) and set(mask) <= {"0", "1"} and mask[:1] == "1"
            if not is_row or len(mask) != len(self.times):
                raise ValueError(
                    f"masks: expected {len(self.times)} characters 0 and 1, the first of them 1, "
                    f"for {name}, got {mask!r}"
                )

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules that it routes."""
        return tuple(self.masks)

    @property
    def share(self) -> float:
        """Share of the (step, module) pairs that run."""
        ran = sum(mask.count("1") for mask in self.masks.values())
        return ran / (len(self.masks) * len(self.times))

    def __repr__(self) -> str:
        said = (
            f"Router({len(self.masks)} modules on {len(self.times)} steps, "
            f"{self.made.get('compute', self.share):.0%} of their work"
        )
        if "psnr" in self.predicted:
            said += f", {self.predicted['psnr']:.1f} dB expected"
        return said + ")"

    def is_on(self, times: Sequence[float]) -> bool:
        """Whether a grid is the router's."""
        return Plan(self.times, (None,) * len(self.times)).is_on(times)

    def _expect(self, times: Sequence[float]) -> None:
        if not self.is_on(times):
            ends = f"from {times[0]:g} to {times[-1]:g}" if times else "without steps"
            raise ValueError(
                f"cache: expected the router's grid of {len(self.times)} steps from "
                f"{self.times[0]:g} to {self.times[-1]:g}, got one of {len(times)} {ends}; "
                "fewstep.caching.train_router trains one for it"
            )

    def forecasts(self, times: Sequence[float]) -> Forecasts:
        """Return the steps at which all modules reuse; the others count as full.

        Raises:
            ValueError: another grid than the router's.
        """
        self._expect(times)
        ran = (any(mask[i] == "1" for mask in self.masks.values()) for i in range(len(times)))
        return tuple(None if one else _REUSE for one in ran)

    def forecasts_for(self, name: str, times: Sequence[float]) -> Forecasts:
        """Return what a module does at every step.

        Raises:
            ValueError: another grid than the router's.
        """
        self._expect(times)
        return tuple(None if mark == "1" else _REUSE for mark in self.masks[name])

    def save(self, path: str | Path) -> None:
        """Write the router as JSON."""
        data = {"format": _FORMAT, "version": _VERSION, **asdict(self)}
        Path(path).write_text(json.dumps(data, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Router:
        """Read a router.

        Raises:
            ValueError: not a router, or one of a version that is not known.
        """
        try:
            data = json.loads(Path(path).read_text())
            if data.pop("format") != _FORMAT or data.pop("version") != _VERSION:
                raise KeyError("format, version")
            mark = data.pop("fingerprint")
            return cls(
                times=tuple(data.pop("times")),
                fingerprint=None if mark is None else Fingerprint.of_json(mark),
                **data,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: expected a {_FORMAT} of version {_VERSION}, got something else "
                f"({type(error).__name__}: {error})"
            ) from error
