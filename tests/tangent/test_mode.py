"""forward_mode: where it reaches, that it leaves nothing behind, and that it can be nested."""

import threading

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
import torch.utils.checkpoint
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

import fewstep
from fewstep.tangent import deferred, mode
from fewstep.tangent.interceptors import INTERCEPTORS
from helpers import relative_error
from tangent_nets import double_net, gradients, point, unfused_jvp


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def in_mode(f, x, t):
    with fewstep.forward_mode():
        return torch.func.jvp(f, (x,), (t,))


def mode_inside(f, x, t):
    def inside(x):
        with fewstep.forward_mode():
            return f(x)

    return torch.func.jvp(inside, (x,), (t,))


def by_duals(f, x, t):
    with fewstep.forward_mode(), forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, t)))


WAYS = {"outside jvp": in_mode, "inside jvp": mode_inside, "duals": by_duals}


def test_torch_alone_raises():
    net, (x, t) = double_net(), point()
    with pytest.raises(NotImplementedError):
        torch.func.jvp(net, (x,), (t,))


@pytest.mark.parametrize("way", WAYS)
def test_an_unmodified_module(way):
    net, (x, t) = double_net(), point()
    want = unfused_jvp(net, x, t)
    got = WAYS[way](net, x, t)
    torch.testing.assert_close(tuple(got), want)
    torch.testing.assert_close(gradients(net, *got), gradients(net, *want))


@pytest.mark.parametrize("way", ["outside jvp", "duals"])
def test_checkpointed(way):
    """Backward runs the blocks again, outside of the context and of the level."""
    net, (x, t) = double_net(reentrant=False), point()
    plain = double_net()
    got, want = WAYS[way](net, x, t), unfused_jvp(plain, x, t)
    assert not mode.is_active()
    torch.testing.assert_close(gradients(net, *got), gradients(plain, *want))


def test_checkpointed_with_the_backward_in_another_thread():
    net, (x, t) = double_net(reentrant=False), point()
    plain = double_net()
    got, want = in_mode(net, x, t), unfused_jvp(plain, x, t)
    found = []
    thread = threading.Thread(target=lambda: found.extend(gradients(net, *got)))
    thread.start()
    thread.join()
    torch.testing.assert_close(tuple(found), gradients(plain, *want))


def test_checkpointed_without_tangents():
    net, plain = double_net(reentrant=False), double_net()
    x, _ = point()
    with fewstep.forward_mode():
        out = net(x)
    want = plain(x)
    torch.testing.assert_close(gradients(net, out, out), gradients(plain, want, want))


def test_a_reentrant_checkpoint_raises():
    net, (x, t) = double_net(reentrant=True), point()
    for way in WAYS.values():
        with pytest.raises((RuntimeError, NotImplementedError)):
            way(net, x, t)


SEAMS = [
    (torch.utils.checkpoint, "_checkpoint_without_reentrant_generator"),
    (flex_attention, "flex_attention"),
    (torch.inference_mode, "__enter__"),
]


def enter_twice_and_fail():
    with fewstep.forward_mode():
        with fewstep.forward_mode():
            assert len(_get_current_function_mode_stack()) == 1
        assert mode.is_active()
        assert all(hasattr(getattr(*seam), "__wrapped__") for seam in SEAMS)
        raise KeyError


def test_restores_on_exceptions_and_nests():
    before = [getattr(*seam) for seam in SEAMS]
    with pytest.raises(KeyError):
        enter_twice_and_fail()
    assert not mode.is_active()
    assert [getattr(*seam) for seam in SEAMS] == before


def test_belongs_to_its_thread():
    net, (x, t) = double_net(), point()
    errors, entered, leave = [], threading.Event(), threading.Event()

    def other():
        with fewstep.forward_mode():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait(10)
    try:
        torch.func.jvp(net, (x,), (t,))
    except NotImplementedError as error:
        errors.append(error)
    leave.set()
    thread.join()
    assert errors, "another thread's context reached this one"


