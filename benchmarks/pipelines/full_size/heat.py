"""One heat: several forms of one model beside its bfloat16, all of their modes timed in turns.

    eager            as diffusers calls it
    graph            the same, captured in a CUDA graph
    compiled         the model's blocks compiled by torch.compile, each class of them once
    compiled, graph  the same, captured

A sample is one call of the model from an idle device to an idle device. A round calls everybody
once in shuffled order. A call is checked before: it is finite and near bfloat16's, and no layer is
served by the reference. And after: it launches as many low-bit products as layers were replaced (a
profiler stays attached to a GPU's launches, so no sample may follow it). What fails gets no number
but a reason.
"""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters

from fewstep.bench.kernels import launches

from . import forms, models
from .forms import BF16, Built, Form
from .timing import capture, distance, memory, seconds

EAGER, COMPILED = "eager", "compiled"
CAPTURED = {"graph": EAGER, "compiled, graph": COMPILED}
# The small models err by 0.4 % in 8 bits and by 1 % in 4; a product that is wrong changes as much
# as its layer adds. Not a measure of quality: weights of random noise have none.
FARTHEST = 0.3
SHOWN_KERNELS, SHOWN_NAME = 12, 160
_SEED = 0


@dataclass(frozen=True)
class Settings:
    """How a heat is run.

    backend   of torch.compile; None leaves the compiled modes out
    table     leave layers in bfloat16 by measurement
    released  let kernels take part that no record lets into `auto` yet
    rounds    at least so many; more until `seconds` are spent on rounds
    deadline  of `time.monotonic()`: what is not ready by then is left out
    """

    device: torch.device
    small: bool = False
    backend: str | None = "inductor"
    table: bool = True
    released: bool = True
    rounds: int = 7
    seconds: float = 15.0
    deadline: float = float("inf")


@dataclass
class Run:
    """One form in one mode; `row` is its record, filled on the way."""

    built: Built
    mode: str
    call: Callable[[], Tensor]
    compiled: Compiled | None
    row: dict[str, Any]

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Have the model's blocks compiled, or not, as the mode wants it."""
        with self.compiled.on() if self.compiled else contextlib.nullcontext():
            yield


