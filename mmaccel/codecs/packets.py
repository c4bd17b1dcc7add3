"""What a video file holds, learnt from its packets without decoding one of them."""

from __future__ import annotations

import errno
import io
import os
import stat
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import av
import numpy as np
from av.error import FFmpegError
from av.stream import Disposition
from av.video.stream import VideoStream
from PIL import Image

from mmaccel.errors import VideoError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from av.container import InputContainer
    from av.packet import Packet

__all__ = ["PacketTable", "Source", "VideoSource", "scan"]

VideoSource = str | os.PathLike[str] | bytes | BinaryIO

# Codecs whose packets each hold exactly one shown frame. VP8 is not among them: its alternate reference frames are
# packets that are never shown. The others are unproved. Both are counted by decoding.
_ONE_FRAME_A_PACKET = frozenset(
    {"av1", "ffv1", "gif", "h264", "hevc", "mjpeg", "mpeg1video", "mpeg2video", "mpeg4", "png", "prores", "vp9"}
)


class Source:
    """One video that can be opened any number of times, and its name for messages.

    Takes a path, a URL that FFmpeg opens (anything with "://"), the encoded bytes, or a binary file object, which is
    read from its start and left open. Raises VideoError where that cannot be a video: wrong type, missing, a directory,
    unreadable, empty.
    """

    def __init__(self, src: VideoSource) -> None:
        self._data: bytes | None = None
        self._file: BinaryIO | None = None
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
            self._url = f"file:{_readable(self.name)}"
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

    @contextmanager
    def open(self, threads: int = 1) -> Iterator[tuple[InputContainer, VideoStream]]:
        """Open the container and its video stream at the start; FFmpeg's errors inside the block become VideoError."""
        target: str | BinaryIO = self._url
        if self._data is not None:
            target = io.BytesIO(self._data)
        elif self._file is not None:
            self._file.seek(0)
            target = self._file
        try:
            # A file with names in a legacy encoding is still a video, and a server that stops answering is an error.
            timeout = 30.0 if self.remote else None
            # The name of a picture is a name, not a pattern that stands for a series of them.
            options = {"pattern_type": "none"}
            with av.open(target, "r", metadata_errors="replace", timeout=timeout, options=options) as container:
                stream = self._video_stream(container)
                stream.codec_context.thread_count = threads
                stream.thread_type = "AUTO"  # type: ignore[assignment]
                yield container, stream
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


def _readable(name: str) -> str:
    """Return a path that may hold a video, or say why it cannot."""
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
    return name


@dataclass(frozen=True)
class PacketTable:
    """The frames that the packets of a video promise, in presentation order; slot k is frame k.

    `pts` int64 [n] in units of `tick` seconds; `dts` and `rank` int64 [n]: when the slot's packet is decoded, in ticks
    and as its place in the file; `keys` int64, ascending: the slots at which decoding may start; `span`: the display
    time of the last frame in ticks, 0 if not stated.
    `sizes` int64 [n]: the bytes of each slot's packet.
    `exact` says whether packets number the frames; without it only decoding tells the frames apart.
    `cut` is the number of frames that the file announces but ends before, `rate` the frame rate of the header.
    `guessed` says that FFmpeg has made the times up (AVI stores none): only the decoder's order is to be trusted.
    `exif` is the EXIF orientation of a still image, 1 to 8, None for anything else.
    """

    codec: str
    pts: np.ndarray
    dts: np.ndarray
    rank: np.ndarray
    sizes: np.ndarray
    keys: np.ndarray
    span: int
    tick: float
    rate: float | None
    exact: bool
    cut: int
    guessed: bool
    exif: int | None

    @cached_property
    def slots(self) -> dict[int, int]:
        """Slot by pts."""
        return {int(time): slot for slot, time in enumerate(self.pts)}

    @cached_property
    def reorder(self) -> int:
        """How many frames the decoder may hold back to bring them into presentation order."""
        return int(np.abs(self.rank - np.arange(len(self.rank))).max(initial=0))

    def key_before(self, slot: int) -> int:
        """The last slot up to `slot` at which decoding may start; 0, the start of the file, if none is marked."""
        place = int(np.searchsorted(self.keys, slot, side="right"))
        return int(self.keys[place - 1]) if place else 0


