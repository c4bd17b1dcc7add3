"""Where a live stream comes from: a server, a device, a pipe, a growing file; opened so that it can be left."""

from __future__ import annotations

import io
import math
import os
import re
import select
import stat
import time
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import av
from av.error import ExitError, FFmpegError
from av.format import ContainerFormat
from av.stream import Disposition
from av.video.stream import VideoStream

from mmaccel.errors import VideoError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from threading import Event

    from av.container import InputContainer

__all__ = ["Feed", "LiveSource"]

LiveSource = str | os.PathLike[str] | BinaryIO

# Seconds between two looks at whether the stream has been left, or a file has grown.
_SLICE = 0.05


class Feed:
    """One live source: `name` for messages, `again` whether it can be opened more than once.

    Once `stopped` is set, reading ends: at once from pipes and files, within `timeout` seconds from servers (twice that
    while they are being opened), with the next frame from devices. `touched` is when the source was last asked for
    something (time.monotonic), None while nobody waits for it; `patience` seconds later it can be given up.
    Raises VideoError where this cannot be a source: wrong type, missing, a directory, a closed or a text file.
    """

    def __init__(
        self,
        src: LiveSource,
        stopped: Event,
        timeout: float,
        idle: float | None,
        container: str | None,
        options: dict[str, str] | None,
    ) -> None:
        self._stopped, self._timeout, self._idle = stopped, timeout, idle
        self._container, self._options = container, dict(options or {})
        self._url, self._path = "", ""
        self._file: BinaryIO | None = None
        self.touched: float | None = None
        # What a reader met. It ends the data instead of raising, so that FFmpeg gives out all that came before.
        self.failure: OSError | None = None
        self.patience = 2 * max(timeout, idle or 0.0) + 1
        if container is not None:
            _known(container)
        if isinstance(src, (str, os.PathLike)):
            self.name = re.sub(r"(?<=://)[^/@]*@", "", os.fspath(src))  # a camera's password is for no log
            self._locate(os.fspath(src))
        elif hasattr(src, "read"):
            name = getattr(src, "name", None)
            self.name = name if isinstance(name, str) else "the given file object"  # a pipe is called by its number
            self._file = src
            _check_binary(src, self.name)
        else:
            raise VideoError(f"a live source is a URL, a path or a binary file object, not {type(src).__name__}")
        self.again = bool(self._url) and not self._url.startswith("file:")
        if idle is not None and (self.again or self._waits()):
            raise VideoError(f"{self.name} is no file that could grow; leave follow out")

    def _locate(self, src: str) -> None:
        if not src:
            raise VideoError("the path of the live source is empty")
        if "://" in src:
            self._url = src
            return
        try:
            mode = Path(src).stat().st_mode
        except (OSError, ValueError) as error:
            if self._container is not None:
                self._url = src  # what a device is called is up to its driver
                return
            raise VideoError(f"{src!r} cannot be opened ({getattr(error, 'strerror', None) or error})") from error
        if stat.S_ISDIR(mode):
            raise VideoError(f"{src} is a directory, not a video")
        if self._idle is not None or stat.S_ISFIFO(mode) or (stat.S_ISCHR(mode) and self._container is None):
            self._path = src
        else:
            self._url = f"file:{src}" if stat.S_ISREG(mode) else src

    def _waits(self) -> bool:
        """Whether this is a pipe, a FIFO or a terminal, which tell when there is something to read."""
        if self._path:
            return not Path(self._path).is_file()
        raw = getattr(self._file, "raw", self._file)
        return isinstance(raw, io.FileIO) and not stat.S_ISREG(os.fstat(raw.fileno()).st_mode)

    @contextmanager
    def open(self, threads: int) -> Iterator[tuple[InputContainer, VideoStream]]:
        """Open the container and its video stream; FFmpeg's errors inside the block become VideoError."""
        self.touched, self.failure = time.monotonic(), None
        try:
            with self._reader() as reader:
                options = {"pattern_type": "none", **self._options}
                timeout = None
                if self.again:
                    # Looking for streams may take half the time, so that a slow sender is not taken for a dead one.
                    options = {"analyzeduration": str(int(self._timeout * 5e5)), **options}
                    if "listen" in options.get("rtsp_flags", ""):
                        # FFmpeg refuses its own default for how long to wait for an RTSP sender.
                        options = {"listen_timeout": str(math.ceil(self._timeout)), **options}
                    timeout = self._timeout
                target = self._url if reader is None else reader
                with av.open(
                    target, "r", self._container, options, metadata_errors="replace", timeout=timeout
                ) as container:
                    stream = self._video_stream(container)
                    stream.codec_context.thread_count = threads
                    # Threads that work on a frame each would hold back as many frames.
                    stream.thread_type = "SLICE"  # type: ignore[assignment]
                    yield container, stream
            if self.failure is not None:
                raise self.failure
        except (FFmpegError, OSError) as error:
            # Some protocols call it by another name when they are interrupted.
            silent = self.again and self.touched is not None and time.monotonic() - self.touched >= self._timeout
            if silent or isinstance(error, ExitError):
                raise VideoError(
                    f"{self.name} sent nothing for {self._timeout:g} s; is the sender running? timeout= waits longer"
                ) from error
            reason = self.failure or getattr(error, "strerror", None) or error
            raise VideoError(
                f"{self.name} cannot be read as a live video ({reason}); is it there, and does it send video?"
            ) from error
        finally:
            self.touched = None

    def _reader(self) -> AbstractContextManager[_Descriptor | _Growing | _Plain | None]:
        """What FFmpeg reads from instead of a URL."""
        if self._file is not None:
            if self._idle is not None:
                return nullcontext(_Growing(self, self._file, self._idle))
            return nullcontext(_Descriptor(self, self._file) if self._waits() else _Plain(self, self._file))
        if not self._path:
            return nullcontext()
        if self._idle is not None:
            return closing(_Growing(self, open(self._path, "rb", buffering=0), self._idle))  # noqa: PTH123
        # Opening a named pipe would wait for its writer.
        descriptor = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK)
        return closing(_Descriptor(self, os.fdopen(descriptor, "rb", buffering=0)))

    def _video_stream(self, container: InputContainer) -> VideoStream:
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
            kinds = sorted({other.type for other in container.streams if other is not stream}) or ["none"]
            raise VideoError(f"{self.name} holds no video (its streams: {', '.join(kinds)})")
        if container.format.name == "tty":
            # FFmpeg renders plain text as pictures.
            raise VideoError(f"{self.name} sends text, not video")
        if stream.codec_context is None:
            raise VideoError(f"{self.name} sends video in a codec that this FFmpeg cannot decode")
        return stream

    def rest(self, seconds: float) -> bool:
        """Wait, and say whether the stream has been left meanwhile."""
        return self._stopped.wait(seconds)

    @property
    def stopped(self) -> bool:
        """Whether the stream has been left."""
        return self._stopped.is_set()

    @property
    def timeout(self) -> float:
        """Seconds without data after which the source is taken for lost."""
        return self._timeout


