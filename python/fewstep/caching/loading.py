"""Files with caches that were fitted to a pipeline, of whichever kind."""

from __future__ import annotations

import json
from pathlib import Path

from .lookahead import LookAhead
from .plan import Plan
from .router import Router

__all__ = ["load_cache"]

_KINDS = {
    "fewstep cache plan": Plan,
    "fewstep cache router": Router,
    "fewstep look-ahead cache": LookAhead,
}


def load_cache(path: str | Path) -> Plan | Router | LookAhead:
    """Read what `save` of a plan, a router or a look-ahead cache has written.

    Raises:
        ValueError: none of these, or one of a version that is not known.
    """
    try:
        kind = _KINDS[json.loads(Path(path).read_text())["format"]]
    except (ValueError, KeyError, TypeError):
        kind = Plan  # which says what it expects
    return kind.load(path)
