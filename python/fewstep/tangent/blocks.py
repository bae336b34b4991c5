"""Methods of diffusers that spell out what a fused op computes; forward_mode puts the op there.

    RMSNorm, MochiRMSNorm                   F.rms_norm, which is norm_jvp in forward mode
    SanaLinearAttnProcessor2_0, its two     linear_attention_jvp between the same projections
    variants for perturbed attention,
    SanaMultiscaleLinearAttention

A method is replaced only if it is diffusers' own: one that somebody else has put there stays. The
handler reads the attributes and calls the modules that the method reads and calls, so subclasses,
hooks, adapters and swapped submodules mean what they meant. What carries no tangent, or what the op
doesn't serve, goes to the method.

SanaLinearAttnProcessor3_0 (SANA-Video) is not here: it rotates queries and keys in the numerator
only, which is another function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from ..ops._linear_attention import HEAD_DIMS
from ..ops.linear_attention_jvp import linear_attention_jvp
from .levels import is_forward, is_nested, unpack

_HALF = (torch.float16, torch.bfloat16)


def _has_tangent(*tensors: Tensor | None) -> bool:
    """Return whether one of these plain tensors carries a tangent that the ops can take."""
    given = [x for x in tensors if x is not None]
    return (
        is_forward()
        and not is_nested()
        and all(type(x) is Tensor and x.device.type in ("cpu", "cuda") for x in given)
        and any(unpack(x)[1] is not None for x in given)
    )


def _rms_norm(original: Callable[..., Tensor], self: Any, hidden_states: Tensor) -> Tensor:
    """x rsqrt(mean x^2 + eps), then weight and bias in the weight's dtype, which the result has."""
    x, weight, bias = hidden_states, self.weight, self.bias
    dtype = x.dtype if weight is None else weight.dtype
    widened = dtype == torch.float32 and x.dtype in _HALF
    served = (
        (x.dtype == dtype or widened)
        and (weight is None or weight.shape == x.shape[-1:])
        and (weight is None or bias is None or bias.dtype == dtype)
    )
    if not served or not _has_tangent(x):
        return original(self, hidden_states)
    x = x.float() if widened else x
    y = F.rms_norm(x, x.shape[-1:], weight, self.eps).to(dtype)  # autocast may have widened it
    return y if weight is None or bias is None else y + bias


def _mochi_rms_norm(original: Callable[..., Tensor], self: Any, hidden_states: Tensor) -> Tensor:
    """Compute the same without a bias, and with x's dtype for the result."""
    x, weight = hidden_states, self.weight
    fits = weight is None or (
        weight.shape == x.shape[-1:] and weight.dtype in (x.dtype, torch.float32)
    )
    if not fits or not _has_tangent(x):
        return original(self, hidden_states)
    return F.rms_norm(x, x.shape[-1:], weight, self.eps).to(x.dtype)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """Return ReLU linear attention [B, H, Nq, Dv] of q [B, H, Nq, D], k and v; any head dims.

    Stands in for torch functions in a method, so function modes see it as they see those.
    """
    if has_torch_function((q, k, v)):
        return handle_torch_function(linear_attention, (q, k, v), q, k, v, eps)
    width = v.shape[-1]
    # Columns of zeros add nothing to the sums.
    pairs = [unpack(F.pad(x, (0, -x.shape[-1] % HEAD_DIMS.step))) for x in (q, k, v)]
    (q, t_q), (k, t_k), (v, t_v) = pairs
    o, t_o = linear_attention_jvp(q, k, v, t_q, t_k, t_v, eps=eps)
    return forward_ad.make_dual(o, t_o)[..., :width]


def _attend(attn: Any, source: Tensor, target: Tensor, normalise: bool) -> Tensor:
    """Return attn of target to source, from its projections to its output in target's dtype."""
    q, k, v = attn.to_q(target), attn.to_k(source), attn.to_v(source)
    if normalise and attn.norm_q is not None:
        q = attn.norm_q(q)
    if normalise and attn.norm_k is not None:
        k = attn.norm_k(k)
    # The method goes through float32; the op does inside, from and to the widest dtype there is.
    dtype = target.dtype
    for x in (q, k, v):
        dtype = torch.promote_types(dtype, x.dtype)
    q, k, v = (x.to(dtype).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
    o = linear_attention(q, k, v, 1e-15)
    return _project(attn, o.transpose(1, 2).flatten(2).to(target.dtype))


def _project(attn: Any, x: Tensor) -> Tensor:
    return attn.to_out[1](attn.to_out[0](x))


def _clipped(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.clip(-65504, 65504) if dtype == torch.float16 else x


def _head_dim_fits(attn: Any) -> bool:
    return -(-attn.inner_dim // attn.heads) <= HEAD_DIMS[-1]


def _sana(
    original: Callable[..., Tensor],
    self: Any,
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """relu(q) (relu(k)^T [v, 1]), numerator over denominator. The method reads no mask either."""
    source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    if not (_head_dim_fits(attn) and _has_tangent(hidden_states, source)):
        return original(self, attn, hidden_states, encoder_hidden_states, attention_mask)
    out = _attend(attn, source, hidden_states, normalise=True)
    return _clipped(out, hidden_states.dtype)


def _sana_perturbed(parts: int) -> Callable[..., Tensor]:
    """Return the handler of a processor whose last of `parts` batches attends to itself alone."""

    def handler(
        original: Callable[..., Tensor],
        self: Any,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        if not (_head_dim_fits(attn) and _has_tangent(hidden_states)):
            return original(self, attn, hidden_states, encoder_hidden_states, attention_mask)
        *plain, perturbed = hidden_states.chunk(parts)
        plain = torch.cat(plain)
        out = _attend(attn, plain, plain, normalise=False)
        perturbed = _project(attn, attn.to_v(perturbed).to(hidden_states.dtype))
        return _clipped(torch.cat([out, perturbed]), hidden_states.dtype)

    return handler


def _multiscale(
    original: Callable[..., Tensor], self: Any, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Compute the same on [B, H, D, N]; relu, taken already, changes nothing a second time."""
    widest = max(query.shape[-2], value.shape[-2])
    kinds = {x.dtype for x in (query, key, value)}
    served = widest <= HEAD_DIMS[-1] and len(kinds) == 1 and not kinds & {*_HALF}
    if not (served and _has_tangent(query, key, value)):
        return original(self, query, key, value)
    return linear_attention(query.mT, key.mT, value.mT, self.eps).mT


_ATTENTION = "diffusers.models.attention_processor"
_NORMS = "diffusers.models.normalization"
METHODS: dict[tuple[str, str], Callable[..., Any]] = {
    (_NORMS, "RMSNorm.forward"): _rms_norm,
    (_NORMS, "MochiRMSNorm.forward"): _mochi_rms_norm,
    (_ATTENTION, "SanaLinearAttnProcessor2_0.__call__"): _sana,
    (_ATTENTION, "PAGCFGSanaLinearAttnProcessor2_0.__call__"): _sana_perturbed(3),
    (_ATTENTION, "PAGIdentitySanaLinearAttnProcessor2_0.__call__"): _sana_perturbed(2),
    (_ATTENTION, "SanaMultiscaleLinearAttention.apply_linear_attention"): _multiscale,
}
"""(module, method) -> handler(original, self, *args, **kwargs). It is called with the mode on."""


def is_own(method: Any, module: str, path: str) -> bool:
    """Return whether `method` is what the module defines under that name, not a replacement."""
    return (
        getattr(method, "__module__", None) == module
        and getattr(method, "__qualname__", None) == path
        and not hasattr(method, "__wrapped__")
    )
