"""Running some of the tokens through a stack of blocks.

    before the first block     h := h[index]                             `token_gather`
    to_k, to_v                 k[position] := to_k(h), hand on all of k  `token_scatter`, in place
    behind the last block      h := its rows among what entered          `token_scatter`
    the model's output         the rows that were left out as they are kept

Between first and last block nothing is in the way: norms, queries, feed-forward and cross-attention
act on every token by itself, and self-attention reads the keys and values of all. So the blocks
must let tokens meet in self-attention alone, by projections `to_k` and `to_v`, and know no
positions: a rotary embedding is a table with a row for each token of the whole sequence, the same
for queries and keys.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..ops import token_gather, token_scatter
from ._wrap import Followed, Replacement, Wrapped, follow, uncompiled
from .calls import Call
from .output import take_apart
from .token_session import Grid, Memory, TokenSession

__all__ = ["TokenStack"]

_POSITIONS = re.compile(r"rotary|rope|freqs|pos(ition)?_(emb|ids)")
# They change which blocks run, or add to all tokens between them.
_IGNORE = ("skip_layers", "block_controlnet_hidden_states", "controlnet_block_samples")


@dataclass
class TokenStack:
    """The blocks of a denoiser in the order in which they run.

    Args:
        denoiser: the model whose call is one evaluation.
        blocks: its blocks, all lists joined.
        two_streams: as in `BlockStack`; the text's tokens are always computed.
        grid: how tokens lie in its output.

    Raises:
        ValueError: blocks in which tokens meet elsewhere than in a self-attention that is known.
    """

    denoiser: nn.Module
    blocks: list[nn.Module]
    two_streams: bool
    grid: Grid

    def __post_init__(self) -> None:
        for index, block in enumerate(self.blocks):
            if found := _refuse_block(block):
                raise ValueError(
                    "cache: expected blocks whose tokens meet in self-attention alone, without "
                    f"positions, to compute a share of the tokens; got {found} in block {index} of "
                    f"{type(self.denoiser).__name__}, a {type(block).__name__}"
                )

    def describe(self, session: TokenSession) -> str:
        """Say what a partial step leaves out."""
        return (
            f"a partial step runs {session.policy.share:.0%} of the tokens through the "
            f"{len(self.blocks)} blocks, with the keys and values of all kept"
        )

    def replacements(self, session: TokenSession) -> list[Replacement]:
        """Return what to set on the instances; sets nothing itself."""
        attentions = [x for block in self.blocks for _, x in _self_attentions(block)]
        projections = [
            (attention, name, getattr(attention, name))
            for attention in attentions
            for name in ("to_k", "to_v")
        ]
        found = follow(self.denoiser, session, _IGNORE, _Model)
        found[0].value.grid, found[0].value.projections = self.grid, projections
        for place, (_, _, layer) in enumerate(projections):
            found.append(Replacement(layer, "forward", _Kept(layer.forward, session, place)))
        ends = {0: self.blocks[0], len(self.blocks) - 1: self.blocks[-1]}
        for index, block in ends.items():
            is_last = index == len(self.blocks) - 1
            end = _End(block.forward, session, index == 0, is_last, self.two_streams)
            found.append(Replacement(block, "forward", end))
        return found


def _self_attentions(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the attentions of a block that read keys and values of its own tokens."""
    for name, child in block.named_children():
        known = all(isinstance(getattr(child, x, None), nn.Module) for x in ("to_k", "to_v"))
        if known and getattr(child, "is_cross_attention", None) is False:
            yield name, child


def _refuse_block(block: nn.Module) -> str | None:
    """Return what is in a block that a share of its tokens can't go through, or None."""
    for name in inspect.signature(type(block).forward).parameters:
        if _POSITIONS.search(name):
            return f"an argument `{name}`"
    for name in ("pos_embed", "fuser"):
        if getattr(block, name, None) is not None:
            return f"`{name}`"
    for name, module in block.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            return f"a {type(module).__name__} at `{name}`"
        if getattr(module, "fused_projections", False):
            return f"fused projections at `{name}`"
    if not any(True for _ in _self_attentions(block)):
        return "no self-attention with `to_k` and `to_v`"
    return None


class _Model(Followed):
    """The denoiser's `forward`: chooses the tokens, and completes its output."""

    grid: Grid
    projections: list[tuple[nn.Module, str, nn.Module]]  # attention, name, layer

    def run(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        session: TokenSession = self.session
        # An adapter that was loaded since adds to rows that aren't there.
        if call.skip and any(getattr(x, name) is not own for x, name, own in self.projections):
            session.run_in_full(call, "other projections")
        session.enter(call)
        output = self.below(*args, **kwargs)
        if call.branch is None:
            return output
        (first, *others), rebuild = take_apart(output)
        if call.skip:
            memory: Memory = call.branch.memory
            first = self.grid.merge(first, memory.output, memory.chosen.position)
            output, call.done = rebuild((first, *others)), True
        session.keep_output(call, first, self.grid, len(self.projections))
        return output


class _Kept(Wrapped):
    """`forward` of a projection to keys or values: keeps those of all tokens."""

    def __init__(self, below: Callable[..., Any], session: TokenSession, place: int) -> None:
        super().__init__(below, session)
        self.place = place

    @uncompiled
    def __call__(self, x: Tensor) -> Tensor:
        rows, memory = self.below(x), _memory_of(self.session)
        if memory is None:
            return rows
        if memory.chosen is not None:
            return token_scatter(
                rows, memory.chosen.position, memory.rows[self.place], in_place=True
            )
        # Perturbed guidance projects some samples apart from others: which rows are whose is only
        # known to the attention's processor.
        again = self.place in memory.rows
        memory.torn |= again or rows.shape[:2] != (memory.samples, memory.tokens)
        memory.rows[self.place] = rows
        return rows


class _End(Wrapped):
    """`forward` of the first block, of the last one, or of the only one."""

    def __init__(
        self,
        below: Callable[..., Any],
        session: TokenSession,
        is_first: bool,
        is_last: bool,
        two_streams: bool,
    ) -> None:
        super().__init__(below, session)
        self.is_first, self.is_last, self.two_streams = is_first, is_last, two_streams

    @uncompiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        memory, call = _memory_of(self.session), self.session.call
        if memory is None:
            return self.below(*args, **kwargs)
        if self.is_first:
            args, kwargs = self._choose(memory, call, args, kwargs)
        output = self.below(*args, **kwargs)
        if not self.is_last or memory.chosen is None:
            return output
        encoder, hidden = output if self.two_streams else (None, output)
        # What is beside the computed rows only has to be numbers: the kept output covers it.
        base = call.entry.to(hidden.dtype)
        hidden = token_scatter(hidden, memory.chosen.position, base)
        return (encoder, hidden) if self.two_streams else hidden

    def _choose(
        self, memory: Memory, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with the chosen tokens alone."""
        hidden = args[0] if args else kwargs["hidden_states"]
        memory.samples, memory.tokens = hidden.shape[:2]
        if memory.chosen is None:
            return args, kwargs
        call.entry = hidden
        hidden = token_gather(hidden, memory.chosen.index)
        if args:
            return (hidden, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": hidden}


def _memory_of(session: TokenSession) -> Memory | None:
    """Return what the call under way keeps, None where there is no call that keeps something."""
    call = session.call
    if session.closed or call is None or call.branch is None:
        return None
    return call.branch.memory
