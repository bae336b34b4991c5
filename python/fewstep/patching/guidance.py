"""`guidance="off"` or a number: the guidance scale of calls that give none.

Most pipelines of diffusers have the default scale in the signature of `__call__`, which belongs to
the class; a patch changes instances only, so it can't serve them and says so. A pipeline that keeps
its default in its config (`default_guidance`: fewstep's digits pipeline) can be served.
"""

from __future__ import annotations

import math
from typing import Any

from .undo import Change, ConfigKeys, ConfigStack

__all__ = ["plan_guidance"]

_KEY = "default_guidance"


def plan_guidance(pipe: Any, guidance: Any, config: ConfigStack) -> Change:
    """Plan the default guidance scale; nothing is changed yet.

    Raises:
        TypeError, ValueError: not "off" or a scale, or a pipeline that it can't be set on.
    """
    if isinstance(guidance, str):
        if guidance != "off":
            raise ValueError(f"guidance: expected 'off' or a number >= 1, got {guidance!r}")
    elif isinstance(guidance, bool) or not isinstance(guidance, int | float):
        raise TypeError(f"guidance: expected 'off' or a number >= 1, got {guidance!r}")
    elif not (math.isfinite(guidance) and guidance >= 1):
        raise ValueError(f"guidance: expected 'off' or a number >= 1, got {guidance!r}")
    if _KEY not in pipe.config:
        raise ValueError(
            f"guidance: expected a pipeline with `{_KEY}` in its config (DigitsPipeline), got "
            f"{type(pipe).__name__}; pass guidance_scale to its call instead"
        )
    scale = 1.0 if guidance == "off" else float(guidance)
    off = scale <= 1
    change = Change("guidance", "off" if off else f"scale {scale:g}")
    change.slots.append(ConfigKeys(pipe, config, "guidance", {_KEY: scale}))
    calls = "one evaluation per step" if off else "two evaluations per step"
    change.done.append(f"default scale {pipe.config[_KEY]:g} -> {scale:g}: {calls}")
    change.left.append("a guidance_scale given to a call still counts")
    return change
