"""The fp64 oracle: plain forward mode through the model as if every float32 in it were float64.

    y, t_y = jvp(f, primals, tangents)    in fp64, attention as matmul and softmax

Models cast to float32 by name (rotary tables, norms, time embeddings, attention weights). In fp64
that would round, and some models then multiply a float by a double and fail; `Wide` reads those
casts as casts to float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel
from torch.overrides import TorchFunctionMode


class Wide(TorchFunctionMode):
    """Turns every float32 asked for by name into float64, and the default dtype too.

    `tables=False` leaves what is made from no fp64 tensor (rotary tables, frequencies) as it is.
    """

    def __init__(self, tables: bool = True) -> None:
        super().__init__()
        self._tables = tables

    def __enter__(self) -> Wide:
        self._default = torch.get_default_dtype()
        if self._tables:
            torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_default_dtype(self._default)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` with float64 for float32."""
        wide = bool(args) and torch.is_tensor(args[0]) and args[0].dtype is torch.float64
        if not (self._tables or wide):
            return func(*args, **(kwargs or {}))
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        kwargs = {key: _wide(value) for key, value in (kwargs or {}).items()}
        return func(*map(_wide, args), **kwargs)


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def dense_flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Any = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    **_: Any,
) -> torch.Tensor:
    """Compute flex_attention with a dense mask in plain operations: it has no forward mode."""
    assert score_mod is None, "no model under test modifies scores"
    mask = None
    if block_mask is not None:
        rows, columns = query.shape[-2], key.shape[-2]
        batch, heads = block_mask.kv_num_blocks.shape[:2]
        q_size, kv_size = block_mask.BLOCK_SIZE
        blocks = block_mask.to_dense().bool()
        blocks = blocks.repeat_interleave(q_size, -2).repeat_interleave(kv_size, -1)
        inside = flex_attention.create_mask(
            block_mask.mask_mod, batch, heads, rows, columns, device=query.device
        )
        mask = blocks[..., :rows, :columns] & inside
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    # A padded row sees no key: zeros, as from the kernel.
    return scores.softmax(-1).nan_to_num(0.0) @ value


class _Repaired(TorchFunctionMode):
    """F.group_norm's forward mode views its input and raises if that is not contiguous.

    Tensor.numpy raises inside torch.func.jvp. Models ask it of routing counts.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.group_norm:
            args = (args[0].contiguous(), *args[1:])
        if func is torch.Tensor.numpy:
            assert not args[0].is_floating_point(), "a tangent would be lost"
            return np.array(args[0].tolist())
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Make every attention of the models differentiable in forward mode, the slow plain way."""
    given = flex_attention.flex_attention
    flex_attention.flex_attention = dense_flex
    try:
        with sdpa_kernel(SDPBackend.MATH), _Repaired():
            yield
    finally:
        flex_attention.flex_attention = given


def oracle(
    function: Any,
    primals: tuple[torch.Tensor, ...],
    tangents: tuple[torch.Tensor, ...],
    tables: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (y, t_y) of an fp64 function."""
    with plain_attention(), Wide(tables):
        return torch.func.jvp(function, primals, tangents)
