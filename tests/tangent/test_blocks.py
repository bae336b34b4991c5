"""Methods of diffusers that forward_mode replaces: against fp64, and when they are left alone."""

import contextlib
import inspect
import sys

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from diffusers.models.attention_processor import (
    Attention,
    PAGCFGSanaLinearAttnProcessor2_0,
    PAGIdentitySanaLinearAttnProcessor2_0,
    SanaLinearAttnProcessor2_0,
    SanaMultiscaleLinearAttention,
)
from diffusers.models.normalization import MochiRMSNorm, RMSNorm
from torch import nn

import fewstep
from fewstep.tangent import blocks
from helpers import relative_error
from tangent.zoo.oracle import Wide
from tangent_nets import by_duals, by_transform, gradients, unfused_jvp


def attention(processor, **options):
    return Attention(
        24, heads=2, kv_heads=2, dim_head=12, bias=True, processor=processor(), **options
    )


MODULES = {
    "RMSNorm": (lambda: RMSNorm(24, 1e-6), "norm"),
    "RMSNorm without weight": (
        lambda: nn.Sequential(nn.Linear(24, 24), RMSNorm(24, 1e-6, elementwise_affine=False)),
        "norm",
    ),
    "RMSNorm with bias": (lambda: RMSNorm(24, 1e-3, bias=True), "norm shift"),
    "MochiRMSNorm": (lambda: MochiRMSNorm(24, 1e-6), "norm"),
    "SANA": (lambda: attention(SanaLinearAttnProcessor2_0), "linear attention"),
    "SANA with norms": (
        lambda: attention(SanaLinearAttnProcessor2_0, qk_norm="rms_norm_across_heads"),
        "linear attention",
    ),
    "SANA, PAG and CFG": (lambda: attention(PAGCFGSanaLinearAttnProcessor2_0), "linear attention"),
    "SANA, PAG": (lambda: attention(PAGIdentitySanaLinearAttnProcessor2_0), "linear attention"),
    "multiscale": (
        lambda: SanaMultiscaleLinearAttention(24, 24, attention_head_dim=12, norm_type="rms_norm"),
        "linear attention",
    ),
}


