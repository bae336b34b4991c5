"""Which attention calls a model makes, and a mode that spoils their tangents on purpose."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention
from torch.overrides import TorchFunctionMode

_SOFTMAX = {F.softmax, torch.softmax, torch.Tensor.softmax}


class Routes(TorchFunctionMode):
    """Counts `sdpa`, `flex` and `softmax` calls; to be entered inside what replaces them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = {"sdpa": 0, "flex": 0, "softmax": 0}

    def __enter__(self) -> Routes:
        # FlexAttention is an ordinary function, which no function mode sees.
        inner = flex_attention.flex_attention

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.counts["flex"] += 1
            return inner(*args, **kwargs)

        self._patch = mock.patch.object(flex_attention, "flex_attention", counted)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.stop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and pass on."""
        if func is F.scaled_dot_product_attention:
            self.counts["sdpa"] += 1
        elif func in _SOFTMAX:
            self.counts["softmax"] += 1
        return func(*args, **(kwargs or {}))


class LostTangent(TorchFunctionMode):
    """Drops the tangent of every query: what a suite of tangents has to notice."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Detach the query of F.scaled_dot_product_attention."""
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            if args:
                args = (args[0].detach(), *args[1:])
            else:
                kwargs["query"] = kwargs["query"].detach()
        return func(*args, **kwargs)
