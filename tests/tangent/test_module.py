"""fewstep.jvp: structures in and out, gradients to parameters, nesting, and errors that name."""

from dataclasses import dataclass

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import fewstep
from tangent_nets import double_net, gradients, point, unfused_jvp


def test_one_tensor():
    net, (x, t) = double_net(), point()
    want = unfused_jvp(net, x, t)
    got = fewstep.jvp(net, x, t)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients(net, *got), gradients(net, *want))


def test_checkpointed():
    net, plain, (x, t) = double_net(reentrant=False), double_net(), point()
    got, want = fewstep.jvp(net, x, t), unfused_jvp(plain, x, t)
    torch.testing.assert_close(gradients(net, *got), gradients(plain, *want))
    with pytest.raises(NotImplementedError):
        fewstep.jvp(double_net(reentrant=True), x, t)


def test_gradients_flow_into_inputs_and_tangents():
    net, (x, t) = double_net(), point()
    leaves = [a.clone().requires_grad_() for a in (x, t)]
    outputs = [f(net, *leaves) for f in (fewstep.jvp, unfused_jvp)]
    found = [torch.autograd.grad(o.sin().sum() + d.cos().sum(), leaves) for o, d in outputs]
    torch.testing.assert_close(*found)


def test_structures_and_constants():
    x, y = torch.randn(3), torch.randn(3)
    t_x, t_y = torch.randn(3), torch.randn(3)

    def f(x, pair, n, *, scale):
        a, b = pair
        return {"prod": (x * a * scale, [b * 2]), "n": n, "count": torch.arange(2), "same": y}

    out, t_out = fewstep.jvp(f, (x, (y, x), 5), (t_x, (t_y, None), None), scale=torch.tensor(3.0))
    torch.testing.assert_close(out["prod"][0], 3 * x * y)
    torch.testing.assert_close(t_out["prod"][0], 3 * (t_x * y + x * t_y))
    assert out["n"] == 5
    assert t_out["n"] is None
    assert torch.equal(t_out["prod"][1][0], torch.zeros(3))
    assert torch.equal(t_out["same"], torch.zeros(3))
    assert torch.equal(t_out["count"], torch.zeros(2, dtype=torch.int64))


def test_output_classes_of_diffusers():
    from diffusers import DiTTransformer2DModel
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=4
    )
    model.eval()  # or it drops labels at random
    x, t = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    steps, labels = torch.tensor([3.0, 5.0]), torch.tensor([1, 2])
    out, t_out = fewstep.jvp(model, (x, steps), (t, torch.ones(2)), class_labels=labels)
    assert isinstance(out, Transformer2DModelOutput)
    assert isinstance(t_out, Transformer2DModelOutput)

    with sdpa_kernel(SDPBackend.MATH):
        want = torch.func.jvp(
            lambda x, s: model(x, s, class_labels=labels).sample, (x, steps), (t, torch.ones(2))
        )
    torch.testing.assert_close((out.sample, t_out.sample), want)


def test_nested():
    net, (x, t) = double_net(), point()
    want = unfused_jvp(lambda x: unfused_jvp(net, x, t)[1], x, t)
    torch.testing.assert_close(fewstep.jvp(lambda x: fewstep.jvp(net, x, t)[1], x, t)[1], want[1])


def test_inside_other_transforms():
    net, (x, t) = double_net(), point()

    def loss(f):
        return lambda x: sum(o.sin().sum() for o in f(net, x, t))

    torch.testing.assert_close(
        torch.func.grad(loss(fewstep.jvp))(x), torch.func.grad(loss(unfused_jvp))(x)
    )
    many = torch.stack([t, 2 * t])
    torch.testing.assert_close(
        torch.vmap(lambda t: fewstep.jvp(net, x, t)[1])(many),
        torch.stack([unfused_jvp(net, x, a)[1] for a in many]),
    )


def test_structures_inside_other_transforms():
    def f(x):
        out, t_out = fewstep.jvp(lambda x, n: {"y": x * x, "n": n}, (x, 7), (x, None))
        assert out["n"] == 7
        assert t_out["n"] is None
        return t_out["y"].sum()

    x = torch.randn(3)
    torch.testing.assert_close(torch.func.grad(f)(x), 4 * x)


