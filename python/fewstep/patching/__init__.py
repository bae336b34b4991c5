"""One call that makes a diffusers pipeline fast, and takes everything back.

The one place that composes the areas: steps from `sampling`, low-bit layers from `quantization`,
reuse across steps from `caching`.
"""

from .activations import FusedActivations, fuse_activations
from .apply import apply_cache, remove_cache
from .modulations import GroupedModulations, group_modulations, modulation_layers
from .norms import FusedNorms, fuse_norms
from .patch import Patch, active_patches, patch
from .quantize import load_nunchaku, quantize
from .quantizer import QuantizationConfig
from .undo import PatchError

__all__ = [
    "FusedActivations",
    "FusedNorms",
    "GroupedModulations",
    "Patch",
    "PatchError",
    "QuantizationConfig",
    "active_patches",
    "apply_cache",
    "fuse_activations",
    "fuse_norms",
    "group_modulations",
    "load_nunchaku",
    "modulation_layers",
    "patch",
    "quantize",
    "remove_cache",
]
