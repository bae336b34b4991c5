"""One evaluation of full-size denoisers with random weights: time and memory in every form.

    python benchmarks/pipelines/model_steps.py --device cuda FLUX.1-dev --record benchmarks/results
    python benchmarks/pipelines/model_steps.py --quick      # a few layers each, on the CPU: a check

Random weights serve for time and memory only. Forms: bfloat16, this library's w8a8, fp8 and w4a8
with a branch of rank 32, the same with modulation layers that share launches, torchao's FP8 and
int8; each in eager mode, with its blocks compiled, and in a CUDA graph of both. Forms that fit into
memory beside each other are timed in turns in one process (a heat); every heat has bfloat16 in it,
so ratios are within one process. A heat that ends badly is run again form by form, each in a
process of its own. `full_size/` has the parts.

Layers that the machine multiplies faster in bfloat16 stay so, by a table measured at the start;
torchao's forms have none and replace them, too, as `chosen_by` says. Kernels that `auto` holds back
until a record lets them in take part, if they pass their gate; `--as-shipped` leaves them out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from full_size import heat, models
from full_size.forms import BF16, FORMS, Form

from fewstep.bench.environment import environment, slug

NAME = "model_steps"
GIB = 2**30
SECONDS = 240.0  # for one model
RESERVE = 8 * GIB  # activations, CUDA's context, what compiling tries
GRAPHS = 4 * GIB  # of a form's two graphs


def plan(wanted: Sequence[Form], weights: int, memory: int) -> list[list[Form]]:
    """Return the forms in heats: as many beside bfloat16 as fit, and at least one."""
    rest = [form for form in wanted if form is not BF16]
    room = memory - weights - GRAPHS - RESERVE
    heats: list[list[Form]] = [[]]
    taken = 0.0
    for form in rest:
        size = form.share * weights + GRAPHS
        if heats[-1] and taken + size > room:
            heats.append([])
            taken = 0.0
        heats[-1].append(form)
        taken += size
    return heats


def _serve(pipe: Connection, name: str, wanted: list[Form], settings: heat.Settings) -> None:
    try:
        pipe.send(heat.run(name, wanted, settings))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}".splitlines()[0])


def apart(name: str, wanted: list[Form], settings: heat.Settings) -> list[dict[str, Any]] | str:
    """Return the records of a heat in a process of its own, or why there are none."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(theirs, name, wanted, settings))
    process.start()
    theirs.close()
    left = settings.deadline - time.monotonic() + settings.seconds + 60
    try:
        return ours.recv() if ours.poll(max(left, 1.0)) else "no answer in its time"
    except EOFError:
        process.join(10)
        return f"its process ended with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()


def run_heat(name: str, wanted: list[Form], settings: heat.Settings) -> list[dict[str, Any]]:
    """Return the records of a heat, run again form by form where it ends badly."""
    found = apart(name, wanted, settings)
    if not isinstance(found, str):
        return found
    print(f"{name}: {', '.join(form.name for form in wanted)}: {found}", flush=True)
    if len(wanted) > 1:
        return [row for form in wanted for row in run_heat(name, [form], settings)]
    row = {"model": name, "form": (wanted or [BF16])[0].name, "mode": "all", "failed": found}
    return [row]


def measure(
    name: str, wanted: Sequence[Form], settings: heat.Settings, memory: int | None
) -> Iterator[list[dict[str, Any]]]:
    """Yield the records of a model, heat by heat; without `memory`, one heat in this process."""
    if memory is None:
        yield heat.run(name, list(wanted), settings)
        return
    weights = models.weight_bytes(models.build(models.MODELS[name](settings.small), "meta"))
    heats = plan(wanted, weights, memory)
    for i, here in enumerate(heats):
        left = max(settings.deadline - time.monotonic(), 0.0)
        share = dataclasses.replace(settings, deadline=time.monotonic() + left / (len(heats) - i))
        yield [row | {"heat": i} for row in run_heat(name, here, share)]


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the records as lines of a short table."""
    shown = [f"{'model':13} {'form':30} {'mode':16} {'ms (quartiles)':24} over bf16 compiled  GiB"]
    for row in rows:
        start = f"{row['model']:13} {row['form']:30} {row['mode']:16} "
        if "median_s" not in row:
            shown.append(f"{start}no number: {row.get('failed') or row['skipped']}")
            continue
        q1, median, q3 = (1e3 * row[key] for key in ("q1_s", "median_s", "q3_s"))
        over = row["ratios"].get("bf16 compiled")
        taken = (row["weight_bytes"] + (row["extra_bytes"] or 0)) / GIB
        served = ", ".join(f"{count} x {name}" for name, count in row.get("served", {}).items())
        ratio = "" if over is None else f"{over:.2f}x"
        times = f"{median:.2f} ({q1:.2f}-{q3:.2f})"
        shown.append(f"{start}{times:24} {ratio:18} {taken:5.2f}  {served}".rstrip())
    return shown


def append_lines(path: Path, machine: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Append rows to a file, one line each with the machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row | machine, allow_nan=False) + "\n" for row in rows)


def write_record(
    folder: Path, machine: dict[str, Any], rows: list[dict[str, Any]], name: str = NAME
) -> None:
    """Write a report; rows of other models stay if they are of the same machine and commit."""
    path, kept = folder / f"{name}.json", []
    if path.exists():
        before = json.loads(path.read_text())
        same = ("device", "driver", "torch", "triton", "commit", "dirty")
        if all(before["environment"][key] == machine[key] for key in same):
            new = {row["model"] for row in rows}
            kept = [row for row in before["rows"] if row["model"] not in new]
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"environment": machine, "rows": kept + rows}
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    print(f"wrote {path}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(models.MODELS)}; all by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="a few layers each, all replaced")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each model")
    parser.add_argument("--backend", help="of torch.compile; inductor, with --quick eager")
    parser.add_argument("--no-compile", action="store_true", help="without the compiled modes")
    parser.add_argument("--no-table", action="store_true", help="replace layers that lose, too")
    parser.add_argument("--as-shipped", action="store_true", help="without kernels held back")
    parser.add_argument("--output", type=Path, help=f"folder; appends lines to {NAME}.jsonl")
    parser.add_argument("--record", type=Path, help=f"writes <record>/<device>/{NAME}.json")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in models.MODELS:
            parser.error(f"names: expected some of {', '.join(models.MODELS)}, got {name}")
    if args.record and args.quick:
        parser.error("--record: expected full-size models, got --quick")
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure the models; return 1 if a form of this library failed."""
    args = parse(argv)
    device = torch.device(args.device)
    backend = args.backend or ("eager" if args.quick else "inductor")
    settings = heat.Settings(
        device,
        small=args.quick,
        backend=None if args.no_compile else backend,
        table=not (args.no_table or args.quick),  # nothing gains at such sizes
        released=not args.as_shipped,
        **({"rounds": 3, "seconds": 0.0} if args.quick else {}),
    )
    memory = None
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    machine = environment(device)
    everything: list[dict[str, Any]] = []
    for name in args.names or models.MODELS:
        timed = dataclasses.replace(settings, deadline=time.monotonic() + args.seconds)
        for rows in measure(name, [FORMS[form] for form in args.forms], timed, memory):
            everything += rows
            print("\n".join(lines(rows)), flush=True)
            if args.output is not None:
                append_lines(args.output / f"{NAME}.jsonl", machine, rows)
            if args.record is not None:
                write_record(args.record / slug(machine["device"]), machine, everything)
    ours = [row for row in everything if FORMS[row["form"]].torchao is None]
    return int(any("failed" in row for row in ours))


if __name__ == "__main__":
    sys.exit(main())
