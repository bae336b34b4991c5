"""Scores of attention_jvp from 8-bit operands, rounded as the kernels round them.

    S  = scale (q8 k8^T + q z^T)            tS = scale (t_q8 k8^T + q8 t_k8^T + t_q z^T + q t_z^T)
    q8 = u_i Q(q R / u_i)                   t_q8 = a u_i Q(t_q R / (a u_i))
    k8 = w_j Q((k - z) R / w_j)             t_k8 = a w_j Q((t_k - t_z) R / (a w_j))

z, t_z  means of k, t_k over at most 128 keys at equal distances: a vector that all keys share moves
        a row of S or tS by a constant, which softmax ignores; lse and mu get it back. Any will do,
        a mean leaves little to round
R       int8: the orthogonal Hadamard matrix, which cancels in the product and spreads what is large
        in a few channels over all; e4m3 keeps its own exponents, there R = 1
u, w    a scale per row, so that the largest of the row and of its tangent over a is 127 (int8) or
        at most 448 (e4m3): the two products of tS have one scale, a u_i w_j, and one sum
a       per key head and direction: the larger of max |t_q_i| / max |q_i| and
        max |t_k_j - t_z| / max |k_j - z| over the rows (1-norms)
        e4m3: u, w, a are rounded up to powers of 2, which costs nothing there; dividing by them is
        exact, and what lies halfway between two values is rounded alike everywhere

A row with a value that isn't finite has a scale that is NaN. Derivatives are those of the scores
without rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Score dtypes, and the value that a row's largest becomes."""

_SAMPLES = 128


def rounded_scores(
    s: Tensor,
    t_s: Tensor,
    operands: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return S and tS with the values of 8-bit operands and the derivatives of the given ones.

    `operands`: (q, k, t_q, t_k) in the accumulation dtype, k and t_k with G heads.
    """
    if s.numel() == 0:
        return s, t_s
    rounded, t_rounded = _rounded(*(None if x is None else x.detach() for x in operands), dtype)
    s = s + (scale * rounded - s.detach())
    return s, t_s if t_rounded is None else t_s + (scale * t_rounded - t_s.detach())


def _rounded(
    q: Tensor, k: Tensor, t_q: Tensor | None, t_k: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    groups = k.shape[-3]
    # [..., G, H / G, N, D]: the heads that share keys side by side.
    q, t_q = (None if x is None else x.unflatten(-3, (groups, -1)) for x in (q, t_q))
    k, t_k = (None if x is None else x.unsqueeze(-3) for x in (k, t_k))
    z = _mean(k)
    s_shift, t_shift = q @ z.mT, None
    k = k - z
    if t_q is not None:
        t_shift = t_q @ z.mT
    if t_k is not None:
        t_z = _mean(t_k)
        t_shift = q @ t_z.mT + (0 if t_shift is None else t_shift)
        t_k = t_k - t_z
    a = torch.maximum(_ratio(t_q, q), _ratio(t_k, k))
    a = a.masked_fill(a == 0, 1)
    if dtype != torch.int8:
        a = _power_above(a)
    q8, t_q8 = _quantize(q, t_q, a, dtype)
    k8, t_k8 = _quantize(k, t_k, a, dtype)
    rounded, t_rounded = q8 @ k8.mT + s_shift, t_shift
    if t_q8 is not None:
        t_rounded = t_rounded + t_q8 @ k8.mT
    if t_k8 is not None:
        t_rounded = t_rounded + q8 @ t_k8.mT
    return rounded.flatten(-4, -3), None if t_rounded is None else t_rounded.flatten(-4, -3)


def _mean(x: Tensor) -> Tensor:
    """Return the mean over the sampled rows [..., 1, D] of what is finite."""
    count = min(x.shape[-2], _SAMPLES)
    rows = torch.arange(count, device=x.device) * x.shape[-2] // count
    return x[..., rows, :].nan_to_num(0, 0, 0).sum(-2, keepdim=True) / count


def _largest_row(x: Tensor) -> Tensor:
    """Return the largest 1-norm of rows [..., G, 1, 1, 1]; rows not finite are left out."""
    return x.abs().sum(-1).nan_to_num(0, 0, 0).amax((-2, -1))[..., None, None, None]


def _ratio(t_x: Tensor | None, x: Tensor) -> Tensor:
    size = _largest_row(x)
    if t_x is None:
        return torch.zeros_like(size)
    t_size = _largest_row(t_x)
    return torch.where((size > 0) & (t_size > 0), t_size / size, 0)


def _quantize(
    x: Tensor, t_x: Tensor | None, a: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return x and t_x rounded; with directions in front of t_x all share the scale of x."""
    if dtype == torch.int8:
        x, t_x = (None if y is None else _rotate(y) for y in (x, t_x))
    top = x.abs().amax(-1, keepdim=True)
    if t_x is not None:
        t_top = t_x.abs().amax(-1, keepdim=True) / a
        top = torch.maximum(top, t_top.amax(0) if t_x.dim() > x.dim() else t_top)
    unit = top.masked_fill(top == 0, 1) / LARGEST[dtype]
    if dtype != torch.int8:
        unit = _power_above(unit)
    unit = torch.where(top.isfinite(), unit, torch.nan)

    def rounded(y: Tensor, unit: Tensor) -> Tensor:
        y = y / unit
        return unit * (y.round() if dtype == torch.int8 else y.float().to(dtype).to(y.dtype))

    return rounded(x, unit), None if t_x is None else rounded(t_x, a * unit)


def _power_above(x: Tensor) -> Tensor:
    """Return the least power of 2 that isn't below x > 0."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.ones_like(x), exponent - (mantissa == 0.5).int())


def _rotate(x: Tensor) -> Tensor:
    """Return x R [..., W]: W the power of two, at least 64, that holds the head dim."""
    width = max(64, 1 << (x.shape[-1] - 1).bit_length())
    hadamard = x.new_ones(1, 1)
    while len(hadamard) < width:
        pair = torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)
        hadamard = torch.cat(pair)
    return x @ hadamard[: x.shape[-1]] * width**-0.5
