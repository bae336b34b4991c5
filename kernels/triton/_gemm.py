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