def test_no_grad():
    net, (x, t) = double_net(), point()
    with torch.no_grad():
        out, t_out = fewstep.jvp(net, x, t)
    assert not out.requires_grad
    assert not t_out.requires_grad
    torch.testing.assert_close((out, t_out), unfused_jvp(net, x, t))


@pytest.mark.parametrize(
    "share",
    [lambda t: t.expand(3), lambda t: t.expand(2, 3), lambda t: t.expand(6).unfold(0, 3, 1)],
    ids=["one", "two axes", "windows"],
)
def test_primals_whose_elements_share_memory(share):
    """The time of a diffusion step is usually one number, expanded."""
    t = share(torch.tensor([0.3]))
    want = 2 * t * t.cos() - t**2 * t.sin()

    def f(t):
        return t**2 * t.cos()

    torch.testing.assert_close(fewstep.jvp(f, t, torch.ones(t.shape))[1], want)
    nested = torch.func.vjp(lambda t: fewstep.jvp(f, t, torch.ones(t.shape))[1], t)[0]
    torch.testing.assert_close(nested, want)


@dataclass(frozen=True)
class Pair:
    y: torch.Tensor
    rest: object = None


class Opaque:
    def __init__(self, y):
        self.held = {"y": [y]}


@pytest.mark.parametrize("inside", [False, True])
def test_dataclasses_are_taken_apart(inside):
    """Classes that torch knows nothing of; also inside another transform."""
    x, t = torch.randn(3), torch.randn(3)

    def f(x):
        out, t_out = fewstep.jvp(lambda x: [Pair(x * x, {"in": Pair(x.sin(), 7)}), 5], x, t)
        assert type(out[0]) is type(t_out[0].rest["in"]) is Pair
        assert (out[0].rest["in"].rest, t_out[0].rest["in"].rest) == (7, None)
        return out[0].y, t_out[0].y, t_out[0].rest["in"].y

    got = torch.func.vjp(f, x)[0] if inside else f(x)
    torch.testing.assert_close(got, (x * x, 2 * x * t, x.cos() * t))


@pytest.mark.parametrize("inside", [False, True])
def test_a_tangent_in_an_unknown_object_is_not_lost(inside):
    def f(x):
        return fewstep.jvp(lambda x: Opaque(2 * x), x, torch.ones(3))[1]

    with pytest.raises(TypeError, match=r"got .*\.Opaque, which holds a tensor whose tangent"):
        torch.func.vjp(f, torch.ones(3)) if inside else f(torch.ones(3))
    out, t_out = fewstep.jvp(lambda x: (x, Opaque(torch.ones(2))), torch.ones(3), torch.ones(3))
    assert isinstance(out[1], Opaque)
    assert t_out[1] is None


@dataclass
class Bad:
    args: object
    tangents: object
    match: str


X = torch.zeros(2, 3)
BAD = {
    "too few": Bad((X, X), (X,), r"tangents: expected one for each of the 2 arguments.* got 1"),
    "all constant": Bad((X,), (None,), r"tangents: expected at least one tensor"),
    "shape": Bad((X, X), (None, X[:1]), r"tangents\[1\]: expected torch.float32 \[2, 3\]"),
    "dtype": Bad(X, X.double(), r"tangents\[0\]: expected torch.float32"),
    "device": Bad(X, X.to("meta"), r"tangents\[0\]: expected .* on cpu .* on meta"),
    "integers": Bad(X.int(), X, r"tangents\[0\]: expected None, as args\[0\] is not floating"),
    "no tensor": Bad((X, 3), (X, X), r"tangents\[1\]: expected None, as args\[1\] is not"),
    "a number": Bad((X,), (1.0,), r"tangents\[0\]: expected a tensor or None, got float"),
    "structure": Bad(((X, X),), (X,), r"tangents\[0\]: expected the structure of args\[0\], tuple"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_argument(name):
    bad = BAD[name]
    with pytest.raises(ValueError, match=bad.match):
        fewstep.jvp(lambda *x: x[0], bad.args, bad.tangents)


def test_inside_dual_numbers_it_says_what_to_do():
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"Use torch\.func\.jvp"):
        fewstep.jvp(torch.sin, X, X)
