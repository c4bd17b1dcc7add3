"""What a streaming session gives back: answers, and what has become of the frames."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Answer", "StreamStats"]


@dataclass(frozen=True)
class Answer:
    """What the model says. `str()` is the text.

    ids: the tokens, without the one that ends the answer. tokens: visual tokens that the question looked at. seconds:
    wall clock. logits: float32 [len(ids) (+ 1), V] if they were asked for, one row for each token that was chosen.
    """

    text: str
    ids: tuple[int, ...]
    tokens: int
    seconds: float = field(compare=False)
    logits: torch.Tensor | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class StreamStats:
    """What has become of a stream.

    frames: accepted. late: dropped, because they were not later than the one before. pending: accepted frames that wait
    for the others of their group. made: visual tokens that the encoder made. reduced: of these, those that methods
    dropped or merged away. evicted: those that went because the budget was full, in `evictions` steps. held: those that
    a question would look at, made - reduced - evicted. cache_bytes: keys and values, and inputs kept to rebuild them.
    next_position: of the next token. push_seconds: median, 99th percentile and largest of the last 2048 groups encoded.
    """

    frames: int
    late: int
    pending: int
    made: int
    reduced: int
    evicted: int
    evictions: int
    held: int
    cache_bytes: int
    next_position: int
    push_seconds: tuple[float, float, float]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {**vars(self), "push_seconds": dict(zip(("median", "p99", "max"), self.push_seconds, strict=True))}
