"""What is in a video file, how it is built, and what reading frames of it would cost."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import av
import numpy as np
from av.error import FFmpegError

from mmaccel.codecs import backends
from mmaccel.codecs.disposable import disposable_test
from mmaccel.codecs.index import look_up
from mmaccel.codecs.packets import PacketTable, scan
from mmaccel.codecs.picture import Painter
from mmaccel.codecs.plan import DecodePlan, GroupStructure, plan_for, structure_of
from mmaccel.codecs.pool import thread_count
from mmaccel.codecs.reading import Clock
from mmaccel.codecs.sampling import OnShort, Request, Size, target_size
from mmaccel.codecs.source import Source, VideoSource

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

__all__ = ["VideoProbe", "probe_video"]

# Names of ITU-T H.273; the others are rare and told by number.
_MATRICES = {
    0: "RGB", 1: "BT.709", 4: "FCC", 5: "BT.601", 6: "BT.601", 7: "SMPTE 240M", 8: "YCgCo", 9: "BT.2020",
    10: "BT.2020 constant luminance", 14: "ICtCp",
}  # fmt: skip
_RANGES = {1: "limited", 2: "full"}


@dataclass(frozen=True)
class VideoProbe:
    """One video file: what it says, how its packets are ordered, and what reading the wanted frames would take.

    name: of the file. container: FFmpeg's name of the format. streams: kind and codec of each stream. codec, profile,
    pixel_format. height, width: pixels of the stored picture. rotation: clockwise degrees by which it is turned to come
    upright, None if no picture decodes. output: (height, width) of the frames that are read, upright and resized.
    interlaced: whether the first picture is. matrix, range: of the colours, None where the stream states none (BT.601
    and the pixel format's range are taken). duration: seconds. fps: mean frames a second. rate_varies: whether frames
    are shown for different times, by more than the clock tick of the container rounds. frames: how many there are.
    bit_rate: of the video stream, bits a second. cut: frames that the file announces but ends before. numbered_by: what
    tells the frames apart: "index" (of the file, without reading all of it), "scan" (of all packets) or "decoding" (of
    all frames). backends: for each backend None, or why it cannot be used.

    Where only decoding tells the frames apart, `frames`, `rate_varies`, `bit_rate`, `structure` and `plan` are None.
    """

    name: str
    container: str
    streams: tuple[tuple[str, str], ...]
    codec: str
    profile: str | None
    pixel_format: str | None
    height: int
    width: int
    rotation: int | None
    output: tuple[int, int]
    interlaced: bool
    matrix: str | None
    range: str | None
    duration: float
    fps: float
    rate_varies: bool | None
    frames: int | None
    bit_rate: float | None
    cut: int
    numbered_by: str
    structure: GroupStructure | None
    plan: DecodePlan | None
    backends: dict[str, str | None]

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        return dataclasses.asdict(self)


def probe_video(
    src: VideoSource,
    frames: int | None = None,
    *,
    fps: float | None = None,
    indices: Iterable[int] | None = None,
    seconds: Iterable[float] | None = None,
    size: Size = None,
    on_short: OnShort = "error",
    threads: int | None = None,
) -> VideoProbe:
    """Look into a video without reading it: one picture is decoded, all packets are read.

    Arguments are those of `load_video`, whose work on the same request the `plan` foretells. It holds for sound files:
    damage that only decoding shows makes `load_video` decode more.

    Raises VideoError for what is no video, and for a request that the video cannot satisfy.
    """
    request, hands = Request.of(frames, fps, indices, seconds, on_short), thread_count(threads)
    target_size(1, 1, size)
    source = Source(src)
    picture = _first_picture(source)
    with source.open() as (container, stream):
        indexed = not request.timed and look_up(container, stream, lambda n: request.slots(n, source.name)) is not None
    with source.open() as (container, stream):
        facts, table = _facts(container, stream), scan(container, stream)
        length = (container.duration or 0) / av.time_base
    told = table.exact and not table.guessed
    disposable = _disposable(source, table) if told else None
    interlaced = picture is not None and bool(picture.interlaced_frame)
    clock = Clock.of(table, table.total, table.ends) if told else Clock(table.rate or 0.0, length)
    height, width = (picture.height, picture.width) if picture else (facts["height"], facts["width"])
    painter = Painter(size, exif=table.exif)
    layout = painter.layout(picture) if picture else None
    plan = None
    if told:
        numbers = _numbers(table, clock, request, source)
        plan = plan_for(table, numbers, disposable, hands, play=interlaced and disposable is not None)
    return VideoProbe(
        name=str(source.name),
        **{**facts, "height": height, "width": width},
        rotation=layout.rotation if layout else None,
        output=painter.shape(height, width, layout)[1] if layout else target_size(height, width, size),
        interlaced=interlaced,
        duration=clock.duration,
        fps=clock.fps,
        rate_varies=_varies(table.pts) if told else None,
        frames=table.total if told else None,
        bit_rate=8 * float(table.sizes.sum()) / clock.duration if told else None,
        cut=table.cut,
        numbered_by=("index" if indexed else "scan") if told else "decoding",
        structure=structure_of(table, disposable) if told else None,
        plan=plan,
        backends={"pyav": None, **{name: backends.probe(name) for name in backends.BACKENDS}},
    )


def _facts(container: InputContainer, stream: VideoStream) -> dict[str, Any]:
    """What the headers say."""
    context = stream.codec_context
    return {
        "container": container.format.name,
        "streams": tuple((other.type, _codec(other)) for other in container.streams),
        "codec": context.codec.canonical_name,
        "profile": context.profile,
        "pixel_format": context.pix_fmt,
        "height": context.height,
        "width": context.width,
        "matrix": _stated(context.colorspace, _MATRICES),
        "range": _RANGES.get(int(context.color_range)),
    }


def _codec(stream: Any) -> str:
    return stream.codec_context.codec.canonical_name if stream.codec_context else "unknown"


def _stated(number: int, names: dict[int, str]) -> str | None:
    # 2 says that it is not stated, 3 is reserved.
    return None if int(number) in (2, 3) else names.get(int(number), f"matrix {int(number)}")


def _first_picture(source: Source) -> VideoFrame | None:
    """The first picture that the decoder gives; None if it gives none of the whole file."""
    with source.open() as (container, stream):
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
            # Where the file breaks off there is nothing more to be had; the scan says what is missing.
            except FFmpegError:
                packet = None
            try:
                pictures = stream.decode(packet)
            except FFmpegError:
                pictures = []
            if pictures or packet is None:
                return pictures[0] if pictures else None


def _disposable(source: Source, table: PacketTable) -> np.ndarray | None:
    """For each slot whether its packet can be left out, bool [n]; None for codecs that do not tell."""
    flags = np.zeros(len(table.slots), dtype=bool)
    with source.open() as (container, stream):
        test = disposable_test(stream.codec_context)
        if test is None:
            return None
        try:
            for packet in container.demux(stream):
                if packet.size and test(memoryview(packet)) and packet.pts in table.slot_at:
                    flags[table.slot_at[packet.pts]] = True
        # The scan has ended here too.
        except FFmpegError:
            return flags
    return flags


def _numbers(table: PacketTable, clock: Clock, request: Request, source: Source) -> np.ndarray:
    times = (table.pts - table.pts[0] - 0.5) * table.tick
    return request.slots(table.total, source.name, table.cut, times, clock.duration)


def _varies(pts: np.ndarray) -> bool:
    steps = np.diff(pts)
    return len(steps) > 0 and bool(steps.max() - steps.min() > max(1.0, 0.01 * float(np.median(steps))))
