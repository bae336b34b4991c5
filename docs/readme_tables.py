"""Draws the tables of the documents from the committed records; nothing in them is typed.

    make figures                    # measure: records under benchmarks/results/<device>/
    make peers                      # other packages beside the low-bit products: peers.jsonl there
    make cache-peers                # caches of other packages: cache_<model>.json
    python docs/readme_tables.py    # README, docs/benchmarks.md, the guides

A document says from which device's folder it was drawn, and goes on with that one; an argument
chooses another. A table's caption names the machine and the commit of its run. A test draws every
document again and compares.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewstep.bench import Result, roofline_picture
from fewstep.bench.table import seconds, share, summary_markdown

sys.path.insert(0, str(Path(__file__).parent))

from drawn.caching import cache_table, draw_curves, headline, summary_table
from drawn.markdown import caption, table
from drawn.steps import (
    LOOPS,
    MODELS,
    cache_time_table,
    gpu_tables,
    kept_table,
    loop_table,
    model_table,
    step_table,
)

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DEMO = ROOT / "demo"
IMAGES = ROOT / "docs" / "images"
README, BENCHMARKS, CACHES, CACHING, PATCHING, QUANTIZATION, ATTENTION = (
    ROOT / name
    for name in (
        "README.md",
        "docs/benchmarks.md",
        "docs/cache_quality.md",
        "docs/guides/caching.md",
        "docs/guides/patching.md",
        "docs/guides/quantization.md",
        "docs/ops/attention_jvp.md",
    )
)
ROOFLINE = "attention_jvp_roofline.png"
# Baselines that do the op's whole work.
ROOFLINE_BASELINES = (
    "torch.func.jvp, math SDPA",
    "finite difference, fused SDPA",
    "jvp_flash_attention",
)
# <name>.json beside the harness's lines. Without one of OPTIONAL its table says so.
REPORTS = ("demo", "patches", "dit_step")
OPTIONAL = (
    "quantized_digits",
    "quantized_photos",
    "time_steps",
    "text_steps",
    "cache_time",
    "cache_digits",
    "cache_photos",
    "cache_photos_unet",
)
CURVES = {
    "cache_digits": "cache_quality_digits.png",
    "cache_photos": "cache_quality_photos.png",
    "cache_photos_unet": "cache_quality_photos_unet.png",
}
PICTURES = ("samples.png", "tradeoff.png")

# What README shows of each op: the case, and the baseline that its user would otherwise run.
HEADLINES = [
    ("attention_jvp", "DiT-XL/2 256px", "float32", "torch.func.jvp, math SDPA"),
    ("attention_jvp_backward", "DiT-XL/2 256px", "float32", "autograd, torch.func.jvp, math SDPA"),
    ("linear_attention_jvp", "SANA 1.6B 1024px", "bfloat16", "torch.func.jvp, unfused"),
    ("norm_jvp", "DiT-XL/2 256px", "float32", "torch.func.jvp, unfused"),
    ("modulate_jvp", "DiT-XL/2 256px", "float32", "torch.func.jvp, unfused"),
    ("gemm_w8a8", "SDXL 1280 proj", "bfloat16", "torch linear"),
    ("gemm_w4a8", "SDXL 1280 proj", "bfloat16", "torch linear"),
    ("gemm_w4a16", "FLUX.1 adaLN, 1 image", "bfloat16", "torch linear"),
    ("quantize_int8", "FLUX.1 1024px", "bfloat16", "torch.compile"),
    ("cache_metric", "FLUX.1 1024px", "bfloat16", "torch.compile"),
]
FROM_X = "fewstep native, from x"
KERNEL = "fewstep native, kernel"
LARGE_M = 256
PEERS = "peers.jsonl"  # a run of its own beside the others, and optional


@dataclass(frozen=True)
class Records:
    """What one device's folder holds: reports and the harness's lines."""

    demo: dict[str, Any]
    patches: dict[str, Any]
    dit_step: dict[str, Any]
    bench: list[dict[str, Any]]
    quantized_digits: dict[str, Any] | None = None
    quantized_photos: dict[str, Any] | None = None
    time_steps: dict[str, Any] | None = None
    text_steps: dict[str, Any] | None = None
    cache_time: dict[str, Any] | None = None
    cache_digits: dict[str, Any] | None = None
    cache_photos: dict[str, Any] | None = None
    cache_photos_unet: dict[str, Any] | None = None
    peers: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def load(cls, folder: Path) -> Records:
        """Read a folder; all lines of a run of the harness must come from one clean commit."""
        there = [*REPORTS, *(name for name in OPTIONAL if (folder / f"{name}.json").exists())]
        reports = {name: json.loads((folder / f"{name}.json").read_text()) for name in there}
        files = {file: file.read_text().splitlines() for file in sorted(folder.glob("*.jsonl"))}
        peers = [json.loads(line) for line in files.pop(folder / PEERS, ())]
        bench = [json.loads(line) for lines in files.values() for line in lines]
        for what, records in (
            *((f"{name}.json", [report["environment"]]) for name, report in reports.items()),
            ("*.jsonl", bench),
            *([(PEERS, peers)] if peers else []),
        ):
            runs = {(r["commit"], r["dirty"], r["threads"], r["torch"]) for r in records}
            if len(runs) != 1 or any(r["commit"] is None or r["dirty"] for r in records):
                raise ValueError(
                    f"{folder}/{what}: expected records of one run of a clean commit, got {runs}"
                )
        return cls(**reports, bench=bench, peers=peers)


def _decibels(row: dict[str, Any]) -> str:
    if row["identical"]:
        return "identical"
    return "" if row["psnr_db"] is None else f"{row['psnr_db']:.1f} dB"


def demo_table(report: dict[str, Any]) -> str:
    """Return the demo's rows as Markdown."""
    header = (
        "| | network evaluations | ms / image (quartiles) | speed-up | Frechet distance | ratio "
        "| accuracy | PSNR | relative L2 |"
    )
    rows = []
    for row in report["rows"]:
        if row["failure"]:
            rows.append([row["label"], "not run", *[""] * 7])
            continue
        evaluations = f"{row['evaluations']:.4g}"
        if row["full_evaluations"] < row["evaluations"] - 0.005:
            evaluations += f" ({row['full_evaluations']:.3g} full)"
        q1, median, q3 = (1e3 * row[name] for name in ("q1", "seconds_per_image", "q3"))
        off = row["relative_l2"]
        rows.append(
            [
                row["label"],
                evaluations,
                f"{median:.1f} ({q1:.1f}-{q3:.1f})",
                "as above" if row["distinct"] is False else f"{row['speedup']:.2f}x",
                f"{row['frechet']:.2f}",
                f"{row['frechet_ratio']:.2f}",
                f"{row['accuracy']:.1%}",
                _decibels(row),
                "" if off is None else f"{off:.3f}",
            ]
        )
    ratio = report["real_frechet"] / report["rows"][0]["frechet"]
    level = [f"{report['real_frechet']:.2f}", f"{ratio:.2f}"]
    rows.append(["real digits (training half)", "", "", "", *level, "", "", ""])
    return table(header, "lrrrrrrrr", rows)


