"""Compile variants of the larger kernels for sm_90 as launched; no GPU needed.

    python tests/ops/_hopper.py [PART_OF_A_NAME ...]

Prints registers, bytes spilled per thread and bytes of shared memory of each; exits with 1 if one
has dots without tensor core instructions, spills, or asks for more shared memory than there is. Not
in a process that has imported Triton as an interpreter.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from fewstep.kernels import (
    _attention,
    attention_jvp,
    attention_jvp_backward,
    forecast_apply,
    gemm_fp8,
    gemm_w4a8,
    gemm_w4a16,
    gemm_w8a8,
    gemv_w4a16_grouped,
    norm_quantize_int8,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
    snapshot_store,
    token_gather,
    token_scatter,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED = 227 * 1024
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
WGMMA = r"wgmma\.mma_async"
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
KERNELS = {
    attention_jvp: ["_attention_jvp_fwd_kernel"],
    attention_jvp_backward: ["_attention_jvp_bwd_keys_kernel", "_attention_jvp_bwd_queries_kernel"],
    gemm_w8a8: ["_gemm_w8a8_kernel"],
    gemm_w4a8: ["_gemm_w4a8_kernel", "_fold_int4_kernel"],
    gemm_w4a16: ["_gemm_w4a16_kernel", "_gemv_w4a16_kernel"],
    gemv_w4a16_grouped: ["_gemv_w4a16_grouped_kernel"],
    quantize_int4: ["_quantize_int4_kernel"],
    quantize_fp8: ["_quantize_fp8_kernel"],
    quantize_int8: ["_quantize_int8_kernel"],
    norm_quantize_int8: ["_norm_quantize_int8_kernel"],
    forecast_apply: ["_forecast_apply_kernel"],
    snapshot_store: ["_snapshot_store_kernel", "_snapshot_store_finish_kernel"],
    token_gather: ["_token_gather_kernel"],
    token_scatter: ["_token_scatter_kernel"],
}


class Recorder:
    """Stands for a kernel and keeps what it is launched with."""

    def __init__(self, kernel, calls):
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.calls.append((self.kernel, args, kwargs))


def launches(launch) -> list:
    """Return (kernel, args, kwargs) of every launch that `launch` makes."""
    calls = []
    kernels = [
        (module, name, getattr(module, name)) for module in KERNELS for name in KERNELS[module]
    ]
    try:
        for module, name, kernel in kernels:
            setattr(module, name, Recorder(kernel, calls))
        launch()
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)
    return calls


def describe(value, path, constants, attributes):
    """Return the type of an argument as a launch would specialise it."""
    if isinstance(value, tuple):
        return tuple(
            describe(x, (*path, i), constants, attributes) for i, x in enumerate(value)
        )  # fmt: skip
    if isinstance(value, torch.Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return TYPES[value.dtype]
    if value is None or (isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, int):
        if value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32"
    return "fp32"


def compiled(kernel, args, kwargs, may_spill=0, products=WGMMA) -> tuple[dict[str, int], str]:
    """Return (resources, what is wrong with them or "")."""
    options = {n: kwargs.pop(n) for n in OPTIONS if n in kwargs}
    names, constants, attributes = kernel.arg_names, {}, {}
    signature = {
        names[i]: describe(value, (i,), constants, attributes) for i, value in enumerate(args)
    }
    for name, value in kwargs.items():
        signature[name] = "constexpr"
        constants[(names.index(name),)] = value
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    resources = {
        "registers": registers,
        "spilled": stack + local,
        "shared": result.metadata.shared,
    }
    wrong = []
    has_dots = "tt.dot " in result.asm["ttir"]
    if has_dots and products and not re.search(products, result.asm["ptx"]):
        wrong.append(f"no {products}")
    if resources["spilled"] > may_spill:
        wrong.append("spills")
    if resources["shared"] > SHARED:
        wrong.append("shared memory")
    return resources, ", ".join(wrong)


def tensors(d, nk=1000, directions=1, mask=None, sequences=0, is_causal=False):
    """Return (primals, tangents, masks) of one sample with 4 heads of 1000 queries; no data."""

    def new(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v = new(1, 4, 1000, d), new(1, 4, nk, d), new(1, 4, nk, d)
    tangents = [new(directions, *x.shape) if directions else None for x in (q, k, v)]
    shape = (1, 4, 1000, nk)
    attn_mask = t_attn_mask = offsets = None
    if mask == "bool":
        attn_mask = new(*shape, dtype=torch.bool)
    elif mask == "keys":
        attn_mask = new(1, 1, 1, nk, dtype=torch.bool).expand(shape)
    elif mask == "additive keys":
        attn_mask = new(1, 1, 1, nk).expand(shape)
        t_attn_mask = new(directions, 1, 1, 1, nk).expand(directions, *shape)
    elif mask == "additive":
        attn_mask, t_attn_mask = new(*shape), new(directions, *shape)
    if sequences:
        offsets = new(sequences + 1, dtype=torch.int32)
    return (
        (q, k, v),
        tangents,
        _attention.Masks(attn_mask, t_attn_mask, offsets, offsets, is_causal),
    )


def forward(d, directions=1, static=False, **options):
    """Return the launches of the forward."""
    primals, tangents, masks = tensors(d, directions=directions, **options)
    q = primals[0]
    if static:
        tangents[1:] = None, None
    rows = q.new_empty(q.shape[:3], dtype=torch.float32)
    outputs = (
        torch.empty_like(q), q.new_empty((directions, *q.shape)),
        rows, rows.new_empty((directions, *rows.shape)), rows if masks.additive else None,
    )  # fmt: skip
    return launches(
        lambda: attention_jvp.launch_attention_jvp(primals, tangents, masks, outputs, 0.3),
    )


def backward(d, plain=False, **options):
    """Return the launches of the backward."""
    primals, tangents, masks = tensors(d, **options)
    q = primals[0]
    rows = q.new_empty(q.shape[:3], dtype=torch.float32)
    tangents = [x[0] for x in tangents]
    if masks.t_attn_mask is not None:
        masks = _attention.Masks(masks.attn_mask, masks.t_attn_mask[0])
    gradients, cotangents = (*primals, *primals), (q, q)
    stats = (rows, rows, rows if masks.additive else None, rows, rows)
    if plain:
        gradients = (*primals, None, None, None)
        tangents, cotangents, stats = [None] * 3, (q, None), (rows, None, None, None, rows)
    return launches(
        lambda: attention_jvp_backward.launch_attention_jvp_backward(
            cotangents, primals, tangents, stats, masks, gradients, 0.3
        ),
    )


def product(
    module, M, group=64, dtype=torch.bfloat16, R=32, activation=None, blend=False, blocks=0
):
    """Return the launches of a low-bit product with bias, and a branch where R is not 0.

    With `blend` there are a gate and a residual; e4m3 has scales of `blocks` of a, or 2: and of w.
    """
    N, K = 3072, 4096

    def new(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    a, scale = new(M, K, dtype=torch.int8), new(M, dtype=torch.float32)
    w = new(N, K // 2, dtype=torch.uint8), new(N, K // group, dtype=torch.bfloat16)
    if module in (gemm_w8a8, gemm_fp8):
        a = new(M, K, dtype=torch.uint8) if module is gemm_fp8 else a
        w = new(N, K, dtype=a.dtype), new(N, dtype=torch.float32)
    if blocks:
        scale = new(M, K // 128, dtype=torch.float32)
    if blocks == 2:
        w = w[0], new(N // 128, K // 128, dtype=torch.float32)
    left = (new(M, K),) if module is gemm_w4a16 else (a, scale)
    branch = (new(M, R), new(N, R)) if R else (None, None)
    launch = getattr(module, "launch_" + module.__name__.rpartition(".")[2])
    width = N // 2 if activation in ("geglu", "swiglu") else N
    blended = (new(1, width), new(M, width)) if blend else (None, None)
    end = (activation, *blended, new(M, width))
    return launches(lambda: launch(*left, *w, new(N), *branch, *end))


def grouped(M, group=64, dtype=torch.bfloat16):
    """Return the launch of FLUX.1's modulation layers, all of one input."""
    x = torch.empty((1, M, 3072), dtype=dtype, device="meta")
    widths = [18432] * 38 + [9216] * 38
    w = [x.new_empty((N, 1536), dtype=torch.uint8) for N in widths]
    w_scale = [x.new_empty((N, 3072 // group), dtype=torch.bfloat16) for N in widths]
    bias, out = [x.new_empty(N) for N in widths], x.new_empty(M * sum(widths))
    launch, memory = gemv_w4a16_grouped.launch_gemv_w4a16_grouped, [0] * 3 * len(widths)
    return launches(lambda: launch(x, w, w_scale, bias, memory, out))


def quantize_rows(rotate, activation=None):
    """Return the launches of the int8 quantisation of rows, activated, smoothed and rotated."""
    smooth = torch.empty(3072, dtype=torch.bfloat16, device="meta")
    x = smooth.new_empty((4096, 6144 if activation == "geglu" else 3072))
    q, scale = x.new_empty((4096, 3072), dtype=torch.int8), x.new_empty(4096).float()
    inputs = x, smooth, rotate, activation
    return launches(lambda: quantize_int8.launch_quantize_int8(*inputs, q, scale))


def quantize_blocks(size, dtype, rotate=0):
    """Return the launches of the e4m3 quantisation of rows, in blocks of `size`."""
    x = torch.empty((4096, 3072), dtype=dtype, device="meta")
    q, scale = x.new_empty(x.shape, dtype=torch.uint8), x.new_empty((4096, 3072 // size)).float()
    outputs = q, scale, size
    return launches(lambda: quantize_fp8.launch_quantize_fp8(x, x[0], rotate, None, *outputs))


def quantize(group, dtype, rotate=0):
    """Return the launches of the 4-bit quantisation of a weight."""
    w = torch.empty((3072, 4096), dtype=dtype, device="meta")
    q, scale = w.new_empty((3072, 2048), dtype=torch.uint8), w.new_empty((3072, 4096 // group))
    outputs = q, scale.bfloat16()
    return launches(lambda: quantize_int4.launch_quantize_int4(w, rotate, *outputs))


def norm_quantize(columns, whole=True, rotate=0):
    """Return the launches of a modulated norm in int8, `whole` with all its operands."""
    x = torch.empty((2, 1024, columns), dtype=torch.bfloat16, device="meta")
    row, table = (
        (x.new_empty(columns).float(), x.new_empty((2, 1, columns))) if whole else [None] * 2
    )
    modulation = table if table is None else table.expand(x.shape)
    out = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1]).float()
    return launches(
        lambda: norm_quantize_int8.launch_norm_quantize_int8(
            x, row, row, modulation, modulation, row, rotate, *out, True, 1e-6
        )
    )


def slots(dtype, columns=3072, int4=False, count=3):
    """Return the launches that store a snapshot with its products, and of a forecast."""
    x = torch.empty((1, 4608, columns), dtype=torch.bfloat16, device="meta")
    ring = x.new_empty((count, 1, 4608, columns // 2 if int4 else columns), dtype=dtype)
    scale = None if dtype == torch.bfloat16 else x.new_empty((count, 1, 4608, -(-columns // 128)))
    scale = scale if scale is None else scale.float()
    step, table = x.new_empty(1, dtype=torch.int64), x.new_empty((50, count)).float()
    gram = x.new_empty((1, count)).float()

    def launch():
        snapshot_store.launch_snapshot_store(x, x, ring, scale, 0, step, 128, gram)
        forecast_apply.launch_forecast_apply(ring, table, x, scale, step, 128, x)

    return launches(launch)


def tokens(columns, whole, kind=torch.int64):
    """Return the launches that gather tokens and scatter them, `whole` with all operands."""
    x = torch.empty((2, 4096, columns), dtype=torch.bfloat16, device="meta")
    chosen, rows = x.new_empty((2, 1024, columns)), x.new_empty((2, 2 * columns)).chunk(2, -1)
    index, position = (x.new_empty((2, n), dtype=kind) for n in (1024, 4096))
    scale, shift, base = (*rows, x) if whole else (None, None, None)

    def launch():
        token_gather.launch_token_gather(x, index, scale, shift, chosen, whole, 1e-6)
        token_scatter.launch_token_scatter(chosen, position, base, scale, x, whole)

    return launches(launch)


# What is known to spill, bytes a thread at most.
SPILLED = {
    "forward 256 additive": 64,
    "forward 256 causal": 64,
    "backward 72": 16,
    "backward 256": 1024,
}
if triton.__version__.startswith("3.6."):  # its ptxas is CUDA 12.8's
    SPILLED |= {
        "backward 64 additive": 32,
        "backward 72": 104,
        "backward 128": 32,
        "backward 128 additive": 24,
        "gemm_w8a8 4096 alone": 16,  # three words, behind the loop
    }
# Few enough to compile within a minute or two: each head dim, each kind of masking.
VARIANTS = {
    "forward 32": lambda: forward(32, directions=3),
    "forward 32 causal": lambda: forward(32, is_causal=True, directions=3),
    "forward 32 additive": lambda: forward(32, mask="additive", directions=3),
    "forward 64": lambda: forward(64, directions=3),  # as chunks of 2 and 1
    "forward 64 static": lambda: forward(64, static=True, directions=2),
    "forward 64 additive": lambda: forward(64, mask="additive", directions=2),
    "forward 64 additive keys": lambda: forward(64, mask="additive keys", directions=2),
    "forward 64 bool": lambda: forward(64, mask="bool"),
    "forward 64 sequences causal": lambda: forward(64, sequences=9, is_causal=True, directions=3),
    "forward 72": lambda: forward(72, directions=2),
    "forward 128": lambda: forward(128, directions=2),
    "forward 128 static": lambda: forward(128, static=True),
    "forward 128 bool": lambda: forward(128, mask="bool"),
    "forward 128 keys": lambda: forward(128, mask="keys"),
    "forward 128 additive": lambda: forward(128, mask="additive", directions=2),
    "forward 128 causal": lambda: forward(128, is_causal=True, directions=2),
    "forward 256": lambda: forward(256, directions=2),
    "forward 256 additive": lambda: forward(256, mask="additive", directions=2),
    "forward 256 causal": lambda: forward(256, is_causal=True),
    "backward 64": lambda: backward(64),
    "backward 64 additive": lambda: backward(64, mask="additive"),
    "backward 72": lambda: backward(72),
    "backward 128": lambda: backward(128),
    "backward 128 plain": lambda: backward(128, plain=True),
    "backward 128 causal": lambda: backward(128, is_causal=True),
    "backward 128 keys": lambda: backward(128, mask="keys"),
    "backward 128 additive": lambda: backward(128, mask="additive"),
    "backward 256": lambda: backward(256),
    "gemm_w8a8 16": lambda: product(gemm_w8a8, 16),
    "gemm_w8a8 4096": lambda: product(gemm_w8a8, 4096),
    "gemm_w8a8 4096 float32": lambda: product(gemm_w8a8, 4096, dtype=torch.float32),
    "gemm_w8a8 4096 alone": lambda: product(gemm_w8a8, 4096, R=0),
    "gemm_fp8 16": lambda: product(gemm_fp8, 16),
    "gemm_fp8 4096": lambda: product(gemm_fp8, 4096),
    "gemm_fp8 4096 float32": lambda: product(gemm_fp8, 4096, dtype=torch.float32),
    "gemm_fp8 4096 alone": lambda: product(gemm_fp8, 4096, R=0),
    "gemm_fp8 4096 blocks": lambda: product(gemm_fp8, 4096, blocks=1),
    "gemm_fp8 4096 squares": lambda: product(gemm_fp8, 4096, blocks=2),
    "gemm_fp8 16 squares": lambda: product(gemm_fp8, 16, blocks=2),
    "gemm_fp8 4096 geglu": lambda: product(gemm_fp8, 4096, activation="geglu"),
    "gemm_w8a8 4096 blend": lambda: product(gemm_w8a8, 4096, blend=True),
    "gemm_w8a8 4096 gelu": lambda: product(gemm_w8a8, 4096, R=0, activation="gelu", blend=True),
    "gemm_w8a8 4096 geglu": lambda: product(gemm_w8a8, 4096, activation="geglu"),
    "gemm_w8a8 16 swiglu": lambda: product(gemm_w8a8, 16, activation="swiglu"),
    "gemm_w4a8 512 geglu": lambda: product(gemm_w4a8, 512, activation="geglu", blend=True),
    "gemm_w4a8 16 gelu_tanh": lambda: product(gemm_w4a8, 16, activation="gelu_tanh"),
    "gemm_w4a16 2 swiglu": lambda: product(gemm_w4a16, 2, activation="swiglu", blend=True),
    "gemm_w4a16 64 geglu": lambda: product(gemm_w4a16, 64, activation="geglu", blend=True),
    "gemm_w4a8 16": lambda: product(gemm_w4a8, 16),
    "gemm_w4a8 64 group 128": lambda: product(gemm_w4a8, 64, group=128),
    "gemm_w4a8 512": lambda: product(gemm_w4a8, 512),
    "gemm_w4a8 512 float32": lambda: product(gemm_w4a8, 512, dtype=torch.float32),
    "gemm_w4a8 512 group 32": lambda: product(gemm_w4a8, 512, group=32, dtype=torch.float16),
    "gemm_w4a8 512 group 128": lambda: product(gemm_w4a8, 512, group=128),
    "gemm_w4a8 4096 group 32": lambda: product(gemm_w4a8, 4096, group=32),
    "gemm_w4a8 4096 group 128": lambda: product(gemm_w4a8, 4096, group=128),
    "gemm_w4a16 1": lambda: product(gemm_w4a16, 1),
    "gemv_w4a16_grouped 1": lambda: grouped(1),
    "gemv_w4a16_grouped 2": lambda: grouped(2, group=128),
    "gemv_w4a16_grouped 8": lambda: grouped(8),
    "gemv_w4a16_grouped 8 float32": lambda: grouped(8, group=32, dtype=torch.float32),
    "gemm_w4a16 2": lambda: product(gemm_w4a16, 2, group=32),
    "gemm_w4a16 8 float32": lambda: product(gemm_w4a16, 8, dtype=torch.float32),
    "gemm_w4a16 8": lambda: product(gemm_w4a16, 8),
    "gemm_w4a16 64 group 32": lambda: product(gemm_w4a16, 64, group=32, dtype=torch.float16),
    "gemm_w4a16 1024": lambda: product(gemm_w4a16, 1024),
    "gemm_w4a16 1024 group 128": lambda: product(gemm_w4a16, 1024, group=128),
    "gemm_w4a16 1024 float32": lambda: product(gemm_w4a16, 1024, dtype=torch.float32),
    "quantize_int4 32": lambda: quantize(32, torch.float32),
    "quantize_int4 128": lambda: quantize(128, torch.bfloat16),
    "norm_quantize_int8 1152": lambda: norm_quantize(1152),
    "norm_quantize_int8 5120": lambda: norm_quantize(5120),
    "norm_quantize_int8 3072 rotated": lambda: norm_quantize(3072, rotate=256),
    "norm_quantize_int8 16384 alone": lambda: norm_quantize(16384, whole=False),
    "quantize_int8": lambda: quantize_rows(0),
    "quantize_int8 rotated": lambda: quantize_rows(256),
    "quantize_int8 geglu": lambda: quantize_rows(0, "geglu"),
    "quantize_int8 gelu_tanh": lambda: quantize_rows(0, "gelu_tanh"),
    "quantize_int4 32 rotated": lambda: quantize(32, torch.bfloat16, 256),
    "quantize_fp8 row": lambda: quantize_blocks(3072, torch.bfloat16),
    "quantize_fp8 row rotated": lambda: quantize_blocks(3072, torch.bfloat16, 256),
    "quantize_fp8 128 rotated": lambda: quantize_blocks(128, torch.bfloat16, 128),
    "quantize_fp8 128": lambda: quantize_blocks(128, torch.float32),
    "slots bfloat16": lambda: slots(torch.bfloat16),
    "slots int8": lambda: slots(torch.int8),
    "slots e4m3": lambda: slots(torch.uint8),
    "slots int4": lambda: slots(torch.uint8, int4=True),
    "tokens": lambda: tokens(3072, False),
    "tokens whole": lambda: tokens(1152, True, torch.int32),
    "slots e4m3 of broken groups": lambda: slots(torch.uint8, columns=3000, count=8),
}
# Tiles of few rows do without warpgroups; a product that keeps float32's accuracy without either.
ANY_TENSOR_CORES = rf"{WGMMA}|mma\.sync"
WITHOUT_TENSOR_CORES = ("gemm_w4a16 1024 float32",)


def products_of(name: str) -> str | None:
    """Return what the PTX of a variant's dots must hold."""
    if name in WITHOUT_TENSOR_CORES:
        return None
    if name.startswith("gemm_fp8 4096"):
        return rf"{WGMMA}\S*e4m3\.e4m3"
    return ANY_TENSOR_CORES if name.startswith("gemm") else WGMMA


def main(parts: list[str]) -> int:
    """Compile the variants whose name has one of `parts` in it; return how many are wrong."""
    failures = 0
    for name, variant in VARIANTS.items():
        if parts and not any(part in name for part in parts):
            continue
        for kernel, args, kwargs in variant():
            resources, wrong = compiled(
                kernel, args, kwargs, SPILLED.get(name, 0), products_of(name)
            )
            failures += bool(wrong)
            print(name, kernel.fn.__name__, resources, wrong, flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) != 0)