def scan(source: Source) -> PacketTable:
    """Demux the whole video once and return its PacketTable; nothing is decoded, headers are not believed."""
    pts: list[int | None] = []
    dts: list[int | None] = []
    keys: list[bool] = []
    spans: list[int] = []
    sizes: list[int] = []
    exif = None
    packets, end, last_dts, ordered, torn, broken = 0, 0.0, None, True, False, False
    with source.open() as (container, stream):
        # Matroska states no frame count, only the length of the longest stream: all of them must be looked at.
        matroska = container.format.name == "matroska,webm"
        codec = stream.codec_context.codec.canonical_name
        guessed = container.format.name == "avi" and codec in ("h264", "hevc")
        still = container.format.name == "image2" or container.format.name.endswith("_pipe")
        sized = container.size > 0
        for packet in _until_broken(container.demux() if matroska else container.demux(stream), sized):
            if packet is None:
                broken = True
                break
            if packet.pts is not None and packet.time_base:
                end = max(end, (packet.pts + (packet.duration or 0)) * float(packet.time_base))
            if packet.stream.index != stream.index or not packet.size:
                continue
            packets += 1
            torn = packet.is_corrupt
            if still and packets == 1:
                exif = _exif_orientation(bytes(packet))
            # Matroska stores no decoding times: FFmpeg makes them up, and stumbles where frames are missing.
            if packet.dts is not None and not matroska:
                ordered &= last_dts is None or packet.dts >= last_dts
                last_dts = packet.dts
            # Outside the edit list, or an alternate reference: decoded, never shown.
            if not packet.is_discard and not (codec == "vp9" and _hidden(memoryview(packet))):
                pts.append(packet.pts)
                dts.append(packet.dts)
                keys.append(packet.is_keyframe)
                spans.append(packet.duration or 0)
                sizes.append(packet.size)
        if torn and stream.frames > packets:
            cut = stream.frames - packets
        else:
            cut = _cut(container, stream, packets, end if matroska else None)
        rate = float(stream.average_rate) if stream.average_rate else None
        tick = float(stream.time_base or 0)
    known = [time for time in pts if time is not None]
    exact = ordered and len(set(known)) == len(pts) > 0 and codec in _ONE_FRAME_A_PACKET
    if not exact:
        none = np.empty(0, dtype=np.int64)
        return PacketTable(
            codec, none, none, none, none, none, 0, tick, rate, False, max(cut, int(broken)), guessed, exif
        )
    order = np.argsort(np.array(known, dtype=np.int64))
    return PacketTable(
        codec=codec,
        pts=np.array(known, dtype=np.int64)[order],
        dts=np.array([time if when is None else when for time, when in zip(known, dts, strict=True)])[order],
        rank=order,
        sizes=np.array(sizes, dtype=np.int64)[order],
        keys=np.flatnonzero(np.array(keys)[order]),
        span=spans[order[-1]],
        tick=tick,
        rate=rate,
        exact=True,
        cut=max(cut, int(broken)),
        guessed=guessed,
        exif=exif,
    )


def _exif_orientation(encoded: bytes) -> int | None:
    """The EXIF orientation of an encoded picture, None if it cannot be read; PyAV tells the turn, but no mirror."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            orientation = image.getexif().get(0x0112, 1)
    # Pillow's parsers raise errors of many kinds on damaged files; FFmpeg may still read the pixels.
    except Exception:
        return None
    return orientation if orientation in range(1, 9) else 1


def _hidden(data: memoryview) -> bool:
    """Whether a VP9 packet holds one frame only, and that is not to be shown (VP9 bitstream specification, 7.2)."""
    if data[-1] & 0xE0 == 0xC0:
        return False  # several frames, the last of which is shown
    header = data[0] << (data[0] & 0x30 == 0x30)  # profile 3 has one bit more
    return data[0] & 0xC0 == 0x80 and not header & 0x08 and not header & 0x02


def _until_broken(packets: Iterator[Packet], sized: bool) -> Iterator[Packet | None]:
    """Hand packets through; None in the place of an error, after which nothing follows."""
    try:
        yield from packets
    except FFmpegError as error:
        # A server that does not state the length says by closing the connection that this was all.
        if sized or error.errno != errno.EIO:
            yield None


def _cut(container: InputContainer, stream: VideoStream, packets: int, end: float | None) -> int:
    """Count the frames that an index or a header places behind the end of the file."""
    entries = stream.index_entries
    if len(entries) > packets:
        beyond = sum(entry.pos + entry.size > container.size >= 0 for entry in entries)
        return min(beyond, len(entries) - packets)
    if end is not None and container.duration and stream.average_rate:
        missing = container.duration / av.time_base - end
        # Streams of one file rarely end together; less than half a second says nothing.
        return int(missing * stream.average_rate) if missing > 0.5 else 0
    return 0
