"""The forms that a model is timed in: as it is, this library's low-bit layers, torchao's.

A form shares with the bfloat16 model whatever it does not replace, so both fit side by side.

Layers stay in bfloat16 for one of two reasons, which a record tells: `default_skip`'s, or the
table, a measurement on the machine at hand: each shape that occurs in the model, at its count of
rows, as torch's linear and as the low-bit layer from the floating input. Where torch's is faster,
all layers of that shape stay. torchao's forms replace all that `default_skip` lets through, by no
table: a record says which (`chosen_by`). Modulation layers of a form that groups them are in w4a16
by no table, either: one launch of all is not what a table of single layers has timed.

A low-rank branch has random factors here: finding those that quantising would (`low_rank.py`) takes
a singular value decomposition per layer, and changes neither time nor memory. Its `up` is small, so
that the outputs can still be compared.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep import ops, patching, quantization
from fewstep.bench.kernels import PRODUCT_OPS
from fewstep.bench.measure import Budget, clock, interleave, warm_up
from fewstep.bench.providers import needs
from fewstep.quantization import Plan, QuantLinear, Scheme, choose_layers, default_skip

LOW_BIT_OPS = tuple(op for op in ops.OPS if op.startswith(("gem", "quantize_", "norm_quantize_")))
TABLE_BUDGET = Budget(seconds=0.05, min_rounds=7, max_rounds=30, warmup_seconds=0.01)
_UP = 1e-3
Shape = tuple[int, int, int]  # rows, outputs, inputs


@dataclass(frozen=True)
class Form:
    """How a model's linear layers are stored and multiplied.

    scheme   of `fewstep.quantize`, or None
    norms    "fuse" lets norms quantise for the layers behind them
    group    keeps modulation layers in w4a16, all that read one input in one launch
    torchao  name of its config, with the arguments
    share    of bfloat16's bytes that it takes besides, roughly, for planning
    """

    name: str
    scheme: str | None = None
    norms: str | None = None
    group: bool = False
    torchao: tuple[str, dict[str, Any]] | None = None
    share: float = 0.55


BF16 = Form("bf16", share=1.0)
# In the order of what is wanted most, should the time run out.
FORMS = {
    form.name: form
    for form in (
        BF16,
        Form("w8a8", "w8a8"),
        Form("torchao fp8", torchao=("Float8DynamicActivationFloat8WeightConfig", {"row": True})),
        Form("fp8", "fp8"),
        Form("w4a8-r32", "w4a8-r32", share=0.35),
        Form("w4a8-r32, modulations grouped", "w4a8-r32", group=True, share=0.35),
        Form("w8a8, norms fused", "w8a8", norms="fuse"),
        Form("torchao int8", torchao=("Int8DynamicActivationInt8WeightConfig", {})),
    )
}


@dataclass
class Built:
    """A model in one form, and what a record says of it.

    replaced  names of the low-bit layers
    grouped   those of them that share launches in eager mode
    left      reason -> how many layers are left in bfloat16 for it
    table     shape -> seconds of torch's linear and of the low-bit layer, where it was measured
    """

    form: Form
    model: nn.Module
    replaced: list[str] = field(default_factory=list)
    grouped: list[str] = field(default_factory=list)
    left: dict[str, int] = field(default_factory=dict)
    table: dict[Shape, tuple[float, float]] = field(default_factory=dict)


@contextlib.contextmanager
def released() -> Iterator[None]:
    """Let `auto` take kernels that no record lets in yet; their gates are asked as ever."""
    modules = [ops.module(op) for op in LOW_BIT_OPS]
    before = [module.IMPLEMENTATIONS for module in modules]
    for module, found in zip(modules, before, strict=True):
        module.IMPLEMENTATIONS = tuple(dataclasses.replace(i, held_back=None) for i in found)
    try:
        yield
    finally:
        for module, found in zip(modules, before, strict=True):
            module.IMPLEMENTATIONS = found


def layer_shapes(model: nn.Module, call: Callable[[], Any]) -> dict[str, Shape]:
    """Return the shape of the product that each linear layer makes in one call, by its name."""
    found: dict[str, Shape] = {}

    def see(name: str, linear: nn.Linear, given: tuple[Tensor, ...]) -> None:
        rows = given[0].numel() // linear.in_features
        found[name] = rows, linear.out_features, linear.in_features

    hooks = [
        module.register_forward_pre_hook(lambda m, given, name=name: see(name, m, given))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _with_branch(layer: QuantLinear, rank: int) -> QuantLinear:
    if rank:
        shapes = (rank, layer.in_features), (layer.out_features, rank)
        made = {"dtype": layer.weight_dtype, "device": layer.quantized.device}
        layer.down, layer.up = (torch.randn(shape, **made) for shape in shapes)
        layer.down.mul_(layer.in_features**-0.5)
        layer.up.mul_(_UP)
    return layer


def _timed(linear: nn.Linear, scheme: Scheme, rows: int) -> tuple[float, float]:
    """Return the seconds of a linear layer and of its low-bit form, from the floating input."""
    x = torch.randn(rows, linear.in_features, device=linear.weight.device).to(linear.weight.dtype)
    bare = dataclasses.replace(scheme, rank=0)
    quantised = _with_branch(QuantLinear.from_linear(linear, bare), scheme.rank)
    calls = [lambda layer=layer: layer(x) for layer in (linear, quantised)]
    for call in calls:
        warm_up(call, x.device, TABLE_BUDGET.warmup_seconds)
    samples = interleave([[call] for call in calls], clock(x.device), TABLE_BUDGET)
    plain, ours = (sorted(seconds)[len(seconds) // 2] for seconds in samples)
    return plain, ours


def measure_table(
    model: nn.Module, scheme: Scheme, shapes: dict[str, Shape]
) -> dict[Shape, tuple[float, float]]:
    """Return, for each shape of a layer that the scheme may replace, the seconds of both forms."""
    candidates, _ = choose_layers(model, scheme)
    table: dict[Shape, tuple[float, float]] = {}
    for name in candidates:
        shape = shapes.get(name)
        if shape is not None and shape not in table:
            table[shape] = _timed(model.get_submodule(name), scheme, shape[0])
    return table


def table_skip(
    table: dict[Shape, tuple[float, float]], shapes: dict[str, Shape]
) -> Callable[[str, nn.Linear], str | None]:
    """Return the `skip` that leaves alone what `default_skip` does, and what the table has slower.

    What no call reaches is left alone, too: there is nothing to gain.
    """

    def skip(name: str, linear: nn.Linear) -> str | None:
        why = default_skip(name, linear)
        if why is not None or not table:
            return why
        shape = shapes.get(name)
        if shape is None:
            return "the call does not reach it"
        plain, ours = table[shape]
        if ours < plain:
            return None
        rows, outputs, inputs = shape
        return f"by the table: {plain / ours:.2f}x at {rows} x {outputs} x {inputs}"

    return skip


def twin(model: nn.Module) -> nn.Module:
    """Return a copy of the model's modules that shares its parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _torchao(built: Built, names: set[str]) -> None:
    import torchao.quantization as torchao

    name, given = built.form.torchao or ("", {})
    options = {"granularity": torchao.PerRow()} if given.get("row") else {}
    config = getattr(torchao, name)(**options)
    torchao.quantize_(built.model, config, filter_fn=lambda module, name: name in names)
    built.replaced = sorted(names)


