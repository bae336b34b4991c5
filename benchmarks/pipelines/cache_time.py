"""What of a plan's saved steps is saved time: whole runs with and without a plan, in turns.

    python benchmarks/pipelines/cache_time.py --record benchmarks/results

    efficiency = (seconds in full / seconds with the plan) / (steps / full steps)

1 means that skipped steps are free. Plans reuse the newest outputs by equal weights, as many as the
calibrated plans sum: their time is the same and needs no calibration. The digits teacher with its
trained weights, guided; a DiT of 326M parameters with random weights in bfloat16, which serves for
time only.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler

import fewstep
from fewstep.assets.digits import DigitsPipeline, load_digits_pipeline
from fewstep.bench.environment import environment, slug
from fewstep.caching import Plan

SIZES = {"num_layers": 16, "num_attention_heads": 16, "attention_head_dim": 64, "sample_size": 32}
ORDER = 4


def digits(batch: int) -> tuple[Any, dict[str, Any]]:
    """Return the trained teacher and what its call is given."""
    pipe = load_digits_pipeline("teacher")
    return pipe, {"class_labels": [index % 10 for index in range(batch)]}


def large(sizes: dict[str, int]) -> tuple[Any, dict[str, Any]]:
    """Return a pipeline around a random DiT."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(in_channels=4, patch_size=2, num_embeds_ada_norm=10, **sizes)
    pipe = DigitsPipeline(model.eval().to(torch.bfloat16), FlowMatchEulerDiscreteScheduler())
    return pipe, {"class_labels": [3], "guidance_scale": 1.0}


def evenly(times: list[float], full_steps: int) -> Plan:
    """Return a plan with so many full steps, evenly spread, and weights of the full length."""
    count = len(times)
    full = {round(index * count / full_steps) for index in range(full_steps)}
    steps: list[tuple[float, ...] | None] = []
    known = 0
    for index in range(count):
        order = min(ORDER, known)
        steps.append(None if index in full else (1 / order,) * order)
        known += index in full
    return Plan(tuple(times), tuple(steps))


def measure(
    name: str, pipe: Any, given: dict[str, Any], steps: int, fulls: tuple[int, ...], rounds: int
) -> list[dict[str, Any]]:
    """Return a row per plan."""
    pipe.set_progress_bar_config(disable=True)
    call = {**given, "num_inference_steps": steps, "output_type": "latent"}
    generator = torch.Generator()

    def run(plan: Plan | None) -> float:
        generator.manual_seed(0)
        start = time.perf_counter()
        pipe(**call, generator=generator)
        return time.perf_counter() - start

    run(None)
    times = [float(t) for t in pipe.scheduler.timesteps]
    plans: dict[int, Plan | None] = {steps: None} | {full: evenly(times, full) for full in fulls}
    seconds: dict[int, list[float]] = {full: [] for full in plans}
    for round_ in range(rounds):
        order = list(plans)
        random.Random(round_).shuffle(order)
        for full in order:
            plan = plans[full]
            if plan is None:
                seconds[full].append(run(None))
                continue
            with fewstep.patch(pipe, cache=plan) as patch:
                seconds[full].append(run(plan))
                branches = patch.report()["cache"]["branches"].values()
            if any(decisions.count("full") != full for decisions in branches):
                raise RuntimeError(f"{name}: expected {full} full steps, got {list(branches)}")
    whole = statistics.median(seconds[steps])
    rows = []
    for full in fulls:
        median = statistics.median(seconds[full])
        q1, _, q3 = statistics.quantiles(seconds[full], n=4, method="inclusive")
        rows.append(
            {
                "model": name,
                "parameters": sum(p.numel() for p in pipe.transformer.parameters()),
                "steps": steps,
                "full_steps": full,
                "plain": whole,
                "seconds": median,
                "q1": q1,
                "q3": q3,
                "speedup": whole / median,
                "efficiency": whole / median / (steps / full),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    """Measure and write <record>/<device>/cache_time.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--record", type=Path, help="folder of the records")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args(argv)
    machine = environment(torch.device("cpu"))
    if options.quick:
        tiny = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 32}
        rows = measure("DiT, tiny", *large(tiny | {"sample_size": 8}), 6, (2,), 2)
    else:
        rows = measure("digits teacher, 10 images", *digits(10), 50, (17, 12, 8), options.rounds)
        rows += measure("DiT, 326M parameters", *large(SIZES), 12, (4, 3), options.rounds)
    report = {"environment": machine, "rows": rows}
    if options.record is not None:
        path = options.record / slug(machine["device"]) / "cache_time.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
