"""8-bit outputs of a product by limits that are known before it runs, for the layer that follows.

    v        [..., M, N']   what the product returns in float32
    limit    [..., M]       the magnitude that each row is expected to keep to
    int8     q = round(clamp(v (127 / limit), +-127))     scale = limit / 127
    e4m3     q = round(clamp(v / (limit / 448), +-448))   scale = limit / 448
    amax     [..., M]       max_n |v_mn|
    exceeded []             how many outputs |v| <= limit does not hold for

A scale of a row's own has to wait until the row is whole; one that is given does not, so the end of
a product can write 8 bits, and nothing in 16 is written and read again. Neighbouring steps of a
sampler have nearly the same activations: the limit is the amax of the step before, times a margin.
What exceeds it is cut off, and counted.

float32 throughout, one rounding. Where limit is the row's amax q and scale are, to the bit, those
of `quantize_int8` or `quantize_fp8` of v. A limit g times amax costs int8 20 log10(g) dB; e4m3
loses that a row's largest value is exact, up to 2 dB for rows of few extremes. A limit too small
for a normal scale has scale 1 and q 0. A row that holds an infinity or a NaN, or whose limit is
one, has scale NaN, and no particular q. scale, amax and exceeded are views of one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..reference._requantize import requantize
from ._expect import expect_tensor
from ._gemm import SCHEMA, Operands, expect, launch_group
from ._register import register
from ._select import Implementation, select

Requantized = tuple[Tensor, Tensor, Tensor, Tensor]
_SCHEMA = SCHEMA.replace(
    "ScalarType out_dtype, str impl) -> Tensor",
    "Tensor limit, str impl) -> (Tensor, Tensor)",
)


def register_requantized(
    name: str, form: torch.dtype, implementations: Callable[[], Sequence[Implementation]]
) -> Callable[..., Requantized]:
    """Register `<name>_requantized` and return (operands, limit, impl) -> (q, scale, ...).

    `implementations()` are those of `name`, asked for at every choice. It has no derivative. On
    Hopper the native kernel does it in its end; all others return float32 and leave the rest to
    eager torch, which on CPUs is what int8 outputs cost anyhow.
    """

    def outputs(p: Operands) -> tuple[Tensor, Tensor]:
        # scale, amax and exceeded in 32 bits: one behind the other, they are zeroed at once.
        found = 2 * math.prod(p.a.shape[:-1]) + 1
        return p.new_output(form), p.a.new_empty(found, dtype=torch.int32)

    def run_with(way: Implementation) -> Callable[..., tuple[Tensor, Tensor]]:
        def run(*args: Any) -> tuple[Tensor, Tensor]:
            *operands, limit = args
            p = Operands(*operands, torch.float32)
            if way.name == "native" and p.a.device.type == "cuda":
                q, found = outputs(p)
                if q.numel():
                    launch_group(form, [p], [q], [(limit, *_apart(found, limit.shape))])
                    return q, found
            q, *found = requantize(way.run(*p), limit, form)
            return q, torch.cat([x.reshape(-1).view(torch.int32) for x in found])

        return run

    def fake(*args: Any) -> tuple[Tensor, Tensor]:
        return outputs(Operands(*args[:-2], torch.float32))

    ways = [replace(way, run=run_with(way)) for way in implementations()]
    op = register(f"{name}_requantized", _SCHEMA, ways, fake)

    def call(p: Operands, limit: Tensor, out_dtype: torch.dtype | None, impl: str) -> Requantized:
        expect_tensor("limit", limit)
        expect("limit", limit, tuple(p.a.shape[:-1]), (torch.float32,), p.a.device)
        if out_dtype != form:
            raise ValueError(f"out_dtype: expected {form} with limit, got {out_dtype}")
        chosen = select(name, impl, implementations(), *p[:-1], out_dtype, limit=limit)
        q, found = op(*p[:-1], limit, chosen)
        return q, *_apart(found, limit.shape)

    return call


def _apart(found: Tensor, rows: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return scale and amax [..., M] and exceeded [] of the numbers that an op returns as one."""
    M = math.prod(rows)
    scale, amax = (found[i * M : (i + 1) * M].view(torch.float32).view(rows) for i in (0, 1))
    return scale, amax, found[2 * M]


def gate_limits(
    device: torch.device, weight: Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]
) -> list[tuple[tuple[Any, ...], dict[str, Any], float, float]]:
    """Return gate cases of 8-bit outputs by limits; as `gate_layers` of `_gemm.py`."""
    from ._gemm import TILED_SHAPES

    generator = torch.Generator().manual_seed(3)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], float, float]] = []
    for M, N, K in (*TILED_SHAPES, (130, 132, 208)):
        w, w_scale = (x.to(device) for x in weight(N, K, generator))
        w_scale = 2.0**14 * w_scale
        dtype = torch.int8 if w.dtype == torch.int8 else w.dtype
        x = torch.randn((M, K), generator=generator).to(device, torch.bfloat16)
        # Of outputs of about 2^14; none exceeds 2^18. Where sums fall to different sides of a
        # rounding, q is off by one, or by a unit of e4m3's 3 bits; scale and amax are thousands.
        options = {"activation": "gelu_tanh", "limit": torch.full((M,), 2.0**18, device=device)}
        cases.append(((x, None, w, w_scale), {**options, "out_dtype": dtype}, 2.0**-3, 1.0))
    return cases