def best_peer(peers: list[dict[str, Any]], record: dict[str, Any]) -> str:
    """Return what this record's kernel gains over the fastest other package, "" without any."""
    wanted = {name: record[name] for name in ("op", "case", "dtype")}
    timed = [r for r in peers if wanted.items() <= r.items() and not r["skipped"]]
    rivals = [r for r in timed if r["package"]]
    ours = [r for r in timed if r["provider"] == record["provider"]]
    if not (rivals and ours):
        return ""
    name = min(rivals, key=lambda r: r["median_s"])["provider"]
    return f"{ours[0]['ratios'][name]:.2f}x {name}"


def peers_table(peers: list[dict[str, Any]]) -> str:
    """Return, per case, the layer's time and what it gains over torch and each other package."""
    packages = dict.fromkeys(r["package"].split()[0] for r in peers if r["package"])
    rows = []
    for record in (r for r in peers if r["role"] == "op" and not r["skipped"]):
        case = {name: record[name] for name in ("op", "case", "dtype")}
        beside = [r for r in peers if case.items() <= r.items()]
        if record["provider"] != FROM_X and any(r["provider"] == FROM_X for r in beside):
            continue  # the product alone: other packages start from x
        names = {r["package"].split()[0]: r["provider"] for r in beside if r["package"]}
        ratios = [record["ratios"].get(names.get(package, "")) for package in packages]
        rows.append(
            [
                f"`{record['op']}`",
                f"{record['case'].strip()}, {record['dtype']}",
                str(record["shape"]["M"]),
                seconds(record["median_s"]),
                f"{record['ratios']['torch linear']:.2f}x",
                *("" if ratio is None else f"{ratio:.2f}x" for ratio in ratios),
            ]
        )
    header = f"| op | case | rows | from x | torch linear | {' | '.join(packages)} |"
    return table(header, "llrrr" + "r" * len(packages), rows)


