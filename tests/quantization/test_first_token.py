"""MixDQ's finding (arXiv 2405.17873): the first text token is 80 times larger than the others.

One scale for all tokens leaves the others nothing. Scales per row keep them apart, to the bit, and
calibration does not let the first token decide how the others are smoothed.
"""

import pytest
import torch
from torch import nn

from fewstep.quantization import QuantLinear, calibrate, quantize
from fewstep.quantization.errors import sqnr

pytestmark = pytest.mark.usefixtures("no_grad")
TOKENS, COLUMNS = 77, 256


def text(seed=0):
    """Return tokens [2, 77, K] of size one, and the same with a first one as SDXL's text has it."""
    calm = torch.randn(2, TOKENS, COLUMNS, generator=torch.Generator().manual_seed(seed))
    spiked = calm.clone()
    spiked[:, 0, [7, 90, 200]] = torch.tensor([828.0, -300.0, 80.0])  # the same in every text
    return calm, spiked


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a8-r32", "w4a16"])
def test_a_large_token_costs_the_others_nothing(scheme):
    layer = QuantLinear.from_linear(nn.Linear(COLUMNS, 192), scheme)
    calm, spiked = text()
    assert torch.equal(layer(spiked)[:, 1:], layer(calm)[:, 1:])


def test_one_scale_for_all_tokens_loses_the_others():
    linear = nn.Linear(COLUMNS, 192, bias=False)
    _, x = text()
    want, got = linear(x), QuantLinear.from_linear(linear, "w8a8")(x)
    scale = x.abs().max() / 127
    static = linear((x / scale).round() * scale)
    assert sqnr(static[:, 1:], want[:, 1:]) < 1
    assert sqnr(got[:, 1:], want[:, 1:]) >= 30
    # The first token itself: its three columns are all but a few tenths of a percent of its energy,
    # and what the others lose at its scale is that.
    assert sqnr(got[:, 0], want[:, 0]) >= 30


@pytest.mark.parametrize("columns", [slice(0, 0), slice(11, None, 64)], ids=["even", "uneven"])
def test_smoothing_is_not_decided_by_the_first_token(columns):
    model = nn.Sequential(nn.Linear(COLUMNS, 192))

    def tokens(seed):
        x = text(seed)[1]
        x[:, 1:, columns] *= 12  # what there is to smooth in the others
        return x

    calibration = calibrate(model, [{"input": tokens(seed)} for seed in range(3)])
    x = tokens(5)
    want, found = model(x), {}
    for smooth in (None, calibration):
        with quantize(model, "w8a8", smooth=smooth) as handle:
            found[smooth is not None] = sqnr(model(x)[:, 1:], want[:, 1:])
    # Nothing to gain: none. Factors that the first token asks for would cost the others 7 dB.
    taken = handle.replaced["0"].scheme.smooth
    assert taken == (columns.start == 11)
    assert found[True] >= found[False] + 5 * taken
