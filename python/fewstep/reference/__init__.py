"""The oracles: eager torch that reads like the formula and runs in fp64.

`fewstep.reference.<op>` is the function of the module of the same name.
"""

from __future__ import annotations

import importlib
import pkgutil

_names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
for _name in _names:
    globals()[_name] = getattr(importlib.import_module(f"{__name__}.{_name}"), _name)

__all__ = list(_names)
