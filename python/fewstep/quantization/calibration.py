"""What a model's linear layers see while it denoises: samples of their inputs, and whole calls.

    calls = [{"prompt": prompt, "num_inference_steps": 4} for prompt in prompts]
    calibration = fewstep.quantization.calibrate(pipe, calls)

Activations drift along the denoising path, so what is kept is drawn from all evaluations of all
calls, at every step of the grid that the pipeline will use: that is the point of PTQ4DM (arXiv
2211.15736). Rows: every row that a layer has seen is equally likely (reservoir sampling; Vitter,
1985). Whole evaluations, of which few are kept: of four times as many that are drawn so, those that
stand for many others and differ from each other (the density and variety of EDA-DM, arXiv
2401.04585), by the model's outputs. The draw is seeded: the same calls give the same samples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

DENOISERS = ("transformer", "unet")
_FORMAT = "fewstep.calibration"
_POOL = 4  # evaluations held for each one that is kept
_FINGERPRINT = 256


@dataclass
class Calibration:
    """What `calibrate` has seen.

    inputs        layer -> rows [R, K] of its input, float32 on the CPU
    rows          layer -> rows that one evaluation of the model gives it, on average
    evaluations   (args, kwargs) of calls of the model, on the CPU
    amax          layer -> largest magnitude in each column [K] of all rows seen, each row in units
                  of its root mean square, float32 on the CPU
    runs          layer -> which run of the pipeline each of `inputs` came in [R], int64 on the CPU;
                  empty for a model by itself, and from files that do not know
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, float] = field(default_factory=dict)
    evaluations: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    amax: dict[str, Tensor] = field(default_factory=dict)
    runs: dict[str, Tensor] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write it as safetensors.

        Raises:
            TypeError: an argument of a kept evaluation is no tensor, number, text, list or dict.
        """
        tensors: dict[str, Tensor] = {}
        evaluations = [_encode(item, tensors) for item in self.evaluations]
        for kind, found in (("inputs", self.inputs), ("amax", self.amax), ("runs", self.runs)):
            tensors |= {f"{kind}.{name}": x.contiguous() for name, x in found.items()}
        data = {"rows": self.rows, "evaluations": evaluations}
        # One layer in several places has its rows under several names.
        tensors = {name: x.clone() for name, x in tensors.items()}
        save_file(tensors, path, {_FORMAT: json.dumps(data)})

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            ValueError: another file.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            data = json.loads(metadata[_FORMAT])
            evaluations = [_decode(item, tensors) for item in data["evaluations"]]
            found: dict[str, dict[str, Tensor]] = {"inputs": {}, "amax": {}, "runs": {}}
            for name, x in tensors.items():
                kind, _, layer = name.partition(".")
                if kind in found:
                    found[kind][layer] = x
            for layer, runs in found["runs"].items():
                if runs.shape != found["inputs"][layer].shape[:1] or runs.dtype != torch.int64:
                    raise KeyError(f"runs.{layer} of {list(runs.shape)} {runs.dtype}")
            return cls(found["inputs"], data["rows"], evaluations, found["amax"], found["runs"])
        except (KeyError, TypeError, json.JSONDecodeError, SafetensorError) as error:
            raise ValueError(
                f"calibration: expected a file as Calibration.save writes it, got {path}: {error}"
            ) from error


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return a nest as JSON-ready data, its tensors by name; each container is tagged."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        name = f"evaluations.{len(tensors)}"
        tensors[name] = value.contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _encode(item, tensors)] for key, item in value.items()]}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_encode(item, tensors) for item in value]}
    raise TypeError(
        "calibration: expected evaluations of tensors, numbers, texts, lists and dicts, got "
        f"{type(value).__name__}"
    )


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in content}
    return {"list": list, "tuple": tuple}[kind](_decode(item, tensors) for item in content)


class _Reservoir:
    """A uniform sample of all rows that come by, and the largest magnitude of each column.

    Rows count in units of their root mean square: each is quantised with a scale of its own, so
    what its columns ask for does not depend on its size. The first token of a text, of 80 times
    the others' size (MixDQ, arXiv 2405.17873), would decide for all of them otherwise.
    """

    def __init__(self, size: int, generator: torch.Generator) -> None:
        self.size, self.generator = size, generator
        self.kept: Tensor | None = None
        self.runs = torch.zeros(0, dtype=torch.int64)
        self.amax: Tensor | None = None
        self.seen = 0

    def add(self, rows: Tensor, run: int = 0) -> None:
        rms = rows.float().square().mean(1, keepdim=True).sqrt()
        largest = (rows.float() / rms.clamp(min=torch.finfo(torch.float32).tiny)).abs().amax(0)
        self.amax = largest if self.amax is None else self.amax.maximum(largest)
        count = rows.shape[0]
        order = torch.arange(self.seen, self.seen + count)
        # The n-th row (from 0) takes a place that is uniform in 0..n; beyond the size it is lost.
        places = (torch.rand(count, generator=self.generator) * (order + 1)).long()
        places = torch.where(order < self.size, order, places)
        self.seen += count
        if self.kept is None:
            self.kept = rows.new_zeros((0, rows.shape[1]), dtype=torch.float32, device="cpu")
        missing = min(self.seen, self.size) - self.kept.shape[0]
        if missing:
            self.kept = torch.cat([self.kept, self.kept.new_zeros((missing, rows.shape[1]))])
            self.runs = torch.cat([self.runs, self.runs.new_zeros(missing)])
        hits = (places < self.size).nonzero()[:, 0]
        # Of several rows for one place the last one stays, as if they had come one by one.
        last = dict(zip(places[hits].tolist(), hits.tolist(), strict=True))
        if last:
            taken = rows[torch.tensor([*last.values()], device=rows.device)]
            self.kept[torch.tensor([*last])] = taken.float().cpu()
            self.runs[torch.tensor([*last])] = run


# Arguments that are no condition: what differs from call to call anyway, and settings.
_UNTOLD = {"generator", "latents", "output_type", "timesteps", "sigmas"}
_UNTOLD |= {"callback_on_step_end_tensor_inputs"}


def _told(value: Any) -> Any:
    """Return a nest of texts, integers and tensors as something hashable, equal for equal ones."""
    if isinstance(value, Tensor):
        data = value.detach().float().cpu().contiguous().numpy().tobytes()
        return (*value.shape, hashlib.sha256(data).hexdigest())
    if isinstance(value, (list, tuple)):
        told = tuple(map(_told, value))
        return None if all(item is None for item in told) else told
    return value if isinstance(value, str) or type(value) is int else None


def _is_every_class(value: Any, classes: int | None) -> bool:
    """Return whether a list or tensor of integers names all of a model's classes."""
    if isinstance(value, Tensor) and not value.is_floating_point():
        value = value.flatten().tolist()
    if not classes or not isinstance(value, (list, tuple)) or len(value) < classes:
        return False
    return all(type(item) is int for item in value) and {*value} >= {*range(classes)}