class Counting(TorchFunctionMode):
    """Counts what reaches torch's own attention."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def test_what_nobody_differentiates_stays_torch_s():
    net, (x, t) = double_net(), point()
    with Counting() as outer, fewstep.forward_mode():
        with torch.no_grad():
            net(x)
        assert outer.count == 2
        torch.func.jvp(net, (x,), (t,))
        assert outer.count == 2


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_inside_sdpa_kernel(backend):
    net, (x, t) = double_net(), point()

    def f(x):
        with sdpa_kernel(backend):
            return net(x)

    torch.testing.assert_close(in_mode(f, x, t), unfused_jvp(net, x, t))


@pytest.mark.parametrize("need_weights", [True, False])
def test_multi_head_attention_module(need_weights):
    attention = torch.nn.MultiheadAttention(16, 2, batch_first=True).double().eval()
    x, t = point()

    def f(x):
        return attention(x, x, x, need_weights=need_weights)[0]

    torch.testing.assert_close(in_mode(f, x, t), unfused_jvp(f, x, t))


@pytest.mark.parametrize("groups", [1, 2])
def test_flex_attention(groups):
    q, k, v, t = (normal(2, 4 // g, 6, 8) for g in (1, groups, groups, 1))

    def earlier(b, h, i, j):
        return i >= j

    block_mask = flex_attention.create_block_mask(earlier, 2, 4, 6, 6, device="cpu")

    def f(q):
        return flex_attention.flex_attention(
            q, k, v, block_mask=block_mask, enable_gqa=groups > 1, scale=0.4
        )

    def want(q):
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=groups > 1, scale=0.4
        )

    torch.testing.assert_close(in_mode(f, q, t), unfused_jvp(want, q, t))


def test_flex_attention_with_a_function_of_the_scores_raises():
    q = normal(1, 1, 4, 8)
    with pytest.raises(Exception, match=r"."):
        in_mode(lambda q: flex_attention.flex_attention(q, q, q, lambda s, *_: s * 2), q, q)


AFFINE = (torch.linspace(0.5, 2, 4).double(), torch.linspace(-1, 1, 4).double())
LAST = {
    "softmax": lambda x: x.softmax(-1),
    "softmax in float32": lambda x: F.softmax(x, -1, dtype=torch.float32).double(),
    "log_softmax": lambda x: F.log_softmax(x, dim=1),
    "logsumexp": lambda x: x.logsumexp((0, 2)),
    "logsumexp, kept": lambda x: torch.logsumexp(x, -1, keepdim=True),
    "glu": F.glu,
    "layer_norm": lambda x: F.layer_norm(x, (4,)),
    "layer_norm with parameters": lambda x: F.layer_norm(x, (4,), *AFFINE, 1e-3),
    "layer_norm with parameters that move": lambda x: F.layer_norm(x, (4,), x[0, 0], x[0, 1]),
    "layer_norm over two axes": lambda x: F.layer_norm(x, (3, 4)),
    "rms_norm": lambda x: F.rms_norm(x, (4,), AFFINE[0]),
    "rms_norm with a narrow weight": lambda x: F.rms_norm(x, (4,), AFFINE[0].float()),
    "rms_norm over two axes": lambda x: F.rms_norm(x, (3, 4), eps=1e-3),
    "group_norm of a view": lambda x: F.group_norm(x.transpose(1, 2), 2),
}


@pytest.mark.parametrize("way", ["outside jvp", "duals"])
@pytest.mark.parametrize("name", LAST)
def test_other_functions(name, way):
    """Tangent and the gradient through it."""
    f = LAST[name]
    x, t = (a.requires_grad_() for a in (normal(2, 3, 4), normal(2, 3, 4)))
    out, want = unfused_jvp(f, x, t)
    got = WAYS[way](f, x, t)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if "float32" in name else {}
    torch.testing.assert_close(tuple(got), (out, want), **tolerance)
    grads = [
        torch.autograd.grad(o.sin().sum() + t_o.cos().sum(), (x, t))
        for o, t_o in (got, (out, want))
    ]
    torch.testing.assert_close(*grads, **tolerance)


def test_torch_alone_has_wrong_gradients_of_layer_norm_s_tangent():
    """Why it is replaced. Should this fail, torch has mended it."""
    x, t, f = normal(2, 4).requires_grad_(), normal(2, 4), LAST["layer_norm"]
    right, wrong = (
        torch.autograd.grad(jvp(f, x, t)[1].cos().sum(), x)[0]
        for jvp in (unfused_jvp, lambda f, x, t: torch.func.jvp(f, (x,), (t,)))
    )
    assert relative_error(wrong, right) > 1e-2


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_norms_run_in_one_pass(norm, monkeypatch):
    calls = []
    fused = deferred.norm_jvp
    monkeypatch.setattr(
        deferred, "norm_jvp", lambda *a, **k: calls.append(k["kind"]) or fused(*a, **k)
    )
    x, f = normal(2, 3, 4), getattr(F, norm)
    in_mode(lambda x: f(x, (4,)), x, x)
    assert calls == [norm.removesuffix("_norm")]
    with fewstep.forward_mode():  # nobody differentiates: torch's own
        f(x, (4,))
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_a_norm_differentiated_forward_twice(name):
    x, t = normal(2, 3, 4), normal(2, 3, 4)
    with fewstep.forward_mode():
        _, got = torch.func.jvp(lambda x: torch.func.jvp(LAST[name], (x,), (t,))[1], (x,), (t,))

    def slope(step):
        return unfused_jvp(LAST[name], x + step * t, t)[1]

    # A central difference: truncation of some step^2, rounding of 2^-52 / step.
    torch.testing.assert_close(got, (slope(1e-5) - slope(-1e-5)) / 2e-5, rtol=1e-6, atol=1e-7)


def weighted_by_counts(read):
    """Scale x by a function of how many of its entries are positive, which numpy computes."""

    def f(x):
        counts = read((x > 0).flatten().long().bincount(minlength=2))
        assert isinstance(counts, np.ndarray)
        assert counts.dtype == np.int64
        return x * int(counts.cumsum(0)[-1] - counts[0])

    return f


@pytest.mark.parametrize("read", [torch.Tensor.numpy, np.asarray])
@pytest.mark.parametrize("way", WAYS)
def test_integers_become_numpy_arrays(way, read):
    """The experts of HiDream's image transformer are routed so."""
    x, t = normal(3, 4), normal(3, 4)
    f = weighted_by_counts(read)
    for got in (WAYS[way](f, x, t), WAYS[way](torch.no_grad()(f), x, t)):
        torch.testing.assert_close(tuple(got), (f(x), t * (x > 0).sum()))
    _, twice = in_mode(lambda x: torch.func.jvp(lambda x: f(x).square(), (x,), (t,))[1], x, t)
    torch.testing.assert_close(twice, 2 * (t * (x > 0).sum()).square())


