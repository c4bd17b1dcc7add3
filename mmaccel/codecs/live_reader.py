"""From a live source to frames worth showing: their times, which are wanted, and what to do when the line drops."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from av.error import FFmpegError
from av.format import Flags

from mmaccel.codecs.live_gate import Gate
from mmaccel.errors import VideoError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

    from mmaccel.codecs.feed import Feed

__all__ = ["Arrival", "LiveReader", "Timeline"]

# Seconds between two attempts to reconnect, at most.
_LONGEST_BACKOFF = 8.0
_USUAL_RATE = Fraction(25)
# Clocks with longer ticks count frames, and round nothing.
_COARSEST_ROUNDING = Fraction(1, 1000)


@dataclass(frozen=True)
class Arrival:
    """A decoded frame: `pts` seconds in the stream, `arrived` wall-clock seconds, `index` among the sound frames."""

    frame: VideoFrame
    pts: float
    arrived: float
    index: int
    discontinuity: bool


class Timeline:
    """Stream time in exact seconds after the first frame, never running backwards, and what is wanted of it.

    With `fps`, the grid k / fps is laid over stream time, and the first frame at or after each of its points is wanted,
    once. Containers round times to their clock's tick, so one that is early by up to a tick, or a millisecond if
    that is less, counts as on time.
    """

    def __init__(self, fps: Fraction | None) -> None:
        self._fps = fps
        self._cell = -1
        self._offset: Fraction | None = None
        self._last: Fraction | None = None
        self._arrived = 0.0

    def disconnect(self) -> None:
        """Say that the next frame comes from a new connection, whose clock may be another one."""
        self._offset = None

    def place(self, stamp: Fraction | None, arrived: float, step: Fraction) -> tuple[Fraction, bool]:
        """Give a frame's seconds, and whether the stream's clock has jumped before it.

        stamp is its time by the stream's clock in seconds, None for `step` seconds after the frame before. Over a jump
        time goes on by what has passed on the wall clock, and at least by `step`.
        """
        if self._last is None:
            self._offset, seconds, jumped = -(stamp or Fraction(0)), Fraction(0), False
        else:
            jumped = self._offset is None
            seconds = self._last + step if stamp is None or self._offset is None else stamp + self._offset
            if jumped or seconds < self._last:
                jumped = True
                passed = Fraction(round((arrived - self._arrived) * 1_000_000), 1_000_000)
                seconds = self._last + max(passed, step)
                self._offset = seconds - (stamp or Fraction(0))
        self._last, self._arrived = seconds, arrived
        return seconds, jumped

    def wanted(self, seconds: Fraction, tick: Fraction) -> bool:
        """Whether a frame at that time is to be shown; to be asked once a frame, in order."""
        if self._fps is None:
            return True
        cell = math.floor((seconds + min(tick, _COARSEST_ROUNDING)) * self._fps)
        new, self._cell = cell > self._cell, max(cell, self._cell)
        return new


class LiveReader:
    """Reads one feed until it ends, is left, or stays away for `attempts` connections in a row.

    Counts, kept by the thread that reads: `decoded` sound frames, `damaged` ones (see Gate), `skipped` frames that
    `fps` has no use for, `reconnects` after which frames came again.
    """

    def __init__(self, feed: Feed, fps: Fraction | None, threads: int, attempts: int, backoff: float) -> None:
        self._feed, self._timeline, self._threads = feed, Timeline(fps), threads
        self._attempts, self._backoff = attempts, backoff
        self._gate, self._damaged = Gate(""), 0
        self.decoded = self.skipped = self.reconnects = 0

    @property
    def damaged(self) -> int:
        """What all connections together have spoilt."""
        return self._damaged + self._gate.damaged

    def arrivals(self) -> Generator[Arrival, None, None]:
        """Yield the wanted frames as they come. Raises VideoError when the source fails for good."""
        feed, failures = self._feed, 0
        while True:
            before = self.decoded
            problem = yield from self._connection()
            if feed.stopped:
                return
            failures = 0 if self.decoded > before else failures
            if failures == self._attempts:
                break
            if feed.rest(min(self._backoff * 2**failures, _LONGEST_BACKOFF)):
                return
            failures += 1
        if problem is None and not self.decoded:
            problem = VideoError(f"{feed.name} ended before a frame that can be shown; does it send keyframes?")
        if self._attempts:
            why = problem or f"{feed.name} has ended"
            raise VideoError(f"{why} ({self._attempts} attempt(s) to reconnect have failed)") from problem
        if problem is not None:
            raise problem

    def _connection(self) -> Generator[Arrival, None, VideoError | None]:
        """Yield the wanted frames of one connection; return why it broke off, None if it was closed."""
        self._timeline.disconnect()
        fresh, jump = True, False
        try:
            with self._feed.open(self._threads) as (container, stream):
                rate = stream.average_rate or stream.guessed_rate or _USUAL_RATE
                untimed = bool(container.format.flags & Flags.no_timestamps.value)
                for frame in self._sound(container, stream):
                    arrived = time.time()
                    stamp, tick = None, frame.time_base or stream.time_base or Fraction(0)
                    if untimed and self._feed.again:
                        stamp = Fraction(round(arrived * 1_000_000), 1_000_000)
                    elif not untimed and frame.pts is not None:
                        stamp = frame.pts * tick
                    seconds, jumped = self._timeline.place(stamp, arrived, 1 / rate)
                    self.reconnects += fresh and self.decoded > 0
                    fresh, jump = False, jump or jumped
                    self.decoded += 1
                    if not self._timeline.wanted(seconds, tick):
                        self.skipped += 1
                        continue
                    yield Arrival(frame, float(seconds), arrived, self.decoded - 1, jump)
                    jump = False
        except VideoError as error:
            return error
        return None

    def _sound(self, container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
        """Decode until the connection ends or the stream is left; yield each frame that is whole."""
        self._damaged, self._gate = self.damaged, Gate(stream.codec_context.codec.canonical_name)
        try:
            for packet in container.demux(stream):
                if self._feed.stopped:
                    return
                # An empty packet would tell the decoder that the video is over.
                if packet.size:
                    yield from self._pictures(stream, packet)
                self._feed.touched = time.monotonic()
        except (FFmpegError, OSError):
            yield from self._pictures(stream, None)
            raise
        yield from self._pictures(stream, None)

    def _pictures(self, stream: VideoStream, packet: Packet | None) -> Iterator[VideoFrame]:
        """Decode a packet, or what the decoder still holds."""
        if packet is not None:
            self._gate.feed(packet)
        try:
            frames = stream.decode(packet)
        except FFmpegError:
            self._gate.fail(packet)
            return
        yield from filter(self._gate.shows, frames)