def peers_caption(peers: list[dict[str, Any]]) -> str:
    """Return the line under what was measured beside other packages, or that nothing was."""
    if not peers:
        return "Beside other packages: not measured yet.\n"
    packages = ", ".join(dict.fromkeys(r["package"] for r in peers if r["package"]))
    return caption(peers[0], f"`make peers`, each package in a process of its own ({packages}), on")


def headline_table(records: list[dict[str, Any]], peers: list[dict[str, Any]]) -> str:
    """Return one row per op as Markdown, against the baseline that HEADLINES names."""
    rows = []
    for op, case, dtype, baseline in HEADLINES:
        wanted = {"op": op, "case": case, "dtype": dtype, "role": "op", "skipped": None}
        found = [r for r in records if wanted.items() <= r.items()]
        # The one that does the whole job: `from x` includes quantising the activations.
        found = [r for r in found if r["provider"] == FROM_X] or found
        if len(found) != 1:
            raise ValueError(f"expected one record of {wanted}, got {len(found)}")
        result = Result.from_record(found[0])
        kernel = result.provider.removeprefix("fewstep ")
        rows.append(
            [
                f"[`{op}`](docs/ops/{op}.md)",
                f"{case}, {dtype}",
                kernel,
                seconds(result.median_s),
                f"{result.ratios[baseline]:.2f}x {baseline}",
                best_peer(peers, found[0]),
                share(result),
            ]
        )
    header = "| op | case | kernel | median | against | best other package | of the limit |"
    return table(header, "lllrlll", rows)


def _large(records: list[dict[str, Any]], op: str, provider: str) -> list[dict[str, Any]]:
    wanted = {"op": op, "provider": provider, "dtype": "bfloat16", "skipped": None}
    return [r for r in records if wanted.items() <= r.items() and r["shape"]["M"] >= LARGE_M]


def linear_sentence(records: list[dict[str, Any]], peers: list[dict[str, Any]], op: str) -> str:
    """Return what a low-bit product gains over bf16 and other packages at many rows, in words."""
    layers, kernels = _large(records, op, FROM_X), _large(records, op, KERNEL)
    ratios = [r["ratios"]["torch linear"] for r in layers]
    shares = [r["of_limit"] for r in kernels]
    return (
        f"`{op}` from x, quantising included, against torch's bf16 linear: {min(ratios):.2f}x "
        f"to {max(ratios):.2f}x over the {len(ratios)} cases of {LARGE_M} rows and more. "
        f"Its kernel alone, without the way from Python: {min(shares):.0%} to {max(shares):.0%} "
        f"of {kernels[0]['limit']}.{against_peers(peers, op)}\n\n"
    )


