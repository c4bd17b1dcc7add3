"""Frames in a vision encoder that reuse what an earlier one has left: which they are, and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mmaccel.tokens.reuse import RowCache

__all__ = ["Counts", "Frames", "Held", "Rule"]


@dataclass(frozen=True)
class Rule:
    """Which frames are computed whole, and which rows of the others.

    interval: a frame is computed whole when its reference is so many frames old; None sets no limit. cut: it is
    computed whole when the mean similarity of its keys in the first block is below this; None never. share: the share
    of a frame's rows that is renewed in each block, those least similar; None renews all whose similarity is not above
    `similarity`. changes(video, frames, rows, columns) -> float [frames, rows * columns] in [0, 1]: how far each patch
    of a video of the call has changed since the frame before; with it similarity is 1 - the change since the reference,
    added up, the same in every block, and tokens that are no patches are renewed first. None: similarity is the cosine
    of keys.
    """

    interval: int | None
    cut: float | None
    share: float | None
    similarity: float = 1.0
    changes: Callable[[int, int, int, int], torch.Tensor] | None = None


@dataclass
class Counts:
    """What one call did.

    whole, reusing: frames. renewed, rows: of the reusing frames, over all blocks. nbytes: what the stream holds.
    """

    whole: int = 0
    reusing: int = 0
    renewed: int = 0
    rows: int = 0
    nbytes: int = 0


@dataclass
class Held:
    """What a stream remembers: the four parts of each block of the last whole frame, and how many frames ago it was.

    change: float64 [tokens], how far each has changed since that frame, if such changes are given.
    """

    cache: RowCache = field(default_factory=RowCache)
    age: int = 0
    change: torch.Tensor | None = None
    kind: Any = None
    module: Callable[[], nn.Module | None] = lambda: None

    def fits(self, module: nn.Module, kind: Any) -> bool:
        """Whether the same encoder can go on from here with frames of this kind."""
        return len(self.cache) > 0 and self.module() is module and self.kind == kind


@dataclass
class Frames:
    """Frames of one size that stand one behind the other, from row `start` of the flat [rows, C] on.

    whole: those computed whole, ascending. reusing: the others, and `reference`: for each its place in `whole`, or -1
    for the frame that the stream holds. before: rows of the call's whole frames ahead of these. changed: float64
    [frames, tokens], the given changes added up since the call began.
    """

    start: int
    frames: int
    tokens: int
    first: list[bool]
    whole: list[int] = field(default_factory=list)
    reusing: list[int] = field(default_factory=list)
    reference: list[int] = field(default_factory=list)
    before: int = 0
    chosen: Any = ...  # the reusing ones, as an index of frames
    order: torch.Tensor | None = None  # `reference` where it is not simply 0, 1, 2, ...
    changed: torch.Tensor | None = None
    renewed: torch.Tensor | None = None  # bool [reusing, tokens], where it is the same in every block

    def settle(self, device: torch.device) -> None:
        """Turn the lists into indices."""
        if self.whole:
            self.chosen = torch.tensor(self.reusing, device=device)
        if self.reference != list(range(len(self.whole))):
            self.order = torch.tensor(self.reference, device=device)

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """[rows, ...] of all to [frames, tokens, ...] of these."""
        return flat[self.start : self.start + self.frames * self.tokens].unflatten(0, (self.frames, self.tokens))

    def likeness(self, frame: int, reference: int, held: Held | None) -> torch.Tensor:
        """float32 [tokens]: 1 - the change of a frame since `reference`, which is -1 for the one that is held.

        Changes add up beyond 1, or what has changed often could not be told from what has changed once.
        """
        assert self.changed is not None
        change = self.changed[frame]
        if reference >= 0:
            change = change - self.changed[reference]
        elif held is not None and held.change is not None:
            change = change + held.change
        return 1 - change.float()
