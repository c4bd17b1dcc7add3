"""A video that can be opened any number of times, by several threads at once."""

from __future__ import annotations

import io
import os
import stat
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import av
from av.error import FFmpegError
from av.stream import Disposition
from av.video.stream import VideoStream

from mmaccel.errors import VideoError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from av.container import InputContainer

__all__ = ["Source", "VideoSource"]

VideoSource = str | os.PathLike[str] | bytes | BinaryIO

# FFmpeg would reserve what a damaged header claims, and for video several times. Pictures may be photographs.
_MOST_PIXELS, _MOST_PIXELS_STILL = 1 << 27, 1 << 28
# Decoders that hand out what they have found in memory where a picture is cut off, unless an error is asked for.
_SILENT = frozenset({"mjpeg"})


class Source:
    """One video that can be opened any number of times, and its name for messages.

    Takes a path, a URL that FFmpeg opens (anything with "://"), the encoded bytes, or a binary file object, which is
    read from its start and left open. Raises VideoError where that cannot be a video: wrong type, missing, a directory,
    unreadable, empty.
    """

    def __init__(self, src: VideoSource) -> None:
        self._data: bytes | None = None
        self._file: BinaryIO | None = None
        self._lock = threading.Lock()
        self._url = ""
        if isinstance(src, (bytes, bytearray, memoryview)):
            self.name, self._data = "the given bytes", bytes(src)
        elif isinstance(src, str) and "://" in src:
            self.name = self._url = src
        elif isinstance(src, (str, os.PathLike)):
            self.name = os.fspath(src)
            # A URL without an authority is a path with a prefix, unless a file is really called that.
            if isinstance(self.name, str) and self.name.startswith("file:") and not os.path.lexists(self.name):
                self.name = self.name.removeprefix("file:")
            if not self.name:
                raise VideoError("the path of the video is empty")
            if _readable(self.name):
                self._url = f"file:{self.name}"
            else:
                # What comes through a pipe comes once.
                self._data = Path(self.name).read_bytes()
        elif hasattr(src, "read"):
            self.name = str(getattr(src, "name", "the given file object"))
            self._adopt(src)
        else:
            raise VideoError(f"a video is a path, bytes or a binary file object, not {type(src).__name__}")
        if self._data is not None and not self._data:
            raise VideoError(f"{self.name} is empty (0 bytes)")

    def _adopt(self, file: BinaryIO) -> None:
        if getattr(file, "closed", False):
            raise VideoError(f"{self.name} is a closed file; pass it open, or pass its path")
        try:
            if not isinstance(file.read(0), bytes):
                raise VideoError(f'{self.name} is open in text mode; open it with mode "rb"')
            # Not every reader says whether it can seek; one that does not is taken for a pipe.
            if not (hasattr(file, "seekable") and file.seekable()):
                self._data = file.read()
            elif file.seek(0, os.SEEK_END) == 0:
                raise VideoError(f"{self.name} is empty (0 bytes)")
            else:
                self._file = file
        except io.UnsupportedOperation as error:
            raise VideoError(f'{self.name} cannot be read from ({error}); open it with mode "rb"') from error
        except (OSError, TypeError) as error:
            raise VideoError(
                f"{self.name} cannot be read from ({error}); pass a binary file open for reading"
            ) from error

    @property
    def remote(self) -> bool:
        """Whether it comes from a server."""
        return "://" in self._url and not self._url.startswith("file:")

    def local(self) -> str | bytes:
        """For libraries that open videos themselves: its path, or what it holds; VideoError if a server has it."""
        if self._data is not None:
            return self._data
        if self._file is not None:
            return _View(self._file, self._lock).read()
        if self.remote or not self._url.startswith("file:"):
            raise VideoError(f'{self.name} is read by backend="pyav" only; download it for another one')
        return str(Path(self._url.removeprefix("file:")).absolute())

    @contextmanager
    def open(self, threads: int = 1) -> Iterator[tuple[InputContainer, VideoStream]]:
        """Open the container and its video stream at the start; FFmpeg's errors inside the block become VideoError."""
        target: str | io.BytesIO | _View = self._url
        if self._data is not None:
            target = io.BytesIO(self._data)
        elif self._file is not None:
            target = _View(self._file, self._lock)
        try:
            # A file with names in a legacy encoding is still a video, and a server that stops answering is an error.
            timeout = 30.0 if self.remote else None
            # The name of a picture is a name, not a pattern that stands for a series of them.
            options = {"pattern_type": "none"}
            with av.open(target, "r", metadata_errors="replace", timeout=timeout, options=options) as container:
                stream = self._video_stream(container)
                still = container.format.name == "image2" or container.format.name.endswith("_pipe")
                most = _MOST_PIXELS_STILL if still else _MOST_PIXELS
                strict = {"err_detect": "explode"} if stream.codec_context.codec.canonical_name in _SILENT else {}
                stream.codec_context.options = {"max_pixels": str(most), **strict}
                stream.codec_context.thread_count = threads
                stream.thread_type = "AUTO"  # type: ignore[assignment]
                try:
                    yield container, stream
                finally:
                    # Freeing the decoder waits for FFmpeg's threads with Python's lock held. They may wait for that
                    # lock themselves, to write a log: so let them come to rest before.
                    stream.codec_context.flush_buffers()
        except (FFmpegError, OSError) as error:
            reason = getattr(error, "strerror", None) or error
            raise VideoError(
                f"{self.name} cannot be read as a video ({reason}); is it complete, and a video?"
            ) from error

    def _video_stream(self, container: InputContainer) -> VideoStream:
        if container.format.name == "tty":
            # FFmpeg renders plain text as pictures; nobody who passes a text file means that.
            raise VideoError(f"{self.name} is a text file, not a video")
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
            kinds = sorted({other.type for other in container.streams if other is not stream}) or ["none"]
            raise VideoError(f"{self.name} holds no video (its streams: {', '.join(kinds)})")
        if stream.codec_context is None:
            raise VideoError(f"{self.name} holds a video in a codec that this FFmpeg cannot decode")
        return stream


class _View(io.RawIOBase):
    """A reader of a file object that other threads read too; it has a position of its own."""

    def __init__(self, file: BinaryIO, lock: threading.Lock) -> None:
        self._file, self._lock, self._position = file, lock, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        with self._lock:
            self._file.seek(self._position)
            data = self._file.read(size)
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with self._lock:
            base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position}.get(whence)
            self._position = offset + (self._file.seek(0, os.SEEK_END) if base is None else base)
        return self._position


def _readable(name: str) -> bool:
    """Whether a path that may hold a video can be read more than once; says why if it holds none."""
    try:
        facts = Path(name).stat()
    except FileNotFoundError:
        raise VideoError(f"{name} does not exist") from None
    except (OSError, ValueError) as error:
        raise VideoError(f"{name!r} cannot be opened ({error})") from error
    if stat.S_ISDIR(facts.st_mode):
        raise VideoError(f"{name} is a directory, not a video file")
    if stat.S_ISREG(facts.st_mode) and facts.st_size == 0:
        raise VideoError(f"{name} is empty (0 bytes)")
    return stat.S_ISREG(facts.st_mode) or stat.S_ISBLK(facts.st_mode)
