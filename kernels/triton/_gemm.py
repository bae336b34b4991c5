"""What the low-bit products share: which tile a program computes, its scales' end, the branch.

An accumulator is [I, J]: rows of out by columns, or the other way round where the weight is the
left operand. `lines_*` are row numbers, int64 and inside the matrix: what lies past the end of out
is clamped, computed and not stored.
"""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl

from ._common import dot

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
