"""One call that makes a diffusers pipeline fast, and takes everything back.

The one place that composes the areas: steps from `sampling`, int8 layers from `quantization`,
reuse across steps from `caching`.
"""

from .patch import Patch, active_patches, patch
from .undo import PatchError

__all__ = ["Patch", "PatchError", "active_patches", "patch"]
