"""Compensated rounding: the algorithm's own bounds, and layers that err less on inputs not seen."""

import itertools

import pytest
import torch
from torch import nn

from fewstep.quantization import (
    KINDS,
    Calibration,
    Plan,
    QuantLinear,
    Scheme,
    calibrate,
    quantize,
)
from fewstep.quantization.compensation import (
    Metric,
    compensate,
    quantize_compensated,
    round_columns,
)
from fewstep.quantization.errors import row_error, sqnr
from fewstep.quantization.grids import Grid, search
from fewstep.quantization.samples import FEWEST, HELD_OUT, Samples, splits


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def correlated(rows=512, columns=128, seed=0, mean=0.5):
    """Return inputs as a trained model has them: columns that go together, around a mean.

    The singular values of what mixes them fall by a factor of 30, the same mix for every seed.
    """
    mix = torch.randn(columns, columns, generator=seeded(99))
    u, _, v = torch.linalg.svd(mix)
    mix = u * torch.logspace(0, -1.5, columns) @ v
    x = torch.randn(rows, columns, generator=seeded(seed)) @ mix
    return x + mean * torch.randn(columns, generator=seeded(98)) / columns**0.5


def layer_of(inputs=128, outputs=96, bias=True, dtype=torch.float32):
    torch.manual_seed(7)
    return nn.Linear(inputs, outputs, bias=bias).to(dtype)


def metric_of(x):
    return Metric.of(x, torch.ones(len(x), dtype=torch.float64), False)


def matrix(metric):
    """Return H of a metric, in float64 and in natural order."""
    back = metric.order.argsort()
    h = torch.linalg.inv(metric.factor.double().mT @ metric.factor.double())
    return h[back][:, back]


