"""What a video file holds, learnt from its packets without decoding one of them."""

from __future__ import annotations

import errno
import io
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import av
import numpy as np
from av.error import FFmpegError
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Iterator

    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

__all__ = ["ONE_FRAME_A_PACKET", "PacketTable", "packs_frames", "scan"]

# Codecs whose packets each hold exactly one shown frame. VP8 is not among them: its alternate reference frames are
# packets that are never shown. The others are unproved. Both are counted by decoding.
ONE_FRAME_A_PACKET = frozenset(
    {"av1", "ffv1", "gif", "h264", "hevc", "mjpeg", "mpeg1video", "mpeg2video", "mpeg4", "png", "prores", "vp9"}
)

_VOP = b"\0\0\1\xb6"  # what an MPEG-4 picture starts with


@dataclass(frozen=True)
class PacketTable:
    """The frames that the packets of a video promise, in presentation order; slot k is frame k.

    `total` is how many there are, `slots` int64 [n], ascending, those that the table knows of: all, or those around the
    wanted ones. For these: `pts` int64 [n] in units of `tick` seconds; `dts` and `rank` int64 [n]: when the slot's
    packet is decoded, in ticks and as its place in the file; `sizes` int64 [n]: the bytes of its packet; `keys` bool
    [n]: whether decoding may start there. `ends`: the pts of the first and the last frame of the video, and the display
    time of the last one, 0 if not stated.
    `exact` says whether packets number the frames; without it only decoding tells the frames apart, and `total` is 0.
    `cut` is the number of frames that the file announces but ends before, `rate` the frame rate of the header.
    `guessed` says that FFmpeg has made the times up (AVI stores none), or that packets hold two frames: only the
    decoder's order is to be trusted.
    `exif` is the EXIF orientation of a still image, 1 to 8, None for anything else.
    """

    codec: str
    total: int
    slots: np.ndarray
    pts: np.ndarray
    dts: np.ndarray
    rank: np.ndarray
    sizes: np.ndarray
    keys: np.ndarray
    ends: tuple[int, int, int]
    tick: float
    rate: float | None
    exact: bool
    cut: int = 0
    guessed: bool = False
    exif: int | None = None

    @property
    def whole(self) -> bool:
        """Whether every frame is in the table."""
        return len(self.slots) == self.total

    @cached_property
    def slot_at(self) -> dict[int, int]:
        """Slot by pts."""
        return dict(zip(self.pts.tolist(), self.slots.tolist(), strict=True))

    def row(self, slot: int) -> int:
        """The row of a slot that the table knows of."""
        return slot if self.whole else int(np.searchsorted(self.slots, slot))

    def key_before(self, slot: int) -> int:
        """The last slot up to `slot` at which decoding may start; the first of the table if none is marked."""
        row = self.row(slot)
        keys = np.flatnonzero(self.keys[: row + 1])
        return int(self.slots[keys[-1]]) if len(keys) else int(self.slots[0])

    def nearest_key(self, slot: int) -> int:
        """The slot nearest to a slot (the earlier of two) at which decoding may start; itself if none is marked."""
        keys = self.slots[self.keys]
        return int(keys[np.abs(keys - slot).argmin()]) if len(keys) else slot


def scan(container: InputContainer, stream: VideoStream) -> PacketTable:
    """Demux the whole of a freshly opened video and return its PacketTable; nothing is decoded, no header is believed.

    The container stands at the end after that.
    """
    pts: list[int | None] = []
    dts: list[int | None] = []
    keys: list[bool] = []
    sizes: list[int] = []
    spans: list[int] = []
    exif = None
    packets, end, last_dts, ordered, torn, broken = 0, 0.0, None, True, False, False
    # Matroska states no frame count, only the length of the longest stream: all of them must be looked at.
    matroska = container.format.name == "matroska,webm"
    codec = stream.codec_context.codec.canonical_name
    hides = codec == "vp9"
    guessed = container.format.name == "avi" and codec in ("h264", "hevc")
    still = container.format.name == "image2" or container.format.name.endswith("_pipe")
    tick = float(stream.time_base or 0)
    for packet in _until_broken(container.demux() if matroska else container.demux(stream), container.size > 0):
        if packet is None:
            broken = True
            break
        size, time = packet.size, packet.pts
        if matroska:
            if time is not None and packet.time_base:
                end = max(end, (time + (packet.duration or 0)) * float(packet.time_base))
            if packet.stream_index != stream.index:
                continue
        if not size:
            continue
        packets += 1
        torn = packet.is_corrupt
        if still and packets == 1:
            exif = _exif_orientation(bytes(packet))
        guessed = guessed or packs_frames(codec, packet)
        decoded_at = packet.dts
        # Matroska stores no decoding times: FFmpeg makes them up, and stumbles where frames are missing.
        if decoded_at is not None and not matroska:
            ordered &= last_dts is None or decoded_at >= last_dts
            last_dts = decoded_at
        # Outside the edit list, or an alternate reference: decoded, never shown.
        if packet.is_discard or (hides and _hidden(memoryview(packet))):
            continue
        pts.append(time)
        dts.append(decoded_at)
        keys.append(packet.is_keyframe)
        sizes.append(size)
        spans.append(packet.duration or 0)
    if torn and stream.frames > packets:
        cut = stream.frames - packets
    else:
        cut = _cut(container, stream, packets, end if matroska else None)
    known = [time for time in pts if time is not None]
    exact = ordered and len(set(known)) == len(pts) > 0 and codec in ONE_FRAME_A_PACKET
    times = np.array(known if exact else [], dtype=np.int64)
    order = np.argsort(times)
    count = len(order)
    return PacketTable(
        codec=codec,
        total=count,
        slots=np.arange(count),
        pts=times[order],
        dts=np.array([t if d is None else d for t, d in zip(known, dts, strict=True)], dtype=np.int64)[order]
        if exact
        else times,
        rank=order,
        sizes=np.array(sizes, dtype=np.int64)[order] if exact else times,
        keys=np.array(keys, dtype=bool)[order] if exact else times.astype(bool),
        ends=(int(times[order[0]]), int(times[order[-1]]), spans[order[-1]]) if exact else (0, 0, 0),
        tick=tick,
        rate=float(stream.average_rate) if stream.average_rate else None,
        exact=exact,
        cut=max(cut, int(broken)),
        guessed=guessed,
        exif=exif,
    )


def packs_frames(codec: str, packet: Packet) -> bool:
    """Whether a packet holds two pictures, as DivX stores MPEG-4's B-frames; an empty one makes up for it later."""
    return codec == "mpeg4" and bytes(packet).count(_VOP) > 1


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