def _condition(call: Mapping[str, Any], classes: int | None) -> Any:
    """Return what tells a call's prompts and labels from others', or None without any.

    Calls of the same ones show what other seeds bring, and not what other texts do: they are one
    run. Labels of all classes leave no other to come, so they are no condition.
    """
    found = []
    for name, value in call.items():
        if name in _UNTOLD or _is_every_class(value, classes):
            continue
        # A number by itself is a setting, but for a label.
        told = None if type(value) is int and "label" not in name else _told(value)
        if told is not None:
            found.append((name, told))
    return tuple(sorted(found)) or None


def _classes_of(pipe: Any, model: nn.Module) -> int | None:
    """Return how many classes a pipeline's labels can name, or None if that is not known."""
    config = getattr(model, "config", None)
    given = [(pipe, "num_classes"), (config, "num_embeds_ada_norm"), (config, "num_class_embeds")]
    found = (getattr(owner, name, None) for owner, name in given)
    return next((count for count in found if type(count) is int), None)


def _fingerprint(output: Any) -> Tensor:
    """Return a few numbers that tell outputs of a model apart, whatever their size."""
    y = first_tensor(output).detach().float().reshape(1, 1, -1)
    return F.adaptive_avg_pool1d(y, _FINGERPRINT)[0, 0].nan_to_num().cpu()


def choose(fingerprints: Tensor, count: int) -> list[int]:
    """Return which `count` of the points [P, F] to keep: dense ones that differ, in order.

    The density of a point is the inverse of its mean distance to the others, its variety the
    distance to the nearest one chosen; both in units of the largest, added.
    """
    if len(fingerprints) <= count:
        return [*range(len(fingerprints))]
    distance = torch.cdist(fingerprints.double(), fingerprints.double())
    density = 1 / distance.mean(1).clamp(min=1e-12)
    density /= density.max()
    chosen = [int(density.argmax())]
    while len(chosen) < count:
        variety = distance[:, chosen].amin(1)
        score = density + variety / variety.max().clamp(min=1e-12)
        score[chosen] = -1
        chosen.append(int(score.argmax()))
    return sorted(chosen)


