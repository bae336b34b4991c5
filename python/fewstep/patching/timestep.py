"""`time="cache"`: what depends on the time alone is computed once per step of the grid.

Which modules these are is read off diffusers' models, for the families that the tests run. Where
the time is summed with a condition (DiT's label, FLUX's and Stable Diffusion 3's pooled text, what
SDXL's UNet adds) its own part is kept and the sum goes on; where nothing else comes in (SANA and
PixArt's modulation for all blocks) that is kept too. The small projections of a UNet's ResNets are
left: to know their input takes as long as to project it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from ..caching import TimePart, TimeSession
from .pipeline import SchedulerOf
from .recognise import Target
from .undo import Change, Hook, PatchError, Slot

__all__ = ["plan_time"]

_VALUES = ("cache",)


class _Place(NamedTuple):
    """A module, by its path, with the names of what it hands on and what it is handed."""

    path: str
    gives: str = ""
    takes: str = ""


def _embedding(proj: str, *mlps: str) -> Iterator[_Place]:
    """Yield sine and cosine, and the layers that each of their outputs goes into."""
    yield _Place(proj, gives=proj)
    for mlp in mlps:
        yield _Place(mlp, takes=proj)


def _dit(model: nn.Module) -> Iterator[_Place]:
    for index in range(len(model.transformer_blocks)):  # every block has embeddings of its own
        where = f"transformer_blocks.{index}.norm1.emb"
        yield from _embedding(f"{where}.time_proj", f"{where}.timestep_embedder")


def _text_and_time(model: nn.Module) -> Iterator[_Place]:
    where = "time_text_embed"
    mlps = [f"{where}.timestep_embedder"]
    if hasattr(model.time_text_embed, "guidance_embedder"):
        mlps.append(f"{where}.guidance_embedder")
    yield from _embedding(f"{where}.time_proj", *mlps)


_PLACES: dict[str, Callable[[nn.Module], Iterator[_Place]]] = {
    "DiT": _dit,
    "FLUX": _text_and_time,
    "PixArt": lambda model: iter([_Place("adaln_single")]),
    "SANA": lambda model: iter([_Place("time_embed")]),
    "Stable Diffusion 3": _text_and_time,
    "Stable Diffusion UNet": lambda model: _embedding("time_proj", "time_embedding"),
}


class _Begin:
    """Forward pre-hook of the denoiser: at which time. torch.compile sees an empty one."""

    def __init__(self, session: TimeSession, forward: Callable[..., Any]) -> None:
        self.session = session
        self.position = list(inspect.signature(forward).parameters).index("timestep")

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or self.session.closed:
            return
        at = self.position
        self.session.begin(args[at] if at < len(args) else kwargs.get("timestep"))


class _End:
    """Forward hook of the denoiser, also after an exception."""

    def __init__(self, session: TimeSession) -> None:
        self.session = session

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.session.end()


class _TimeChange(Change):
    def __init__(self, session: TimeSession) -> None:
        super().__init__("time", "what depends on the time alone, once per step of the grid")
        self._session = session

    def undo(self) -> None:
        self._session.close()  # a wrapper that somebody else has wrapped stays below theirs
        super().undo()

    def report(self) -> dict[str, Any]:
        return self._session.report()


def plan_time(pipe: Any, target: Target, time: Any) -> Change:
    """Plan the replacements of `forward`; nothing is changed yet.

    Raises:
        TypeError, ValueError: not "cache", or a model that it can't serve.
        PatchError: another patch does it already.
    """
    if not isinstance(time, str):
        raise TypeError(f"time: expected 'cache', got {time!r}")
    if time not in _VALUES:
        raise ValueError(f"time: expected 'cache', got {time!r}")
    target.require_eager("time")
    model = target.denoiser
    family = target.family.name if target.family else ""
    if family not in _PLACES or not type(model).forward.__module__.startswith("diffusers."):
        known = ", ".join(_PLACES)
        raise ValueError(
            f"time: expected a denoiser of diffusers, one of {known}; got {target.model}"
        )
    session = TimeSession(SchedulerOf(pipe))
    change = _TimeChange(session)
    for place in _PLACES[family](model):
        module, where = model.get_submodule(place.path), f"pipe.{target.component}.{place.path}"
        if TimePart.is_on(module):
            raise PatchError(
                f"time: expected a {target.model} not yet patched with it, got one that another "
                "pipeline's patch holds, or a copy of such a one; undo that patch before, or "
                "before copying"
            )
        if "forward" in module.__dict__:
            change.left.append(f"{place.path}: something else has replaced its forward")
            continue
        part = TimePart(module, session, place.gives, place.takes)
        for name, value in part.replacements().items():
            change.slots.append(Slot(module, name, value, f"{where}.{name}"))
    where = f"pipe.{target.component}"
    begin, end = _Begin(session, model.forward), _End(session)
    change.slots.append(Hook(model, begin, f"{where} (forward pre-hook)", before=True))
    change.slots.append(Hook(model, end, f"{where} (forward hook)", before=False))
    change.done.append(
        f"{len(session.parts)} modules of {target.model} are evaluated once per step of a grid and "
        "batch size, the values used by every later call: the same bits"
    )
    change.done.append(f"at most {session.max_bytes >> 20} MiB")
    change.left.append("what text, labels or guidance enter")
    return change