def build(name):
    torch.manual_seed(0)
    module = MODULES[name][0]().double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    shape = (2, 24, 4, 5) if name == "multiscale" else (6, 5, 24)
    return module, *(torch.randn(shape, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("way", [by_duals, by_transform])
@pytest.mark.parametrize("name", MODULES)
def test_values_and_gradients(name, way, calls):
    module, x, t = build(name)
    with Wide():
        want = unfused_jvp(module, x, t)
        want_gradients = gradients(module, *want)
    # What is around the multiscale method rounds to float32 by name, too.
    with Wide() if name == "multiscale" else contextlib.nullcontext():
        got = way(module, x, t)
        got_gradients = gradients(module, *got)
    assert MODULES[name][1] in calls
    torch.testing.assert_close(tuple(got), want)
    torch.testing.assert_close(got_gradients, want_gradients)


@pytest.mark.parametrize("name", MODULES)
def test_what_carries_no_tangent_is_diffusers_own(name, calls):
    module, x, t = build(name)
    want = module(x)
    with fewstep.forward_mode():
        outside = module(x)
    (_, inside), _ = fewstep.jvp(lambda t: (t, module(x)), t, t)
    assert torch.equal(outside, want)
    assert torch.equal(inside, want)
    assert calls == []


@pytest.mark.parametrize("name", MODULES)
def test_differentiated_forward_twice(name, calls):
    module, x, t = build(name)
    with Wide(), fewstep.forward_mode():
        _, got = torch.func.jvp(
            lambda x: torch.func.jvp(lambda x: module(x), (x,), (t,))[1], (x,), (t,)
        )
    if MODULES[name][1] == "linear attention":
        assert "linear attention" not in calls

    def slope(step):
        with Wide():
            return unfused_jvp(module, x + step * t, t)[1]

    # A central difference: truncation of some step^2, rounding of 2^-52 / step.
    want = (slope(1e-6) - slope(-1e-6)) / 2e-6
    assert relative_error(got, want) < 1e-5


def test_several_directions_at_once():
    module, x, _ = build("SANA")
    with fewstep.forward_mode():
        got = torch.func.jacfwd(lambda x: module(x)[:, 0, :3])(x)
    with Wide():
        want = torch.func.jacrev(lambda x: module(x)[:, 0, :3])(x)
    torch.testing.assert_close(got, want)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("kind", [RMSNorm, MochiRMSNorm])
@pytest.mark.parametrize("weight", [None, *DTYPES, torch.float64])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_dtypes_of_norms(kind, dtype, weight):
    """The result has the dtype and at least the accuracy that the method gives it."""
    norm = kind(64, 1e-6, elementwise_affine=weight is not None)
    if weight is not None:
        norm.weight.data = (torch.randn(64) + 2).to(weight)
    x, t = (torch.randn(4, 7, 64).to(dtype) for _ in range(2))
    wide = kind(64, 1e-6, elementwise_affine=weight is not None)
    if weight is not None:
        wide.weight.data = norm.weight.data.double()
    with Wide():
        want = unfused_jvp(wide, x.double(), t.double())
    plain = norm(x)
    unfused = torch.func.jvp(norm, (x,), (t,))
    got = by_duals(norm, x, t)
    for mine, theirs, right in zip(got, unfused, want, strict=True):
        assert mine.dtype == plain.dtype
        # Both round once or more; sums are in another order.
        assert relative_error(mine, right) <= 1.05 * relative_error(theirs, right) + 1e-7


def test_weights_that_move():
    module, x, _ = build("RMSNorm")
    t = torch.randn_like(module.weight)

    def f(weight):
        return torch.func.functional_call(module, {"weight": weight}, (x * weight.sin(),))

    with Wide():
        want = unfused_jvp(f, module.weight.detach(), t)
    torch.testing.assert_close(tuple(by_duals(f, module.weight.detach(), t)), want)


def test_hooks_and_swapped_modules_are_seen(calls):
    module, x, t = build("SANA with norms")
    module.to_q = nn.Sequential(module.to_q, nn.Tanh())
    seen = []
    for name in ("to_q", "to_k", "norm_k", "to_out.0"):
        module.get_submodule(name).register_forward_hook(
            lambda m, args, out, name=name: seen.append(name) or 1.5 * out
        )
    with Wide():
        want = unfused_jvp(module, x, t)
    assert sorted(seen) == sorted(["to_q", "to_k", "norm_k", "to_out.0"])
    torch.testing.assert_close(tuple(by_duals(module, x, t)), want)
    assert len(seen) == 8
    assert "linear attention" in calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, calls):
    """The op's sums are float32's, as the method's are."""
    module, x, t = build("SANA")
    with Wide():
        want = unfused_jvp(module, x.to(dtype).double(), t.to(dtype).double())
    module.to(dtype)
    got = by_duals(module, x.to(dtype), t.to(dtype))
    assert calls == ["linear attention"]
    unfused = torch.func.jvp(module, (x.to(dtype),), (t.to(dtype),))
    for mine, theirs, right in zip(got, unfused, want, strict=True):
        assert mine.dtype == dtype
        assert relative_error(mine, right) <= 1.3 * relative_error(theirs, right)


def test_autocast(calls):
    module, x, t = build("SANA with norms")
    module, x, t = module.float(), x.float(), t.float()
    with Wide():
        want = unfused_jvp(module.double(), x.double(), t.double())
    module.float()
    with torch.autocast("cpu", torch.bfloat16):
        plain = module(x)
        unfused = torch.func.jvp(module, (x,), (t,))
        got = by_duals(module, x, t)
    assert calls == ["norm", "norm", "linear attention"]
    for mine, theirs, right in zip(got, unfused, want, strict=True):
        assert mine.dtype == plain.dtype
        assert relative_error(mine, right) <= 1.3 * relative_error(theirs, right)


def test_heads_that_the_op_has_not(calls):
    torch.manual_seed(0)
    module = Attention(8, heads=1, dim_head=136, processor=SanaLinearAttnProcessor2_0()).double()
    x, t = (torch.randn(2, 3, 8, dtype=torch.float64) for _ in range(2))
    with Wide():
        want = unfused_jvp(module, x, t)
        got = by_duals(module, x, t)
    torch.testing.assert_close(tuple(got), want)
    assert calls == []


def methods():
    for module, path in blocks.METHODS:
        owner, name = path.split(".")
        yield module, path, getattr(sys.modules[module], owner), name


def test_methods_are_replaced_and_put_back():
    before = [vars(owner)[name] for _, _, owner, name in methods()]
    signatures = [inspect.signature(method) for method in before]
    with fewstep.forward_mode():
        inside = [vars(owner)[name] for _, _, owner, name in methods()]
        assert all(
            new is not old and new.__wrapped__ is old
            for new, old in zip(inside, before, strict=True)
        )
        assert [inspect.signature(method) for method in inside] == signatures
    assert [vars(owner)[name] for _, _, owner, name in methods()] == before


def test_a_method_that_somebody_else_has_replaced_stays(monkeypatch):
    def other(self, hidden_states):
        return 3 * hidden_states

    monkeypatch.setattr(RMSNorm, "forward", other)
    module, x, t = build("RMSNorm")
    with fewstep.forward_mode():
        assert RMSNorm.forward is other
    assert RMSNorm.forward is other
    assert torch.equal(by_duals(module, x, t)[1], 3 * t)


def test_a_subclass_that_builds_on_it(calls):
    class Twice(RMSNorm):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    module, x, t = build("RMSNorm")
    twice = Twice(24, 1e-6).double()
    twice.load_state_dict(module.state_dict())
    want = by_duals(module, x, t)
    got = by_duals(twice, x, t)
    torch.testing.assert_close(tuple(got), tuple(2 * x for x in want))
    assert calls == ["norm", "norm"]


def test_norms_of_a_tensor_subclass_are_diffusers_own(calls):
    class Tagged(torch.Tensor):
        pass

    module, x, t = build("RMSNorm")
    with fewstep.forward_mode(), forward_ad.dual_level():
        module(forward_ad.make_dual(x.as_subclass(Tagged), t.as_subclass(Tagged)))
    assert calls == []
