"""The comparison of caches: every method is on, its work is counted, and the record is drawn."""

import dataclasses
import importlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
STEPS = 8


def module_at(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def quality():
    path = list(sys.path)
    yield module_at(ROOT / "benchmarks/pipelines/cache_quality.py")
    sys.path[:] = path
    ours = ("cache_quality", "photos")
    for name in [n for n in sys.modules if n in ours or n.partition(".")[0] == "cache_peers"]:
        sys.modules.pop(name)


@pytest.fixture(scope="module")
def trial(quality):
    return sys.modules["cache_peers.trial"]


@pytest.fixture
def caching(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("drawn.caching")


@pytest.fixture(scope="module")
def study(quality):
    return quality.Study(quality.MODELS["photos"], STEPS, 2, 1)


@pytest.fixture(scope="module")
def reference(quality, study):
    return quality.draw(study.pipeline(), study)


@pytest.fixture
def run(quality, study, reference):
    """Runs a trial of a source: the first whose method and setting begin so."""

    def run(source, method, setting=""):
        for trial in source(study):
            if trial.method.startswith(method) and trial.setting.startswith(setting):
                return quality.run(trial, study, reference)
        raise LookupError(f"{method}, {setting}")

    return run


def test_the_uncached_run_is_all_there_is(quality, trial, study, reference):
    assert len(reference.work) == STEPS * 2  # two batches, no guidance
    assert len(set(reference.work)) == 1
    nothing = trial.Trial("nothing", "", lambda pipe: None)
    found = quality.run(nothing, study, reference)
    assert (found["full_steps"], found["block_share"]) == (STEPS, 1)
    assert found["psnr_worst_db"] == 150


def test_psnr_is_of_each_image(trial):
    levels = trial.decibels(torch.tensor([[0.5, 0.5], [0.6, 0.4]]), torch.full((2, 2), 0.5))
    torch.testing.assert_close(levels, torch.tensor([150.0, 20.0]).double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("source", "method", "setting", "full", "share"),
    [
        # All but the first step skip: the first of three blocks is run and compared.
        ("diffusers_hooks", "First Block Cache", "threshold=9", 1, 1 / 3),
        # The first 3 steps, the one after the next, then every third.
        ("diffusers_hooks", "TaylorSeer, output, order 1", "cache_interval=3", 5, 0),
        ("diffusers_hooks", "MagCache", "threshold=9", 1, 0),
        # The first step and the last.
        ("diffusers_hooks", "SeaCache", "threshold=9", 2, 0),
        ("easycache", "EasyCache's rule", "threshold=9", 4, 0),
    ],
)
def test_what_peers_skip(quality, run, monkeypatch, source, method, setting, full, share):
    module = getattr(quality, source)
    for sweep in ("FIRST_BLOCK", "MAG", "SEA", "THRESHOLDS"):
        if hasattr(module, sweep):
            monkeypatch.setattr(module, sweep, (9,))
    found = run(module.trials, method, setting)
    assert found["full_steps"] == pytest.approx(full)
    skipped = found["block_share"] * STEPS - full
    assert skipped == pytest.approx(share * (STEPS - full), abs=1e-6)
    assert 5 < found["psnr_db"] < 60


def test_cache_dit_is_on(quality, run):
    if quality.dbcache.why_not():
        assert not list(quality.dbcache.trials(None))
        pytest.skip("an optional peer that is not installed")
    found = run(quality.dbcache.trials, "DBCache, mask + TaylorSeer 1", "F1B0, every=4")
    assert found["full_steps"] == 4  # 0, 1, 2, 6
    assert found["block_share"] * STEPS == pytest.approx(4 + 4 / 3)


def test_tokens_are_charged_by_their_share(quality, run):
    found = run(quality.ours.presets, "ras", "share=0.5")
    # Steps 0 to 3 are dense; in the others half of the tokens pass every layer but the time's.
    assert found["partial_steps"] == STEPS - 4
    assert found["full_steps"] == pytest.approx(4 + (STEPS - 4) / 2, rel=0.02)
    assert found["full_steps"] == pytest.approx(found["block_share"] * STEPS)
    assert 20 < found["psnr_db"] < 150


def test_every_preset_is_tried(quality, study):
    from fewstep.caching import PRESETS

    tried = {trial.method for trial in quality.ours.presets(study)}
    assert set(PRESETS) - tried == {"deepcache", "faster-diffusion", "tiue"}
    assert any("expected a UNet" in reason for reason in quality.left_out(study))
    assert "every=3" in {trial.setting.split(",")[0] for trial in quality.ours.presets(study)}


def test_routers_are_tried_on_few_steps(quality, study):
    methods = [trial.method for trial in quality.ours.trained(study)]
    assert methods.count("look-ahead blocks") == 3
    assert "router (HarmoniCa)" in methods
    assert methods.count("calibrated plan of a router's work") == 2
    study = dataclasses.replace(study, steps=50)
    assert {trial.method for trial in quality.ours.trained(study)} == {"look-ahead blocks"}


def test_one_image_at_a_time(quality, study, run):
    """What decides by image gives the same image in a batch, which runs a step for all."""
    assert {t.method for t in quality.ours.one_at_a_time(study)} == {
        f"{name}, one image at a time"
        for name in ("first-block", "easycache", "teacache", "seacache")
    }
    alone = run(quality.ours.one_at_a_time, "seacache", "threshold=0.8")
    assert 2 <= alone["full_steps"] < STEPS
    assert alone["block_share"] == pytest.approx(alone["full_steps"] / STEPS)


def test_what_is_measured_first(quality, run, monkeypatch):
    monkeypatch.setattr(quality.Study.calibration, "__defaults__", (1, 2))
    monkeypatch.setattr(quality.ours_measured, "LONGEST", 4)
    found = run(quality.ours_measured.trials, "lemica", "full_steps=2")
    assert found["full_steps"] == len(found["schedule"]) == 2
    assert run(quality.ours_measured.trials, "magcache", "threshold=0.8")["full_steps"] < STEPS
    assert run(quality.ours_measured.trials, "mask, degree 2", "full_steps=2")["full_steps"] == 2


def test_a_record_and_what_is_drawn_from_it(quality, caching, tmp_path, monkeypatch):
    monkeypatch.setattr(quality.Study.calibration, "__defaults__", (1, 2))
    arguments = "--model photos --images 2 --batch 2 --steps 8 --only plan|fewer|EasyCache"
    quality.main([*arguments.split(), "--record", str(tmp_path)])
    (path,) = tmp_path.glob("*/cache_photos_8.json")
    report = json.loads(path.read_text())
    methods = [(row["method"], row["setting"]) for row in report["rows"]]
    path.write_text(json.dumps(report | {"rows": report["rows"][::-1]}))
    again = [*arguments.split()[:-1], "fewer", "--record", str(tmp_path)]
    quality.main(again)  # adds to what is there
    assert json.loads(path.read_text())["rows"] == report["rows"]
    path.write_text(json.dumps(report | {"images": 3}))
    with pytest.raises(ValueError, match="give another folder"):
        quality.main(again)
    assert len(set(methods)) == len(methods)
    plans = [row for row in report["rows"] if row["method"] == "calibrated plan"]
    assert [row["full_steps"] for row in plans] == [2, 1]
    assert all(row["predicted_psnr_db"] > 10 for row in plans)
    alone = [row for row in report["rows"] if row["method"] == "plan of the Gram matrix alone"]
    assert [row["schedule"] for row in alone] == [row["schedule"] for row in plans]

    report["environment"] |= {"commit": "0123456789abcdef"}
    text = caching.cache_table(report, "curve.png", "photos")
    assert "dB at 2 full steps" in text
    assert "commit 0123456789." in text
    assert text.count("\n| ") == 1 + len(caching.methods(report))
    caching.draw_curves(tmp_path / "curve.png", report, "photos")
    assert (tmp_path / "curve.png").stat().st_size > 10_000
    assert caching.cache_table(None, "", "photos") == "Not measured yet.\n"
    summary = caching.summary_table({"photos": report, "digits": None}, "page.md")
    link = "page.md#photos-plan-of-the-gram-matrix-alone"
    assert summary.count(link) == 2
    assert 'id="photos-plan-of-the-gram-matrix-alone"' in text
    assert caching.summary_table({"digits": None}, "page.md") == "Not measured yet.\n"


def test_a_sweep_that_misses_a_count_is_read_between_its_settings(caching):
    rows = [{"full_steps": full, "psnr_db": level} for full, level in ((4, 20.0), (8, 30.0))]
    found = [caching.level(rows, full) for full in (3, 4, 6, 8, 50)]
    assert found == [None, 20, 25, 30, 30]
    rows.insert(0, {"full_steps": 2, "psnr_db": 24.0})  # a method that is better with fewer
    assert caching.level(rows, 4) == 24


@pytest.fixture(scope="module")
def unet_study(quality):
    return quality.Study(quality.MODELS["photos-unet"], STEPS, 2, 2)


def test_what_is_tried_on_a_unet(quality, unet_study, monkeypatch):
    reference = quality.draw(unet_study.pipeline(), unet_study)
    assert len(set(reference.work)) == 1
    tried = {trial.method: trial for trial in quality.trials(unet_study)}
    assert {"deepcache", "faster-diffusion", "tiue", "EasyCache's rule"} <= set(tried)
    assert not {"First Block Cache", "DBCache"} & set(tried)
    assert any("First Block Cache" in reason for reason in quality.left_out(unet_study))

    def found(source, method, setting=""):
        for trial in source(unet_study):
            if trial.method.startswith(method) and trial.setting.startswith(setting):
                return quality.run(trial, unet_study, reference)
        raise LookupError(f"{method}, {setting}")

    encoder = found(quality.ours.presets, "faster-diffusion", "every=4")
    assert (encoder["full_steps"], encoder["partial_steps"]) == (2, 6)
    assert 0.3 < (encoder["block_share"] * 8 - 2) / 6 < 0.8  # the decoder
    taylor = found(quality.diffusers_hooks.trials, "TaylorSeer, modules, order 1")
    assert 5 <= taylor["full_steps"] < 8
    if quality.deepcache.why_not() is None:
        peer = found(quality.deepcache.trials, "DeepCache, branch 1", "cache_interval=4")
        assert peer["full_steps"] == 2
        mine = found(quality.ours.presets, "deepcache", "every=4")
        assert mine["full_steps"] == 3  # the last step, too
