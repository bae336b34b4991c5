"""Runs in which every module's output is a mixture of what it computes and what it gave before.

    y_sm = g_sm f_m(x) + (1 - g_sm) y_s'm      g in [0, 1] by step s and module m; s' = s - 1

What learned routers are trained with. g = 1 is the model as it is and g = 0 reuse; what is kept is
the mixture itself, so that gates of 0 and 1 do what a mask does later. Each guidance pass keeps
outputs of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .rollouts import Rollout, first_tensor, standing

__all__ = ["Mixing", "mixing"]


class Mixing(Rollout):
    """Runs with gates on modules of the model.

    Args:
        pipe: the pipeline.
        modules: those with a gate, by name.

    Attributes:
        gates: [S, M], a tensor, or lists of bools: then nothing is computed in vain; None is the
            model as it is.
        teach: where it is set, runs go as they do without gates, and from the second step on it is
            given (step, the model's output, what returns the output of this step with gates).
    """

    def __init__(self, pipe: Any, modules: Mapping[str, nn.Module]) -> None:
        self.modules = dict(modules)
        self.gates: Any = None
        self.teach: Callable[[int, Tensor, Callable[[], Tensor]], None] | None = None
        super().__init__(pipe)

    def start(self) -> None:
        """Forget the last run."""
        super().start()
        self._given: dict[int, list[Any]] = {}  # by guidance pass, what every module gave
        self._row: Any = None  # gates of the call under way
        self._now: list[Any] = []  # what its modules give

    def module(self, index: int, below: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stand for a module's forward."""
        if not self._now:
            return below(*args, **kwargs)
        gate, given = None if self._row is None else self._row[index], self._now[index]
        if gate is False and given is not None:
            return given
        output = below(*args, **kwargs)
        if given is not None and isinstance(gate, Tensor):
            output = _mix(given, output, gate)
        self._now[index] = output
        return output

    def compute(self, below: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the model's output with gates."""
        branch, step = self.branch, self.step
        before = self._given.get(branch, [None] * len(self.modules))
        row = None if self.gates is None or branch not in self._given else self.gates[step]

        def compute(row: Any) -> tuple[Any, list[Any]]:
            self._row, self._now = row, list(before)
            output = below(*args, **kwargs)
            after, self._now = self._now, []
            return output, after

        if self.teach is None:
            output, after = self.kept(functools.partial(compute, row))
        else:
            output, after = compute(None)
            if row is not None:
                self.teach(step, first_tensor(output), lambda: first_tensor(compute(row)[0]))
        self._given[branch] = after
        return output


def _mix(given: Any, output: Any, gate: Tensor) -> Any:
    if isinstance(output, tuple):
        return tuple(_mix(one, other, gate) for one, other in zip(given, output, strict=True))
    return torch.lerp(given, output, gate.to(output)) if isinstance(output, Tensor) else output


@contextmanager
def mixing(pipe: Any, denoiser: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[Mixing]:
    """Put gates on modules of a pipeline's denoiser; everything is as it was afterwards."""
    mixed = Mixing(pipe, modules)
    stands = (
        (module, functools.partial(mixed.module, index))
        for index, module in enumerate(modules.values())
    )
    with standing(denoiser, mixed, stands):
        yield mixed