def denoiser_of(pipe: Any) -> nn.Module:
    """Return the model that a pipeline evaluates in every step; a module is its own.

    Raises:
        TypeError: neither a module nor a pipeline with a transformer or unet.
    """
    if isinstance(pipe, nn.Module):
        return pipe
    for name in DENOISERS:
        model = getattr(pipe, name, None)
        if isinstance(model, nn.Module):
            return model
    raise TypeError(
        f"pipe: expected a module, or a pipeline with one of {', '.join(DENOISERS)}, got "
        f"{type(pipe).__name__}"
    )


def first_tensor(output: Any) -> Tensor:
    """Return the first tensor in a model's output."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    return first_tensor(next(iter(values)))


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {name: _to_cpu(item) for name, item in value.items()}
    return type(value)(map(_to_cpu, value)) if isinstance(value, (list, tuple)) else value


def to_device(value: Any, device: torch.device) -> Any:
    """Return a nest of tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: to_device(item, device) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(item, device) for item in value)
    return value


@torch.no_grad()
def calibrate(
    pipe: Any,
    calls: Iterable[Mapping[str, Any]],
    *,
    rows: int = 256,
    evaluations: int = 8,
    seed: int = 0,
) -> Calibration:
    """Run `pipe(**call)` for every call and keep samples of what its linear layers see.

    Args:
        pipe: a pipeline, or the model itself.
        calls: keyword arguments; 4 to 16 calls with different prompts and seeds. Those of equal
            prompts and labels (texts, labels, integers in lists, tensors; latents and settings do
            not count, nor labels of all classes) are one run, in what layers are judged by
            (`samples`).
        rows: rows kept of each layer's input, each as many float32 numbers as the layer has inputs.
            For `quantize(compensate=)` better about as many as that, 1,024 at least.
        evaluations: whole evaluations of the model kept, for errors at its output; four times as
            many are held meanwhile, on the CPU.
        seed: of the draw.

    Returns:
        The samples. The pipeline is as it was.

    Raises:
        TypeError: no pipeline and no module.
        ValueError: rows or evaluations below 1, no call at all, or a call that never reaches the
            model.
    """
    for name, value in (("rows", rows), ("evaluations", evaluations)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
    model = denoiser_of(pipe)
    classes = _classes_of(pipe, model)
    generator = torch.Generator().manual_seed(seed)
    places: dict[nn.Module, list[str]] = {}  # a layer can sit in several
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            places.setdefault(module, []).append(name)
    reservoirs = {layer: _Reservoir(rows, generator) for layer in places}
    seen = 0
    pool = _POOL * evaluations
    kept: dict[int, Any] = {}
    prints: dict[int, Tensor] = {}
    place = 0

    def see(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("input")
        if isinstance(x, Tensor) and x.numel():
            reservoirs[layer].add(x.detach().reshape(-1, x.shape[-1]), run)

    def evaluated(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal seen, place
        place = seen if seen < pool else int(torch.randint(seen + 1, (), generator=generator))
        if place < pool:
            kept[place] = _to_cpu((args, kwargs))
        seen += 1

    def gave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if place < pool:
            prints[place] = _fingerprint(output)

    handles = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in places]
    handles.append(model.register_forward_pre_hook(evaluated, with_kwargs=True))
    handles.append(model.register_forward_hook(gave))
    ran = run = 0
    known: dict[Any, int] = {}
    try:
        for ran, call in enumerate(calls, 1):
            before = seen
            run = known.setdefault(_condition(call, classes) or ran, len(known))
            pipe(**call)
            if seen == before:
                raise ValueError(
                    f"calls: expected calls that evaluate {type(model).__name__}, got none in "
                    f"call {ran}"
                )
    finally:
        for handle in handles:
            handle.remove()
    if not ran:
        raise ValueError("calls: expected at least one call, got none")
    found = {name: reservoirs[layer] for layer, names in places.items() for name in names}
    return Calibration(
        {name: r.kept for name, r in found.items() if r.kept is not None},
        {name: r.seen / seen for name, r in found.items() if r.kept is not None},
        [kept[i] for i in choose(torch.stack([prints[i] for i in range(len(kept))]), evaluations)],
        {name: r.amax.cpu() for name, r in found.items() if r.amax is not None},
        {} if pipe is model else {name: r.runs for name, r in found.items() if r.kept is not None},
    )
