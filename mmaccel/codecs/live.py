"""Live streams: frames of a camera, a server, a pipe or a growing file as they come, read by a thread of its own."""

from __future__ import annotations

import math
import threading
import time
import warnings
from contextlib import closing
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Self, get_args

from av.error import FFmpegError

from mmaccel.codecs.feed import Feed, LiveSource
from mmaccel.codecs.live_buffer import Drop, LiveBuffer, Waiting
from mmaccel.codecs.live_reader import LiveReader
from mmaccel.codecs.picture import Interpolation, Painter
from mmaccel.codecs.pool import thread_count
from mmaccel.codecs.sampling import Size, target_size, whole_number
from mmaccel.codecs.video import VideoWarning
from mmaccel.errors import VideoError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    import torch

__all__ = ["Drop", "LiveFrame", "LiveStats", "LiveStream", "open_stream"]

_USUAL_THREADS = 8
_FINEST_RATE = 1_000_000


@dataclass(frozen=True, eq=False)
class LiveFrame:
    """One frame of a live stream.

    frame: uint8 [3, H, W], RGB, contiguous, upright. pts: seconds of stream time after the stream's first frame, never
    less than that of the frame before. arrived: when it was decoded, in seconds of the wall clock (time.time).
    index: its number among the stream's sound frames, from 0, those that fps= leaves out and those dropped included.
    discontinuity: the stream was interrupted, or its clock jumped, between this frame and the one returned before.
    dropped_before: how many frames were dropped between the one returned before and this one.
    """

    frame: torch.Tensor = field(repr=False)
    pts: float
    arrived: float
    index: int
    discontinuity: bool
    dropped_before: int


@dataclass(frozen=True)
class LiveStats:
    """What has become of a stream's frames: decoded = skipped + dropped + returned + waiting, when the thread rests.

    decoded: sound frames. damaged: frames that are not shown, and packets that gave none. skipped: left out by fps=.
    dropped: wanted, but the buffer was full, latest() passed over them, or the block was left. returned: given to the
    caller. waiting: in the buffer. reconnects: interruptions after which frames came again.
    """

    decoded: int
    damaged: int
    skipped: int
    dropped: int
    returned: int
    waiting: int
    reconnects: int


