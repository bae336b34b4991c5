"""Forward mode through whole modules: attention that has it, a context that puts it in, one call.

fewstep.scaled_dot_product_attention   torch's function, with every derivative
fewstep.forward_mode                   context: unmodified models use it
fewstep.jvp                            a module's output and its derivative along tangents
"""

from __future__ import annotations

from .attention import scaled_dot_product_attention
from .mode import forward_mode
from .module import jvp

__all__ = ["forward_mode", "jvp", "scaled_dot_product_attention"]
