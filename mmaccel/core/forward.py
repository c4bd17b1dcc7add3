"""What is known of the forward of a vision-language model that is running, and of the calls that led to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from mmaccel.core.cache import Kept, Ledger
from mmaccel.core.layout import Encoded, GridLayout, Site, VisualTokens
from mmaccel.core.run import current
from mmaccel.tokens.place import Placement, Reduction, TokenMap

__all__ = ["Calls", "Count", "Forward", "Grid", "Level", "Reduce", "calls_of"]

Reduce = Callable[[VisualTokens], "Reduction | None"]
Count = Callable[..., None]


class Grid(NamedTuple):
    """A grid of the prompt: its layout and kind, the span of its scores in its encoder call, the rows that show it."""

    layout: GridLayout
    kind: str
    encoded: Encoded
    span: slice
    rows: range


@dataclass(frozen=True, eq=False)
class Level:
    """What the decoder layers from `first` on see: their tokens, and how these came from those of the level before.

    index: int64 [B, L], where each stands among the tokens of layer 0.
    """

    first: int
    tokens: TokenMap
    placement: Placement
    index: torch.Tensor
    full: bool


@dataclass
class Forward:
    """One forward; made anew at the start of each.

    input_ids, inputs_embeds: the prompt as the root module got it. foreign: a modality whose features were encoded
    outside of the run. tokens: what every living token is, None without visual ones; first_tokens: those of layer 0.
    length: tokens in this call before any reduction. seen: tokens seen before it. held: keys in each layer before it.
    hidden: how many were seen more. old_valid: bool [B, held], what the mask says of these. levels: reductions between
    layers, in the order of the layers. fitted, shared: layers whose keywords are done, and what they have in common.
    """

    input_ids: torch.Tensor | None = None
    inputs_embeds: torch.Tensor | None = None
    encoded: dict[str, Encoded] = field(default_factory=dict)
    foreign: str | None = None
    tokens: TokenMap | None = None
    first_tokens: TokenMap | None = None
    grids: dict[tuple[int, int], Grid] = field(default_factory=dict)
    mapped: bool = False
    settled: bool = False
    prepared: bool = False
    reduced: bool = False
    pad_left: bool = True
    length: int = 0
    seen: int = 0
    held: list[int] = field(default_factory=list)
    hidden: int = 0
    old_valid: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    cache: Any = None
    ledger: Ledger | None = None
    levels: list[Level] = field(default_factory=list)
    fitted: set[int] = field(default_factory=set)
    shared: dict[Any, Any] = field(default_factory=dict)
    inner_scores: dict[object, torch.Tensor] = field(default_factory=dict)
    in_deepstack: bool = False

    def level_at(self, layer: int) -> Level | None:
        """The reduction of this call that layer number `layer` is behind."""
        return next((level for level in reversed(self.levels) if level.first <= layer), None)

    def kept_at(self, layer: int) -> Kept | None:
        """What layer number `layer` held, None if it is everything."""
        return None if self.ledger is None else self.ledger.at(layer)


@dataclass
class Calls:
    """What a run remembers over its forwards: generate encodes first and calls the model later.

    per_token: an argument of the present call that counts the prompt's tokens one by one, which a shortened output
    cannot serve. guessed: how many of the last tokens are guesses to be verified (assisted decoding), not the prompt's.
    """

    encoded: dict[str, Encoded] = field(default_factory=dict)
    encoding: Encoded | None = None
    forward: Forward = field(default_factory=Forward)
    per_token: str | None = None
    guessed: int = 0


def calls_of(site: Site) -> Calls | None:
    """The calls of the run of a model that is open here, None outside of any."""
    run = current(site.root)
    return run.get(Calls) if run is not None else None
