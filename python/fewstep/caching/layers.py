"""Which layers of a model are cached one by one: found by the names that diffusers gives them."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

__all__ = [
    "OUT",
    "beside",
    "choose_modules",
    "find_modules",
    "is_joined",
    "said",
    "source_for_views",
]

_LAYER = re.compile(
    r"(?!\w*(norm|proj|time|ada))(\w+_)?"
    r"((attn|attention)\d*|(ff|ffn|mlp|feed_forward)(_context|_[it])?)"
)
_JOINED = "torch.cat([attn_output, mlp_hidden_states], dim=2)"
OUT = ".proj_out"


def is_joined(block: nn.Module) -> bool:
    """Whether a block is of the form of FLUX's single ones, by its forward's source."""
    names = ("attn", "proj_mlp", "act_mlp", "proj_out")
    if not all(isinstance(block._modules.get(name), nn.Module) for name in names):
        return False
    source = source_for_views(type(block).forward)
    once = all(source.count(f"self.{name}") == 1 for name in names)
    return once and _JOINED in source


def source_for_views(forward: Callable[..., Any]) -> str:
    """Return the source of a forward that may run on a view of its module, "" of others.

    It sets nothing of `self`, and hands `self` to nobody.
    """
    try:
        source = inspect.getsource(inspect.unwrap(forward))
    except (OSError, TypeError):  # no source at hand
        return ""
    alone = len(re.findall(r"\bself\b(?!\.)", source)) == 1  # its own argument
    sets = re.search(r"\bself(\.\w+)+\s*([+*/-]?=)(?!=)", source)
    return source if alone and sets is None and "super(" not in source else ""


def find_modules(
    denoiser: nn.Module, blocks: Mapping[str, nn.Module] | None = None
) -> dict[str, nn.Module]:
    """Return what scope "module" caches, by path.

    Args:
        denoiser: the model.
        blocks: its transformer blocks by path; None where they are not known: then what lies in
            any list of modules is looked at.

    Returns:
        Attention and feed-forward layers; for a block in the form of FLUX's single ones the block
        itself, by the path of its `proj_out`.
    """
    if blocks is None:
        listed = [(n, m) for n, m in denoiser.named_modules() if isinstance(m, nn.ModuleList)]
        blocks = {
            f"{name}.{key}": part for name, parts in listed for key, part in parts._modules.items()
        }
    found: dict[str, nn.Module] = {}
    for name, block in blocks.items():
        _search(name, block, found)
    return found


def _search(name: str, module: nn.Module, found: dict[str, nn.Module]) -> None:
    if is_joined(module):
        found[name + OUT] = module
        return
    for key, child in module._modules.items():
        if child is None:
            continue
        path = f"{name}.{key}"
        if _LAYER.fullmatch(key) and child._modules:
            found[path] = child
        else:
            _search(path, child, found)


def choose_modules(
    found: Mapping[str, nn.Module], pattern: str | Sequence[str] | None
) -> dict[str, nn.Module]:
    """Return the modules that a policy's `modules` names.

    Args:
        found: what there is, by path.
        pattern: a regular expression that is searched in paths; or names, each a path or its last
            part; None is all.

    Raises:
        ValueError: a name that is none, or nothing matches; the message says what was found.
    """
    if pattern is None:
        return dict(found)
    if isinstance(pattern, str):
        wanted = re.compile(pattern)
        chosen = {name: module for name, module in found.items() if wanted.search(name)}
        missing = [] if chosen else [pattern]
    else:
        chosen, missing = {}, []
        for own in pattern:
            some = {n: m for n, m in found.items() if n == own or n.rpartition(".")[2] == own}
            chosen |= some
            missing += [] if some else [own]
    if missing:
        raise ValueError(
            f"modules: expected a pattern or names of what can be cached, got {missing[0]!r}, "
            f"which matches none of {said(found)}"
        )
    return {name: module for name, module in found.items() if name in chosen}


def said(names: Iterable[str]) -> str:
    """Say modules by the last parts of their paths that are no numbers, and one path."""
    kinds = Counter(re.sub(r"(\.\d+)+$", "", name).rpartition(".")[2] for name in names)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    return f"{counts} (such as {next(iter(names))})" if kinds else "nothing"


def beside(blocks: Mapping[str, nn.Module], found: Mapping[str, nn.Module]) -> list[str]:
    """Return the layers in blocks that no forecast stands for, but for norms with modulations."""
    return [
        path
        for name, block in blocks.items()
        if name + OUT not in found
        for key, child in block._modules.items()
        if (path := f"{name}.{key}") not in found and "norm" not in key and child is not None
        if not any(other.startswith(f"{path}.") for other in found)
        and any(parameter.dim() > 1 for parameter in child.parameters())
    ]
