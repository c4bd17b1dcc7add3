"""The buffer between a live stream's thread and its consumers, and what is dropped when it is full."""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass
from threading import Condition
from typing import TYPE_CHECKING, Literal

from mmaccel.errors import VideoError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mmaccel.codecs.live_reader import Arrival

__all__ = ["Drop", "LiveBuffer", "Waiting"]

Drop = Literal["oldest", "newest", "block"]


@dataclass
class Waiting:
    """A frame in the buffer, and what it has to tell of the frames dropped before it."""

    arrival: Arrival
    dropped: int
    discontinuity: bool


class LiveBuffer:
    """At most `room` frames; one thread puts them in, any number take them out. Counts `dropped` and `taken`."""

    def __init__(self, room: int, drop: Drop) -> None:
        self._room, self._drop = room, drop
        self._queue: deque[Waiting] = deque()
        self._changed = Condition()
        self._over = self._closed = False
        self._error: VideoError | None = None
        # Of frames dropped behind all that wait.
        self._lost, self._jumped = 0, False
        self.dropped = self.taken = 0

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def drained(self) -> bool:
        """Whether nothing waits and nothing will come."""
        with self._changed:
            return self._over and not self._queue

    def put(self, arrival: Arrival) -> None:
        """Add a frame; when the buffer is full, drop one or wait for room."""
        with self._changed:
            if self._drop == "block":
                self._changed.wait_for(lambda: self._closed or len(self._queue) < self._room)
            if self._closed:
                self.dropped += 1
                return
            full = len(self._queue) >= self._room
            self._jumped |= arrival.discontinuity
            if full and self._drop == "newest":
                self.dropped += 1
                self._lost += 1
                return
            self._queue.append(Waiting(arrival, self._lost, self._jumped))
            self._lost, self._jumped = 0, False
            if full:
                self._drop_oldest()
            self._changed.notify_all()

    def finish(self, error: VideoError | None) -> None:
        """Say that no more frames will come, and why if that is an error."""
        with self._changed:
            self._over, self._error = True, error
            self._changed.notify_all()

    def close(self) -> None:
        """Throw away what waits, and let nobody wait any longer."""
        with self._changed:
            self._closed = True
            self.dropped += len(self._queue)
            self._queue.clear()
            self._changed.notify_all()

    def take(self, timeout: float | None, newest: bool, check: Callable[[], float]) -> Waiting | None:
        """Return the next frame, or the newest one; None if there will be none, or none came within `timeout` seconds.

        check() is called before every wait; it returns the seconds that the wait may last, and may raise. Raises the
        error given to `finish` once all frames are taken.
        """
        until = math.inf if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not self._queue:
                if self._error is not None:
                    raise VideoError(str(self._error)) from self._error
                most, left = check(), until - time.monotonic()
                if self._over or left <= 0:
                    return None
                self._changed.wait(min(left, most))
            while newest and len(self._queue) > 1:
                self._drop_oldest()
            self.taken += 1
            self._changed.notify_all()
            return self._queue.popleft()

    def _drop_oldest(self) -> None:
        lost = self._queue.popleft()
        self._queue[0].dropped += lost.dropped + 1
        self._queue[0].discontinuity |= lost.discontinuity
        self.dropped += 1
