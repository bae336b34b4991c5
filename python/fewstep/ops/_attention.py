"""What attention_jvp and its backward ask of their arguments, and how masks reach the kernels."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ._expect import expect_bool, expect_number, expect_tensor, expect_tensors
from ._layout import DTYPES, refuse_rows

HEAD_DIMS = range(8, 257, 8)
_INDEX_DTYPES = (torch.int32, torch.int64)
# Triton 3.9's compiler aborts the process on exact float32 products of some of these head dims.
_TRITON_DTYPES = (torch.bfloat16, torch.float16)


_warned: set[tuple[str, torch.dtype]] = set()
# Below it nobody runs out of memory: tests, and small models in full precision.
_QUIET_BYTES = 2**30


def warn_of_scores(op: str, matrices: int, q: Tensor, k: Tensor, directions: int = 1) -> None:
    """Say once per dtype that the reference stores Nq x Nk matrices on a GPU, where that is much.

    Called where the op runs, so that compiled graphs say it too.
    """
    pairs = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    size = matrices * max(directions, 1) * pairs * stat_dtype(q).itemsize
    if q.device.type != "cuda" or size < _QUIET_BYTES or (op, q.dtype) in _warned:
        return
    _warned.add((op, q.dtype))
    warnings.warn(
        f"fewstep.ops.{op}: {str(q.dtype).removeprefix('torch.')} tensors on a GPU run on the "
        f"reference, which stores Nq x Nk matrices, {size / 2**30:.1f} GiB here. In bfloat16 or "
        "float16, torch.autocast included, a kernel runs that stores none; fewstep.ops.explain "
        "says why another can't",
        stacklevel=2,
    )


def stat_dtype(q: Tensor) -> torch.dtype:
    """Return the dtype of lse and mu."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def triton_dtypes(q: Tensor) -> tuple[torch.dtype, ...]:
    """Return what the Triton kernels take: float32 in the interpreter only."""
    return _TRITON_DTYPES if q.device.type == "cuda" else (torch.float32, *_TRITON_DTYPES)


def refuse_hopper(inputs: dict[str, Tensor], max_dim: int = HEAD_DIMS[-1]) -> str | None:
    """Return why the Hopper kernels can't read these matrices where they lie, or None."""
    for name, x in inputs.items():
        if x.shape[-1] > max_dim:
            return f"{name}: expected head dims up to {max_dim}, got {x.shape[-1]}"
        reason = refuse_rows(name, x)
        if reason is not None:
            return reason
    return None


def memory_for_scores(
    q: Tensor, k: Tensor, v: Tensor, t_k: Tensor | None, score_dtype: torch.dtype | None
) -> tuple[Tensor | None, ...]:
    """Allocate (q8, k8, rows8) of csrc/include/fewstep/ops/attention_jvp.h, or three None."""
    if score_dtype is None:
        return None, None, None
    (b, h, nq, d), (g, nk) = q.shape, k.shape[1:3]
    width = 64 if max(d, v.shape[-1]) <= 64 else 128
    dtype = torch.int8 if score_dtype == torch.int8 else torch.uint8
    return (
        q.new_empty((b, h, nq, 2 * width), dtype=dtype),
        q.new_empty((b, g, nk, width if t_k is None else 2 * width), dtype=dtype),
        q.new_empty(3 * b * h * nq + b * g * (nk + 2 * width + 4), dtype=torch.float32),
    )


def new_rows(q: Tensor, columns: int, *lead: int) -> Tensor:
    """Allocate [*lead, B, H, Nq, columns] for 4-d q, in the order of q's heads and tokens."""
    b, h, n, _ = q.shape
    if q.stride(1) < q.stride(2):
        return q.new_empty((*lead, b, n, h, columns)).transpose(-3, -2)
    return q.new_empty((*lead, b, h, n, columns))


