"""One evaluation of a 300M-parameter DiT, random weights: seconds per scheme, all in one run.

    python benchmarks/pipelines/dit_step.py --record benchmarks/results

Random weights serve for time and memory only. Forms take turns, shuffled in every round; medians
and quartiles. "weights" are the bytes that a checkpoint of the linear layers in question holds, as
a share of bfloat16's.

Quantised as `fewstep.quantize` does by default: the activations of feed-forward layers are part of
the product before them. `--activations none` times them apart, `--norms fuse` or `share` has norms
quantise for the layers behind them; the report says which.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel

import fewstep
from fewstep.bench.environment import environment, slug

SIZES = {"num_layers": 16, "num_attention_heads": 16, "attention_head_dim": 64, "sample_size": 32}
SCHEMES = ("w8a8", "w4a8-g128", "w4a8-g64-r32")
BATCH, ROUNDS = 1, 9


def build(sizes: dict[str, int]) -> DiTTransformer2DModel:
    """Return the model with random weights."""
    torch.manual_seed(0)
    return DiTTransformer2DModel(in_channels=4, patch_size=2, **sizes).eval()


def forms(
    model: DiTTransformer2DModel, fusions: dict[str, str | None]
) -> dict[str, tuple[Any, torch.dtype, float]]:
    """Return name -> (model, dtype, share of bfloat16's bytes of the layers that are replaced)."""
    bf16 = copy.deepcopy(model).to(torch.bfloat16)
    found = {"float32": (model, torch.float32, 2.0), "bfloat16": (bf16, torch.bfloat16, 1.0)}
    for scheme in SCHEMES:
        twin = copy.deepcopy(bf16)
        handle = fewstep.quantize(twin, scheme, keep_originals=False, **fusions)
        bytes_now = bytes_before = 0
        for layer in handle.replaced.values():
            bytes_now += sum(x.numel() * x.element_size() for x in layer.state_dict().values())
            bytes_before += 2 * layer.in_features * layer.out_features
            bytes_before += 0 if layer.bias is None else 2 * layer.out_features
        found[scheme] = (twin, torch.bfloat16, bytes_now / bytes_before)
    return found


@torch.no_grad()
def measure(
    sizes: dict[str, int], rounds: int = ROUNDS, fusions: dict[str, str | None] | None = None
) -> dict[str, Any]:
    """Return the report: one row per form. `fusions` are options of `fewstep.quantize`."""
    fusions = {"norms": None, "activations": "fuse"} | (fusions or {})
    model = build(sizes)
    parameters = sum(p.numel() for p in model.parameters())
    models = forms(model, fusions)
    side = sizes["sample_size"]
    x, labels = torch.randn(BATCH, 4, side, side), torch.zeros(BATCH, dtype=torch.long)
    when = torch.full((BATCH,), 500)

    def call(name: str) -> float:
        network, dtype, _ = models[name]
        inputs = x.to(dtype)
        start = time.perf_counter()
        network(inputs, timestep=when, class_labels=labels)
        return time.perf_counter() - start

    seconds: dict[str, list[float]] = {name: [] for name in models}
    order = list(models)
    for name in order:
        call(name)  # warm up
    for round_ in range(rounds):
        random.Random(round_).shuffle(order)
        for name in order:
            seconds[name].append(call(name))
    medians = {name: statistics.median(samples) for name, samples in seconds.items()}
    rows = []
    for name, samples in seconds.items():
        q1, _, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        rows.append(
            {
                "form": name,
                "seconds": medians[name],
                "q1": q1,
                "q3": q3,
                "over_bfloat16": medians["bfloat16"] / medians[name],
                "over_float32": medians["float32"] / medians[name],
                "weights": models[name][2],
            }
        )
        print(rows[-1], flush=True)
    machine = environment(torch.device("cpu"))
    report = {"environment": machine, "parameters": parameters, "sizes": sizes}
    return report | fusions | {"rows": rows}


def main(argv: list[str] | None = None) -> None:
    """Measure and write <record>/<device>/dit_step.json."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--layers", type=int, default=SIZES["num_layers"])
    parser.add_argument("--norms", choices=("none", "share", "fuse"), default="none")
    parser.add_argument("--activations", choices=("none", "fuse"), default="fuse")
    args = parser.parse_args(argv)
    given = {"norms": args.norms, "activations": args.activations}
    fusions = {name: None if how == "none" else how for name, how in given.items()}
    report = measure(SIZES | {"num_layers": args.layers}, args.rounds, fusions)
    path = args.record / slug(report["environment"]["device"]) / "dit_step.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
