"""Which fused ops run in forward mode."""

import pytest

from fewstep.tangent import blocks, deferred


@pytest.fixture
def calls(monkeypatch):
    """Fused ops as they are called, a norm with the modulation it was given."""
    found = []

    def spy_on(module, op, name):
        fused = getattr(module, op)

        def spy(*args, **kwargs):
            given = [key for key in ("scale", "shift") if kwargs.get(key) is not None]
            found.append(" ".join([name, *given]))
            return fused(*args, **kwargs)

        monkeypatch.setattr(module, op, spy)

    spy_on(deferred, "norm_jvp", "norm")
    spy_on(deferred, "modulate_jvp", "gate")
    spy_on(blocks, "linear_attention_jvp", "linear attention")
    return found
