"""Where frames come from, one source after the other, and how their clocks become one."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from mmaccel.errors import StreamError

__all__ = ["Sources"]


class Sources:
    """The sources of one session."""

    def __init__(self) -> None:
        self._newest: weakref.ref[Any] | None = None
        self._shift = 0.0

    def frames(self, source: Any) -> Iterator[Any]:
        """Frames of a source that is no path: an opened stream, a `Video`, or an iterable.

        Raises:
            StreamError: it is none of these.
        """
        if _is_video(source):
            from mmaccel.codecs.live import LiveFrame

            times = source.pts.tolist()
            return (LiveFrame(source.frames[n], at, 0.0, n, False, 0) for n, at in enumerate(times))
        if not isinstance(source, Iterable):
            raise StreamError(f"a {type(source).__name__} gives no frames; give a path, or an iterable of frames.")
        return iter(source)

    def timed(self, frame: Any, source: Any, last: float | None, step: float) -> Any:
        """The frame at its time in the session.

        A source that comes after another counts from its own beginning. Where that has passed already, it begins `step`
        seconds after the session's `last` frame, as behind an interruption.
        """
        if not (_is_video(source) or _is_live(source)):
            return frame
        if self._newest is None or self._newest() is not source:
            self._newest, self._shift = weakref.ref(source), 0.0
            if last is not None and frame.pts <= last:
                self._shift = last + step - frame.pts
                frame = replace(frame, discontinuity=True)
        return replace(frame, pts=frame.pts + self._shift) if self._shift else frame


def _is_video(source: Any) -> bool:
    return hasattr(source, "frames") and hasattr(source, "pts")


def _is_live(source: Any) -> bool:
    return hasattr(source, "latest") and hasattr(source, "ended")
