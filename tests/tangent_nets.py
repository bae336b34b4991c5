"""Small modules that the tests of forward mode differentiate."""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import fewstep


class Block(torch.nn.Module):
    """Self-attention through torch's function, a softmax by hand, and a norm."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.out = torch.nn.Linear(width, width)
        self.heads = heads

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(o).tanh() * x.softmax(-1)


class Net(torch.nn.Module):
    """Two blocks; `reentrant` None: without checkpoints."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(), Block()])
        self.reentrant = reentrant

    def forward(self, x, scale=1.0):
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x * scale


def double_net(**kwargs):
    torch.manual_seed(0)
    return Net(**kwargs).double()


def point():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 5, 16, dtype=torch.float64, generator=generator) for _ in range(2)]


class WrittenOut(TorchFunctionMode):
    """Writes layer_norm out: gradients through torch's tangents of it are wrong (torch 2.13)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.layer_norm:
            return func(*args, **(kwargs or {}))
        return layer_norm(*args, **(kwargs or {}))


def layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
    over = tuple(range(-len(shape), 0))
    u = x - x.mean(over, keepdim=True)
    y = u * (u.square().mean(over, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def unfused_jvp(f, x, t):
    """(out, t_out) without fused kernels and without forward mode, by two pullbacks."""
    with WrittenOut(), sdpa_kernel(SDPBackend.MATH):
        out, pull = torch.func.vjp(f, x)
        return out, torch.func.vjp(lambda u: pull(u)[0], torch.zeros_like(out))[1](t)[0]


def gradients(net, out, t_out):
    """Backpropagate a loss of both outputs into the parameters."""
    loss = out.sin().sum() + t_out.cos().sum()
    return torch.autograd.grad(loss, list(net.parameters()))


def by_duals(f, x, t):
    return fewstep.jvp(f, x, t)


def by_transform(f, x, t):
    with fewstep.forward_mode():
        return torch.func.jvp(f, (x,), (t,))