def _modulations(model: nn.Module) -> dict[str, Scheme]:
    """Return the scheme of each modulation layer that may be replaced."""
    chosen, _ = choose_layers(model, Scheme.parse("w4a16"))
    return {name: chosen[name] for name in patching.modulation_layers(model) if name in chosen}


@torch.no_grad()
def build(form: Form, model: nn.Module, shapes: dict[str, Shape], table: bool) -> Built | str:
    """Return the form of a bfloat16 model, or why there is none.

    `shapes` are `layer_shapes`; with `table` this library's forms leave layers in bfloat16 where
    the machine is slower with them.
    """
    if form is BF16:
        return Built(form, model)
    if form.torchao:
        missing = needs("torchao")(None)
        if missing is not None:
            return missing
        built = Built(form, twin(model))
        chosen, skipped = choose_layers(model, Scheme.parse("w8a8"))
        built.left = dict(Counter(skipped.values()))
        _torchao(built, set(chosen))
        return built
    scheme = Scheme.parse(form.scheme or "")
    measured = measure_table(model, scheme, shapes) if table else {}
    chosen, skipped = choose_layers(model, scheme, table_skip(measured, shapes))
    rows: dict[str, Scheme] = {}
    if form.group:
        rows = _modulations(model)
        if not rows:
            return "it has no modulation layers"
    left = [why for name, why in skipped.items() if name not in rows]
    built = Built(form, twin(model), left=dict(Counter(left)), table=measured)
    if not chosen.keys() - rows.keys():
        return "the table leaves every layer in bfloat16"
    bare = {name: dataclasses.replace(s, rank=0) for name, s in chosen.items()}
    plan = Plan.of(built.model, bare | rows)
    handle = quantization.quantize(built.model, plan=plan, keep_originals=False)
    for name, layer in handle.replaced.items():
        _with_branch(layer, 0 if name in rows else scheme.rank)
    built.replaced = sorted(handle.replaced)
    patching.fuse_activations(built.model)
    if form.group:
        built.grouped = patching.group_modulations(built.model).grouped
    if form.norms is not None:
        try:
            patching.fuse_norms(built.model, form.norms)
        except ValueError as error:  # none of its norms is known
            return str(error)
    return built


class _Count(TorchDispatchMode):
    """Counts calls of low-bit products by op and implementation, the last argument of each."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith(PRODUCT_OPS):
            self.found[f"{name.removeprefix('fewstep::').removesuffix('_int8')} {args[-1]}"] += 1
        return func(*args, **(kwargs or {}))


def served(call: Callable[[], Any]) -> dict[str, int]:
    """Return how many products of one call each implementation computes: {"gemm_w8a8 native": 7}.

    In eager mode: a compiled call goes past the mode that counts.
    """
    with _Count() as mode:
        call()
    return dict(mode.found)
