"""Whole videos decoded in order: for what the packets do not tell, and for damaged files."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from av.error import FFmpegError
from av.video.frame import PictureType

from mmaccel.codecs.groups import INVENTS, REPORT_LOSS, FrameMismatchError
from mmaccel.errors import VideoError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

    from mmaccel.codecs.canvas import Canvas
    from mmaccel.codecs.packets import PacketTable
    from mmaccel.codecs.picture import Painter
    from mmaccel.codecs.source import Source

__all__ = ["Survey", "decode_in_order", "decode_slots", "survey"]

# FFmpeg's own bound for an MPEG-4 packet that says "the same picture again" and holds none.
_REPEATS = 19


def _decoded(packets: Iterator[Packet], stream: VideoStream, errors: list[str]) -> Iterator[tuple[VideoFrame, bool]]:
    """Decode packet by packet, then what the decoder still holds; yield each frame and whether it is undamaged.

    A packet that fails is noted in errors and skipped.
    """
    torn: Counter[int] = Counter()
    # At the seam of two joined streams MPEG-TS counts a loss where nothing is lost.
    trusted = stream.container.format.name == "mpegts" and stream.codec_context.codec.canonical_name in REPORT_LOSS
    founded, invents = True, stream.codec_context.codec.canonical_name in INVENTS
    while True:
        try:
            packet = next(packets, None)
        except FFmpegError:
            packet = None  # the file breaks off here: the scan has counted what is missing
        # An empty packet would tell the decoder that the video is over.
        if packet is not None and not packet.size:
            continue
        if packet is not None and packet.is_corrupt and packet.pts is not None and not trusted:
            torn[packet.pts] += 1  # some decoders show what is left of it and do not say so
        try:
            frames = stream.decode(packet)
        except FFmpegError as error:
            errors.append(str(error))
            frames = []
        for frame in frames:
            if invents and frame.pict_type == PictureType.NONE:
                # The stand-in is no frame of the video, and what is built upon it is spoilt up to the next keyframe.
                founded = False
                continue
            founded |= frame.key_frame
            # Pictures of joined streams may share a time; a torn packet spoils one of them.
            spoilt = False
            if frame.pts is not None and torn[frame.pts] > 0:
                torn[frame.pts] -= 1
                spoilt = True
            yield frame, founded and not spoilt and not frame.is_corrupt
        if packet is None:
            return


def decode_slots(source: Source, table: PacketTable, canvas: Canvas, painter: Painter, threads: int) -> int:
    """Draw the wanted slots, recognised by pts, from the start of the file on; return the number of frames decoded.

    Raises FrameMismatchError as soon as the frames that arrive are not, one by one, those of the table, which must be
    whole.
    """
    errors: list[str] = []
    wanted, last = set(canvas.targets), -1
    with source.open(threads) as (container, stream):
        for frame, clean in _decoded(container.demux(stream), stream, errors):
            last += 1
            slot = -1 if frame.pts is None else table.slot_at.get(frame.pts, -1)
            if errors or not clean or slot != last:
                raise FrameMismatchError
            if slot in wanted:
                canvas.draw(slot, frame, painter)
            if slot == canvas.targets[-1]:
                return last + 1
    raise FrameMismatchError


@dataclass(frozen=True)
class Survey:
    """What a video yields when all of it is decoded in order.

    total: how many frames it has, lost ones included. times: int64 [total], their pts in ticks, ascending, None where
    frames carry none or come in another order. number: for each frame that decodes, its place among the decoder's
    outputs. held: frames without a picture of their own by design, which show the one before. lost: frames that do not
    decode. unplaced: how many of those have no number. decoded: the decoder's outputs.
    """

    total: int
    times: np.ndarray | None
    number: dict[int, int]
    held: frozenset[int]
    lost: int
    unplaced: int
    decoded: int

    def nearest(self, wanted: np.ndarray) -> np.ndarray:
        """For each wanted frame itself if it decodes, else the nearest earlier one, else the nearest later one."""
        present = np.array(sorted(self.number))
        return present[np.maximum(np.searchsorted(present, wanted, side="right") - 1, 0)]


def survey(source: Source, table: PacketTable) -> Survey:
    """Decode a whole video once without converting a frame, to learn which of its frames exist.

    For videos whose packets do not tell, or that are damaged. Raises VideoError if nothing decodes.
    """
    errors: list[str] = []
    # One thread: a damaged video then comes out the same way when its wanted frames are decoded.
    with source.open() as (container, stream):
        interlaced: set[int | None] = set()
        arrived = []
        for frame, ok in _decoded(container.demux(stream), stream, errors):
            arrived.append((frame.pts, ok))
            if frame.interlaced_frame:
                interlaced.add(frame.pts)
    clean = [place for place, (_, ok) in enumerate(arrived) if ok]
    if table.exact:
        known = [place for place, (pts, _) in enumerate(arrived) if pts in table.slot_at]
        slots = [table.slot_at[pts] for place in known if (pts := arrived[place][0]) is not None]
        if table.guessed:
            slots.sort()  # the decoder's order is that of presentation, FFmpeg's times are not
        number = {slot: place for slot, place in zip(slots, known, strict=True) if arrived[place][1]}
        held = _held(table, number, set() if errors else interlaced)
        lost = len(table.pts) - len(number) - len(held)
        found = Survey(len(table.pts), table.pts, number, held, lost, 0, len(arrived))
    else:
        stated = np.array([pts for pts, _ in arrived if pts is not None], dtype=np.int64)
        # Joined streams start anew; what runs backwards says nothing about when a frame is shown.
        times = stated if len(stated) == len(arrived) and (np.diff(stated) >= 0).all() else None
        lost = len(errors) + len(arrived) - len(clean)
        places = {place: place for place in clean}
        found = Survey(len(arrived), times, places, frozenset(), lost, len(errors), len(arrived))
    if not found.number:
        raise VideoError(f"no frame of {source.name} can be decoded; {_advice(source, table, bool(arrived))}")
    return found


def _advice(source: Source, table: PacketTable, decoded: bool) -> str:
    if table.codec == "webp":
        return "is it complete? FFmpeg reads still WebP pictures only: convert an animation to GIF or to a video"
    if source.remote and not decoded:
        return (
            "is it complete? A server without range requests cannot give a file whose index is at its end: download "
            "the file, or move the index to the front (ffmpeg -c copy -movflags +faststart)"
        )
    return "is it complete, and undamaged?"


def _held(table: PacketTable, number: dict[int, int], interlaced: set[int | None]) -> frozenset[int]:
    """Slots that no picture arrives for, and need none: MPEG-4's "the same again", and the second field of a frame."""
    total = len(table.pts)
    missing = set(range(total)) - set(number)
    if table.codec == "mpeg4":
        first = min(number, default=total)
        return frozenset(slot for slot in missing if slot > first and table.sizes[slot] <= _REPEATS)
    # A single gap in interlaced video is a loss; fields in packets of their own leave every other slot empty.
    fields = {slot for slot in missing if slot - 1 in number and int(table.pts[slot - 1]) in interlaced}
    return frozenset(fields) if fields == missing and abs(total - 2 * len(missing)) <= 1 else frozenset()


def decode_in_order(source: Source, canvas: Canvas, painter: Painter) -> int:
    """Draw the wanted frames, numbered by their place among the decoder's outputs; return how many were decoded."""
    last = canvas.targets[-1]
    wanted = set(canvas.targets)
    with source.open() as (container, stream):
        for place, (frame, _) in enumerate(_decoded(container.demux(stream), stream, [])):
            if place in wanted:
                canvas.draw(place, frame, painter)
            if place == last:
                return last + 1
    raise VideoError(f"{source.name} changed while it was read")
