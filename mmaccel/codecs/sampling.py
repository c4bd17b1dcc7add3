"""Which frames, and how large: the questions a video reader answers before it decodes anything."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch

from mmaccel.core.free_memory import free_memory
from mmaccel.errors import VideoError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Facts", "OnShort", "Request", "Size", "allocate", "as_numbers", "target_size", "whole_number"]

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


def as_numbers(indices: Iterable[int] | torch.Tensor) -> list[int]:
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


class Facts(NamedTuple):
    """What `choose` is shown: frames, mean frames a second, seconds, pixels of the upright video."""

    total: int
    fps: float
    duration: float
    height: int
    width: int


@dataclass(frozen=True)
class Request:
    """Which frames of a video are wanted: one of `frames`, `fps`, `indices`, `seconds`; with none of them up to 32.

    `choose` takes the place of these: it is shown the facts and gives frame numbers.

    Raises VideoError for a value that no video can satisfy.
    """

    frames: int | None = None
    fps: float | None = None
    indices: tuple[int, ...] | None = None
    seconds: tuple[float, ...] | None = None
    on_short: OnShort = "error"
    choose: Callable[[Facts], Iterable[int]] | None = None

    @classmethod
    def of(
        cls,
        frames: int | None = None,
        fps: float | None = None,
        indices: Iterable[int] | torch.Tensor | None = None,
        seconds: Iterable[float] | None = None,
        on_short: OnShort = "error",
    ) -> Request:
        """Check and normalise what the caller has given."""
        given = [
            name
            for name, value in (("frames", frames), ("fps", fps), ("indices", indices), ("seconds", seconds))
            if value is not None
        ]
        if len(given) > 1:
            raise VideoError(f"give one of frames, fps, indices and seconds, not {' and '.join(given)}")
        if on_short not in ("error", "all", "repeat"):
            raise VideoError(f'on_short must be "error", "all" or "repeat", not {on_short!r}')
        if not given:
            return cls(frames=32, on_short="all")
        if frames is not None:
            count = whole_number(frames, "frames")
            if count < 1:
                raise VideoError(f"frames must be at least 1, got {count}")
            return cls(frames=count, on_short=on_short)
        if fps is not None:
            rate = _real_number(fps, "fps")
            if rate <= 0:
                raise VideoError(f"fps must be above 0, got {fps}")
            return cls(fps=rate)
        if indices is not None:
            return cls(indices=tuple(as_numbers(indices)))
        return cls(seconds=tuple(_as_times(seconds)))

    @property
    def timed(self) -> bool:
        """Whether the times of all frames must be known to answer it."""
        return self.fps is not None or self.seconds is not None or self.choose is not None

    def slots(
        self,
        total: int,
        name: str,
        cut: int = 0,
        times: np.ndarray | None = None,
        duration: float = 0.0,
        facts: Callable[[], Facts] | None = None,
    ) -> np.ndarray:
        """Turn the request into frame numbers, int64 [N], of a video of `total` frames.

        `frames=N` gives linspace(0, total - 1, N), each value rounded to the nearest whole number (halves to the even
        one): the first and the last frame are always in, N = 1 is the first frame; `on_short` says what happens where
        there are fewer. `indices` are taken as they are, negative ones counted from the end. `seconds` are times after
        the first frame, `fps=r` stands for the times 0, 1/r, 2/r ... before the end: each gives the frame that is shown
        at that time. Order and duplicates are kept.

        `cut` is the number of frames that the file announces but ends before. `times` float64 [total] (for timed
        requests): when each frame is shown, in seconds after the first one, with half the container's clock tick
        subtracted, as containers round times; `duration`: when the last one ends. `facts` is for `choose`.

        Raises VideoError for what is outside of the video.
        """
        early = f" (it ends early: {cut} more are announced)" if cut else ""
        indices = self.indices
        if self.choose is not None and facts is not None:
            indices = as_numbers(self.choose(facts()))
        if indices is not None:
            for index in indices:
                if not -total <= index < total:
                    raise VideoError(
                        f"frame {index} is outside {name}, which has {total} frame(s): 0 to {total - 1}{early}"
                    )
            return np.array([index % total for index in indices], dtype=np.int64)
        if self.frames is not None:
            count = self.frames
            if count > total and self.on_short == "error":
                raise VideoError(
                    f"{name} has {total} frame(s){early}, {count} were asked for; ask for at most {total}, "
                    'or pass on_short="all" (each frame once) or on_short="repeat" (frames repeated)'
                )
            if self.on_short == "all":
                count = min(count, total)
            _countable(count, "frames")
            return np.linspace(0, total - 1, count).round().astype(np.int64)
        assert times is not None
        if self.seconds is not None:
            asked = np.array(self.seconds)
            outside = asked[(asked < 0) | (asked > duration)]
            if len(outside):
                raise VideoError(
                    f"second {outside[0]:g} is outside {name}, which lasts from 0 to {duration:g} s{early}"
                )
        else:
            assert self.fps is not None
            _countable(int(min(duration * self.fps, 1e9)), f"fps={self.fps:g}")
            asked = np.arange(max(1, math.ceil(duration * self.fps - 1e-6))) / self.fps
        return np.maximum(np.searchsorted(times, asked, side="right") - 1, 0).astype(np.int64)


def _real_number(value: object, what: str) -> float:
    if isinstance(value, bool):
        raise VideoError(f"{what} must be a number, not {value!r}")
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise VideoError(f"{what} must be a number, not {value!r}") from None
    if not math.isfinite(number):
        raise VideoError(f"{what} must be finite, not {value!r}")
    return number


def _as_times(seconds: Iterable[float] | None) -> list[float]:
    try:
        items = list(islice(seconds or (), _MOST_FRAMES + 1))
    except TypeError:
        raise VideoError(f"seconds must be a sequence of numbers, not {seconds!r}") from None
    if not items:
        raise VideoError("seconds is empty; ask for at least one frame")
    _countable(len(items), "seconds")
    return [_real_number(item, "each of seconds") for item in items]


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


def allocate(count: int, height: int, width: int, device: torch.device | None = None) -> torch.Tensor:
    """An empty uint8 [count, 3, height, width]; VideoError if the memory that is free cannot hold it."""
    host = device is None or device.type == "cpu"
    wanted, free = 3 * count * height * width, free_memory("cpu" if host else device)
    problem = f"{count} frame(s) of {height} x {width} need {wanted / 2**30:.3g} GiB of memory"
    if free is not None and wanted > free:
        raise VideoError(f"{problem}, and {free / 2**30:.3g} GiB are free; ask for fewer frames or a smaller size")
    try:
        return torch.empty(count, 3, height, width, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        raise VideoError(f"{problem}, which is not to be had; ask for fewer frames or a smaller size") from error


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
