"""Storing a snapshot in a slot of a ring, and its inner products with all slots, in one pass.

    r = x - base
    scale = max |r| / top                   over groups of neighbours along C
    code = round(r * (top / max |r|))       to nearest, ties to even
    gram[b, k] = sum value[slot] * value[k]        of values as stored, the new slot's included

x, base    [B, ..., C]        any floating dtypes (float64 only together with the ring's)
snapshots  [K, B, ..., C]     and scale: `_slots.py`; written in place
           floats             r rounded to the dtype; no scale
           int8, e4m3, int4   top 127, 448, 7
slot       which of K: an int, or int64 of one element on the device
gram       [B, K]             float32 (float64 for float64)

One float32 subtraction, two divisions a group, one product and one rounding a value, in this order:
all implementations store the same bits. The error is half a scale for int8 and int4 and 2^-4 of the
value for e4m3 (2^-10 of the scale near zero). A group whose maximum is below top * 2^-126 counts as
zero: scale 0, codes 0. One that holds an infinity or a NaN gets scale NaN and codes 0.

Products are summed in float32 within chunks of 16,384 values and in float64 across, in a fixed
order. Entries of slots that nothing was stored in mean nothing, and don't touch the others.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..reference.snapshot_store import snapshot_store as _reference
from ._expect import expect_bool, expect_tensor, expect_tensors
from ._layout import DTYPES, FLOATS, samples
from ._register import register
from ._select import Implementation, refuse_native, refuse_triton, select
from ._slots import CODES, expect_ring, ring_views

__all__ = ["snapshot_store"]

CHUNK = 16384
LINE = 1024  # of floats; of codes it is a group


def chunks_of(rows: int, columns: int, length: int) -> int:
    """Return in how many parts the native kernels sum the products of a sample."""
    length = max(1, min(columns, length))
    lines = rows * -(-columns // length)
    return -(-lines // max(1, CHUNK // length))


def _gram(x: Tensor, snapshots: Tensor, gram: bool) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((x.shape[0], snapshots.shape[0]) if gram else (0,), dtype=dtype)


def _written(*tensors: Tensor | None) -> None:
    # What autograd has saved of them is no longer true, which it finds out by this counter.
    torch.autograd.graph.increment_version([x for x in tensors if x is not None])


def _run_reference(
    x: Tensor,
    snapshots: Tensor,
    slot: int,
    slot_at: Tensor | None,
    base: Tensor | None,
    scale: Tensor | None,
    group: int,
    gram: bool,
) -> Tensor:
    at = slot if slot_at is None else slot_at
    found = _reference(x, snapshots, slot=at, base=base, scale=scale, group=group, gram=gram)
    return _gram(x, snapshots, False) if found is None else found.contiguous()


def _run_kernel(
    launch: Any,
    x: Tensor,
    snapshots: Tensor,
    slot: int,
    slot_at: Tensor | None,
    base: Tensor | None,
    scale: Tensor | None,
    group: int,
    gram: bool,
) -> Tensor:
    products = _gram(x, snapshots, gram)
    ring, scales = ring_views(snapshots, scale)
    x3, rows = samples(x), None if base is None else samples(base)
    if scale is None and x3.is_contiguous() and (rows is None or rows.is_contiguous()):
        # Floats have no groups that a row's end cuts off: a sample is one row.
        x3, ring = x3.view(x3.shape[0], 1, math.prod(x.shape[1:])), ring.flatten(2)[:, :, None]
        rows = rows if rows is None else rows.view(x3.shape)
    at = slot_at if slot_at is None else slot_at.view(1)
    launch(x3, rows, ring, scales, slot, at, group, products if gram else None)
    _written(snapshots, scale)
    return products


def _launch_native(
    x: Tensor,
    base: Tensor | None,
    ring: Tensor,
    scale: Tensor | None,
    slot: int,
    slot_at: Tensor | None,
    group: int,
    gram: Tensor | None,
) -> None:
    partials = None
    if gram is not None:
        chunks = chunks_of(x.shape[1], x.shape[2], LINE if scale is None else group)
        partials = x.new_empty((x.shape[0], chunks, ring.shape[0]), dtype=torch.float64)
    _native.call("snapshot_store", x, base, ring, scale, slot, slot_at, group, partials, gram)


def _run_native(*args: Any) -> Tensor:
    return _run_kernel(_launch_native, *args)


def _run_triton(*args: Any) -> Tensor:
    from ..kernels.snapshot_store import launch_snapshot_store

    return _run_kernel(launch_snapshot_store, *args)


def _native_dtypes(x: Tensor) -> tuple[torch.dtype, ...]:
    return DTYPES if x.device.type == "cpu" else FLOATS


IMPLEMENTATIONS = (
    Implementation(
        "native",
        _run_native,
        lambda x, *args, **kwargs: refuse_native("snapshot_store", [x], _native_dtypes(x)),
    ),
    Implementation("triton", _run_triton, lambda x, *args, **kwargs: refuse_triton([x], FLOATS)),
    Implementation("reference", _run_reference, lambda *args, **kwargs: None),
)


def _fake(
    x: Tensor,
    snapshots: Tensor,
    slot: int,
    slot_at: Tensor | None,
    base: Tensor | None,
    scale: Tensor | None,
    group: int,
    gram: bool,
    impl: str,
) -> Tensor:
    return _gram(x, snapshots, gram)


_op = register(
    "snapshot_store",
    "(Tensor x, Tensor(a!) snapshots, int slot, Tensor? slot_at, Tensor? base, Tensor(b!)? scale,"
    " int group, bool gram, str impl) -> Tensor",
    IMPLEMENTATIONS,
    _fake,
)


def _expect_like(name: str, x: Tensor, ring: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        raise ValueError(
            f"{name}: expected the shape of a slot, {list(shape)}, got {list(x.shape)}"
        )
    if x.device != ring.device:
        raise ValueError(f"{name}: expected the device of snapshots, {ring.device}, got {x.device}")
    if x.dtype not in (FLOATS if ring.dtype != torch.float64 else (torch.float64,)):
        expected = "float64" if ring.dtype == torch.float64 else "float32, bfloat16 or float16"
        raise ValueError(
            f"{name}: expected {expected} with snapshots in {ring.dtype}, got {x.dtype}"
        )


def _expect_slot(slot: Any, ring: Tensor) -> None:
    slots = ring.shape[0]
    if isinstance(slot, Tensor):
        if slot.dtype != torch.int64 or slot.numel() != 1 or slot.device != ring.device:
            raise ValueError(
                f"slot: expected one element of int64 on {ring.device}, got {list(slot.shape)} of "
                f"{slot.dtype} on {slot.device}"
            )
    elif isinstance(slot, bool) or not isinstance(slot, (int, torch.SymInt)):
        raise TypeError(f"slot: expected an int or a tensor, got {type(slot).__name__}")
    elif not 0 <= slot < slots:
        raise ValueError(f"slot: expected one of 0 to {slots - 1}, got {slot}")


def snapshot_store(
    x: Tensor,
    snapshots: Tensor,
    *,
    slot: int | Tensor,
    base: Tensor | None = None,
    scale: Tensor | None = None,
    group: int = 128,
    gram: bool = False,
    impl: str = "auto",
) -> Tensor | None:
    """Store x, or x - base, in a slot of the ring, in place.

    Args:
        x: [B, ..., C], floating; any strides.
        snapshots: [K, B, ..., C], contiguous, K from 1 to 8: floating, float8_e4m3fn, int8 or int4
            (uint8, two a byte).
        slot: which slot. An int64 tensor of one element is read on the device, without a host
            sync; outside of the ring nothing is stored then, and the products are NaN.
        base: like x, subtracted first.
        scale: of codes, float32 [K, B, ..., ceil(C / group)], contiguous; written too.
        group: how many neighbours along C share a factor; even for int4.
        gram: return the inner products of the new slot with every slot, as stored.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        [B, K] in float32 with `gram`, else None.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: a shape, dtype, device or the layout of an argument does not fit.
        UnsupportedError: `impl` can't serve these tensors.
        DerivativeError: an input carries a tangent or requires grad.
    """
    expect_tensor("x", x)
    expect_tensors(base=base)
    shape = expect_ring(snapshots, scale, group)
    _expect_like("x", x, snapshots, shape)
    if base is not None:
        _expect_like("base", base, snapshots, shape)
    _expect_slot(slot, snapshots)
    expect_bool("gram", gram)
    chosen = select("snapshot_store", impl, IMPLEMENTATIONS, x)
    index, at = (-1, slot) if isinstance(slot, Tensor) else (slot, None)
    products = _op(x, snapshots, index, at, base, scale, group, gram, chosen)
    return products if gram else None


def gate_cases(device: torch.device) -> list[tuple[tuple[Any, ...], dict[str, Any], float, float]]:
    """Return (args, kwargs, rtol, atol) for the gate on a new machine; see `_gate.check`."""
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], float, float]] = []
    slot = torch.tensor(1, device=device)
    for dtype in (*FLOATS, *CODES):
        for shape, group in (((2, 7, 264), 8), ((3, 5, 3, 66), 32)):
            x, base = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
            columns = shape[-1] // 2 if dtype == torch.uint8 else shape[-1]
            ring = torch.zeros((3, *shape[:-1], columns), device=device).to(dtype)
            options: dict[str, Any] = {"slot": slot, "base": base.bfloat16(), "gram": True}
            if dtype in CODES:
                scale = torch.zeros((3, *shape[:-1], -(-shape[-1] // group)), device=device)
                options |= {"scale": scale, "group": group}
            # Sums of 16k products in float32; what is stored is the same to the bit.
            cases.append(((x, ring), options, 1e-5, 1e-4))
    return cases