def test_the_metric_is_that_of_the_rows():
    x, weights = correlated(64, 16), torch.rand(64, generator=seeded(1), dtype=torch.float64)
    shares = weights / weights.sum()
    mean = shares @ x.double()
    h = (x.double() - mean).mT @ ((x.double() - mean) * shares[:, None])
    h += 0.01 * h.diagonal().mean() * torch.eye(16)
    metric = Metric.of(x, weights, True)
    # The factor is rounded to float32, and H's condition is 30^2 at most, damped.
    close = {"rtol": 0, "atol": 1e-4 * float(h.max())}
    torch.testing.assert_close(matrix(metric), h, **close)
    torch.testing.assert_close(metric.mean.double(), mean, rtol=0, atol=1e-6)
    importance = 1 / torch.linalg.inv(h).diagonal()
    torch.testing.assert_close(metric.importance().double(), importance, rtol=1e-4, atol=0)
    d = torch.randn(5, 16, generator=seeded(2))
    energy = float((d.double() @ h * d.double()).sum())
    assert float(metric.whiten(d).square().sum()) == pytest.approx(energy, rel=1e-4)
    torch.testing.assert_close(metric.restore(metric.whiten(d)), d, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_columns_round_to_what_the_layer_stores_and_multiplies(kind):
    weight, scheme = torch.randn(24, 128, generator=seeded(0)), Scheme(kind)
    layer_type = QuantLinear.kinds[kind]
    quantized, scale = layer_type.quantize_weight(weight, scheme)
    grid = Grid(kind, scale, 128)
    pairs = [grid.round(weight[:, k], k) for k in range(128)]
    codes, values = (torch.stack(columns, 1) for columns in zip(*pairs, strict=True))
    assert torch.equal(grid.pack(codes).view(torch.uint8), quantized.view(torch.uint8))
    assert torch.equal(values, layer_type.dequantize_weight(quantized, scale))


@pytest.mark.parametrize("kind", KINDS)
def test_independent_columns_round_to_nearest(kind):
    weight, scheme = torch.randn(24, 128, generator=seeded(0)), Scheme(kind)
    quantized, scale = QuantLinear.kinds[kind].quantize_weight(weight, scheme)
    metric = metric_of(torch.diag(torch.rand(128, generator=seeded(1)) + 0.1))
    grid = Grid(kind, scale, 128)
    codes, _ = round_columns(weight, grid, metric)
    assert torch.equal(grid.pack(codes).view(torch.uint8), quantized.view(torch.uint8))


def test_the_error_keeps_the_bound_of_nearest_plane_and_is_near_the_best_there_is():
    # tr(D H D^T) = sum_i e_i^2, and no |w_i - nearest(w_i)| is above half a step: what Babai's
    # nearest plane guarantees (GPTQ is that, arXiv 2507.18553), if nothing is clipped.
    K, step = 5, 0.25
    metric = metric_of(correlated(64, K))
    h = matrix(metric)
    weight = torch.rand(30, K, generator=seeded(3)) - 0.5
    scale = torch.full((30, 1), step, dtype=torch.bfloat16)
    _, values = round_columns(weight, Grid("w4a16", scale, K), metric)
    energy = lambda d: (d.double() @ h * d.double()).sum(-1)  # noqa: E731
    found, nearest = energy(weight - values), energy(weight - step * (weight / step).round())
    bound = step**2 / 4 / metric.factor.double().diagonal().square()
    assert (found <= 1.001 * bound.sum()).all()
    low = (weight / step).floor()
    moves = torch.tensor([*itertools.product(range(-2, 4), repeat=K)])
    best = energy(weight[:, None] - step * (low[:, None] + moves)).amin(1)
    assert (found >= 0.999 * best).all()
    assert found.sum() < 1.5 * best.sum()
    assert found.sum() < 0.5 * nearest.sum()


def test_blocks_of_columns_give_what_one_block_gives(monkeypatch):
    weight, metric = torch.randn(24, 128, generator=seeded(0)), metric_of(correlated())
    grid = search(weight, Scheme("w4a8"), metric.importance())
    want = round_columns(weight, grid, metric)[1]
    monkeypatch.setattr("fewstep.quantization.compensation.BLOCK", 24)
    got = round_columns(weight, grid, metric)[1]
    # Sums in another order can tip a value that lies on an edge, and what follows it.
    energies = [float(metric.whiten(weight - v).square().sum()) for v in (got, want)]
    assert energies[0] == pytest.approx(energies[1], rel=0.02)


def test_scales_that_clip_err_less_and_none_errs_more():
    weight, scheme = torch.randn(24, 128, generator=seeded(0)), Scheme("w4a16")
    importance = torch.rand(128, generator=seeded(1)) + 0.1
    layer_type = QuantLinear.kinds["w4a16"]

    def errors(grid):
        values = torch.stack([grid.round(weight[:, k], k)[1] for k in range(128)], 1)
        return ((weight - values).square() * importance).unflatten(1, (2, 64)).sum(-1)

    plain = errors(Grid("w4a16", layer_type.quantize_weight(weight, scheme)[1], 128))
    searched = errors(search(weight, scheme, importance))
    assert (searched <= plain).all()
    assert searched.sum() < 0.9 * plain.sum()


SCHEMES = (
    *("w4a8", "w4a8-g32", "w4a8-g128", "w4a8-g64-r16", "w4a8-g64-r8-h32", "w4a8-g64-r8-smooth"),
    *("w4a8-h128", "w4a16-g64-r8-smooth", "w4a16", "w8a8-r8", "fp8"),
)


@pytest.mark.parametrize(
    ("text", "bias"), [*((text, True) for text in SCHEMES), ("w4a8", False), ("w4a8-r16", False)]
)
def test_layers_err_less_on_inputs_not_seen(text, bias):
    linear, x, unseen = layer_of(bias=bias), correlated(), correlated(seed=1)
    scheme = Scheme.parse(text)
    smooth = 0.5 + torch.rand(128, generator=seeded(1)) if scheme.smooth else None
    rounded = QuantLinear.from_linear(linear, scheme, smooth=smooth)
    layer = compensate(linear, scheme, Samples.of(x), smooth)
    assert layer.scheme == scheme
    want = linear(unseen)
    gain = sqnr(layer(unseen), want) - sqnr(rounded(unseen), want)
    # In dB: weights of 8 bits err no more than the activations, which nothing is done about.
    assert gain > {"w4a8": 4, "w4a16": 4, "fp8": 1.5, "w8a8": 0}[scheme.kind]
    other = QuantLinear.empty(128, 96, scheme, bias=bias)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(unseen), layer(unseen))
    again = compensate(linear, scheme, Samples.of(x), smooth)
    assert all(torch.equal(a, again.state_dict()[n]) for n, a in layer.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_of_16_bits_keep_their_dtype(dtype):
    linear = layer_of(dtype=dtype)
    x, unseen = correlated(), correlated(seed=1).to(dtype)
    layer = compensate(linear, Scheme.parse("w4a8-r16"), Samples.of(x))
    assert {layer.bias.dtype, layer.up.dtype, layer.down.dtype, layer.weight_dtype} == {dtype}
    want = linear.float()(unseen.float())
    rounded = QuantLinear.from_linear(linear.to(dtype), "w4a8-r16")
    assert sqnr(layer(unseen), want) > sqnr(rounded(unseen), want) + 5


def test_the_bias_takes_what_the_mean_input_loses():
    linear, x = layer_of(), correlated(mean=8.0)
    shift = lambda layer: float((layer(x) - linear(x)).mean(0).norm())  # noqa: E731
    # What stays: the mean that counts rows by their outputs is not quite the plain one.
    layer = compensate(linear, Scheme("w4a16"), Samples.of(x))
    assert 20 * shift(layer) < shift(QuantLinear.from_linear(linear, "w4a16"))


def test_one_large_token_does_not_decide():
    # MixDQ's first token (arXiv 2405.17873): one row of 80 times the others' size.
    linear, x, unseen = layer_of(), correlated(mean=0.0), correlated(seed=1, mean=0.0)
    large = torch.cat([x, 80 * torch.randn(1, 128, generator=seeded(5))])
    want = linear(unseen)
    layers = [compensate(linear, Scheme("w4a8"), Samples.of(s)) for s in (x, large)]
    errors = [sqnr(layer(unseen), want) for layer in layers]
    assert errors[1] > errors[0] - 1


def test_it_is_kept_only_where_it_errs_less_on_rows_held_out():
    linear, x = layer_of(), correlated()
    rounded = QuantLinear.from_linear(linear, "w4a8")
    layer, after, before = quantize_compensated(linear, rounded, splits(x))
    assert layer is not rounded
    assert after < 0.5 * before
    # Fitted rows that hold one direction alone, in which nothing else is worth anything.
    lies = torch.randn(512, 128, generator=seeded(1))
    fitted = torch.arange(512) % HELD_OUT != 0
    sizes = 10 + torch.rand(448, 1, generator=seeded(3))
    lies[fitted] = sizes * torch.randn(128, generator=seeded(2))
    ways = splits(lies)
    assert torch.equal(ways[0].fitted.rows, lies[fitted])
    layer, after, before = quantize_compensated(linear, rounded, ways)
    assert layer is rounded
    assert after == before


def test_equal_rows_are_one_and_count_as_many():
    x = correlated(rows=100)
    x[7] = x[93] = x[2]
    copies = x[torch.randint(0, 100, (300,), generator=seeded(0))]
    samples = Samples.of(torch.cat([x, copies]))
    # In the order in which they came first.
    assert torch.equal(samples.rows, x[[i for i in range(100) if i not in (7, 93)]])
    (split,) = splits(torch.cat([x, copies]))
    held, fitted = split.held_out, split.fitted
    assert (len(held.rows), len(fitted.rows)) == (13, 85)
    assert held.counts.sum() + fitted.counts.sum() == 400
    assert len(split.judges()) == 1
    assert not (held.rows[:, None] == fitted.rows).all(-1).any()
    assert torch.equal(held.all_rows().unique(dim=0), held.rows.unique(dim=0))
    assert held.counts.sum() == len(held.all_rows())
    everything = samples.all_rows()
    assert len(everything) == 400
    got, want = samples.rows + 0.1, samples.rows
    twice = row_error(everything + 0.1, everything)
    assert row_error(got, want, samples.counts) == pytest.approx(twice, rel=1e-6)
    assert row_error(got, want) != pytest.approx(twice, rel=1e-3)
    linear = layer_of()
    one = compensate(linear, Scheme("w4a16"), samples)
    # As the metric of all of them, up to the order of sums, which can tip a value on an edge.
    layer = compensate(linear, Scheme("w4a16"), Samples(everything, torch.ones(400).double()))
    assert (one.quantized == layer.quantized).float().mean() > 0.9


@pytest.mark.parametrize("distinct", [40, 80])
def test_rows_that_come_again_and_again_prove_nothing(distinct):
    # Tokens of one text at eight steps: fitted ones, had they copies among those held out, would
    # find 6 to 12 dB in what is a loss on other texts.
    text, model = correlated(distinct, 384, seed=1), nn.Sequential(nn.Linear(384, 96))
    unseen = correlated(512, 384, seed=2)
    seen = calibrate(model, [{"input": text}] * 8, rows=256)
    assert len(seen.inputs["0"]) == 256
    want = model(unseen)
    with quantize(model, "w4a8"):
        plain = sqnr(model(unseen), want)
    with quantize(model, "w4a8", compensate=seen) as handle:
        assert sqnr(model(unseen), want) >= plain
        text = handle.explain()
    if distinct < FEWEST:
        assert "rounding compensated in 0 of 0 layers calibrated" in text
        few = "layers that saw fewer than 64 different rows in one run, rounded to nearest: 1"
        assert few in text.splitlines()
    else:
        assert "rounding compensated in 0 of 1 layers calibrated" in text
        assert "fewer than" not in text


@pytest.mark.parametrize(("gain", "taken"), [(0.05, False), (0.15, True)])
def test_a_gain_of_less_than_a_tenth_is_luck(monkeypatch, gain, taken):
    linear, module = layer_of(), "fewstep.quantization.compensation"
    rounded = QuantLinear.from_linear(linear, "w4a8")
    errors = lambda _, layer, split: [1.0 if layer is rounded else 1 - gain]  # noqa: E731
    monkeypatch.setattr(f"{module}.held_out_errors", errors)
    layer, after, before = quantize_compensated(linear, rounded, splits(correlated(128)))
    assert (layer is not rounded, after, before) == (taken, 1 - gain * taken, 1.0)


def test_the_layers_do_not_depend_on_autocast(calibration):
    model, given = Net(), {"smooth": calibration, "compensate": calibration}
    states = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            handle = quantize(model, "w4a8-r8", **given)
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        handle.undo()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_plan_says_that_it_wants_the_calibration_again(calibration, tmp_path):
    model = Net()
    with quantize(model, "w4a8", compensate=calibration, smooth=calibration) as handle:
        handle.plan().save(tmp_path / "plan.json")
        state = {name: value.clone() for name, value in model.state_dict().items()}
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.notes == {"smoothed": True, "compensated": True}
    assert "compensate=, too" in plan.explain()
    assert "smooth=, too" in plan.explain()
    lost = "rounded to nearest: the plan was made with rounding compensated"
    with quantize(model, plan=plan, smooth=calibration) as handle:
        assert lost in handle.explain()
    with quantize(model, plan=plan, smooth=calibration, compensate=calibration) as handle:
        assert lost not in handle.explain()
        assert all(torch.equal(state[n], value) for n, value in model.state_dict().items())
    with quantize(model, "w4a8") as handle:
        assert handle.plan().notes == {}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(128, 192)
        self.second = nn.Linear(192, 128)
        self.unused = nn.Linear(128, 128)

    def forward(self, x):
        return self.second(nn.functional.gelu(self.first(x)))


@pytest.fixture(scope="module")
def calibration():
    return calibrate(Net(), [{"x": correlated(seed=seed)} for seed in range(2)], rows=512)


def test_a_model_is_compensated_from_a_calibration_or_its_file(calibration, tmp_path):
    model, x = Net(), correlated(seed=5)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    path = tmp_path / "seen.safetensors"
    calibration.save(path)
    want, outputs = model(x), []
    for given in (calibration, path, str(path)):
        with quantize(model, "w4a8-r16", compensate=given) as handle:
            outputs.append(model(x))
            text = handle.explain()
            assert "rounding compensated in 2 of 2 layers calibrated: " in text
    with quantize(model, "w4a8-r16") as handle:
        rounded = model(x)
        assert "compensated" not in handle.explain()
        unused = model.unused(x)
    assert all(torch.equal(outputs[0], y) for y in outputs)
    assert sqnr(outputs[0], want) > sqnr(rounded, want) + 5
    assert all(torch.equal(state[n], value) for n, value in model.state_dict().items())
    quantize(model, "w4a8-r16", compensate=calibration, keep_originals=False)
    assert torch.equal(model(x), outputs[0])
    assert torch.equal(model.unused(x), unused)  # no call reached it: rounded to nearest


def test_it_goes_with_smoothing_and_plans(calibration, tmp_path):
    model, x = Net(), correlated(seed=5)
    x[:, 5::40] *= 30
    uneven = calibrate(model, [{"x": x}], rows=512)
    uneven.save(tmp_path / "seen.safetensors")
    given = {"smooth": uneven, "compensate": uneven, "skip": lambda name, _: name == "unused"}
    with quantize(model, "w4a8-smooth", **given) as handle:
        assert all(layer.scheme.smooth for layer in handle.replaced.values())
        found, plan = model(x), handle.plan()
    path = tmp_path / "seen.safetensors"
    with quantize(model, plan=plan, smooth=path, compensate=str(path)):
        assert torch.equal(model(x), found)
    with quantize(model, "w4a8", compensate=uneven) as handle:  # none given: none is tried
        assert not any(layer.scheme.smooth for layer in handle.replaced.values())


@pytest.mark.parametrize("keep_originals", [True, False])
def test_bad_input_is_named_and_the_model_is_left_as_it_was(calibration, tmp_path, keep_originals):
    model = Net()
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def refuse(error, message, given):
        with pytest.raises(error, match=message):
            quantize(model, "w4a8", compensate=given, keep_originals=keep_originals)
        assert all(type(m) is nn.Linear for m in model.children())
        assert all(torch.equal(state[n], value) for n, value in model.state_dict().items())

    other = Calibration({"first": torch.ones(4, 64)}, amax={"first": torch.ones(64)})
    refuse(ValueError, "first: compensate: expected inputs of 128, got 64: another model", other)
    stranger = Calibration({"third": torch.ones(4, 64)}, amax={"third": torch.ones(64)})
    refuse(ValueError, "compensate: expected a calibration of Net, got one of .*third", stranger)
    broken = Calibration(
        {"first": torch.full((4, 128), torch.nan)}, amax={"first": torch.ones(128)}
    )
    refuse(ValueError, "first: compensate: expected finite inputs", broken)
    refuse(TypeError, "compensate: expected a Calibration or a file with one, got int", 3)
    (tmp_path / "no.safetensors").write_bytes(b"12345678")
    refuse(ValueError, "expected a file as Calibration.save", tmp_path / "no.safetensors")


@pytest.mark.parametrize("rows", [1, 3, 80])
@pytest.mark.parametrize("value", [0.0, 1.0, 1e30])
def test_few_or_extreme_rows_do_no_harm(rows, value):
    model = Net()
    sizes = torch.linspace(1, 2, rows)[:, None]  # no two are equal, if they are anything
    seen = Calibration({"first": value * sizes.expand(-1, 128)}, amax={"first": torch.ones(128)})
    with quantize(model, "w4a8-r8", compensate=seen):
        assert model.first.weight.isfinite().all()
        got = model.first(torch.full((4, 128), value))
    want = model.first(torch.full((4, 128), value))
    assert (got - want).norm() <= 0.1 * want.norm()