class LiveStream:
    """A live stream between `with` and its end; made by `open_stream`. Iterating gives the frames.

    May be used once, and by any number of threads, which share the frames among them.
    """

    def __init__(
        self,
        feed: Feed,
        reader: LiveReader,
        buffer: LiveBuffer,
        stopped: threading.Event,
        size: Size,
        interpolation: Interpolation,
    ) -> None:
        self._feed, self._reader, self._buffer, self._stopped = feed, reader, buffer, stopped
        self._painter, self._painting = Painter(size, interpolation), threading.Lock()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._thread is not None:
            raise VideoError(f"the stream of {self._feed.name} was entered before; call open_stream again")
        self._thread = threading.Thread(target=self._fill, name=f"mmaccel live {self._feed.name}", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._buffer.close()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(self._feed.patience)
            if self._thread.is_alive():
                warnings.warn(
                    f"{self._feed.name} does not return from reading; its thread ends as soon as it does",
                    VideoWarning,
                    stacklevel=2,
                )

    def __iter__(self) -> Iterator[LiveFrame]:
        self._check_open()
        return self._frames()

    def _frames(self) -> Iterator[LiveFrame]:
        while True:
            try:
                frame = self.read()
            except VideoError:
                # Left by another thread while this one waited: that is an end, not a failure.
                if self._stopped.is_set():
                    return
                raise
            if frame is None:
                return
            yield frame

    def read(self, timeout: float | None = None) -> LiveFrame | None:
        """Return the next frame, waiting for it at most `timeout` seconds (0: not at all; None: until it comes).

        None means that the stream is over (`ended`) or that no frame came within `timeout`. Without a `timeout` it
        returns or raises in the end even if the source hangs, by the time-outs and attempts given to `open_stream`.
        Raises VideoError if the stream is not open, or has failed; frames that came before that are returned first.
        """
        return self._next(timeout, newest=False)

    def latest(self, timeout: float | None = None) -> LiveFrame | None:
        """Return the newest frame that waits, and drop the others; wait as `read` does if there is none."""
        return self._next(timeout, newest=True)

    @property
    def ended(self) -> bool:
        """Whether the source has ended or failed, and all frames that were kept have been returned."""
        return self._buffer.drained

    def stats(self) -> LiveStats:
        """Count what has come and gone so far; also after the with-block."""
        reader, buffer = self._reader, self._buffer
        return LiveStats(
            decoded=reader.decoded,
            damaged=reader.damaged,
            skipped=reader.skipped,
            dropped=buffer.dropped,
            returned=buffer.taken,
            waiting=len(buffer),
            reconnects=reader.reconnects,
        )

    def _check_open(self) -> None:
        if self._thread is None:
            raise VideoError("the stream is not open; use it as: with open_stream(...) as stream")
        if self._stopped.is_set():
            raise VideoError(f"the stream of {self._feed.name} is closed; call open_stream again")

    def _next(self, timeout: float | None, newest: bool) -> LiveFrame | None:
        self._check_open()
        taken = self._buffer.take(timeout, newest, self._patience_left)
        return None if taken is None else self._show(taken)

    def _patience_left(self) -> float:
        """Seconds for which to wait for the source, which cannot say itself that it hangs."""
        self._check_open()
        touched = self._feed.touched
        if touched is None:
            return 1.0
        left = touched + self._feed.patience - time.monotonic()
        if left <= 0:
            raise VideoError(f"{self._feed.name} has not answered for {self._feed.patience:g} s, and cannot be stopped")
        return min(left, 1.0)

    def _show(self, taken: Waiting) -> LiveFrame:
        arrival = taken.arrival
        with self._painting:
            try:
                picture = self._painter.picture(arrival.frame)
            except (FFmpegError, ValueError) as error:
                if isinstance(error, VideoError):
                    raise
                raise VideoError(f"a frame of {self._feed.name} cannot be converted to RGB ({error})") from error
        return LiveFrame(picture, arrival.pts, arrival.arrived, arrival.index, taken.discontinuity, taken.dropped)

    def _fill(self) -> None:
        """Read the source until it ends: what the thread does."""
        error: VideoError | None = None
        try:
            with closing(self._reader.arrivals()) as arrivals:
                for arrival in arrivals:
                    # Who waits for room in the buffer does not wait for the source.
                    self._feed.touched = None
                    self._buffer.put(arrival)
                    self._feed.touched = time.monotonic()
        except VideoError as problem:
            error = problem
        except Exception as problem:
            error = VideoError(f"reading {self._feed.name} failed ({problem!r})")
            error.__cause__ = problem
        self._buffer.finish(error)


def open_stream(
    src: LiveSource,
    *,
    fps: float | None = None,
    size: Size = None,
    interpolation: Interpolation = "BICUBIC",
    drop: Drop = "oldest",
    buffer: int = 16,
    timeout: float = 5.0,
    reconnect: int = 0,
    backoff: float = 0.5,
    follow: bool = False,
    idle: float = 5.0,
    format: str | None = None,  # noqa: A002
    options: dict[str, str] | None = None,
    threads: int | None = None,
) -> LiveStream:
    """Read a live video: `with open_stream(src) as stream: for frame in stream: ...`, each a LiveFrame.

    src is a URL that FFmpeg opens (rtsp, http, tcp, udp, srt, ...), a device with its `format` ("v4l2" for a camera
    under Linux), a path (a named pipe; a growing file with `follow`; any other file is read at full speed) or a binary
    file object (read from where it stands, left open). options go to FFmpeg's protocol and demuxer as they are, for
    example {"rtsp_transport": "tcp"}.

    fps thins out by stream time: of the grid k / fps after the first frame, the first frame at or after each point is
    returned, once; it makes no frames up. size and interpolation are those of `load_video`. Frames are converted and
    resized when they are returned, so what is skipped or dropped costs no more than its decoding.

    A thread decodes into a buffer of `buffer` frames. When that is full, drop="oldest" drops the frame that has waited
    longest, "newest" the one that comes, and "block" lets the source wait, which loses nothing as long as the source
    can wait. Frames that are damaged, or that come between a loss (or the start) and the next keyframe, are not shown.
    A loss is what FFmpeg reports: whole frames lost from RTP over UDP go unnoticed, so prefer RTP over TCP.

    A source that sends nothing for `timeout` seconds is lost. If src is a URL or a device, `reconnect` says how often
    in a row it is connected to again after it was lost, failed or ended, after a pause of `backoff` seconds that
    doubles up to 8; frames start the count anew. Stream time goes on over the gap as the wall clock does. With
    reconnect=0 the stream ends when its source ends, and raises when that is lost. Where the container holds no
    times, frames of a URL are timed by their arrival, others by the stated rate (25 a second if none is stated).

    follow=True waits at the end of a file for more, until it has not grown for `idle` seconds. The file has to be
    readable from front to back: MPEG-TS, Matroska, fragmented MP4, raw streams.

    Leaving the with-block ends the thread: at once for pipes and files, with the next frame or after `timeout` seconds
    (twice that during connecting) for servers that have fallen silent. What cannot be broken off (a name server, a
    camera driver, a file object of your own that blocks) gets 2 * timeout + 1 seconds, then a VideoWarning.
    threads is the number of decoding threads, at most 256, by default one a core and at most 8; they share the slices
    of a picture and add no delay.

    Raises VideoError for a wrong source or request; while reading, when the source cannot be opened, holds no video,
    is lost for good or ended before the first frame that can be shown.
    """
    if drop not in get_args(Drop):
        raise VideoError(f"drop must be one of {', '.join(get_args(Drop))}, not {drop!r}")
    if interpolation not in get_args(Interpolation):
        raise VideoError(f"interpolation must be one of {', '.join(get_args(Interpolation))}, not {interpolation!r}")
    target_size(1, 1, size)
    room, attempts = whole_number(buffer, "buffer"), whole_number(reconnect, "reconnect")
    if room < 1 or attempts < 0:
        raise VideoError("buffer must be at least 1, and reconnect at least 0")
    workers = thread_count(threads, _USUAL_THREADS)
    rate = None if fps is None else Fraction(_positive(fps, "fps")).limit_denominator(_FINEST_RATE)
    if rate == 0:
        raise VideoError(f"fps must be at least {1 / _FINEST_RATE:g} frames a second, got {fps!r}")
    stopped = threading.Event()
    patience = _positive(idle, "idle") if follow else None
    feed = Feed(src, stopped, _positive(timeout, "timeout"), patience, format, options)
    if attempts and not feed.again:
        raise VideoError(f"only a URL or a device can be connected to again, not {feed.name}; leave reconnect out")
    reader = LiveReader(feed, rate, workers, attempts, _positive(backoff, "backoff"))
    return LiveStream(feed, reader, LiveBuffer(room, drop), stopped, size, interpolation)


def _positive(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, Fraction)) or not 0 < value < math.inf:
        raise VideoError(f"{what} must be a positive number, not {value!r}")
    return float(value)