@pytest.mark.parametrize("read", [torch.Tensor.numpy, np.asarray])
def test_what_may_have_a_tangent_becomes_no_numpy_array(read):
    """Nor does a batch of integers, which is more than one array."""
    x = normal(3, 4)
    for way in (in_mode, by_duals):
        with pytest.raises(RuntimeError):
            way(lambda x: x * read(x).sum(), x, x)
    with fewstep.forward_mode(), pytest.raises(RuntimeError):
        torch.func.vmap(lambda x: x * int(read((x > 0).long()).sum()))(x)


@pytest.mark.parametrize("around", [True, False])
def test_inference_mode_ends_where_it_should(around):
    with torch.inference_mode(around):
        before = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        with fewstep.forward_mode():
            inside = torch.is_grad_enabled()
            with torch.inference_mode():
                assert not torch.is_inference_mode_enabled()
                assert not torch.is_grad_enabled()
                with torch.inference_mode(False):
                    assert torch.is_grad_enabled()
                assert not torch.is_grad_enabled()
            assert torch.is_grad_enabled() == inside == (not around)
        assert (torch.is_inference_mode_enabled(), torch.is_grad_enabled()) == before


def test_every_interceptor_is_used_by_a_test_above():
    known = {"scaled_dot_product_attention", "multi_head_attention_forward", "group_norm", "glu"}
    known |= {"numpy", "__array__", "_make_dual"}  # the last: test_silent_wrong.py
    known |= {"softmax", "log_softmax", "logsumexp", "layer_norm", "rms_norm"}
    assert {f.__name__.removeprefix("special_") for f in INTERCEPTORS} <= known
