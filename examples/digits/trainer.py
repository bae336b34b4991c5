"""What training a small flow model and its student takes, whatever the images: stages that resume.

    teacher      flow matching, labels dropped at random for guidance
    student      starts as the teacher; continuous-time consistency on the guided teacher's flow,
                 in fp32: the target holds t dF/dt, and with bf16 the residual grew instead
    refine       the same loss from there, times spread evenly over [0, 1] and weight power 1/2. The
                 first stage leaves its error at small t, where it starts and all later times
                 inherit it: the endpoint's error is the integral of the residual from 0 to t

Every stage writes a checkpoint each --save-every steps and goes on from it after being stopped,
bit for bit as if it had not been: weights, EMA, optimizer, step and the one generator that all its
draws come from are in it. A finished stage is kept, unless --stage asks for it without --resume, or
the weights that it started from have changed since. Finished models go to --output as diffusers
folders, EMA weights in fp16. `Task` says what is trained: examples/digits/train.py is one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.assets.digits import TIMESTEP_SCALE, DigitsPipeline, null_label
from fewstep.distillation import (
    consistency_loss,
    ema_decay,
    ema_update,
    flow_matching_loss,
    interpolate,
    sample_times,
)
from fewstep.sampling import FlowConsistencyScheduler


@dataclass(frozen=True)
class StageConfig:
    """What one stage does; every number that shapes the weights is here."""

    steps: int
    batch: int = 64
    lr: float = 1e-3
    warmup: int = 100
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    ema: float = 0.998
    seed: int = 0
    label_drop: float = 0.1
    """Teacher: share of samples trained without their label."""
    time_mean: float = 0.0
    time_std: float = 1.0
    """Of the logit-normal times."""
    endpoint_mass: float = 0.0
    """Share of times exactly 1."""
    guidance: float = 1.0
    """Student: scale of the teacher's guidance that is baked in. Teacher: default when sampling."""
    tangent_warmup: int = 1
    """Student: steps over which r rises from 0 to 1."""
    power: float = 1.0
    floor: float = 1e-2
    """Student: p and c of the adaptive weight."""
    fp32: bool = False
    """Compute in fp32 even where bf16 is faster."""


SMOKE_STEPS = 6
STUDENT_KNOTS = {"1": [1.0], "2": [1.0, 0.4]}


@dataclass
class Run:
    """Where a run writes and what it computes with."""

    output: Path
    device: torch.device
    bf16: bool
    save_every: int
    stop_after: int | None = None
    """Give up after this many steps of a stage, as if stopped from outside; for the tests."""
    again: bool = False
    """Train a finished stage anew."""
    resume: bool = False
    """Never throw a checkpoint away."""


@dataclass(frozen=True)
class Task:
    """What is trained, on what, and where it goes."""

    output: Path
    """Where a run writes unless told otherwise."""
    stages: Mapping[str, StageConfig]
    """In the order of training; those not in `extra` are "teacher", "student" and "refine"."""
    data: Callable[[], tuple[Tensor, Tensor]]
    """Images [N, C, H, W] in [-1, 1] and their labels [N]."""
    network: Callable[[], nn.Module]
    """The untrained network, in eval mode; `null_label` knows its null label."""
    report: Callable[..., None]
    """Measure a finished folder and write its card; `smoke=True` as quickly as can be."""
    extra: Mapping[str, Callable[[StageConfig, Run], bool]] = field(default_factory=dict)
    """Stages of the task's own: run one to its end, False if it was stopped early."""


@contextmanager
def fast_math(run: Run) -> Iterator[None]:
    """bf16 matrix products, and plain attention: for 64 tokens on a CPU 1.5 times the fused one."""
    with (
        sdpa_kernel(SDPBackend.MATH),
        torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16),
    ):
        yield


def learning_rate(config: StageConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to a hundredth."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def record_stage(name: str, config: StageConfig, run: Run, spent: dict[str, float]) -> None:
    """Settings and time of a finished stage, into training.json beside the weights."""
    path = run.output / "training.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    record[name] = {
        **{key: round(value, 1) for key, value in spent.items()},
        "device": run.device.type,
        "precision": "bf16 autocast" if run.bf16 else "fp32",
        "config": asdict(config),
    }
    path.write_text(json.dumps(record, indent=2) + "\n")


def digest(*models: nn.Module) -> str:
    """A name for these weights: the same bits have the same one."""
    found = hashlib.sha256()
    for model in models:
        for value in model.state_dict().values():
            found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def load_checkpoint(path: Path, config: StageConfig, run: Run, start: str) -> dict[str, Any] | None:
    """The state to go on from, or None to begin the stage anew."""
    if not path.exists():
        return None
    state = torch.load(path, map_location=run.device, weights_only=True)
    if state["config"] != asdict(config):
        raise SystemExit(f"{path} was written with other settings; delete it or change --output")
    if state.get("start") != start:
        if run.resume:
            raise SystemExit(f"{path} started from other weights; leave out --resume to begin anew")
        print(f"{path} started from other weights: beginning anew", flush=True)
        return None
    if run.again and state["step"] >= config.steps:
        print(f"{path} is finished: beginning anew (--resume keeps it)", flush=True)
        return None
    return state


