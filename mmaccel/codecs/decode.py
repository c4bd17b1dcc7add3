"""From packets to upright RGB pictures: the wanted frames of one video, and no others."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from av.error import FFmpegError
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter

from mmaccel.codecs.sampling import Size, allocate, target_size
from mmaccel.errors import VideoError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

    from mmaccel.codecs.packets import PacketTable, Source

__all__ = ["Canvas", "FrameMismatchError", "Survey", "decode_in_order", "decode_slots", "survey"]

# Decoders that report every picture that a lost piece of its packet has spoiled.
_REPORT_LOSS = frozenset({"h264", "hevc"})
# Decoders that put a grey picture in for a missing reference.
_INVENTS = frozenset(
    {"flv1", "h263", "mpeg1video", "mpeg2video", "mpeg4", "msmpeg4v1", "msmpeg4v2", "msmpeg4v3", "wmv1", "wmv2"}
)
# FFmpeg's own bound for an MPEG-4 packet that says "the same picture again" and holds none.
_REPEATS = 19
# EXIF orientation: whether to transpose, to mirror, to turn upside down after that; clockwise degrees without a mirror.
_EXIF = {
    1: (False, False, False, 0), 2: (False, True, False, 0), 3: (False, True, True, 180), 4: (False, False, True, 180),
    5: (True, False, False, 270), 6: (True, True, False, 90), 7: (True, True, True, 90), 8: (True, False, True, 270),
}  # fmt: skip


class FrameMismatchError(Exception):
    """The decoder delivered other frames than the packets promise."""


class Canvas:
    """The wanted frames as one tensor; each is converted and resized once, and shown wherever it is wanted.

    `numbers` int64 [N] names the frame for each row of the result; `exif` is the orientation of a still image. After
    drawing: `frames` uint8 [N, 3, H, W], and `height`, `width` (before resizing) and `rotation` of the first frame
    drawn.
    """

    def __init__(self, numbers: np.ndarray, size: Size, interpolation: str, exif: int | None = None) -> None:
        self._rows: dict[int, list[int]] = {}
        for row, number in enumerate(numbers.tolist()):
            self._rows.setdefault(number, []).append(row)
        self._count, self._size, self._interpolation = len(numbers), size, interpolation
        self._exif = exif
        self._scaler = VideoReformatter()
        self.targets = sorted(self._rows)
        self.frames = torch.empty(0)
        self.height = self.width = self.rotation = 0

    def draw(self, number: int, frame: VideoFrame) -> None:
        """Put a decoded frame into every row that wants it."""
        transpose, mirrored, rotation = _orientation(frame, self._exif)
        height, width = (frame.width, frame.height) if transpose else (frame.height, frame.width)
        if not self.height:
            self.height, self.width, self.rotation = height, width, rotation
            self.frames = allocate(self._count, *target_size(height, width, self._size))
        rows, columns = self.frames.shape[-2:]
        across, down = (rows, columns) if transpose else (columns, rows)
        resized = (across, down) != (frame.width, frame.height)
        how = self._interpolation if resized else None
        rgb = self._scaler.reformat(frame, across, down, "rgb24", interpolation=how, threads=1)
        picture = torch.from_numpy(rgb.to_ndarray()).permute(2, 0, 1)
        if transpose:
            picture = picture.transpose(1, 2)
        self.frames[self._rows[number]] = picture.flip(mirrored)


def _orientation(frame: VideoFrame, exif: int | None) -> tuple[bool, list[int], int]:
    """Say how a picture [C, H, W] comes upright: whether transposed, then axes to flip; and its clockwise degrees."""
    if exif is not None:
        transpose, right, down, rotation = _EXIF[exif]
        return transpose, [axis for axis, flip in ((2, right), (1, down)) if flip], rotation
    rotation = -90 * round(frame.rotation / 90) % 360
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:
        # PyAV cannot list side data of a kind that it has no name for (EXIF); it still tells the turn, not a mirror.
        matrix = None
    if matrix is None:
        transpose, right, down = rotation in (90, 270), rotation in (90, 180), rotation in (180, 270)
    else:
        # x' = a x + c y and y' = b x + d y, with x to the right and y downwards.
        a, b, _, c, d = np.frombuffer(bytes(matrix), dtype=np.int32)[:5].tolist()
        transpose = abs(b) > abs(a)
        right, down = (c < 0, b < 0) if transpose else (a < 0, d < 0)
    return transpose, [axis for axis, flip in ((2, right), (1, down)) if flip], rotation


def _decoded(packets: Iterator[Packet], stream: VideoStream, errors: list[str]) -> Iterator[tuple[VideoFrame, bool]]:
    """Decode packet by packet, then what the decoder still holds; yield each frame and whether it is undamaged.

    A packet that fails is noted in errors and skipped.
    """
    torn: Counter[int] = Counter()
    # At the seam of two joined streams MPEG-TS counts a loss where nothing is lost.
    trusted = stream.container.format.name == "mpegts" and stream.codec_context.codec.canonical_name in _REPORT_LOSS
    founded, invents = True, stream.codec_context.codec.canonical_name in _INVENTS
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


def decode_slots(source: Source, table: PacketTable, canvas: Canvas, threads: int, seek: bool) -> int:
    """Draw the wanted slots, recognised by pts, and return the number of frames decoded for that.

    With `seek`, jumps to the keyframe before a wanted slot where that saves decoding.
    Raises FrameMismatchError as soon as the frames that arrive are not, one by one, those of the table.
    """
    errors: list[str] = []
    decoded, last = 0, -1
    with source.open(threads) as (container, stream):
        frames = _decoded(container.demux(stream), stream, errors)
        for target in canvas.targets:
            key = table.key_before(target)
            # A jump throws away what the decoder is working on, so it must skip more than that.
            if seek and key - last > table.reorder + threads - 1:
                frames = _decoded(_jump(container, stream, table, key), stream, errors)
                last = key - 1
            for frame, clean in frames:
                decoded += 1
                slot = -1 if frame.pts is None else table.slots.get(frame.pts, -1)
                if 0 <= slot <= last:
                    continue  # stored behind the keyframe but shown before it: it cannot be decoded from here
                if errors or not clean or slot != last + 1:
                    raise FrameMismatchError
                last = slot
                if slot == target:
                    canvas.draw(slot, frame)
                    break
            else:
                raise FrameMismatchError
    return decoded


def _jump(container: InputContainer, stream: VideoStream, table: PacketTable, key: int) -> Iterator[Packet]:
    """Seek to the keyframe in slot `key` and yield packets from there, or from somewhat earlier."""
    # Most containers seek by pts, and land a group of pictures early if asked for the dts; MPEG-TS seeks by dts, and
    # lands behind the keyframe if asked for the pts.
    for aim in (table.pts[key], table.dts[key]):
        try:
            container.seek(int(aim), stream=stream)
            packets = container.demux(stream)
            first = next(packet for packet in packets if packet.size)
        except (FFmpegError, StopIteration):
            continue
        slot = -1 if first.pts is None else table.slots.get(first.pts, -1)
        if slot >= 0 and table.rank[slot] <= table.rank[key]:
            yield first
            yield from packets
            return
    raise FrameMismatchError


@dataclass(frozen=True)
class Survey:
    """What a video yields when all of it is decoded in order.

    total: how many frames it has, lost ones included. times: int64 [total], their pts in ticks, None where frames carry
    none. number: for each frame that decodes, its place among the decoder's outputs. held: frames without a picture of
    their own by design, which show the one before. lost: frames that do not decode. unplaced: how many of those have no
    number. decoded: the decoder's outputs.
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
        known = [place for place, (pts, _) in enumerate(arrived) if pts in table.slots]
        # The decoder's order is that of presentation even where FFmpeg has guessed the times (H.264 in AVI).
        slots = sorted(table.slots[pts] for place in known if (pts := arrived[place][0]) is not None)
        number = {slot: place for slot, place in zip(slots, known, strict=True) if arrived[place][1]}
        held = _held(table, number, set() if errors else interlaced)
        lost = len(table.pts) - len(number) - len(held)
        found = Survey(len(table.pts), table.pts, number, held, lost, 0, len(arrived))
    else:
        stated = [pts for pts, _ in arrived if pts is not None]
        times = np.array(stated, dtype=np.int64) if len(stated) == len(arrived) else None
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


def decode_in_order(source: Source, canvas: Canvas) -> int:
    """Draw the wanted frames, numbered by their place among the decoder's outputs; return how many were decoded."""
    last = canvas.targets[-1]
    wanted = set(canvas.targets)
    with source.open() as (container, stream):
        for place, (frame, _) in enumerate(_decoded(container.demux(stream), stream, [])):
            if place in wanted:
                canvas.draw(place, frame)
            if place == last:
                return last + 1
    raise VideoError(f"{source.name} changed while it was read")