@dataclass(frozen=True)
class Masking:
    """Which pairs of a query and a key meet, and what is added to their scores.

    attn_mask     bool (True: they meet) or of q's dtype (added to the scores), [..., Nq, Nk]
    t_attn_mask   tangent of an additive mask, with R in front if the other tangents have it
    cu_seqlens_q  int32 [S + 1]: rows cu[s] ... cu[s + 1] of q are sequence s; B is 1
    cu_seqlens_k  the same for k and v
    is_causal     key j is seen by query i if j <= i, counted from the start of their sequence
    """

    attn_mask: Tensor | None = None
    t_attn_mask: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    is_causal: bool = False

    @property
    def is_plain(self) -> bool:
        """Every query meets every key, and nothing is added."""
        return not self.is_causal and self.attn_mask is None and self.cu_seqlens_q is None

    def expanded(self, q: Tensor, k: Tensor, directions: int | None) -> Masking:
        """Return it as the kernels read it: 4-d views (5-d for the tangent) with stride 0."""
        shape = (*q.shape[:3], k.shape[2])
        mask, t_mask = self.attn_mask, self.t_attn_mask
        if mask is not None:
            mask = mask.expand(shape)
        if t_mask is not None:
            if directions is None:
                t_mask = t_mask.expand(shape).unsqueeze(0)
            else:
                t_mask = _pad_rank(t_mask, 5).expand(directions, *shape)
        sequences = (
            None if x is None else x.to(torch.int32).contiguous()
            for x in (self.cu_seqlens_q, self.cu_seqlens_k)
        )  # fmt: skip
        return Masking(mask, t_mask, *sequences, self.is_causal)

    def one_direction(self, r: int) -> Masking:
        """Return expanded masking with the tangent of direction r alone, 4-d."""
        return self if self.t_attn_mask is None else replace(self, t_attn_mask=self.t_attn_mask[r])

    def kernel_arguments(self) -> tuple[Any, ...]:
        """Return the fields in the order in which ops and kernels take them."""
        return (
            self.attn_mask,
            self.t_attn_mask,
            self.cu_seqlens_q,
            self.cu_seqlens_k,
            self.is_causal,
        )

    def keywords(self) -> dict[str, Any]:
        """Return the fields as keyword arguments of the reference."""
        return dict(vars(self))


def _pad_rank(x: Tensor, rank: int) -> Tensor:
    """Return [R, ..., Nq, Nk] with singleton axes after R, up to `rank` axes."""
    return x.reshape(x.shape[0], *[1] * (rank - x.dim()), *x.shape[1:])


def resolve_scale(scale: float | None, q: Tensor) -> float:
    """Return the factor on the scores; refuse what is no number."""
    if scale is None:
        return q.shape[-1] ** -0.5
    expect_number("scale", scale)
    return scale


def _expect_like(name: str, x: Tensor, q: Tensor) -> None:
    if x.dtype != q.dtype:
        raise ValueError(f"{name}: expected the dtype of q, {q.dtype}, got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name}: expected the device of q, {q.device}, got {x.device}")


