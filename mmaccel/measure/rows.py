"""Results as JSON lines: each row says on which machine and with which versions it was made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["append_rows", "environment", "read_rows"]


def environment() -> dict[str, Any]:
    """The machine as it is now: {"machine": {cpu, cores, threads, load, memory_gb, gpu}, "versions": {...}}."""
    raise NotImplementedError


def append_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Append rows to a file, one JSON object a line, on disk when this returns; how many were written.

    Raises:
        MMAccelError: a row holds NaN, infinity or an object that JSON cannot say.
    """
    raise NotImplementedError


def read_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of a file; a last line that was cut off is left out, a missing file has none.

    Raises:
        MMAccelError: a line in the middle is broken.
    """
    raise NotImplementedError
