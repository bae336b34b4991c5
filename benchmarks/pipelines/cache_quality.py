"""What caches cost in quality: PSNR to the uncached image over full steps, per method.

    python benchmarks/pipelines/cache_quality.py --model digits --record benchmarks/results
    python benchmarks/pipelines/cache_quality.py --model photos --record benchmarks/results
    make cache-peers            # all of them, with the other packages installed

Held-out images of three trained models at 50 steps: this library's calibrated plans and presets,
diffusers' hooks and cache-dit by their own packages, EasyCache's rule, and simply fewer steps. The
same labels and noise for all. `cache_peers/` has the methods and what they were given; a package
that is not installed is named in the record. Nothing is timed: figures are the same on an idle and
on a busy machine.

Decisions that a method takes for a whole batch are taken for `--batch` images; this library's are
by image, and are tried in batches and one image at a time. `--processes` shares the trials out;
OMP_NUM_THREADS=1 is then in order.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))

import photos
from cache_peers import dbcache, deepcache, diffusers_hooks, easycache, ours, ours_measured
from cache_peers.trial import Drawn, Study, Trial, draw, run

from fewstep.assets.digits import load_digits_pipeline
from fewstep.bench.environment import environment, slug
from fewstep.caching import PRESETS

STEPS = 50
MODELS: dict[str, Callable[[], Any]] = {
    "digits": lambda: load_digits_pipeline("teacher"),
    "photos": photos.load_photos_pipeline,
    "photos-unet": functools.partial(photos.load_photos_pipeline, "unet"),
}
SOURCES = (
    ours.plans,
    ours.presets,
    ours.trained,
    ours.one_at_a_time,
    ours_measured.trials,
    ours.by_module,
    ours.of_unets,
    ours.fewer_steps,
    diffusers_hooks.trials,
    dbcache.trials,
    easycache.trials,
    deepcache.trials,
)


def trials(study: Study, only: str = "") -> Iterator[Trial]:
    """Yield what is tried: methods that match `only`."""
    for source in SOURCES:
        yield from (trial for trial in source(study) if re.search(only, trial.method))


def left_out(study: Study) -> list[str]:
    """Return which methods are not tried, and why."""
    if not study.is_unet():
        reasons = [dbcache.why_not()]
    else:
        blocks = "knows lists of transformer blocks, and a UNet has none"
        hooks = "First Block Cache, MagCache, SeaCache"
        reasons = [f"{hooks} of diffusers: each {blocks}", f"cache-dit: it {blocks}"]
        reasons.append(deepcache.why_not())
    reasons += [ours.refused(study, name) for name in PRESETS]
    return [reason for reason in reasons if reason]


@functools.cache
def study_of(model: str, *sizes: int) -> Study:
    """Return the study of a process: what it has calibrated is kept."""
    return Study(MODELS[model], *sizes)


def row(share: tuple[tuple[str, int, int, int], str, int, Drawn]) -> dict[str, Any]:
    """Run one trial, by its number."""
    key, only, index, reference = share
    study = study_of(*key)
    return run(next(itertools.islice(trials(study, only), index, None)), study, reference)


def rows(key: tuple[str, int, int, int], only: str, processes: int) -> Iterable[dict[str, Any]]:
    """Yield the rows of the record in their order."""
    study = study_of(*key)
    reference = draw(study.pipeline(), study)
    shares = [(key, only, index, reference) for index, _ in enumerate(trials(study, only))]
    if processes == 1:
        yield from map(row, shares)
        return
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(processes) as pool:
        yield from pool.imap(row, shares, chunksize=2)  # two trials of one calibrated plan


def said(trial: Trial) -> tuple[str, str]:
    """Return what a trial's row is known by."""
    return trial.method, trial.setting


def place_of(row: dict[str, Any]) -> tuple[str, str]:
    """Return what a row is known by."""
    return row["method"], row["setting"]


def of_before(path: Path, report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a record that some methods are added to.

    Raises:
        ValueError: a record of another commit, machine or size.
    """
    if not path.exists():
        return []
    before = json.loads(path.read_text())
    ours = {name: report[name] for name in ("steps", "images", "batch")}
    ours |= {name: report["environment"][name] for name in ("device", "torch", "commit", "dirty")}
    theirs = {name: before.get(name, before["environment"].get(name)) for name in ours}
    if ours != theirs:
        raise ValueError(f"{path}: expected a record of {ours}, got {theirs}; give another folder")
    return before["rows"]


def main(argv: list[str] | None = None) -> None:
    """Measure and write <record>/<device>/cache_<model>.json, with --steps cache_<model>_<steps>.

    With --only the rows of a record of the same run conditions stay.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", default="", help="methods whose name this expression finds")
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args(argv)
    key = (args.model, args.steps, args.images, args.batch)
    machine = environment(torch.device("cpu"))
    report: dict[str, Any] = {
        "environment": machine,
        "steps": args.steps,
        "images": args.images,
        "batch": args.batch,
        "left_out": left_out(study_of(*key)),
        "rows": [],
    }
    name = args.model.replace("-", "_") + ("" if args.steps == STEPS else f"_{args.steps}")
    path = args.record / slug(machine["device"]) / f"cache_{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    order = {said(trial): place for place, trial in enumerate(trials(study_of(*key)))}
    taken = {place_of(row): row for row in of_before(path, report)} if args.only else {}
    for found in rows(key, args.only, args.processes):
        print(json.dumps(found), flush=True)
        taken[place_of(found)] = found
        ranked = sorted(taken, key=lambda place: order.get(place, len(order)))
        report["rows"] = [taken[place] for place in ranked]
        path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
