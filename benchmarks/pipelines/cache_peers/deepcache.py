"""Trials of DeepCache by its own package, on UNets.

Its helper finds the step by looking the model's time up among the scheduler's, and this pipeline
scales it; a subclass asks the scheduler. `cache_branch_id` is block * 3 + layer, however many a
block has. With one, 0 leaves the last layer of the outermost up block to run, 1 the outermost
level, 4 the two outermost.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from .trial import Study, Trial

INTERVALS = (3, 4, 6, 8)
BRANCHES = (0, 1, 4)


def why_not() -> str | None:
    """Return why there is nothing to try, or None."""
    return None if importlib.util.find_spec("DeepCache") else "DeepCache is not installed"


def _install(pipe: Any, *, interval: int, branch: int) -> None:
    from DeepCache import DeepCacheSDHelper

    class Helper(DeepCacheSDHelper):
        def wrap_unet_forward(self) -> None:
            below = self.pipe.unet.forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                self.cur_timestep = pipe.scheduler.step_index or 0
                return below(*args, **kwargs)

            self.pipe.unet.forward = forward

    helper = Helper(SimpleNamespace(unet=pipe.transformer))
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()


def trials(study: Study) -> Iterator[Trial]:
    """Yield its sweeps; nothing for other models, or where it is not installed."""
    if why_not() or not study.is_unet():
        return
    package = f"DeepCache {importlib.metadata.version('DeepCache')}"
    for branch in BRANCHES:
        for interval in INTERVALS:
            install = functools.partial(_install, interval=interval, branch=branch)
            yield Trial(
                f"DeepCache, branch {branch}", f"cache_interval={interval}", install, package
            )