class Compiled:
    """The compiled calls of a model's blocks, which are off but for `with compiled.on()`."""

    def __init__(self, model: nn.Module, blocks: Sequence[str], backend: str) -> None:
        self.backend = backend
        self.calls: dict[nn.Module, Any] = {
            module: None
            for module in model.modules()
            # Fused activations and norms give a block a class of theirs, below its own.
            if any(kind.__name__ in blocks for kind in type(module).__mro__)
        }
        self.compile(fullgraph=True)

    def compile(self, *, fullgraph: bool) -> None:
        """Have the blocks compiled at their next calls."""
        for module in self.calls:
            module.compile(fullgraph=fullgraph, dynamic=False, backend=self.backend)
            self.calls[module], module._compiled_call_impl = module._compiled_call_impl, None

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Call the compiled blocks."""
        for module, call in self.calls.items():
            module._compiled_call_impl = call
        try:
            yield
        finally:
            for module in self.calls:
                module._compiled_call_impl = None


def _facts(built: Built) -> dict[str, Any]:
    table = [
        {"rows": rows, "outputs": outputs, "inputs": inputs, "linear_s": plain, "ours_s": ours}
        for (rows, outputs, inputs), (plain, ours) in built.table.items()
    ]
    return {
        "form": built.form.name,
        "weight_bytes": models.weight_bytes(built.model),
        "low_bit_layers": len(built.replaced),
        "grouped_layers": len(built.grouped),
        "chosen_by": "default_skip, then the table" if built.table else "default_skip",
        "left_in_bf16": built.left,
        "table": table,
    }


class Heat:
    """A model in bfloat16 and some forms of it; `rows()` is the records of all runs."""

    def __init__(self, name: str, settings: Settings) -> None:
        self.name, self.settings, self.device = name, settings, settings.device
        self.model_of = models.MODELS[name](settings.small)
        self.model = models.build(self.model_of, self.device)
        self.arguments = models.arguments(self.model_of, self.device)
        self.runs: list[Run] = []
        self.left: list[dict[str, Any]] = []
        self.shapes = forms.layer_shapes(self.model, self._caller(self.model))
        self.want = self._caller(self.model)()

    def _caller(self, model: nn.Module) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with torch.no_grad():
                return model(**self.arguments)[0]

        return call

    def _leave(self, form: Form, mode: str, reason: str | Exception) -> None:
        """Record why there is no number: "skipped" for a reason, "failed" for an error."""
        key = "skipped"
        if isinstance(reason, Exception):
            key, reason = "failed", f"{type(reason).__name__}: {reason}"
        row = {"model": self.name, "form": form.name, "mode": mode}
        self.left.append(row | {key: reason.splitlines()[0][:300]})
        print(self.left[-1], flush=True)

    @property
    def late(self) -> bool:
        """Whether the time for making forms is over."""
        return time.monotonic() > self.settings.deadline

    def add(self, form: Form) -> None:
        """Make a form and its runs; what does not work is recorded with the reason."""
        if self.late:
            return self._leave(form, "all", "not made: the time was spent")
        try:
            built = forms.build(form, self.model, self.shapes, self.settings.table)
        except Exception as error:  # a package's own, or no memory: the others are still timed
            return self._leave(form, "all", error)
        if isinstance(built, str):
            return self._leave(form, "all", built)
        facts = _facts(built)
        call = self._caller(built.model)
        backend = self.settings.backend
        # torchao's layers are made to be compiled: in eager mode they take seconds.
        modes = [EAGER] * (form.torchao is None) + [COMPILED] * (backend is not None)
        for mode in modes:
            compiled = None
            if mode == COMPILED:
                compiled = Compiled(built.model, self.model_of.blocks, backend)
            run = Run(built, mode, call, compiled, {"model": self.name, "mode": mode} | facts)
            if self._check(run) and self.device.type == "cuda":
                self._capture(run)
        return None

    def _check(self, run: Run) -> bool:
        """Call a run for the first time, check it and keep it; return whether it is right."""
        if self.late:
            self._leave(run.built.form, run.mode, "not called: the time was spent")
            return False
        try:
            if run.compiled is not None:
                self._compile(run, run.compiled)
            with run.ready():
                if run.compiled is None:
                    run.row["first_call_s"] = seconds(run.call, self.device)
                self._expect(run)
                run.row["extra_bytes"] = memory(run.call, self.device)
        except Exception as error:
            self._leave(run.built.form, run.mode, error)
            return False
        self.runs.append(run)
        return True

    def _compile(self, run: Run, compiled: Compiled) -> None:
        """Call compiled blocks for the first time; a graph that breaks is recorded as broken."""
        before = counters["stats"]["unique_graphs"]
        try:
            with run.ready():
                run.row["first_call_s"] = seconds(run.call, self.device)
        except Unsupported as error:
            run.row["graph_break"] = str(error).splitlines()[0][:300]
            compiled.compile(fullgraph=False)
            with run.ready():
                run.row["first_call_s"] = seconds(run.call, self.device)
        run.row["graphs"] = counters["stats"]["unique_graphs"] - before
        if run.row["graphs"] == 0:
            raise RuntimeError("expected compiled blocks, got no graph")

    def _expect(self, run: Run) -> None:
        """Fill in what a run computed and launched.

        Raises:
            RuntimeError: it is not what was asked for.
        """
        row, form = run.row, run.built.form
        row["relative_l2"] = distance(run.call(), self.want)
        if not row["relative_l2"] <= FARTHEST:
            raise RuntimeError(f"expected an output near bf16's, got {row['relative_l2']:.3g} off")
        if form.scheme is not None and run.mode == EAGER:
            row["served"] = forms.served(run.call)
            if any(key.endswith(" reference") for key in row["served"]):
                raise RuntimeError(f"expected kernels, got the reference: {row['served']}")

    def witness(self) -> None:
        """Say which kernels each run launches; one without its low-bit products loses its time.

        A graph is witnessed by the run that it was captured from.
        """
        wrong: dict[tuple[str, str], Exception] = {}
        for run in list(self.runs):
            key = run.built.form.name, CAPTURED.get(run.mode, run.mode)
            if run.mode not in CAPTURED:
                try:
                    with run.ready():
                        self._witness(run)
                except Exception as error:
                    wrong[key] = error
            if key in wrong:
                self.runs.remove(run)
                self._leave(run.built.form, run.mode, wrong[key])

    def _witness(self, run: Run) -> None:
        found = launches(run.call, self.device)
        run.row["kernels"] = [
            vars(kernel) | {"name": kernel.name[:SHOWN_NAME]}
            for kernel in found.kernels[:SHOWN_KERNELS]
        ]
        if run.built.form.scheme is None:
            return
        run.row["products"] = found.products(self.device)
        reached = {name for name in run.built.replaced if name in self.shapes}
        shared = reached.intersection(run.built.grouped) if run.mode == EAGER else set()
        count = len(reached - shared) + bool(shared)  # compiled, each runs by itself
        if run.row["products"] < count:
            raise RuntimeError(
                f"expected a low-bit product for each of {count} layers, got {run.row['products']}"
            )

    def _capture(self, run: Run) -> None:
        mode = next(graph for graph, base in CAPTURED.items() if base == run.mode)
        row = run.row | {"mode": mode}
        row.pop("served", None)
        try:
            with run.ready():
                replay, row["extra_bytes"] = capture(run.call, self.device)
            row["relative_l2"] = distance(replay(), self.want)
            if not row["relative_l2"] <= FARTHEST:
                raise RuntimeError(f"expected bf16's output, got {row['relative_l2']:.3g} off")
        except Exception as error:
            return self._leave(run.built.form, mode, error)
        self.runs.append(Run(run.built, mode, replay, None, row))
        return None

    def time(self) -> None:
        """Take the samples: rounds of everybody."""
        samples: list[list[float]] = [[] for _ in self.runs]
        order = list(range(len(self.runs)))
        begin, round_ = time.perf_counter(), 0
        while round_ < self.settings.rounds or (
            time.perf_counter() - begin < self.settings.seconds and round_ < 100
        ):
            random.Random(_SEED + round_).shuffle(order)
            for i in order:
                with self.runs[i].ready():
                    samples[i].append(seconds(self.runs[i].call, self.device))
            round_ += 1
        medians = {
            f"bf16 {run.mode}": statistics.median(taken)
            for run, taken in zip(self.runs, samples, strict=True)
            if run.built.form is BF16
        }
        for run, taken in zip(self.runs, samples, strict=True):
            q1, median, q3 = statistics.quantiles(taken, n=4, method="inclusive")
            run.row |= {"median_s": median, "q1_s": q1, "q3_s": q3, "samples": len(taken)}
            run.row["ratios"] = {name: plain / median for name, plain in medians.items()}

    def rows(self) -> list[dict[str, Any]]:
        """Return the records of what was timed, then of what was not."""
        return [run.row for run in self.runs] + self.left


def run(name: str, wanted: Sequence[Form], settings: Settings) -> list[dict[str, Any]]:
    """Return the records of a heat: bfloat16 and the forms wanted."""
    torch._dynamo.config.recompile_limit = 256  # many forms compile one block's code
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch.compiler.reset()
    with forms.released() if settings.released else contextlib.nullcontext():
        heat = Heat(name, settings)
        for form in (BF16, *(f for f in wanted if f is not BF16)):
            heat.add(form)
            gc.collect()
            if settings.device.type == "cuda":
                torch.cuda.empty_cache()
        heat.time()
        heat.witness()
    return heat.rows()