def against_peers(peers: list[dict[str, Any]], op: str) -> str:
    """Return what a low-bit product gains over each other package at many rows, in words."""
    layers = _large(peers, op, FROM_X)
    names = dict.fromkeys(r["provider"] for r in peers if r["package"])
    names = [name for name in names if any(name in r["ratios"] for r in layers)]
    parts = []
    for name in names:
        ratios = [r["ratios"][name] for r in layers if name in r["ratios"]]
        parts.append(f"{min(ratios):.2f}x to {max(ratios):.2f}x {name}")
    return f" Against other packages: {'; '.join(parts)}." if parts else ""


def patches_table(report: dict[str, Any]) -> str:
    """Return what each patch costs in quality and saves in work, as Markdown."""
    rows = [
        [
            f"`{row['patch']}`",
            f"{row['evaluations']:.0f}",
            f"{row['block_share']:.0%}",
            _decibels(row),
            f"{row['relative_l2']:.4f}",
        ]
        for row in report["rows"]
    ]
    return table("| patch | evaluations | block evaluations | PSNR | rel. L2 |", "lrrrr", rows)


def quantized_table(report: dict[str, Any]) -> str:
    """Return what each scheme does to the trained models' Frechet distance, as Markdown."""
    rows = [
        [
            row["model"],
            f"`{row['scheme']}`",
            f"{row['plain_frechet']:.3f}",
            f"{row['frechet']:.3f}",
            f"{row['ratio']:.3f}x ± {row['ratio_error']:.3f}",
            "" if row["psnr_db"] is None else f"{row['psnr_db']:.1f} dB",
        ]
        for row in report["rows"]
    ]
    header = "| model | scheme | Frechet as it is | quantised | ratio, standard error | PSNR |"
    return table(header, "llrrrr", rows)


def replace(text: str, name: str, folder: str, body: str) -> str:
    """Put `body` between the markers `table:<name> <folder>` and `end`.

    Raises:
        ValueError: the text has no such markers, or several.
    """
    pattern = rf"<!-- table:{name} [\w-]+ -->\n.*?(<!-- end -->)"
    start = f"<!-- table:{name} {folder} -->\n"
    text, count = re.subn(pattern, lambda match: start + body + match[1], text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"table:{name}: expected one pair of markers, got {count}")
    return text


def drawn_from(text: str) -> str:
    """Return the device folder that a document's tables name."""
    (name,) = set(re.findall(r"<!-- table:\w+ ([\w-]+) -->", text))
    return name


def quality(report: dict[str, Any] | None) -> str:
    """Return what quantising costs a trained model: the table and its caption."""
    if report is None:
        return "Not measured yet.\n"
    drawn = f"{report['images']} images of {report['seeds']} seeds, on"
    return quantized_table(report) + "\n" + caption(report["environment"], drawn)


