"""Peak memory of a block of code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = ["Peak", "peak_memory"]


@dataclass
class Peak:
    """What a block took at most, in bytes, filled in when the block ends.

    peak: largest amount held at one time. growth: the same above what was held when the block began. method: how it
    was measured: "cuda allocator", "rss high-water mark" (reset at the start, exact) or "rss samples" (every 2 ms, may
    miss a shorter peak).
    """

    method: str
    start: int
    peak: int = 0

    @property
    def growth(self) -> int:
        """Bytes above what was held at the start."""
        return max(0, self.peak - self.start)


@contextmanager
def peak_memory(device: Any = "cpu") -> Iterator[Peak]:
    """Measure the peak memory of a block: `with peak_memory(model.device) as peak: ...; peak.growth`."""
    raise NotImplementedError
    yield