def validate_primals(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise an error naming the argument unless q, k and v fit together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        expect_tensor(name, x)
    if q.dtype not in DTYPES:
        raise ValueError(f"q: expected a floating dtype, got {q.dtype}")
    if q.dim() not in (3, 4):
        raise ValueError(f"q: expected [B, H, N, D] or [B, N, D], got shape {tuple(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        _expect_like(name, x, q)
        if x.dim() != q.dim():
            raise ValueError(f"{name}: expected {q.dim()} axes as q has, got {x.dim()}")
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"{name}: expected the batch of q, {q.shape[0]}, got {x.shape[0]}")
    if q.dim() == 4:
        heads, groups = q.shape[1], k.shape[1]
        if groups != heads and (groups == 0 or heads % groups):
            raise ValueError(f"k: expected heads that divide those of q, {heads}, got {groups}")
        if v.shape[1] != groups:
            raise ValueError(f"v: expected the heads of k, {groups}, got {v.shape[1]}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k: expected the head dim of q, {q.shape[-1]}, got {k.shape[-1]}")
    if v.shape[-2] != k.shape[-2]:
        raise ValueError(f"v: expected as many rows as k, {k.shape[-2]}, got {v.shape[-2]}")
    for name, x in (("q", q), ("v", v)):
        # Comparisons, not `in`: torch.compile refuses that where a size is symbolic.
        if x.shape[-1] % 8 or x.shape[-1] < HEAD_DIMS[0] or x.shape[-1] > HEAD_DIMS[-1]:
            raise ValueError(
                f"{name}: expected a head dim that is a multiple of 8 from 8 to 256, got "
                f"{x.shape[-1]}"
            )


def count_directions(primals: dict[str, Tensor], tangents: dict[str, Tensor | None]) -> int | None:
    """Return R if the tangents have an axis of directions, else None.

    Raises:
        ValueError: a tangent doesn't fit its primal, or two disagree about R.
    """
    expect_tensors(**tangents)
    directions: set[int | None] = set()
    for name, t in tangents.items():
        if t is None:
            continue
        primal = primals[name.removeprefix("t_")]
        _expect_like(name, t, primal)
        extra = t.dim() - primal.dim()
        if extra not in (0, 1) or t.shape[extra:] != primal.shape:
            raise ValueError(
                f"{name}: expected the shape of {name[2:]}, {tuple(primal.shape)}, or one more "
                f"axis of directions in front, got {tuple(t.shape)}"
            )
        directions.add(t.shape[0] if extra else None)
        if len(directions) > 1:
            raise ValueError(
                f"{name}: expected the directions of the other tangents, "
                f"{sorted(directions - {t.shape[0] if extra else None}, key=str)[0]}, got "
                f"{t.shape[0] if extra else None}"
            )
    return directions.pop() if directions else None


def validate_masking(q: Tensor, k: Tensor, masking: Masking, directions: int | None) -> None:
    """Raise an error naming the argument unless the masking fits q and k."""
    mask, t_mask = masking.attn_mask, masking.t_attn_mask
    sequences = {"cu_seqlens_q": masking.cu_seqlens_q, "cu_seqlens_k": masking.cu_seqlens_k}
    expect_tensors(attn_mask=mask, t_attn_mask=t_mask, **sequences)
    expect_bool("is_causal", masking.is_causal)
    shape = (*q.shape[:-1], k.shape[-2])
    if mask is not None:
        if mask.dtype not in (torch.bool, q.dtype):
            raise ValueError(
                f"attn_mask: expected torch.bool or the dtype of q, {q.dtype}, got {mask.dtype}"
            )
        if mask.device != q.device:
            raise ValueError(f"attn_mask: expected the device of q, {q.device}, got {mask.device}")
        _expect_broadcast("attn_mask", mask.shape, shape)
        if masking.is_causal:
            raise ValueError("is_causal: expected False where attn_mask is given, got True")
    if t_mask is not None:
        if mask is None or mask.dtype == torch.bool:
            got = "none" if mask is None else "a boolean one, which has no tangent"
            raise ValueError(f"t_attn_mask: expected an additive attn_mask beside it, got {got}")
        _expect_like("t_attn_mask", t_mask, q)
        if directions is None:
            _expect_broadcast("t_attn_mask", t_mask.shape, shape)
        else:
            if t_mask.dim() < 3 or (t_mask.shape[0] != 1 and t_mask.shape[0] != directions):
                raise ValueError(
                    f"t_attn_mask: expected {directions} directions in front as the other tangents "
                    f"have, got shape {tuple(t_mask.shape)}"
                )
            _expect_broadcast("t_attn_mask", t_mask.shape[1:], shape)
    if all(x is None for x in sequences.values()):
        return
    for name, x in sequences.items():
        if x is None:
            raise ValueError(f"{name}: expected a tensor, as the other of the two is, got None")
        if x.dtype not in _INDEX_DTYPES or x.dim() != 1 or len(x) < 2 or x.device != q.device:
            raise ValueError(
                f"{name}: expected int32 [S + 1] on {q.device}, got {x.dtype} {list(x.shape)} on "
                f"{x.device}"
            )
    if len(masking.cu_seqlens_q) != len(masking.cu_seqlens_k):
        raise ValueError(
            f"cu_seqlens_k: expected as many sequences as cu_seqlens_q, "
            f"{len(masking.cu_seqlens_q) - 1}, got {len(masking.cu_seqlens_k) - 1}"
        )
    if mask is not None:
        raise ValueError("attn_mask: expected None where cu_seqlens_q is given, got a mask")
    if q.shape[0] != 1:
        raise ValueError(f"q: expected batch 1 where cu_seqlens_q is given, got {q.shape[0]}")
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        # On a GPU reading them would stop the host; kernels clamp them to the tensors instead.
        for name, rows in (("cu_seqlens_q", q.shape[-2]), ("cu_seqlens_k", k.shape[-2])):
            _expect_offsets(name, sequences[name], rows)


def _expect_broadcast(name: str, given: tuple[int, ...], shape: tuple[int, ...]) -> None:
    # No `in`: torch.compile decides it wrongly where a size is symbolic.
    fits = len(given) <= len(shape) and all(
        have == 1 or have == want
        for have, want in zip(reversed(given), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(f"{name}: expected a shape that broadcasts to {shape}, got {tuple(given)}")


def _expect_offsets(name: str, offsets: Tensor, rows: int) -> None:
    values = offsets.tolist()
    if values[0] != 0 or values[-1] != rows or any(a > b for a, b in pairwise(values)):
        raise ValueError(
            f"{name}: expected offsets that rise from 0 to the {rows} rows, got {values}"
        )