def documents(folder: str) -> dict[Path, str]:
    """Return the documents as they should read, drawn from a device's folder."""
    records = Records.load(RESULTS / folder)
    paths = (README, BENCHMARKS, CACHES, CACHING, PATCHING, QUANTIZATION, ATTENTION)
    texts = {path: path.read_text() for path in paths}
    peers = records.peers
    sentences = "".join(
        linear_sentence(records.bench, peers, op) for op in ("gemm_w8a8", "gemm_w4a8")
    )
    images = f"{records.demo['samples']} images per row from the same seeds"
    machine = records.bench[0]
    bench_caption = caption(machine, "`fewstep bench ops`, each comparison within one run, on")
    bodies = {
        (README, "demo"): demo_table(records.demo)
        + "\n"
        + caption(records.demo["environment"], f"`fewstep demo`: {images}, one run on"),
        (README, "bench"): headline_table(records.bench, peers)
        + "\n"
        + sentences
        + bench_caption
        + "\n"
        + peers_caption(peers),
        (README, "caches"): headline(
            {
                "Digits": records.cache_digits,
                "Photographs": records.cache_photos,
                "Photographs, UNet": records.cache_photos_unet,
            },
            f"docs/images/{CURVES['cache_digits']}",
        ),
        (BENCHMARKS, "bench"): summary_markdown(map(Result.from_record, records.bench))
        + "\n"
        + sentences
        + bench_caption,
        (BENCHMARKS, "models"): gpu_tables(RESULTS, MODELS, model_table),
        (CACHING, "cache_summary"): summary_table(
            {
                "digits": records.cache_digits,
                "photos": records.cache_photos,
                "photos_unet": records.cache_photos_unet,
            },
            "../cache_quality.md",
        ),
        (CACHING, "cache_loops"): gpu_tables(RESULTS, LOOPS, loop_table),
        (BENCHMARKS, "peers"): (peers_table(peers) + "\n" if peers else "") + peers_caption(peers),
        **{
            (CACHES, name): cache_table(
                getattr(records, name), f"images/{picture}", name.removeprefix("cache_")
            )
            for name, picture in CURVES.items()
        },
        (PATCHING, "patches"): patches_table(records.patches)
        + "\n"
        + caption(records.patches["environment"], f"{records.patches['images']} images, on"),
        (PATCHING, "time_steps"): kept_table(records.time_steps, "per step"),
        (PATCHING, "text_steps"): kept_table(records.text_steps, "kept"),
        (CACHING, "cache_time"): cache_time_table(records.cache_time),
        (QUANTIZATION, "quantized_digits"): quality(records.quantized_digits),
        (QUANTIZATION, "quantized_photos"): quality(records.quantized_photos),
        (QUANTIZATION, "dit_step"): step_table(records.dit_step)
        + "\n"
        + caption(
            records.dit_step["environment"],
            f"DiT of {records.dit_step['parameters'] / 1e6:.0f}M parameters, on",
        ),
        (ATTENTION, "roofline"): f"![Roofline of attention_jvp](../images/{ROOFLINE})\n\n"
        + bench_caption,
    }
    for (path, name), body in bodies.items():
        texts[path] = replace(texts[path], name, folder, body)
    return texts


def draw_roofline(folder: str, path: Path) -> None:
    """Draw attention_jvp's records of a device."""
    records = [r for r in Records.load(RESULTS / folder).bench if r["op"] == "attention_jvp"]
    title = f"attention_jvp on {records[0]['device']}, {records[0]['threads']} threads"
    results = [Result.from_record(record) for record in records]
    roofline_picture(path, results, title, ROOFLINE_BASELINES)


def draw_caches(folder: str) -> None:
    """Draw the curves of the caches' records of a device."""
    records = Records.load(RESULTS / folder)
    for name, picture in CURVES.items():
        if (report := getattr(records, name)) is not None:
            draw_curves(
                IMAGES / picture, report, f"Caches on the {name.removeprefix('cache_')} model"
            )


def main(argv: list[str] | None = None) -> None:
    """Rewrite the documents in place, and take over the demo's pictures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", help="device folder under benchmarks/results")
    folder = parser.parse_args(argv).folder or drawn_from(README.read_text())
    for path, text in documents(folder).items():
        path.write_text(text)
        print(f"drew {path.relative_to(ROOT)}")
    draw_roofline(folder, IMAGES / ROOFLINE)
    draw_caches(folder)
    report, record = DEMO / "report.json", RESULTS / folder / "demo.json"
    if report.is_file() and report.read_text() == record.read_text():
        for name in PICTURES:
            shutil.copy(DEMO / name, IMAGES / name)
        print(f"took the pictures from {DEMO.relative_to(ROOT)}")
    else:
        print(f"kept the pictures: {DEMO.relative_to(ROOT)} is not the recorded run")


if __name__ == "__main__":
    main()
