"""What visual tokens are: grids and items, the encoder call that they come from, and where a model keeps its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from mmaccel.errors import NotApplicableError
from mmaccel.tokens.frames import MergedFrames

__all__ = ["MERGED_SCORE", "Encoded", "GridLayout", "ItemLayout", "Site", "VisualTokens"]

MERGED_SCORE = "received by merged frames"  # scores that came about while frames merged


@dataclass(frozen=True)
class GridLayout:
    """A grid of visual tokens: `offsets` int64 [T * H * W], where each cell, in raster order, is in its item's run."""

    shape: tuple[int, int, int]
    offsets: torch.Tensor


@dataclass(frozen=True)
class ItemLayout:
    """One image or video as the language model sees it: `tokens` placeholders, some of them cells of `grids`."""

    kind: str
    tokens: int
    grids: tuple[GridLayout, ...]


@dataclass
class Encoded:
    """One call of a vision encoder: its arguments, its output, and the raw attention scores of one layer, by kind.

    output: a copy of what the encoder returned, since beam search repeats the features inside of the original later on.
    tower: the vision tower's own output. outside: whether nobody asked for it on behalf of a prompt. thinned: how the
    tower call was made smaller, outermost first. merged: of each video, which of its frames the tower has merged, if it
    has; passage: what merges them knows meanwhile. prompt: the prompt that the features go into, as it was given: token
    ids int64 [B, S] or embeddings [B, S, D].
    """

    modality: str
    arguments: dict[str, Any]
    output: Any = None
    tower: torch.Tensor | None = None
    outside: bool = False
    scores: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    recorders: dict[str, object] = field(default_factory=dict)
    thinned: list[Any] = field(default_factory=list)
    merged: list[MergedFrames] | None = None
    passage: Any = None
    prompt: torch.Tensor | None = None

    @property
    def finite(self) -> bool:
        """Whether the vision tower's own output is free of NaN and infinity."""
        return self.tower is None or bool(torch.isfinite(self.tower).all())


class Site(Protocol):
    """Where things are in a model; adapters implement it."""

    target: nn.Module
    root: nn.Module
    language_model: nn.Module
    encoders: dict[str, str]

    @property
    def layers(self) -> Any:
        """The decoder layers."""
        ...

    def decoder_attention(self, layer: int) -> nn.Module:
        """The attention module of one decoder layer."""
        ...

    def score_attention(self) -> nn.Module:
        """The attention module of the vision layer whose output the language model gets."""
        ...

    def bind(self, modality: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of an encoder call by name."""
        ...

    def placeholders(self, input_ids: torch.Tensor | None, embeds: torch.Tensor) -> dict[str, torch.Tensor]:
        """bool [B, S] by modality: where the visual tokens stand; `embeds` are the prompt before features enter it."""
        ...

    def layout(self, encoded: Encoded, where: torch.Tensor) -> list[ItemLayout]:
        """The items of one encoder call, in the order of their features."""
        ...

    def token_scores(self, encoded: Encoded, kind: str) -> torch.Tensor:
        """float32 [tokens of all items]: the raw scores brought to the language model's tokens."""
        ...

    def module_paths(self) -> tuple[str, str]:
        """The names of the vision tower and of the projector, for messages."""
        ...


def _silent(_text: str, _about: str = "") -> None:
    """Nobody reports."""


@dataclass(frozen=True)
class VisualTokens:
    """What a method sees: N living visual tokens of one grid, or of a whole prompt.

    features: [N, D]. cell: int64 [N], raster index t * H * W + y * W + x. shape: (T, H, W), (0, 0, 0) for a prompt.
    score: float32 [N] or None. kind: "image", "video" or "prompt". number: which of the prompt's grids this is.
    contiguous: whether they stand one behind the other, without text or newline tokens in between. note(text, about)
    tells the user's report something, once; of what it is told about one matter, the latest counts. video: which of the
    call's videos this is, over all rows of the batch. merged: what the vision tower has left of its frames, None if all
    are there.
    """

    features: torch.Tensor
    cell: torch.Tensor
    shape: tuple[int, int, int]
    score: torch.Tensor | None
    kind: str
    number: int
    contiguous: bool = True
    note: Callable[..., None] = _silent
    video: int = 0
    merged: MergedFrames | None = None

    def __len__(self) -> int:
        return self.features.shape[0]

    @property
    def time(self) -> torch.Tensor:
        """int64 [N]: the frame of each token."""
        return self.cell // max(1, self.shape[1] * self.shape[2])

    def frames(self) -> tuple[int, int]:
        """(frames, tokens per frame) of the living tokens.

        Raises:
            NotApplicableError: an earlier method has left frames of different sizes.
        """
        _, counts = self.time.unique_consecutive(return_counts=True)
        sizes = counts.tolist()
        if not sizes or min(sizes) != max(sizes):
            raise NotApplicableError(
                "frames hold different numbers of tokens; put this method before the one that drops."
            )
        return len(sizes), sizes[0]