def train(
    name: str,
    config: StageConfig,
    model: nn.Module,
    loss_fn: Callable[[nn.Module, int, torch.Generator], tuple[Tensor, Tensor]],
    run: Run,
    start: str = "",
) -> nn.Module | None:
    """Run a stage to its end and return the model with its EMA weights; None if stopped early.

    `loss_fn(model, step, generator)` returns (loss, the number to show). `start` is the digest of
    the trained weights that the stage builds on, "" where it builds on none.
    """
    checkpoint = run.output / "checkpoints" / f"{name}.pt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    model.to(run.device)
    ema = [value.detach().clone() for value in model.parameters()]
    optimizer = torch.optim.AdamW(
        model.parameters(), config.lr, config.betas, weight_decay=config.weight_decay, fused=True
    )
    generator = torch.Generator().manual_seed(config.seed)
    step, shown, spent = 0, 0.0, {"seconds": 0.0, "cpu_seconds": 0.0}
    state = load_checkpoint(checkpoint, config, run, start)
    if state is not None:
        model.load_state_dict(state["model"])
        ema = state["ema"]
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"].cpu())
        step, shown, spent = state["step"], state["shown"], state["spent"]

    clocks = {"seconds": time.perf_counter, "cpu_seconds": time.process_time}
    began = {key: clock() - spent[key] for key, clock in clocks.items()}

    def save() -> None:
        for key, clock in clocks.items():
            spent[key] = clock() - began[key]
        state = {
            "config": asdict(config),
            "start": start,
            "model": model.state_dict(),
            "ema": ema,
            "optimizer": optimizer.state_dict(),
            "generator": generator.get_state(),
            "step": step,
            "shown": shown,
            "spent": spent,
        }
        # Written aside and renamed: a stop in the middle leaves the older checkpoint whole.
        fresh = checkpoint.with_suffix(".new")
        torch.save(state, fresh)
        fresh.replace(checkpoint)

    columns = (
        TextColumn("{task.description:<10}"), BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("loss {task.fields[loss]:.4f}"), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False, compact=False),
    )  # fmt: skip
    with Progress(*columns, speed_estimate_period=60, refresh_per_second=1) as progress:
        task = progress.add_task(name, total=config.steps, completed=step, loss=shown)
        while step < config.steps:
            if run.stop_after is not None and step >= run.stop_after:
                return None
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            loss, watched = loss_fn(model, step, generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            ema_update(ema, model.parameters(), ema_decay(step, config.ema))
            shown += (watched.item() - shown) / min(step + 1, 50)
            step += 1
            progress.update(task, completed=step, loss=shown)
            if step % run.save_every == 0 or step == config.steps:
                save()
            if step % 100 == 0 and not progress.console.is_terminal:
                print(f"{name} {step}/{config.steps} loss {shown:.4f}", flush=True)
    record_stage(name, config, run, spent)
    with torch.no_grad():
        for value, average in zip(model.parameters(), ema, strict=True):
            value.copy_(average)
    return model.eval()


def draw_batch(n: int, size: int, run: Run, generator: torch.Generator) -> Tensor:
    """Indices [size] into n images, with replacement."""
    return torch.randint(n, (size,), generator=generator).to(run.device)


def bound(model: nn.Module, labels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The network as a function (x, t in [0, 1]) -> velocity for these labels."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return model(x, timestep=t * TIMESTEP_SCALE, class_labels=labels, return_dict=False)[0]

    return velocity


def train_teacher(
    config: StageConfig, run: Run, task: Task, name: str = "teacher"
) -> nn.Module | None:
    """Flow matching."""
    torch.manual_seed(config.seed)
    images, labels = (x.to(run.device) for x in task.data())
    network = task.network()
    null = null_label(network)

    def loss_fn(model: nn.Module, step: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = draw_batch(len(images), config.batch, run, g)
        x0 = images[rows]
        noise = torch.randn(x0.shape, generator=g).to(run.device)
        t = sample_times(
            len(x0), mean=config.time_mean, std=config.time_std,
            endpoint_mass=config.endpoint_mass, generator=g,
        ).to(run.device)  # fmt: skip
        drop = (torch.rand(len(x0), generator=g) < config.label_drop).to(run.device)
        wanted = labels[rows].masked_fill(drop, null)
        with fast_math(run):
            loss = flow_matching_loss(bound(model, wanted), x0, noise, t)
        return loss, loss.detach()

    return train(name, config, network, loss_fn, run)


def train_student(
    name: str, config: StageConfig, run: Run, task: Task, teacher: nn.Module, student: nn.Module
) -> nn.Module | None:
    """Consistency distillation of the guided teacher; its guidance costs nothing afterwards."""
    images, labels = (x.to(run.device) for x in task.data())
    null = null_label(teacher)
    start = digest(teacher, student)
    teacher = teacher.to(run.device).eval().requires_grad_(False)

    def loss_fn(model: nn.Module, step: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = draw_batch(len(images), config.batch, run, g)
        x0, wanted = images[rows], labels[rows]
        noise = torch.randn(x0.shape, generator=g).to(run.device)
        t = sample_times(
            len(x0), mean=config.time_mean, std=config.time_std,
            endpoint_mass=config.endpoint_mass, generator=g,
        ).to(run.device)  # fmt: skip
        x = interpolate(x0, noise, t)
        with fast_math(run):
            with torch.no_grad():
                v = bound(teacher, wanted)(x, t).float()
                if config.guidance > 1:
                    v_null = bound(teacher, torch.full_like(wanted, null))(x, t).float()
                    v = v_null + config.guidance * (v - v_null)
            terms = consistency_loss(
                bound(model, wanted), x, t, v, c=config.floor, p=config.power,
                tangent_weight=min(1.0, step / config.tangent_warmup),
            )  # fmt: skip
        return terms.loss, terms.residual.mean()

    return train(name, config, student, loss_fn, run, start)


def pipeline_folder(name: str, output: Path) -> Path:
    """Where a stage's network goes. The unrefined student is kept apart: it does not ship."""
    folders = {"student": "checkpoints/student", "refine": "student"}
    return output / folders.get(name, name)


def save_pipeline(
    name: str, model: nn.Module, config: StageConfig, task: Task, output: Path
) -> None:
    """A diffusers folder, weights in fp16: it rounds them by 2^-11, far below training noise."""
    if name not in ("student", "refine"):
        scheduler, steps, guidance = FlowMatchEulerDiscreteScheduler(), 50, config.guidance
    else:
        scheduler, steps, guidance = FlowConsistencyScheduler(knots=STUDENT_KNOTS), 2, 1.0
    half = task.network()
    half.load_state_dict(model.state_dict())
    pipeline = DigitsPipeline(
        half.half(), scheduler, default_steps=steps, default_guidance=guidance
    )
    pipeline.save_pretrained(pipeline_folder(name, output), safe_serialization=True)


def load_network(name: str, output: Path) -> nn.Module:
    """A stage's network as saved: what follows is trained from exactly the weights on disk."""
    folder = pipeline_folder(name, output)
    return DigitsPipeline.from_pretrained(folder, dtype=torch.float32).transformer


def run_stage(name: str, config: StageConfig, run: Run, task: Task) -> bool:
    """One stage to its end; False if it was stopped early."""
    if name in task.extra:
        return task.extra[name](config, run)
    if name == "teacher":
        model = train_teacher(config, run, task)
    else:
        start = load_network("teacher" if name == "student" else "student", run.output)
        teacher = load_network("teacher", run.output)
        model = train_student(name, config, run, task, teacher, start)
    if model is not None:
        save_pipeline(name, model.cpu(), config, task, run.output)
    return model is not None


def pick_device(name: str) -> torch.device:
    """The device asked for; "auto" takes a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def supports_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products are faster than fp32 ones here."""
    return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()


def parse(task: Task, argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=task.output)
    parser.add_argument("--stage", choices=[*task.stages, "all"], default="all")
    parser.add_argument(
        "--resume", action="store_true", help="with --stage: keep the stage if it is finished"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--smoke", action="store_true", help="a few steps of each stage, for tests")
    parser.add_argument("--stop-after", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="override the stage"
    )
    return parser.parse_args(argv)


def overridden(config: StageConfig, changes: list[str]) -> StageConfig:
    """The config with KEY=VALUE changes, values as JSON."""
    known = {f.name for f in fields(StageConfig)}
    values = {}
    for change in changes:
        key, _, value = change.partition("=")
        if key not in known:
            raise SystemExit(f"--set {key}: expected one of {', '.join(sorted(known))}")
        values[key] = json.loads(value)
    return replace(config, **values)


def main(task: Task, argv: list[str] | None = None) -> None:
    """Train the stages asked for, then measure and write the card."""
    args = parse(task, argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    device = pick_device(args.device)
    bf16 = supports_bf16(device) if args.precision == "auto" else args.precision == "bf16"
    args.output.mkdir(parents=True, exist_ok=True)
    again = args.stage != "all" and not args.resume
    run = Run(
        args.output, device, bf16, args.save_every, args.stop_after, again, args.resume
    )  # fmt: skip
    for name in task.stages if args.stage == "all" else [args.stage]:
        config = task.stages[name]
        if args.smoke:
            config = replace(config, steps=SMOKE_STEPS, batch=8, warmup=2)
        config = overridden(config, args.set)
        if not run_stage(name, config, replace(run, bf16=run.bf16 and not config.fp32), task):
            return
    if args.stage == "all":
        task.report(args.output, smoke=args.smoke)
