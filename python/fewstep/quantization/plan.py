"""A plan: the scheme of every linear layer of a model, as data.

    {"model": "DiT", "layers": {"blocks.0.ff.net.2": "w4a8-g64-r16", "proj_out": null, ...}}

null leaves a layer in its precision. A plan names all linear layers of its model with their shapes,
so that one made for another model is noticed before anything is changed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from .scheme import Scheme

_SHOWN = 10  # layers in `Plan.explain`


@dataclass(frozen=True)
class Plan:
    """Which layer gets which scheme.

    model     class name of the model that it was made for
    layers    name -> scheme, or None to leave the layer alone
    shapes    name -> [out, in]
    notes     where it comes from, JSON-ready; "compensated" and "smoothed": that a calibration was
              given for it, which the schemes do not tell
    """

    model: str
    layers: Mapping[str, Scheme | None]
    shapes: Mapping[str, tuple[int, int]]
    notes: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        layers: Mapping[str, Scheme | str | None],
        notes: Mapping[str, Any] | None = None,
    ) -> Plan:
        """Return the plan that gives some layers of `model` a scheme and leaves the others.

        Raises:
            ValueError: a name that is no linear layer of the model, or an unknown scheme.
        """
        shapes = linear_shapes(model)
        for name in layers:
            if name not in shapes:
                raise ValueError(
                    f"plan: expected linear layers of {type(model).__name__}, got {name!r}"
                )
        parsed = {
            name: None if layers.get(name) is None else Scheme.parse(layers[name])
            for name in shapes
        }
        return cls(type(model).__name__, parsed, shapes, dict(notes or {}))

    def check(self, model: nn.Module) -> None:
        """Raise ValueError unless this plan is for a model with these layers."""
        shapes = linear_shapes(model)
        for name, shape in self.shapes.items():
            if shapes.get(name) != tuple(shape):
                found = f"one of {list(shapes[name])}" if name in shapes else "none"
                raise ValueError(
                    f"plan: expected a {self.model} with a linear layer {name} of {list(shape)}, "
                    f"got a {type(model).__name__} with {found}"
                )
        extra = [name for name in shapes if name not in self.shapes]
        if extra:
            raise ValueError(
                f"plan: expected the linear layers of the {self.model} it was made for, got a "
                f"{type(model).__name__} with {extra[0]} besides"
            )

    def explain(self) -> str:
        """Say how many layers get what and, of a plan by `allocate`, what was measured."""
        counts = Counter("as it is" if s is None else str(s) for s in self.layers.values())
        lines = [f"{self.model}, {len(self.layers)} linear layers"]
        lines += [f"  {count} {scheme}" for scheme, count in counts.most_common()]
        if "error" in self.notes:
            shares = [f"{self.notes[n]:.3f} of {n}" for n in ("bytes", "time") if n in self.notes]
            shares.append(f"error {self.notes['error']:.2e} at the output")
            lines.append("  " + ", ".join(shares))
        if self.notes.get("compensated"):
            lines.append("  made with rounding compensated: quantize with compensate=, too")
        if self.notes.get("smoothed"):
            lines.append("  made with smoothing from a calibration: quantize with smooth=, too")
        measured = self.notes.get("layers", {})
        worst = sorted(measured, key=lambda n: -measured[n]["content"] - measured[n]["quality"])
        for name in worst[:_SHOWN]:
            found = measured[name]
            own = "exact" if found["sqnr_db"] is None else f"{found['sqnr_db']:.1f} dB"
            lines.append(
                f"  {name} in {self.layers[name]}: {own} at the layer; alone it moves content by "
                f"{found['content']:.1e}, quality by {found['quality']:.1e}"
            )
        if len(worst) > _SHOWN:
            lines.append(f"  and {len(worst) - _SHOWN} layers that err less")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready data."""
        return {
            "model": self.model,
            "layers": {n: None if s is None else str(s) for n, s in self.layers.items()},
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "notes": dict(self.notes),
        }

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """Return the plan in JSON data.

        Raises:
            ValueError: something is missing or no scheme.
        """
        try:
            layers, shapes = data["layers"], data["shapes"]
            if layers.keys() != shapes.keys():
                raise ValueError("its layers and shapes differ")
            return cls(
                str(data["model"]),
                {n: None if s is None else Scheme.parse(s) for n, s in layers.items()},
                {name: (int(out), int(inputs)) for name, (out, inputs) in shapes.items()},
                dict(data.get("notes", {})),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"plan: expected model, layers and shapes as Plan.save writes them, got {error}"
            ) from error

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is cut off, or holds something else; the message names it.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except ValueError as error:  # json's own errors are such
            raise ValueError(f"{path}: {error}") from error


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return name -> (out, in) of every linear layer, quantised ones too."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear)
    }
