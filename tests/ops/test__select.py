"""What `auto` asks of an implementation, and in which order."""

from types import SimpleNamespace

import pytest
import torch

from fewstep.ops import _gate, _select
from fewstep.ops._select import Implementation, explain_choice, select


@pytest.fixture
def asked(monkeypatch):
    """Take every tensor for one on a GPU; return who was asked what."""
    names = []
    gpu = SimpleNamespace(device=torch.device("cuda", 0))
    monkeypatch.setattr(_select, "first_tensor", lambda args: gpu)
    monkeypatch.setattr(_gate, "refusal", lambda op, name, device: names.append(f"gate of {name}"))
    return names


def implementations(asked, held_back=None):
    def way(name, **options):
        return Implementation(name, None, lambda *_: asked.append(name), **options)

    return way("native", held_back=held_back), way("triton"), way("reference")


def test_what_is_held_back_is_asked_nothing(asked):
    ways = implementations(asked, "not yet")
    assert select("op", "auto", ways, None) == "triton"
    assert asked == ["triton", "gate of triton"]
    assert select("op", "native", ways, None) == "native"


def test_arguments_are_looked_at_before_a_gate_runs(asked):
    assert select("op", "auto", implementations(asked), None) == "native"
    assert asked == ["native", "gate of native"]


def test_an_explanation_has_every_reason(asked):
    explanation = explain_choice("op", implementations(asked, "not yet"), (None,), {})
    assert explanation.choice == "triton"
    assert explanation.reasons == {
        "native": "not yet",
        "reference": "could run; triton is preferred",
    }
