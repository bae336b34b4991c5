"""What the low-bit products share: which tile a program computes, the branch, and the end.

An accumulator is [I, J]: rows of out by columns, or TRANSPOSED, where the weight is the left
operand. `lines_*` are row numbers, int64 and inside the matrix: what lies past the end of out is
clamped, computed and not stored.

The end is y's way to out: bias, branch, activation, gate and residual (ops/_epilogue.py), rounding.
For an activation that multiplies halves of the N columns, a tile holds columns of both, so that an
output's two meet in one thread or in two of one warp: even columns are values and odd ones what the
activation is taken of; transposed, eight rows and eight, as the tensor cores hand them out.
"""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl

from ._common import dot, narrow

GROUP = 8  # tiles of M that programs walk before the next tile of N: both operands stay in cache


@triton.jit
def find_tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Return the rows and the columns of out of this program; the last tiles reach past the end."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    group = program // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    within = program % (GROUP * tiles_n)
    offs_m = (group * GROUP + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (within // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    return offs_m, offs_n


@triton.jit
def widen_e4m3(q):
    """Return the float16 that e4m3 bits stand for; it holds all of them."""
    bits = q.to(tl.int16)
    magnitude = bits & 0x7F
    # The exponents' biases differ by 8, and a subnormal is one in both.
    value = (magnitude << 7).to(tl.float16, bitcast=True) * 256.0
    value = tl.where(magnitude == 0x7F, float("nan"), value).to(tl.float16)
    signed = value.to(tl.int16, bitcast=True) | ((bits & 0x80) << 8)
    return signed.to(tl.float16, bitcast=True)


@triton.jit
def dot_e4m3(a, w, acc, NATIVE: tl.constexpr):
    """Return acc + a @ w in float32, on the bits of e4m3 operands, at least 128 of K at a time.

    Hopper adds in its tensor cores with fewer bits than float32 has, so what 128 products sum to is
    added to acc outside of them. Machines without such products multiply in float16.
    """
    if NATIVE:
        a8, w8 = a.to(tl.float8e4nv, bitcast=True), w.to(tl.float8e4nv, bitcast=True)
        return tl.dot(a8, w8, acc, max_num_imprecise_acc=128)
    else:
        return dot(widen_e4m3(a), widen_e4m3(w), acc)


@triton.jit
def weight_columns(offs, N, ACTIVATION: tl.constexpr, APART: tl.constexpr):
    """Return the columns of the weight that columns `offs` of all tiles stand for, int64.

    Those of the halves alternate, APART at a time; a tile has an even multiple of APART.
    """
    if ACTIVATION == "geglu" or ACTIVATION == "swiglu":
        n = offs // (2 * APART) * APART + offs % APART
        n = tl.minimum(n, N // 2 - 1) + offs // APART % 2 * (N // 2)
    else:
        n = tl.minimum(offs, N - 1)
    return n.to(tl.int64)


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """Return activation(y); of the halves' activations, that of the second half."""
    if ACTIVATION == "gelu" or ACTIVATION == "geglu":
        return y * (0.5 + 0.5 * tl.erf(y * 0.7071067811865476))
    z = y
    if ACTIVATION == "gelu_tanh":  # (1 + tanh(z / 2)) / 2 = 1 / (1 + e^-z)
        z = y * (1.5957691216057308 + 0.07135481282553018 * (y * y))
    e = tl.exp(-tl.abs(z))
    return y * (tl.where(z < 0.0, e, 1.0) / (1.0 + e))


@triton.jit
def store_end(y, m, n, M, N, gate_ptr, residual_ptr, steps, out_ptr, ACTIVATION: tl.constexpr):
    """Store residual + gate * y as rows m and columns n of out, whose shapes broadcast to y's.

    `steps` are the rows of out that a row of the gate serves, and the strides of both.
    """
    if ACTIVATION == "geglu" or ACTIVATION == "swiglu":
        N = N // 2
    mask = (m < M) & (n < N)
    m = m.to(tl.int64)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + m // steps[0] * steps[1] + n, mask=mask, other=0.0)
        y = gate.to(tl.float32) * y
    if residual_ptr is not None:
        y += tl.load(residual_ptr + m * steps[2] + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + m * N + n, narrow(y, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def finish_tile(
    y,
    tile,
    columns,
    bias_ptr,
    branch,
    R,
    sizes,
    gate_ptr,
    residual_ptr,
    steps,
    out_ptr,
    BLOCK_R: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Take a tile of scaled sums to out.

    `tile` is what `find_tile` returned and `columns` what `weight_columns` made of it; `branch` is
    (low, up), `sizes` (M, N) of the product.
    """
    offs_m, offs_n = tile
    M, N = sizes
    rows = tl.minimum(offs_m, M - 1).to(tl.int64)
    COLUMNS: tl.constexpr = y.shape[0] if TRANSPOSED else y.shape[1]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns).to(tl.float32)
        y += bias[:, None] if TRANSPOSED else bias[None, :]
    if BLOCK_R > 0:
        if TRANSPOSED:
            y = add_branch(y, branch[1], columns, branch[0], rows, R, BLOCK_R)
        else:
            y = add_branch(y, branch[0], rows, branch[1], columns, R, BLOCK_R)
    if ACTIVATION == "geglu" or ACTIVATION == "swiglu":
        if TRANSPOSED:
            pairs = y.reshape(COLUMNS // 16, 2, 8, y.shape[1]).permute(0, 2, 3, 1)
            value, switch = tl.split(pairs)
            y = (value * activate(switch, ACTIVATION)).reshape(COLUMNS // 2, y.shape[1])
        else:
            value, switch = tl.split(y.reshape(y.shape[0], COLUMNS // 2, 2))
            y = value * activate(switch, ACTIVATION)
        even, _ = tl.split(offs_n.reshape(COLUMNS // 2, 2))
        offs_n = even // 2
    elif ACTIVATION is not None:
        y = activate(y, ACTIVATION)
    m = offs_m[None, :] if TRANSPOSED else offs_m[:, None]
    n = offs_n[:, None] if TRANSPOSED else offs_n[None, :]
    store_end(y, m, n, M, N, gate_ptr, residual_ptr, steps, out_ptr, ACTIVATION)


@triton.jit
def add_branch(acc, left_ptr, lines_i, right_ptr, lines_j, R, BLOCK_R: tl.constexpr):
    """Return acc_ij + sum_r left_ir right_jr in float32; both matrices have R columns, no gaps.

    Two operands of one 16-bit dtype are multiplied as they are, others in float32.
    """
    offs = tl.arange(0, BLOCK_R)
    for start in tl.range(0, R, BLOCK_R, num_stages=1):
        r = start + offs
        left_ptrs = left_ptr + lines_i[:, None] * R + r[None, :]
        right_ptrs = right_ptr + lines_j[None, :] * R + r[:, None]
        left = tl.load(left_ptrs, mask=(r < R)[None, :], other=0.0)
        right = tl.load(right_ptrs, mask=(r < R)[:, None], other=0.0)
        if left.dtype != right.dtype:
            left, right = left.to(tl.float32), right.to(tl.float32)
        acc = dot(left, right, acc)
    return acc


def branch_block(low: Tensor | None, up: Tensor | None) -> int:
    """Return BLOCK_R: how much of R a product takes; 0 where there is no branch."""
    if low is None or up is None:
        return 0
    if low.dtype != up.dtype or low.element_size() == 4:
        return 16  # without tensor cores a product is unrolled over all of it
    return min(64, max(16, triton.next_power_of_2(up.shape[1])))


def end_steps(
    gate: Tensor | None, residual: Tensor | None, M: int
) -> tuple[Tensor | None, Tensor | None, tuple[int, int, int]]:
    """Return gate [G, N'], residual [M, N'] and `steps` as `store_end` takes them."""
    served, stride = (M // gate.shape[0], gate.stride(0)) if gate is not None else (1, 0)
    return gate, residual, (served, stride, 0 if residual is None else residual.stride(0))
