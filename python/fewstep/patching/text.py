"""`text="cache"`: what depends on the prompt alone is computed once per run of the sampler.

Found by name, in any denoiser: the projections of cross-attention's keys and values with the norm
of the keys, and what makes tokens of the text encoder's states in front of the blocks. A name that
means something else in some model costs nothing but memory: an input that changes at every step is
noticed, and its module is left to run.

Looked for when the patch is applied, behind all other features: low-bit layers are then in place.
"""

from __future__ import annotations

import re
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..caching import TextPart, TextSession
from .pipeline import SchedulerOf
from .recognise import Target
from .undo import Change, Hook, PatchError, Slot

__all__ = ["plan_text"]

_CROSS = re.compile(r"(.*\.attn2)\.(to_k|to_v|norm_k)")
_IN_FRONT = re.compile(
    r"caption_projection|caption_norm|context_embedder|encoder_hid_proj|txt_norm|txt_in"
    r"|(condition_embedder|time_text_embed)\.text_embedder"
)


def _found(model: nn.Module) -> dict[str, nn.Module]:
    """Return what depends on the text alone, by name."""
    modules = dict(model.named_modules())

    def is_of_text(name: str) -> bool:
        if cross := _CROSS.fullmatch(name):
            return getattr(modules[cross[1]], "is_cross_attention", True)
        return _IN_FRONT.fullmatch(name) is not None

    return {name: module for name, module in modules.items() if is_of_text(name)}


class _Begin:
    """Forward pre-hook of the denoiser. torch.compile sees an empty one."""

    def __init__(self, session: TextSession) -> None:
        self.session = session

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or self.session.closed:
            return
        tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        first = next(tensors, None)
        self.session.begin(torch.device("cpu") if first is None else first.device)


class _End:
    """Forward hook of the denoiser, also after an exception."""

    def __init__(self, session: TextSession) -> None:
        self.session = session

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.session.end()


class _TextChange(Change):
    def __init__(self, target: Target, session: TextSession) -> None:
        super().__init__("text", "what depends on the prompt alone, once per run of the sampler")
        self._model, self._session = weakref.ref(target.denoiser), session
        self._where = f"pipe.{target.component}"

    def apply(self) -> None:
        model, session = self._model(), self._session
        for name, module in _found(model).items():
            if "forward" in module.__dict__:
                self.left.append(f"{name}: something else has replaced its forward")
                continue
            part = TextPart(module, session)
            for attribute, value in part.replacements().items():
                where = f"{self._where}.{name}.{attribute}"
                self.slots.append(Slot(module, attribute, value, where))
        begin, end = _Begin(session), _End(session)
        self.slots.append(Hook(model, begin, f"{self._where} (forward pre-hook)", before=True))
        self.slots.append(Hook(model, end, f"{self._where} (forward hook)", before=False))
        self.done.append(
            f"{len(session.parts)} modules are evaluated once per run and guidance pass, and their "
            "values used by every later step: the same bits"
        )
        self.done.append(
            f"at most {session.max_bytes >> 20} MiB, until the last step or the end of the call"
        )
        super().apply()

    def undo(self) -> None:
        self._session.close()  # a wrapper that somebody else has wrapped stays below theirs
        super().undo()

    def report(self) -> dict[str, Any]:
        return self._session.report()


def plan_text(pipe: Any, target: Target, text: Any) -> Change:
    """Plan the replacements of `forward`; nothing is changed yet.

    Raises:
        TypeError, ValueError: not "cache", or a model in which nothing depends on a text alone.
        PatchError: another patch does it already.
    """
    if not isinstance(text, str):
        raise TypeError(f"text: expected 'cache', got {text!r}")
    if text != "cache":
        raise ValueError(f"text: expected 'cache', got {text!r}")
    target.require_eager("text")
    found = _found(target.denoiser)
    if not found:
        raise ValueError(
            "text: expected a denoiser with cross-attention (attn2) or a projection of the text, "
            f"got {target.model} without any"
        )
    if any(map(TextPart.is_on, found.values())):
        raise PatchError(
            f"text: expected a {target.model} not yet patched with it, got one that another "
            "pipeline's patch holds, or a copy of such a one; undo that patch before, or before "
            "copying"
        )
    return _TextChange(target, TextSession(SchedulerOf(pipe)))
