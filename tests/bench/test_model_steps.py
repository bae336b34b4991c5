"""The step times of full-size models: sizes, forms, what is witnessed, heats, records."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from fewstep import ops
from fewstep.bench import kernels

PIPELINES = Path(__file__).parents[2] / "benchmarks/pipelines"


@pytest.fixture(scope="module")
def steps():
    path, spec = list(sys.path), None
    spec = importlib.util.spec_from_file_location("model_steps", PIPELINES / "model_steps.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    for name in [n for n in sys.modules if n.partition(".")[0] == "full_size"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def pixart(steps, tmp_path_factory):
    """The records of a small PixArt in three forms of ours, as the command leaves them."""
    folder = tmp_path_factory.mktemp("steps")
    forms = ["bf16", "w8a8, norms fused", "w4a8-r32"]
    given = ["PixArt-Sigma", "--quick", "--output", str(folder), "--forms", *forms]
    assert steps.main(given) == 0
    rows = map(json.loads, (folder / "model_steps.jsonl").read_text().splitlines())
    return {(row["form"], row["mode"]): row for row in rows}


# The published counts of parameters: the model cards', in billions.
SIZES = {
    "FLUX.1-dev": 11.90,
    "SDXL": 2.57,
    "SANA-1.6B": 1.60,
    "PixArt-Sigma": 0.61,
    "Qwen-Image": 20.43,
    "Wan2.1-T2V-1.3B": 1.42,
}


def test_configurations_have_the_published_sizes(steps):
    assert set(SIZES) == set(steps.models.MODELS)
    for name, billions in SIZES.items():
        model = steps.models.build(steps.models.MODELS[name](False), "meta")
        count = sum(p.numel() for p in model.parameters())
        assert count / 1e9 == pytest.approx(billions, abs=0.005)
        assert steps.models.weight_bytes(model) >= 2 * count  # bfloat16, and buffers


def test_every_form_is_timed_and_served_by_kernels(pixart):
    layers = pixart["w8a8, norms fused", "eager"]["low_bit_layers"]
    assert layers > 10
    for (form, mode), row in pixart.items():
        assert {"eager", "compiled"} >= {mode}
        assert row["q1_s"] <= row["median_s"] <= row["q3_s"]
        assert row["ratios"]["bf16 compiled"] > 0
        assert row["torch"] == torch.__version__
        assert ("graphs" in row) is (mode == "compiled")
        assert "graph_break" not in row
        if form != "bf16":
            assert row["products"] == layers == row["low_bit_layers"]
            assert 0 < row["relative_l2"] < 0.05
            assert sum(row["left_in_bf16"].values()) > 0
            assert row["weight_bytes"] < pixart["bf16", "eager"]["weight_bytes"]
    assert len(pixart) == 6
    assert pixart["w8a8, norms fused", "eager"]["served"] == {"gemm_w8a8 native": layers}
    assert pixart["w4a8-r32", "eager"]["served"] == {"gemm_w4a8 native": layers}


def test_forms_share_what_they_do_not_replace(steps):
    models, forms = steps.models, steps.heat.forms
    of = models.MODELS["PixArt-Sigma"](True)
    model = models.build(of, "cpu")
    before = {name: id(p) for name, p in model.named_parameters()}
    built = forms.build(forms.FORMS["w8a8"], model, {}, table=False)
    left = dict(built.model.named_parameters())
    assert set(left) < set(before)
    assert all(before[name] == id(p) for name, p in left.items())
    assert {name: id(p) for name, p in model.named_parameters()} == before


def test_modulations_that_share_a_launch(steps):
    heat = steps.heat
    settings = heat.Settings(torch.device("cpu"), True, "eager", False, rounds=2, seconds=0.0)
    run = heat.Heat("FLUX.1-dev", settings)
    run.add(steps.FORMS["w4a8-r32, modulations grouped"])
    run.witness()
    eager, compiled = run.rows()
    assert eager["grouped_layers"] == 3  # two of the double block, one of the single
    assert eager["served"]["gemv_w4a16_grouped native"] == 1
    layers = eager["low_bit_layers"]
    assert eager["served"]["gemm_w4a8 native"] == layers - 3
    assert eager["products"] == layers - 2
    assert compiled["products"] == layers
    assert eager["chosen_by"] == "default_skip"
    other = heat.Heat("PixArt-Sigma", settings)
    other.add(steps.FORMS["w4a8-r32, modulations grouped"])
    assert other.rows()[0]["skipped"] == "it has no modulation layers"


def test_a_form_without_its_products_has_no_time(steps, monkeypatch):
    heat = steps.heat
    settings = heat.Settings(torch.device("cpu"), True, None, False, rounds=2, seconds=0.0)
    run = heat.Heat("PixArt-Sigma", settings)
    for form in (steps.BF16, steps.FORMS["w8a8"]):
        run.add(form)
    plain, ours = run.runs
    run.runs.append(heat.Run(ours.built, "graph", ours.call, None, ours.row | {"mode": "graph"}))
    run.time()
    assert all(row["samples"] == 2 for row in run.rows())
    none = kernels.Launches([], {"fewstep::quantize_int8": 99})
    monkeypatch.setattr(heat, "launches", lambda call, device: none)
    run.witness()
    kept, *left = run.rows()
    assert kept is plain.row
    assert [row["mode"] for row in left] == ["eager", "graph"]
    for row in left:
        assert "median_s" not in row
        assert "expected a low-bit product for each of 12 layers, got 0" in row["failed"]


def test_a_form_that_computes_something_else_has_no_time(steps, monkeypatch):
    heat = steps.heat
    settings = heat.Settings(torch.device("cpu"), True, None, False, rounds=2, seconds=0.0)
    run = heat.Heat("PixArt-Sigma", settings)
    monkeypatch.setattr(run, "want", -run.want)
    run.add(steps.BF16)
    assert "expected an output near bf16's, got 2 off" in run.rows()[0]["failed"]
    late = heat.Heat("PixArt-Sigma", dataclasses.replace(settings, deadline=0.0))
    late.add(steps.BF16)
    assert late.rows()[0]["skipped"] == "not made: the time was spent"


def test_the_table_keeps_what_is_faster_in_bf16(steps):
    forms, linear = steps.heat.forms, torch.nn.Linear(256, 512)
    shapes = {"fast": (1024, 512, 256), "slow": (8, 512, 256)}
    skip = forms.table_skip({shapes["fast"]: (2.0, 1.0), shapes["slow"]: (1.0, 2.0)}, shapes)
    assert skip("fast", linear) is None
    assert skip("slow", linear) == "by the table: 0.50x at 8 x 512 x 256"
    assert skip("other", linear) == "the call does not reach it"
    assert skip("time_embed", linear).startswith("embeds time")
    assert forms.table_skip({}, {})("slow", linear) is None


def test_a_table_is_measured_once_per_shape(steps):
    forms, model = steps.heat.forms, torch.nn.Module()
    model.a, model.b = (torch.nn.Linear(256, 256).bfloat16() for _ in range(2))
    model.c = torch.nn.Linear(256, 512).bfloat16()
    x = torch.randn(4, 256).bfloat16()
    shapes = forms.layer_shapes(model, lambda: model.c(model.b(model.a(x))))
    assert shapes == {"a": (4, 256, 256), "b": (4, 256, 256), "c": (4, 512, 256)}
    with torch.no_grad():
        table = forms.measure_table(model, steps.heat.forms.Scheme.parse("w4a8-r32"), shapes)
    assert set(table) == {(4, 256, 256), (4, 512, 256)}
    assert all(plain > 0 and ours > 0 for plain, ours in table.values())


def test_kernels_held_back_take_part_only_while_released(steps):
    forms = steps.heat.forms
    before = {op: ops.module(op).IMPLEMENTATIONS for op in forms.LOW_BIT_OPS}
    assert {"gemm_w8a8", "quantize_int8", "norm_quantize_int8"} <= set(before)
    assert any(i.held_back for found in before.values() for i in found)
    with forms.released():
        for op in before:
            assert not any(i.held_back for i in ops.module(op).IMPLEMENTATIONS)
    assert all(ops.module(op).IMPLEMENTATIONS is before[op] for op in before)


def test_heats_hold_what_fits_beside_bf16(steps):
    gib, forms = steps.GIB, list(steps.FORMS.values())
    ours = forms[1:]
    flux = steps.plan(forms, 22 * gib, 78 * gib)
    assert [form for heat in flux for form in heat] == ours
    assert 1 < len(flux) < len(ours)
    for heat in flux:
        taken = 22 * gib * (1 + sum(form.share for form in heat)) + steps.RESERVE
        assert taken + steps.GRAPHS * (1 + len(heat)) <= 78 * gib
    assert steps.plan(forms, 3 * gib, 139 * gib) == [ours]
    assert steps.plan(forms, 60 * gib, 78 * gib) == [[form] for form in ours]
    assert steps.plan([steps.BF16], gib, 78 * gib) == [[]]


def test_a_heat_that_ends_badly_is_run_form_by_form(steps, monkeypatch):
    forms = [steps.FORMS[name] for name in ("w8a8", "fp8")]

    def apart(name, wanted, settings):
        if steps.FORMS["fp8"] in wanted:
            return "its process ended with exit code -6"
        return [{"model": name, "form": form.name} for form in wanted]

    monkeypatch.setattr(steps, "apart", apart)
    ours, theirs = steps.run_heat("SDXL", forms, steps.heat.Settings(torch.device("cpu")))
    assert ours == {"model": "SDXL", "form": "w8a8"}
    assert theirs["form"] == "fp8"
    assert theirs["failed"] == "its process ended with exit code -6"


def test_a_record_keeps_other_models_of_the_same_run(steps, tmp_path):
    machine = {"device": "a GPU", "driver": "1", "torch": "2", "triton": "3", "commit": "c"}
    machine |= {"dirty": False}
    path = tmp_path / "model_steps.json"
    for name in ("SDXL", "FLUX.1-dev", "SDXL"):
        steps.write_record(tmp_path, machine, [{"model": name}])
    rows = [{"model": "FLUX.1-dev"}, {"model": "SDXL"}]
    assert json.loads(path.read_text()) == {"environment": machine, "rows": rows}
    steps.write_record(tmp_path, machine | {"commit": "d"}, [{"model": "SDXL"}])
    assert json.loads(path.read_text())["rows"] == [{"model": "SDXL"}]


def test_products_are_known_by_their_kernels_names():
    for name in (
        "void fewstep::gemm8::(anonymous)::gemm8_sm90_kernel<fewstep::gemm8::Int8, 128>(Params)",
        "_gemm_w8a8_kernel",
        "_gemm_w4a8_kernel",
        "void fewstep::gemm4::gemm4_sm90_kernel<128>(Params)",
        "_gemv_w4a16_grouped_kernel",
        "_gemv_w4a16_kernel",
    ):
        assert kernels.is_product(name)
    for name in (
        "nvjet_tst_128x256_64x4_1x2_h_bz_TNT",
        "triton_poi_fused_gemm_w8a8_0",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n",
        "_quantize_int8_kernel",
    ):
        assert not kernels.is_product(name)


def test_the_profiler_counts_ops_on_a_cpu():
    x, w = torch.randn(4, 64), torch.randn(128, 64)
    q, scale = ops.quantize_int8(w)
    found = kernels.launches(
        lambda: ops.gemm_w8a8(x, None, q, scale, out_dtype=x.dtype), torch.device("cpu")
    )
    assert found.products(torch.device("cpu")) == 1
    assert found.kernels == []


@pytest.mark.gpu
def test_the_profiler_names_kernels_of_a_gpu():
    device = torch.device("cuda")
    x, w = (torch.randn(256, 256, device=device).bfloat16() for _ in range(2))
    q, scale = ops.quantize_int8(w)

    def call():
        return ops.gemm_w8a8(x, None, q, scale, out_dtype=x.dtype)

    call()
    found = kernels.launches(call, device)
    assert found.products(device) == 1
    assert len(found.kernels) == len(kernels.kernel_names(call, device)) >= 1
    matmul = kernels.launches(lambda: x @ w, device)
    assert matmul.products(device) == 0 < len(matmul.kernels)
