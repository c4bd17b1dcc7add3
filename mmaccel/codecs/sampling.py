"""Which frames, and how large: the questions a video reader answers before it decodes anything."""

from __future__ import annotations

import operator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from mmaccel.errors import VideoError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["OnShort", "Size", "allocate", "as_numbers", "frame_indices", "target_size", "whole_number"]

OnShort = Literal["error", "all", "repeat"]
Size = int | tuple[int, int] | None

_LONGEST_SIDE = 32_768
_MOST_FRAMES = 1_000_000


def whole_number(value: object, what: str) -> int:
    """Check that a value is a whole number (Python's, numpy's or torch's) and return it; VideoError names `what`."""
    if isinstance(value, bool):
        raise VideoError(f"{what} must be a whole number, not {value!r}")
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise VideoError(f"{what} must be a whole number, not {value!r}") from None


def as_numbers(indices: Iterable[int]) -> list[int]:
    """Turn any iterable of whole numbers (list, range, array, tensor) into a list; VideoError for anything else."""
    try:
        items = list(islice(indices, _MOST_FRAMES + 1))
    except TypeError:
        raise VideoError(f"indices must be a sequence of whole numbers, not {indices!r}") from None
    if not items:
        raise VideoError("indices is empty; ask for at least one frame")
    _countable(len(items), "indices")
    return [whole_number(item, "each of indices") for item in items]


def _countable(count: int, what: str) -> None:
    if count > _MOST_FRAMES:
        raise VideoError(f"{what}: at most {_MOST_FRAMES} frames can be read in one call; read them in parts")


def frame_indices(
    total: int,
    frames: int | None,
    indices: list[int] | None,
    on_short: OnShort = "error",
    name: str = "the video",
    cut: int = 0,
) -> np.ndarray:
    """Turn a request for frames of a video that has `total` of them into frame numbers, int64 [N].

    `frames=N` gives linspace(0, total - 1, N), each value rounded to the nearest whole number (halves to the even one):
    the first and the last frame are always in, N = 1 is the first frame. `indices`, if given, are taken as they are:
    order and duplicates kept, negative ones counted from the end.

    Raises VideoError for fewer than one frame, an index outside the video, or more frames than there are; `on_short`
    changes the last one: "all" takes every frame once, "repeat" repeats frames evenly until there are N. `cut`, the
    number of frames that the file announces but ends before, is for the message.
    """
    if on_short not in ("error", "all", "repeat"):
        raise VideoError(f'on_short must be "error", "all" or "repeat", not {on_short!r}')
    early = f" (it ends early: {cut} more are announced)" if cut else ""
    if indices is not None:
        for index in indices:
            if not -total <= index < total:
                raise VideoError(
                    f"frame {index} is outside {name}, which has {total} frame(s): 0 to {total - 1}{early}"
                )
        return np.array([index % total for index in indices], dtype=np.int64)
    count = whole_number(frames, "frames")
    if count < 1:
        raise VideoError(f"frames must be at least 1, got {count}")
    if count > total and on_short == "error":
        raise VideoError(
            f"{name} has {total} frame(s){early}, {count} were asked for; ask for at most {total}, "
            'or pass on_short="all" (each frame once) or on_short="repeat" (frames repeated)'
        )
    if on_short == "all":
        count = min(count, total)
    _countable(count, "frames")
    return np.linspace(0, total - 1, count).round().astype(np.int64)


def target_size(height: int, width: int, size: Size) -> tuple[int, int]:
    """Turn `size` into (height, width) in pixels for a picture of the given height and width.

    None keeps the picture's own size; an int is the length of the shorter side, the other side follows in proportion
    (rounded, at least 1); a pair is (height, width) as it stands. Raises VideoError for anything else, and for sides
    above 32768 pixels.
    """
    rows, columns = _sides(height, width, size)
    if max(rows, columns) > _LONGEST_SIDE:
        raise VideoError(f"a side of a frame may have at most {_LONGEST_SIDE} pixels; choose a smaller size")
    return rows, columns


def allocate(count: int, height: int, width: int) -> torch.Tensor:
    """An empty uint8 [count, 3, height, width]; VideoError if the memory that is free cannot hold it."""
    wanted, free = 3 * count * height * width, _free_memory()
    problem = f"{count} frame(s) of {height} x {width} need {wanted / 2**30:.3g} GiB of memory"
    if free is not None and wanted > free:
        raise VideoError(f"{problem}, and {free / 2**30:.3g} GiB are free; ask for fewer frames or a smaller size")
    try:
        return torch.empty(count, 3, height, width, dtype=torch.uint8)
    except RuntimeError as error:
        raise VideoError(f"{problem}, which is not to be had; ask for fewer frames or a smaller size") from error


def _free_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _sides(height: int, width: int, size: Size) -> tuple[int, int]:
    if size is None:
        return height, width
    if isinstance(size, (np.ndarray, torch.Tensor)) and size.ndim == 1:
        size = tuple(size.tolist())  # type: ignore[assignment]
    if hasattr(size, "__index__"):
        short = whole_number(size, "size")
        if short < 1:
            raise VideoError(f"size must be at least 1 pixel, got {short}")
        if short > _LONGEST_SIDE:
            return short, short  # refused; a float need not hold it
        scale = short / min(height, width)
        return (short, max(1, round(width * scale))) if height <= width else (max(1, round(height * scale)), short)
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise VideoError(f"size must be None, an int (shorter side) or (height, width), not {size!r}")
    rows, columns = (whole_number(side, "each side of size") for side in size)
    if min(rows, columns) < 1:
        raise VideoError(f"size must be at least 1 x 1 pixel, got {rows} x {columns}")
    return rows, columns
