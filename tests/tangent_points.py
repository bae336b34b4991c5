"""A point with a direction, and norms and modulations there, for the tests of what is deferred."""

import pytest
import torch
import torch.nn.functional as F

import fewstep
from tangent_nets import by_duals, by_transform, unfused_jvp

B, N, C = 2, 3, 8


def normal(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def mode_inside(f, x, t):
    def inside(x):
        with fewstep.forward_mode():
            return f(x)

    return torch.func.jvp(inside, (x,), (t,))


ways = pytest.mark.parametrize("way", [by_duals, by_transform, mode_inside])


class Point:
    """A point, a direction, and a map from x to modulations: v(x, i) [B, 1, C] has a tangent."""

    def __init__(self, dtype=torch.float64):
        torch.manual_seed(0)
        self.x, self.t = (normal(B, N, C, dtype=dtype).requires_grad_() for _ in range(2))
        self.w = normal(5, C, C, dtype=dtype).requires_grad_()
        self.affine = [normal(C, dtype=dtype).requires_grad_() for _ in range(2)]

    @property
    def leaves(self):
        return self.x, self.t, self.w, *self.affine

    def v(self, x, i, keep=True):
        return (x.mean(1, keepdim=keep) @ self.w[i]).tanh()

    def compare(self, f, way):
        """Compare f with torch's own operators: values, and gradients through both."""
        want, got = unfused_jvp(f, self.x, self.t), way(f, self.x, self.t)
        assert [type(o) for o in got] == [torch.Tensor] * 2
        torch.testing.assert_close(tuple(got), want)
        sums = (out.sin().sum() + t_out.cos().sum() for out, t_out in (got, want))
        torch.testing.assert_close(
            *(torch.autograd.grad(s, self.leaves, allow_unused=True) for s in sums)
        )


def layer(x):
    return F.layer_norm(x, (C,), None, None, 1e-6)


def rms(x):
    return F.rms_norm(x, (C,), None, 1e-6)
