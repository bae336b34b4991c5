"""save_pretrained while patched: the files equal those of the unpatched pipeline, or it raises."""

import copy

import pytest
import torch

import fewstep
from fewstep.patching import PatchError
from patching.tiny_pipelines import build, call, denoiser


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def small_layers(monkeypatch):
    monkeypatch.setattr("fewstep.quantization.replace.SMALLEST_SIDE", 1)
    monkeypatch.setattr("fewstep.quantization.replace.SMALLEST_WEIGHT", 1)


@pytest.mark.usefixtures("small_layers")
@pytest.mark.parametrize("feature", [{"steps": 2}, {"guidance": 3}, {"quantize": "w8a8"}], ids=str)
def test_what_would_go_into_the_files_is_refused(feature, tmp_path):
    pipe = build("digits")
    pipe.save_pretrained(tmp_path / "before")
    cache = fewstep.patch(pipe, cache="interval")
    pipe.save_pretrained(tmp_path / "cached")
    with fewstep.patch(pipe, **feature):
        message = rf"expected a DigitsPipeline .*patched with {next(iter(feature))}.*undo"
        for broken in (pipe, copy.deepcopy(pipe)):
            with pytest.raises(PatchError, match=message):
                broken.save_pretrained(tmp_path / "patched")
        if "quantize" in feature:
            for broken in (pipe, copy.deepcopy(pipe)):
                with pytest.raises(PatchError, match="int8 layers"):
                    denoiser(broken).save_pretrained(tmp_path / "patched")
    assert not (tmp_path / "patched").exists()
    pipe.save_pretrained(tmp_path / "undone")
    cache.undo()
    assert "save_pretrained" not in pipe.__dict__
    before = files(tmp_path / "before")
    assert files(tmp_path / "cached") == files(tmp_path / "undone") == before


def test_separate_patches_undone_in_either_order(tmp_path):
    for order in (0, 1):
        pipe = build("digits")
        handles = [fewstep.patch(pipe, steps=2), fewstep.patch(pipe, guidance="off")]
        handles.pop(order).undo()
        with pytest.raises(PatchError, match=handles[0].features[0]):
            pipe.save_pretrained(tmp_path)
        handles[0].undo()
        assert "save_pretrained" not in pipe.__dict__
    assert torch.equal(call(pipe), call(build("digits")))
