"""What the tests of gemm_fp8 multiply, and the instruction sets that they go through."""

import torch

E4M3 = torch.float8_e4m3fn
# "avx512" leaves bfloat16's dot products out, "" takes whatever there is.
ISAS = ["portable", "avx2", "avx512", ""]


def numbers(*shape):
    """Return e4m3 numbers of every size, subnormals and the largest among them."""
    q = torch.randint(0, 255, shape, dtype=torch.uint8)
    return torch.where(q & 0x7F == 0x7F, 0x7E, q).view(E4M3)


def integers(*shape):
    """Return small integers: their sums are exact, in tensor cores too."""
    return torch.randint(-7, 8, shape).float().to(E4M3)


def operands(rows, N, K, device=None, draw=numbers):
    a_scale, w_scale, bias = torch.rand(rows) + 0.1, torch.rand(N) + 0.1, torch.randn(N)
    size = 2.0**-14  # of most products of numbers
    values = (draw(*rows, K), a_scale * size, draw(N, K), w_scale, bias)
    return [t.to(device) for t in values]