class _Plain:
    """Any binary file object. How long a read may block is up to it: none can be broken off."""

    def __init__(self, feed: Feed, file: BinaryIO) -> None:
        self.name = feed.name
        self._feed, self._file = feed, file
        # read() of a buffered reader waits until it has all it was asked for.
        self._take = getattr(file, "read1", None) or file.read

    def read(self, size: int) -> bytes:
        self._feed.touched = time.monotonic()
        return b"" if self._feed.stopped else self._take(size) or b""

    def close(self) -> None:
        self._file.close()


class _Descriptor(_Plain):
    """A pipe, a FIFO or a terminal, read as soon as something is there; nothing for `timeout` seconds is an error."""

    def __init__(self, feed: Feed, file: BinaryIO) -> None:
        super().__init__(feed, file)
        self._poll = select.poll()
        self._poll.register(file, select.POLLIN)

    def read(self, size: int) -> bytes:
        feed = self._feed
        feed.touched = started = time.monotonic()
        while not feed.stopped and feed.failure is None:
            # A descriptor that does not block gives None where another reader was faster.
            if self._poll.poll(_SLICE * 1000) and (data := self._take(size)) is not None:
                return data
            if time.monotonic() - started > feed.timeout:
                feed.failure = TimeoutError(f"nothing arrived for {feed.timeout:g} s")
        return b""


class _Growing(_Plain):
    """A file that something still writes to; its end is where it has not grown for `idle` seconds."""

    def __init__(self, feed: Feed, file: BinaryIO, idle: float) -> None:
        super().__init__(feed, file)
        self._idle, self._read, self._over = idle, 0, False

    def read(self, size: int) -> bytes:
        feed = self._feed
        feed.touched = started = time.monotonic()
        while not self._over and feed.failure is None:
            if data := self._take(size):
                self._read += len(data)
                return data
            if isinstance(self._file, io.FileIO) and os.fstat(self._file.fileno()).st_size < self._read:
                feed.failure = OSError("it has been cut shorter than what was read of it")
                break
            self._over = time.monotonic() - started > self._idle or feed.rest(_SLICE)
        return b""


def _known(container: str) -> None:
    try:
        known = isinstance(container, str) and ContainerFormat(container, "r").is_input
    except ValueError:
        known = False
    if not known:
        raise VideoError(f'format must be the name of an FFmpeg demuxer or device, as "v4l2", not {container!r}')


def _check_binary(file: BinaryIO, name: str) -> None:
    if getattr(file, "closed", False):
        raise VideoError(f"{name} is a closed file; pass it open")
    if isinstance(file, io.TextIOBase):
        raise VideoError(f'{name} is open in text mode; open it with mode "rb"')
    if hasattr(file, "readable") and not file.readable():
        raise VideoError(f'{name} cannot be read from; open it with mode "rb"')
