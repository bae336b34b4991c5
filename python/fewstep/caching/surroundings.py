"""What besides inputs and weights decides a module's bits, and where reuse stays out."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack, _len_torch_function_stack
from torch.utils._device import DeviceContext

__all__ = ["refuse_module", "refuse_surroundings", "surroundings"]

_MODULE = torch.nn.modules.module
_KNOWN = (
    "torch.nn.",
    "diffusers.models.",
    "fewstep.quantization.linear",
    "fewstep.quantization.layers",
)


def refuse_module(module: nn.Module, inside: bool = False) -> str | None:
    """Return why what a module returns may differ for the same input and weights, or None."""
    kind = type(module)
    if not kind.__module__.startswith(_KNOWN):
        return f"a {kind.__name__} is in it"
    if module.training:
        return "it is in training"
    attributes = module.__dict__
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in attributes
    if inside and hooked:
        return "a module in it has hooks"
    for child in module._modules.values():
        if child is not None and (reason := refuse_module(child, True)) is not None:
            return reason
    return None


def refuse_surroundings() -> str | None:
    """Return why a value computed here is for this call alone, or None."""
    if torch.is_grad_enabled():
        return "gradients are enabled"
    if torch.is_inference_mode_enabled():
        return "inference mode"
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return "a derivative or transform is under way"
    if torch._C._len_torch_dispatch_stack():
        return "a dispatch mode is on"
    if _len_torch_function_stack() and not all(
        isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack()
    ):
        return "a torch function mode is on"
    if torch.jit.is_tracing():
        return "it is traced"
    if _MODULE._global_forward_hooks or _MODULE._global_forward_pre_hooks:
        return "hooks on every module"
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is captured"
    return None


def surroundings(device: torch.device) -> tuple[Any, ...]:
    """Return the settings on which bits may depend."""
    kind = device.type
    autocast = None
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        autocast = torch.get_autocast_dtype(kind)
    stream = torch.cuda.current_stream(device).cuda_stream if kind == "cuda" else None
    return (
        autocast,
        torch.get_num_threads() if kind == "cpu" else None,
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        stream,
    )
