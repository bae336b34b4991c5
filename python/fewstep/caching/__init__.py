"""Reuse of features across denoising steps: when to skip (policy), what is kept (session), how.

A policy decides, a `Session` follows the denoising run and keeps one state per guidance branch, and
a layout (`BlockStack`, `UNetStack`) turns both into replacements of `forward` on a model's
instances. A `TimeSession` keeps what depends on the time alone, exactly. Nothing here changes a
model: `fewstep.patch(pipe, cache=..., time=...)` installs and removes the replacements.
"""

from ._wrap import is_cached
from .policy import PRESETS, CachePolicy, FirstBlock, Interval, resolve_policy
from .session import Session
from .stack import BlockStack
from .timestep import TimePart, TimeSession, is_time_cached
from .unet import UNetStack

__all__ = [
    "PRESETS",
    "BlockStack",
    "CachePolicy",
    "FirstBlock",
    "Interval",
    "Session",
    "TimePart",
    "TimeSession",
    "UNetStack",
    "is_cached",
    "is_time_cached",
    "resolve_policy",
]
