"""How many tokens each layer really computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Shapes", "record_shapes"]


@dataclass
class Shapes:
    """What the layers saw, summed over the calls of a block.

    vision: for each layer of the tower the lengths of the sequences that attended together, such as [729] * 32.
    language: for each decoder layer (batch, length) of each call.
    """

    vision: list[list[int]] = field(default_factory=list)
    language: list[list[tuple[int, int]]] = field(default_factory=list)

    @property
    def prefill(self) -> list[int]:
        """Sequence length at each decoder layer in the first call."""
        raise NotImplementedError


@contextmanager
def record_shapes(model: Any) -> Iterator[Shapes]:
    """Record shapes while a block runs: `with record_shapes(model) as shapes: model.generate(...)`."""
    raise NotImplementedError
    yield
