"""From packets to upright RGB pictures: the wanted frames of one video, and no others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter

from mmaccel.codecs.sampling import Size, target_size
from mmaccel.errors import VideoError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

    from mmaccel.codecs.packets import PacketTable, Source

__all__ = ["Canvas", "FrameMismatchError", "Survey", "decode_in_order", "decode_slots", "survey"]

# Codecs in which a picture may be spread over two packets (fields) or a packet may hold none, without any damage.
_UNEVEN = frozenset({"h264", "mpeg4", "mpeg2video", "mpeg1video", "vp9"})


class FrameMismatchError(Exception):
    """The decoder delivered other frames than the packets promise."""


class Canvas:
    """The wanted frames as one tensor; each is converted and resized once, and shown wherever it is wanted.

    `numbers` int64 [N] names the frame for each row of the result. After drawing: `frames` uint8 [N, 3, H, W], and
    `height`, `width` (before resizing) and `rotation` of the first frame drawn.
    """

    def __init__(self, numbers: np.ndarray, size: Size, interpolation: str) -> None:
        self._rows: dict[int, list[int]] = {}
        for row, number in enumerate(numbers.tolist()):
            self._rows.setdefault(number, []).append(row)
        self._count, self._size, self._interpolation = len(numbers), size, interpolation
        self._scaler = VideoReformatter()
        self.targets = sorted(self._rows)
        self.frames = torch.empty(0)
        self.height = self.width = self.rotation = 0

    def draw(self, number: int, frame: VideoFrame) -> None:
        """Put a decoded frame into every row that wants it."""
        transpose, mirrored, rotation = _orientation(frame)
        height, width = (frame.width, frame.height) if transpose else (frame.height, frame.width)
        if not self.height:
            self.height, self.width, self.rotation = height, width, rotation
            self.frames = torch.empty(self._count, 3, *target_size(height, width, self._size), dtype=torch.uint8)
        rows, columns = self.frames.shape[-2:]
        across, down = (rows, columns) if transpose else (columns, rows)
        resized = (across, down) != (frame.width, frame.height)
        how = self._interpolation if resized else None
        rgb = self._scaler.reformat(frame, across, down, "rgb24", interpolation=how, threads=1)
        picture = torch.from_numpy(rgb.to_ndarray()).permute(2, 0, 1)
        if transpose:
            picture = picture.transpose(1, 2)
        self.frames[self._rows[number]] = picture.flip(mirrored)


def _orientation(frame: VideoFrame) -> tuple[bool, list[int], int]:
    """Say how a picture [C, H, W] comes upright: whether transposed, then axes to flip; and its clockwise degrees."""
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
    torn: set[int] = set()
    while True:
        try:
            packet = next(packets, None)
        except FFmpegError:
            packet = None  # the file breaks off here: the scan has counted what is missing
        # An empty packet would tell the decoder that the video is over.
        if packet is not None and not packet.size:
            continue
        if packet is not None and packet.is_corrupt and packet.pts is not None:
            torn.add(packet.pts)  # some decoders show what is left of it and do not say so
        try:
            frames = stream.decode(packet)
        except FFmpegError as error:
            errors.append(str(error))
            frames = []
        for frame in frames:
            yield frame, not frame.is_corrupt and frame.pts not in torn
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
    none. number: for each frame that decodes, its place among the decoder's outputs. lost: frames that do not decode.
    decoded: the decoder's outputs.
    """

    total: int
    times: np.ndarray | None
    number: dict[int, int]
    lost: int
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
        arrived = [(frame.pts, ok) for frame, ok in _decoded(container.demux(stream), stream, errors)]
    clean = [place for place, (_, ok) in enumerate(arrived) if ok]
    damaged = len(clean) < len(arrived) or bool(errors)
    if table.exact and (damaged or table.codec not in _UNEVEN):
        number = {table.slots[pts]: place for place in clean if (pts := arrived[place][0]) in table.slots}
        found = Survey(len(table.pts), table.pts, number, len(table.pts) - len(number), len(arrived))
    else:
        known = [pts for place in clean if (pts := arrived[place][0]) is not None]
        times = np.array(known, dtype=np.int64) if len(known) == len(clean) else None
        lost = len(errors) + len(arrived) - len(clean)
        found = Survey(len(clean), times, dict(enumerate(clean)), lost, len(arrived))
    if not found.number:
        raise VideoError(f"no frame of {source.name} can be decoded; is it complete, and undamaged?")
    return found


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
