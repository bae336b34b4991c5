"""Smoothing factors from calibration, kept only where they lower a layer's error.

    y = (x / s) @ (W * s).T          s_k = amax_x_k ** alpha / amax_w_k ** (1 - alpha)

amax_x_k and amax_w_k are the largest magnitudes of column k, of the inputs that calibration has
seen, each row in units of its root mean square, and of the weight. alpha moves what is hard to
quantise from the activations (1) to the weight (0): SmoothQuant, arXiv 2211.10438. One alpha for a
model is a compromise, and for some layers any is a loss, so each layer tries a few and none,
quantised exactly as it will be (group scales, branch, rounding of the activations), and takes what
errs least at its output over its calibration rows, each in units of its own energy. So one token of
80 times the others' size (MixDQ's first token, arXiv 2405.17873) is one row of many, in the factors
and in the choice. Layers that saw few different rows (`samples.FEWEST`) stay without: a column that
is small in all of those need not be in others.

With a branch the smoothed weight is what is split (SVDQuant, arXiv 2411.05007). Activations of
w4a16 are not rounded; there the factors give a group's range to columns that matter, as AWQ does
(arXiv 2306.00978).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import row_error
from .linear import QuantLinear
from .samples import Samples
from .scheme import Scheme

ALPHAS = (0.2, 0.35, 0.5, 0.65, 0.8)
# Dividing x is not free, and less than a tenth of the error's energy (0.5 dB) does not carry over
# to the model's output.
GAIN = 0.9
# Columns that calibration hardly saw, or a weight hardly has, must not blow up others' inputs.
FLOOR, RANGE = 2.0**-10, 2.0**8


def factors(amax_x: Tensor, amax_w: Tensor, alpha: float) -> Tensor:
    """Return s [K], float32, scaled to a geometric mean of 1 (a common factor changes nothing)."""
    logs = [
        amax.float().clamp(min=float(amax.max()) * FLOOR).log2().nan_to_num(0.0, 0.0, 0.0)
        for amax in (amax_x, amax_w)
    ]
    log = alpha * logs[0] - (1 - alpha) * logs[1]
    return (log - log.mean()).exp2().clamp(1 / RANGE, RANGE)


@torch.no_grad()
def quantize_smoothed(
    linear: nn.Linear, scheme: Scheme, samples: Samples, amax: Tensor
) -> QuantLinear:
    """Return the quantised layer with the factors that err least, or with none if none help.

    Args:
        linear: the layer; left as it is.
        scheme: with `smooth`, to take factors even where they do not help.
        samples: of its input.
        amax: [K], largest magnitudes of its inputs (`Calibration.amax`).
    """
    weight = linear.weight.detach()
    samples = samples.to(weight)
    x, counts = samples.rows, samples.counts
    want = F.linear(x.float(), weight.float(), None if linear.bias is None else linear.bias.float())
    amax, amax_w = amax.to(weight.device), weight.abs().amax(0)
    best, least = None, float("inf")
    if not scheme.smooth:
        best = QuantLinear.from_linear(linear, scheme)
        least = GAIN * row_error(best(x), want, counts)
    for alpha in ALPHAS:
        s = factors(amax, amax_w, alpha)
        layer = QuantLinear.from_linear(linear, replace(scheme, smooth=True), smooth=s)
        error = row_error(layer(x), want, counts)
        if best is None or error < least:
            best, least = layer, error
    assert best is not None
    return best
