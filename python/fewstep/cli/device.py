"""The --device option: cpu, cuda, cuda:1 or auto."""

from __future__ import annotations

import torch
import typer


def resolve_device(text: str) -> torch.device:
    """Return the device asked for; `auto` is the GPU where there is one.

    Raises:
        typer.BadParameter: no such device here.
    """
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise typer.BadParameter(f"--device: expected cpu, cuda or auto, got {text!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--device: expected cpu, cuda or auto, got {text!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(
            f"--device: {text!r} was asked for, but torch finds no CUDA device"
        )
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device
