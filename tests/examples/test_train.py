"""The digits training example: a smoke run, and a stopped run that goes on bit for bit."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits"


@pytest.fixture(scope="module")
def train():
    sys.path.insert(0, str(EXAMPLE))
    try:
        spec = importlib.util.spec_from_file_location("digits_train", EXAMPLE / "train.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["digits_train"] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        torch.set_flush_denormal(False)  # main() sets it for its process
        sys.path.remove(str(EXAMPLE))
        for name in ("digits_train", "trainer", "evaluate"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("digits")
    train.main(["--smoke", "--output", str(output)])
    return output


WEIGHTS = {
    "classifier": "classifier.safetensors",
    "teacher": "teacher/transformer/diffusion_pytorch_model.safetensors",
    "student": "student/transformer/diffusion_pytorch_model.safetensors",
}


def test_smoke_run_writes_loadable_pipelines_and_the_card(train, finished):
    from fewstep.assets.digits import DigitsPipeline
    from fewstep.metrics import load_classifier

    student = DigitsPipeline.from_pretrained(finished / "student", dtype=torch.float32)
    student.set_progress_bar_config(disable=True)
    assert student([3], output_type="pt").images.shape == (1, 1, 16, 16)
    assert load_classifier(finished / "classifier.safetensors")
    size = sum((finished / name).stat().st_size for name in WEIGHTS.values())
    assert size < 20e6
    card = (finished / "README.md").read_text()
    assert "student, 2 steps" in card
    assert "CC BY 4.0" in card


def test_a_stopped_run_continues_bit_for_bit(train, finished, tmp_path):
    for stage in train.STAGES:
        common = ["--smoke", "--stage", stage, "--output", str(tmp_path), "--save-every", "3"]
        train.main([*common, "--stop-after", "4"])  # the checkpoint is of step 3
        assert (tmp_path / "checkpoints" / f"{stage}.pt").exists()
        train.main(common)
    for name, weights in WEIGHTS.items():
        whole, resumed = (load_file(root / weights) for root in (finished, tmp_path))
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[key], resumed[key]) for key in whole), name


def test_a_checkpoint_of_other_settings_is_refused(train, finished):
    with pytest.raises(SystemExit, match="other settings"):
        train.main(["--smoke", "--stage", "teacher", "--output", str(finished), "--set", "lr=0.5"])


@pytest.fixture
def steps_taken(train, monkeypatch):
    taken, learning_rate = [], train.trainer.learning_rate
    monkeypatch.setattr(
        train.trainer,
        "learning_rate",
        lambda config, step: taken.append(step) or learning_rate(config, step),
    )
    return taken


def test_a_finished_stage_is_trained_again_where_it_is_asked_for(
    train, finished, tmp_path, steps_taken
):
    output = shutil.copytree(finished, tmp_path / "copy")
    stage = ["--smoke", "--stage", "classifier", "--output", str(output)]
    before = load_file(output / WEIGHTS["classifier"])
    train.main([*stage, "--resume"])
    assert steps_taken == []
    train.main(stage)
    assert steps_taken == list(range(train.trainer.SMOKE_STEPS))
    after = load_file(output / WEIGHTS["classifier"])
    assert all(torch.equal(before[key], after[key]) for key in before)  # the same seed


def test_a_student_of_another_teacher_is_not_continued(train, finished, tmp_path, steps_taken):
    output = shutil.copytree(finished, tmp_path / "copy")
    teacher = load_file(output / WEIGHTS["teacher"])
    save_file({key: 2 * value for key, value in teacher.items()}, output / WEIGHTS["teacher"])
    stage = ["--smoke", "--stage", "student", "--output", str(output)]
    with pytest.raises(SystemExit, match="other weights"):
        train.main([*stage, "--resume"])
    assert steps_taken == []
    train.main(stage)
    assert steps_taken == list(range(train.trainer.SMOKE_STEPS))


def test_the_packaged_weights_are_not_the_default_output(train):
    assert train.trainer.parse(train.TASK, []).output == Path("out/digits")


def test_unknown_settings_are_refused(train, tmp_path):
    with pytest.raises(SystemExit):
        train.main(["--stage", "teacher", "--output", str(tmp_path), "--set", "speed=3"])
