"""Whole denoising loops of full-size denoisers with a plan: what of the saved steps is saved time.

    python benchmarks/pipelines/cache_steps.py --device cuda FLUX.1-dev --record benchmarks/results
    python benchmarks/pipelines/cache_steps.py --quick      # a few layers each, on the CPU: a check

    efficiency = (seconds in full / seconds with the plan) / (steps / full steps)

Random weights serve for time and memory only. The plan's full steps are evenly spread and its
weights are equal, as many as calibrated plans have: time does not depend on what they are. Modes:
eager; blocks compiled; and each with the whole loop, scheduler included, in one CUDA graph. Loops
in full and with the plan are timed in turns. Recorded beside the time:

    host_waits      how often the host waited for the device in a loop with the plan, or a replay of
                    its graph (torch's sync debug mode; a new grid has its times read once, before)
    launches        kernels of a loop
    bytes           the most that a loop takes beside the weights; of a captured one its graph's own
    snapshot_bytes  what of that the cache keeps between steps

On a GPU one model a call: counting launches attaches a profiler, which slows what comes after.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from cache_time import evenly
from diffusers import FlowMatchEulerDiscreteScheduler
from full_size import models
from full_size.heat import CAPTURED, COMPILED, EAGER, Compiled
from full_size.timing import capture, distance, memory, seconds, wait
from model_steps import write_record

from fewstep.bench.environment import environment, slug
from fewstep.bench.kernels import launches
from fewstep.caching import OutputStack, ScheduledSession

NAME = "cache_steps"
STEPS, FULL_STEPS = 20, 5
FARTHEST = 0.05  # a captured loop to the same one in eager mode, relative L2


@dataclass
class Loop:
    """A model's denoising from noise to the end, with a plan or without."""

    model: nn.Module
    given: dict[str, Any]
    device: torch.device
    steps: int
    full_steps: int

    def __post_init__(self) -> None:
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self.scheduler.set_timesteps(self.steps, device=self.device)
        self.latents, self.noise = next(iter(self.given.items()))
        times = [float(time) for time in self.scheduler.timesteps]
        self.session = ScheduledSession(evenly(times, self.full_steps), lambda: self.scheduler)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Return the latents at the end; nothing of it needs the host to know a tensor's values."""
        scheduler, given = self.scheduler, dict(self.given)
        scheduler._step_index = None
        scheduler.set_begin_index(0)
        x = self.noise
        for time in scheduler.timesteps:
            given |= {self.latents: x, "timestep": time.expand_as(given["timestep"]).to(x.dtype)}
            velocity = self.model(**given)[0]
            if velocity.shape != x.shape:  # PixArt predicts a variance, too
                velocity = velocity.chunk(2, dim=1)[0]
            x = scheduler.step(velocity, time, x, return_dict=False)[0]
        return x

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Have the model's calls follow the plan.

        Raises:
            RuntimeError: the last loop's steps were not the plan's.
        """
        replaced = OutputStack(self.model).replacements(self.session)
        for module, name, value in replaced:
            module.__dict__[name] = value
        try:
            yield
        finally:
            for module, name, _ in replaced:
                del module.__dict__[name]
        found = self.session.report()
        if (found["full"], found["skipped"]) != (self.full_steps, self.steps - self.full_steps):
            raise RuntimeError(f"expected {self.full_steps} of {self.steps} full, got {found}")


def host_waits(call: Callable[[], Any], device: torch.device) -> int | None:
    """Return how often a call has the host wait for the device; None on a CPU."""
    if device.type != "cuda":
        return None
    wait(device)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in seen)


@dataclass
class Mode:
    """One way to run both loops."""

    name: str
    calls: dict[str, Callable[[], Tensor]]
    row: dict[str, Any]
    samples: dict[str, list[float]] = field(default_factory=lambda: {"full": [], "plan": []})


def build_modes(loop: Loop, compiled: Compiled | None, facts: dict[str, Any]) -> Iterator[Mode]:
    """Yield the modes; each has run once, and captured loops gave what eager ones do."""
    ways = {"full": contextlib.nullcontext, "plan": loop.following}
    device = loop.device

    def run(blocks: Callable[[], Any], way: Callable[[], Any]) -> Tensor:
        with blocks(), way():
            return loop()

    for base in (EAGER,) + ((COMPILED,) if compiled else ()):
        blocks = compiled.on if base == COMPILED else contextlib.nullcontext
        calls = {name: partial(run, blocks, way) for name, way in ways.items()}
        want = {name: call() for name, call in calls.items()}
        row = facts | {
            "mode": base,
            "host_waits": host_waits(calls["plan"], device),
            "bytes": {name: memory(call, device) for name, call in calls.items()},
            "snapshot_bytes": loop.session.report()["snapshot_bytes"],
        }
        yield Mode(base, calls, row)
        if device.type != "cuda":
            continue
        graph = next(name for name, of in CAPTURED.items() if of == base)
        captured, row = {}, row | {"mode": graph, "bytes": {}}
        for name, way in ways.items():
            with blocks(), way():
                captured[name], row["bytes"][name] = capture(loop, device)
            off = distance(captured[name](), want[name])
            if not off <= FARTHEST:
                raise RuntimeError(f"{graph}, {name}: expected the eager loop's, got {off:.3g} off")
        row["host_waits"] = host_waits(captured["plan"], device)
        yield Mode(graph, captured, row)


def measure(
    name: str, device: torch.device, *, small: bool, backend: str | None, rounds: int
) -> list[dict[str, Any]]:
    """Return a row per mode of one model."""
    steps, full = (6, 2) if small else (STEPS, FULL_STEPS)
    of = models.MODELS[name](small)
    model = models.build(of, device)
    loop = Loop(model, models.arguments(of, device), device, steps, full)
    compiled = Compiled(model, of.blocks, backend) if backend else None
    facts = {
        "model": name,
        "weight_bytes": models.weight_bytes(model),
        "steps": steps,
        "full_steps": full,
    }
    modes = list(build_modes(loop, compiled, facts))
    order = [(mode, name) for mode in modes for name in mode.calls]
    for round_ in range(rounds):
        random.Random(round_).shuffle(order)
        for mode, which in order:
            mode.samples[which].append(seconds(mode.calls[which], device))
    for mode in modes:  # last: a profiler stays attached
        for which, taken in mode.samples.items():
            q1, median, q3 = statistics.quantiles(taken, n=4, method="inclusive")
            mode.row[which] = {"median_s": median, "q1_s": q1, "q3_s": q3, "samples": len(taken)}
        ratio = mode.row["full"]["median_s"] / mode.row["plan"]["median_s"]
        mode.row |= {"speedup": ratio, "efficiency": ratio / (steps / full)}
        if device.type == "cuda" and mode.name not in CAPTURED:
            found = {w: launches(call, device).kernels for w, call in mode.calls.items()}
            mode.row["launches"] = {w: sum(k.launches for k in some) for w, some in found.items()}
    return [mode.row for mode in modes]


def main(argv: list[str] | None = None) -> int:
    """Measure the models; return 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(models.MODELS)}; all by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="a few layers each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="without the compiled modes")
    parser.add_argument("--record", type=Path, help=f"writes <record>/<device>/{NAME}.json")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in models.MODELS:
            parser.error(f"names: expected some of {', '.join(models.MODELS)}, got {name}")
    if args.record and args.quick:
        parser.error("--record: expected full-size models, got --quick")
    device, names = torch.device(args.device), args.names or list(models.MODELS)
    if device.type == "cuda" and len(names) > 1:
        parser.error(f"names: expected one model on a GPU, got {', '.join(names)}")
    backend = None if args.no_compile else "eager" if args.quick else "inductor"
    machine, failed = environment(device), 0
    everything: list[dict[str, Any]] = []
    for name in names:
        try:
            rows = measure(
                name,
                device,
                small=args.quick,
                backend=backend,
                rounds=3 if args.quick else args.rounds,
            )
        except Exception as error:
            failed, rows = 1, [{"model": name, "failed": f"{type(error).__name__}: {error}"}]
        for row in rows:
            print(line(row), flush=True)
        everything += rows
        if args.record is not None:
            write_record(args.record / slug(machine["device"]), machine, everything, NAME)
    return failed


def line(row: dict[str, Any]) -> str:
    """Return a row as one line."""
    if "failed" in row:
        return f"{row['model']:16} no number: {row['failed']}"
    full, plan = (1e3 * row[which]["median_s"] for which in ("full", "plan"))
    return (
        f"{row['model']:16} {row['mode']:16} {row['full_steps']} of {row['steps']} full: "
        f"{full:.1f} -> {plan:.1f} ms, {row['speedup']:.2f}x, {row['efficiency']:.1%}, "
        f"host waits {row['host_waits']}"
    )


if __name__ == "__main__":
    sys.exit(main())
