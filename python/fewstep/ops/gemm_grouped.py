"""Products of `gemm_w8a8` or `gemm_fp8`, of several rows and weights of one width, in one launch.

    out_i = gemm_w8a8(a_i, a_scale_i, w_i, w_scale_i, ...)      int8 weights, to the bit
    out_i = gemm_fp8(a_i, a_scale_i, w_i, w_scale_i, ...)       e4m3 weights, to the bit

a_i      [..., M_i, K]   w_i  [N, K]   out_i  [..., M_i, N']
bias_i, smooth_i, down_i, up_i, low_i, gate_i, residual_i, rotate, activation   as there

Models with two streams (FLUX's double blocks, SD3, Qwen-Image) run the same layer on image and text
tokens with a weight for each. FLUX's text product alone, 512 x 3072 x 3072, leaves a quarter of a
GPU's 132 multiprocessors idle. In one launch the tiles of all problems make one list. So do a
block's projections to q, k and v, of either stream.

On Hopper native code does it in one launch, of at most eight problems, where its plan says that it
pays. Everyone else runs the problems one after the other. There is no derivative: the single ops
have one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference.gemm_grouped import gemm_grouped as _reference
from ._expect import expect_tensor
from ._gemm import E4M3, INT8, Operands, launch_group, rounding_dtype, triton_operands
from ._gemm_hopper import refuse_hopper
from ._layout import FLOATS, matrix
from ._register import register
from ._select import NO_RUN_YET, Implementation, refuse_native, refuse_triton, select
from .gemm_fp8 import _validate as _validate_fp8
from .gemm_w8a8 import _validate as _validate_w8a8

__all__ = ["gemm_grouped"]

MAX_PROBLEMS = 8  # kMostProblems of csrc/include/fewstep/cuda/gemm8_sm90.cuh
_INPUTS = (INT8, E4M3, *FLOATS)
_SHARED = ("rotate", "activation", "out_dtype")  # one for all problems


def _problems(*args: Any) -> list[Operands]:
    """Return the problems of arguments in the order of the schema, which is that of Operands."""
    named = dict(zip(Operands._fields, args, strict=True))
    return [
        Operands(*(x if name in _SHARED else x[i] for name, x in named.items()))
        for i in range(len(named["a"]))
    ]


def _format(p: Operands) -> torch.dtype:
    return INT8 if p.w.dtype == torch.int8 else E4M3


def _run_reference(*args: Any) -> list[Tensor]:
    named = dict(zip(Operands._fields, args, strict=True))
    first = [named.pop(name) for name in ("a", "a_scale", "w", "w_scale")]
    return [out.contiguous() for out in _reference(*first, **named)]


def _run_native(*args: Any) -> list[Tensor]:
    problems = _problems(*args)
    outs = [p.new_output() for p in problems]
    some = [i for i, out in enumerate(outs) if out.numel()]
    if some:
        form = _format(problems[0])
        launch_group(form, [problems[i] for i in some], [outs[i] for i in some])
    return outs


def _run_triton(*args: Any) -> list[Tensor]:
    from ..kernels.gemm_grouped import launch_gemm_grouped

    problems = _problems(*args)
    outs = [p.new_output() for p in problems]
    launch_gemm_grouped(
        [
            (*triton_operands(p, _format(p)), matrix(out))
            for p, out in zip(problems, outs, strict=True)
            if out.numel()
        ]
    )
    return outs


def _refuse_native(a: Sequence[Tensor], *rest: Any, **options: Any) -> str | None:
    reason = refuse_native("gemm_grouped", [a[0]], _INPUTS)
    if reason is not None or a[0].device.type != "cuda":
        return reason
    if len(a) > MAX_PROBLEMS:
        return f"the Hopper kernel: expected at most {MAX_PROBLEMS} products, got {len(a)}"
    named = dict(zip(Operands._fields, (a, *rest), strict=False)) | options
    for i in range(len(a)):
        own = {
            name: x[i] if isinstance(x, (list, tuple)) and name not in _SHARED else x
            for name, x in named.items()
        }
        reason = refuse_hopper(**own)
        if reason is not None:
            return f"problem {i}: {reason}"
    return None


IMPLEMENTATIONS = (
    Implementation("native", _run_native, _refuse_native, held_back=NO_RUN_YET),
    Implementation("triton", _run_triton, lambda a, *_, **__: refuse_triton([a[0]], _INPUTS)),
    Implementation("reference", _run_reference, lambda *_, **__: None),
)


def _fake(*args: Any) -> list[Tensor]:
    return [p.new_output() for p in _problems(*args[:-1])]


_op = register(
    "gemm_grouped",
    "(Tensor[] a, Tensor?[] a_scale, Tensor[] w, Tensor[] w_scale, Tensor?[] bias,"
    " Tensor?[] smooth, int rotate, Tensor?[] down, Tensor?[] up, Tensor?[] low, str? activation,"
    " Tensor?[] gate, Tensor?[] residual, ScalarType out_dtype, str impl) -> Tensor[]",
    IMPLEMENTATIONS,
    _fake,
)


def gemm_grouped(
    a: Sequence[Tensor],
    a_scale: Sequence[Tensor | None] | None,
    w: Sequence[Tensor],
    w_scale: Sequence[Tensor],
    *,
    bias: Sequence[Tensor | None] | None = None,
    smooth: Sequence[Tensor | None] | None = None,
    rotate: int = 0,
    down: Sequence[Tensor | None] | None = None,
    up: Sequence[Tensor | None] | None = None,
    low: Sequence[Tensor | None] | None = None,
    activation: str | None = None,
    gate: Sequence[Tensor | None] | None = None,
    residual: Sequence[Tensor | None] | None = None,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> list[Tensor]:
    """Return for each problem what `gemm_w8a8` (int8 w) or `gemm_fp8` (e4m3 w) returns.

    Args:
        a: [..., M_i, K] each, of one dtype.
        a_scale: one each, or None for all where `a` is floating.
        w: [N, K] each, of one dtype.
        w_scale: one each.
        bias, smooth, down, up, low, gate, residual: one or None each, or None for all.
        rotate, activation: of all problems.
        out_dtype: of all problems: float32, bfloat16 or float16, by default as there.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        A list of [..., M_i, N'].

    Raises:
        ValueError: a shape, dtype, device or number of tensors does not fit; the message names the
            argument and the problem.
        TypeError: an argument is no tensor, or no list of them.
        UnsupportedError: `impl` can't serve these tensors.
        DerivativeError: a tensor carries a tangent or requires grad.
    """
    if out_dtype is not None and out_dtype not in FLOATS:
        raise ValueError(f"out_dtype: expected float32, bfloat16 or float16, got {out_dtype}")
    lists = {"a": a, "a_scale": a_scale, "w": w, "w_scale": w_scale, "bias": bias, "smooth": smooth}
    lists |= {"down": down, "up": up, "low": low, "gate": gate, "residual": residual}
    lists = {name: _entries(name, x, a) for name, x in lists.items()}
    first = lists["a"][0]
    rounded = rounding_dtype(first, out_dtype) if isinstance(first, Tensor) else torch.float32
    shared = {"rotate": rotate, "activation": activation, "out_dtype": rounded}
    ordered = [(lists | shared)[name] for name in Operands._fields]
    problems = _problems(*ordered)
    _expect_alike(problems)
    return _op(*ordered, select("gemm_grouped", impl, IMPLEMENTATIONS, *ordered))


def _entries(name: str, given: Any, a: Any) -> list[Any]:
    """Return an argument as a list with an entry for each problem."""
    if given is None and name not in ("a", "w", "w_scale"):
        return [None] * len(a)
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"{name}: expected a list of tensors, got {type(given).__name__}")
    if not a or len(given) != len(a):
        wanted = f"{len(a)} tensors, one for each a" if a else "at least one problem"
        raise ValueError(f"{name}: expected {wanted}, got {len(given)}")
    return list(given)


def _expect_alike(problems: list[Operands]) -> None:
    first = problems[0]
    for i, p in enumerate(problems):
        try:
            expect_tensor("a", p.a)
            is_int8 = isinstance(p.w, Tensor) and p.w.dtype == torch.int8
            (_validate_w8a8 if is_int8 else _validate_fp8)(p)
        except (TypeError, ValueError) as error:
            raise type(error)(f"problem {i}: {error}") from None
        for name, x, want in (("w", p.w, first.w), ("a", p.a, first.a)):
            if (x.dtype, x.device) != (want.dtype, want.device):
                raise ValueError(
                    f"problem {i}: {name}: expected {want.dtype} on {want.device} as in problem 0, "
                    f"got {x.dtype} on {x.device}"
                )
        if p.w.shape != first.w.shape:
            raise ValueError(
                f"problem {i}: w: expected shape {list(first.w.shape)} as in problem 0, "
                f"got {list(p.w.shape)}"
            )


def gate_cases(device: torch.device) -> list[tuple[tuple[Any, ...], dict[str, Any], float, float]]:
    """Return (args, kwargs, rtol, atol) for the gate on a new machine; see `_gate.check`."""
    from .gemm_fp8 import gate_cases as of_fp8
    from .gemm_w8a8 import gate_cases as of_w8a8

    cases: list[tuple[tuple[Any, ...], dict[str, Any], float, float]] = []
    for single in (of_w8a8, of_fp8):
        for (a, a_scale, w, w_scale), options, *bounds in single(device):
            if options.get("activation") != "geglu":  # every tiling, with all of an end
                continue
            # The case with all its rows, and beside it the same weight with a third of them.
            few = slice(a.shape[0] // 3 + 1)
            rows = ("low", "residual")
            lists = {
                name: [x, x[few] if name in rows else x]
                for name, x in options.items()
                if isinstance(x, Tensor)
            }
            shared = {name: x for name, x in options.items() if not isinstance(x, Tensor)}
            scales = None if a_scale is None else [a_scale, a_scale[few]]
            args = ([a, a[few]], scales, [w, w], [w_scale, w_scale])
            cases.append((args, {**lists, **shared}, *bounds))
    return cases
