"""Reuse of features across denoising steps: when to skip (policy), what is kept (session), how.

A policy decides at run time and a `Session` follows it; a `Plan`, or any other schedule, knows
every decision before the run and a `ScheduledSession` follows that, with a ring for every module a
`ModuleSession`. All keep one state per guidance branch, and a layout (`OutputStack`, `BlockStack`,
`ModuleStack`, `UNetStack`, `EncoderStack`) turns them into replacements of `forward` on a model's
instances. `calibrate` makes plans, `train_lookahead` adds small trained blocks to one, and
`train_router` learns which modules need to run. A `TimeSession` keeps what depends on the time
alone, a `TextSession` what depends on the prompt alone, exactly. Nothing here changes a model:
`fewstep.patch(pipe, cache=..., time=..., text=...)` installs and removes the replacements.
"""

from ._wrap import is_cached
from .accumulated import EasyCache, TeaCache
from .calibrate import calibrate
from .dmd import Dmd
from .encoder import EncoderStack
from .fingerprint import Fingerprint
from .guidance_methods import GuidanceReuse
from .kept import BY_MODULE, Kept
from .layers import choose_modules, find_modules
from .lemica import edge_costs, lemica
from .loading import load_cache
from .lookahead import LookAhead, LookAheadBlocks, LookAheadSession
from .magcache import MagCache, MagnitudeRecorder
from .methods import FoCa, Fora, HiCache, Newton, Scm, Taylor
from .module_session import ModuleSession
from .modules import ModuleStack, hands_on
from .output import OutputStack
from .plan import Plan
from .plans import PlanChoice, find_plans, parse_target
from .plots import plot_report
from .policy import CachePolicy, FirstBlock, Interval, ScheduledPolicy
from .presets import PRESETS, resolve_policy
from .router import Router
from .scheduled import ScheduledSession
from .seacache import SeaCache
from .session import Session
from .stack import BlockStack
from .text import TextPart, TextSession
from .timestep import TimePart, TimeSession
from .token_session import Grid, TokenSession
from .token_stack import TokenStack
from .tokens import Ras
from .train_lookahead import train_lookahead
from .train_router import train_router
from .unet import UNetStack
from .unet_methods import DeepCache, FasterDiffusion, Tiue

__all__ = [
    "BY_MODULE",
    "PRESETS",
    "BlockStack",
    "CachePolicy",
    "DeepCache",
    "Dmd",
    "EasyCache",
    "EncoderStack",
    "FasterDiffusion",
    "Fingerprint",
    "FirstBlock",
    "FoCa",
    "Fora",
    "Grid",
    "GuidanceReuse",
    "HiCache",
    "Interval",
    "Kept",
    "LookAhead",
    "LookAheadBlocks",
    "LookAheadSession",
    "MagCache",
    "MagnitudeRecorder",
    "ModuleSession",
    "ModuleStack",
    "Newton",
    "OutputStack",
    "Plan",
    "PlanChoice",
    "Ras",
    "Router",
    "ScheduledPolicy",
    "ScheduledSession",
    "Scm",
    "SeaCache",
    "Session",
    "Taylor",
    "TeaCache",
    "TextPart",
    "TextSession",
    "TimePart",
    "TimeSession",
    "Tiue",
    "TokenSession",
    "TokenStack",
    "UNetStack",
    "calibrate",
    "choose_modules",
    "edge_costs",
    "find_modules",
    "find_plans",
    "hands_on",
    "is_cached",
    "lemica",
    "load_cache",
    "parse_target",
    "plot_report",
    "resolve_policy",
    "train_lookahead",
    "train_router",
]
