"""Names of caches, and what they stand for with its default settings."""

from __future__ import annotations

from collections.abc import Callable

from .accumulated import EasyCache, TeaCache
from .dmd import Dmd
from .guidance_methods import GuidanceReuse
from .methods import FoCa, Fora, HiCache, Newton, Taylor
from .policy import CachePolicy, FirstBlock, Interval, ScheduledPolicy, check_ends
from .seacache import SeaCache
from .tokens import Ras
from .unet_methods import DeepCache, FasterDiffusion, Tiue

__all__ = ["PRESETS", "resolve_policy"]

PRESETS: dict[str, Callable[[], CachePolicy | ScheduledPolicy]] = {
    "first-block": FirstBlock,
    "interval": Interval,
    "fora": Fora,
    "taylor": Taylor,
    "newton": Newton,
    "hicache": HiCache,
    "foca": FoCa,
    "dmd": Dmd,
    "guidance-reuse": GuidanceReuse,
    "easycache": EasyCache,
    "teacache": TeaCache,
    "seacache": SeaCache,
    "ras": Ras,
    "deepcache": DeepCache,
    "faster-diffusion": FasterDiffusion,
    "tiue": Tiue,
}


def resolve_policy(
    cache: str | CachePolicy | ScheduledPolicy,
) -> CachePolicy | ScheduledPolicy:
    """Return the policy of a preset name, or the policy itself.

    Raises:
        ValueError: no preset has this name, or a policy that leaves no block to measure.
        TypeError: neither a name nor a policy, or a policy whose `first` or `last` is no integer.
    """
    names = ", ".join(repr(name) for name in ("auto", *PRESETS))
    if isinstance(cache, str):
        if cache not in PRESETS:
            raise ValueError(
                f"cache: expected {names}, a plan's .json file or a policy object, got {cache!r}"
            )
        return PRESETS[cache]()
    if isinstance(cache, ScheduledPolicy) and not isinstance(cache, type):
        return cache
    if isinstance(cache, type) or not isinstance(cache, CachePolicy):
        raise TypeError(
            f"cache: expected {names} or a policy object such as FirstBlock(threshold=0.08), "
            f"got {cache!r}"
        )
    check_ends(cache)
    return cache
