"""Read the codec's signals of a video: motion vectors, frame types, packet sizes and scene cuts."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from av.error import FFmpegError
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter

from mmaccel.codecs.picture import layout_of, side_data
from mmaccel.codecs.pool import thread_count
from mmaccel.codecs.sampling import Request, whole_number
from mmaccel.codecs.signals import CodecSignals, overlap
from mmaccel.codecs.source import Source
from mmaccel.codecs.vectors import EXPORTING, PITCH, Trace, block_field, unlike
from mmaccel.errors import VideoError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from av.video.frame import VideoFrame

    from mmaccel.codecs.source import VideoSource

__all__ = ["codec_signals"]

_TYPES = {int(PictureType.I): "I", int(PictureType.P): "P", int(PictureType.B): "B"}
# Codecs with packets whose picture is never shown: only the decoder tells how many frames there are.
_HIDING = frozenset({"vp8", "vp9"})


def codec_signals(
    src: VideoSource,
    frames: int | None = None,
    *,
    indices: Iterable[int] | torch.Tensor | None = None,
    grid: tuple[int, int] | None = None,
    fallback: Literal["error", "packets"] = "error",
    threads: int | None = None,
) -> CodecSignals:
    """What changed between the wanted frames of a video, from its bitstream.

    src: path, URL, bytes or binary file, as `load_video`. frames: that many, evenly spaced as `load_video` takes them;
    or indices: frame numbers in ascending order, best those of the loaded video (`video.indices`); neither: all frames.
    grid: (rows, columns) of cells over the upright picture; None: one for every 16 x 16 pixels. fallback: what happens
    with codecs of which FFmpeg exports no motion vectors (HEVC, VP8, VP9, AV1, intra codecs): an error, or "packets":
    frame types and packet sizes alone, the same for all cells of a frame.

    Vectors are found while decoding, so every frame up to the last wanted one is decoded, and none converted. What a
    vector's step is and how steps add up over frames in between: see `block_field` and `Trace`. An I frame bears no
    vectors and says nothing of change; there, and where more than half of a frame is not predicted from what was shown
    before, luma is compared with the frame before, moved on as that was moving. A block off by 10 levels on average is
    new, and with more than half of the blocks new it is a scene cut.

    Limits: FFmpeg tells neither which of several references a vector points to nor what residual a block has. The
    nearest reference is assumed: a vector to an older one counts too much, and what blinks is found again two frames
    back and passes for still. A fade coded without motion is not seen. An encoder's best match need not be the motion
    of the scene, most of all on flat ground. Vectors of fields (interlaced video) count as those of frames.

    Raises:
        VideoError: as `load_video`; indices that are not in order; a codec without vectors; a video that is damaged or
            changes its size.
    """
    request = None if frames is None and indices is None else Request.of(frames, indices=indices)
    if fallback not in ("error", "packets"):
        raise VideoError(f'fallback must be "error" or "packets", not {fallback!r}')
    shape = None if grid is None else _grid(grid)
    workers = thread_count(threads, 8)
    source = Source(src)
    packets = _Packets.read(source)
    if not packets.vectors and fallback == "error":
        raise VideoError(
            f"{source.name} is {packets.codec} video, of which FFmpeg exports no motion vectors; pass "
            'fallback="packets" for frame types and packet sizes alone, or convert it to H.264'
        )
    total = packets.total
    while True:
        # decoders of codecs with hidden pictures show fewer frames than there are packets
        wanted = _wanted(total, request, source.name)
        found = _Reader(source, packets, wanted, shape)
        shown = found.read(workers)
        if shown >= total or packets.slots is not None:
            return found.signals()
        if not shown:
            raise VideoError(f"no frame of {source.name} can be decoded; is it complete, and undamaged?")
        total = shown


def _grid(grid: object) -> tuple[int, int]:
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise VideoError(f"grid must be (rows, columns), not {grid!r}")
    rows, columns = (whole_number(side, "each side of grid") for side in grid)
    if not 1 <= min(rows, columns) <= max(rows, columns) <= 4096:
        raise VideoError(f"grid must have 1 to 4096 rows and columns, not {rows} x {columns}")
    return rows, columns


def _wanted(total: int, request: Request | None, name: str) -> list[int]:
    if request is None:
        return list(range(total))
    wanted = request.slots(total, name).tolist()
    if any(later < earlier for earlier, later in itertools.pairwise(wanted)):
        raise VideoError("indices must be in ascending order: each frame is compared with the wanted one before it")
    return wanted


@dataclass(frozen=True)
class _Packets:
    """The packets of a video: how many frames they promise, and in which order these are shown and decoded.

    slots: frame number by pts, None where packets do not number the frames. rank: for each frame the place of its
    packet in the file. sizes: bytes by pts, or by place in the file where packets have no pts of their own.
    """

    codec: str
    total: int
    slots: dict[int, int] | None
    rank: list[int]
    sizes: dict[int, int]
    timed: bool

    @property
    def vectors(self) -> bool:
        """Whether FFmpeg exports motion vectors of this codec."""
        return self.codec in EXPORTING

    @classmethod
    def read(cls, source: Source) -> _Packets:
        """Demux the video once."""
        times: list[int | None] = []
        sizes: list[int] = []
        with source.open() as (container, stream):
            codec = stream.codec_context.codec.canonical_name
            # AVI stores no times: FFmpeg makes them up, and only the decoder's order is to be trusted
            ordered = codec not in _HIDING and container.format.name != "avi"
            for packet in container.demux(stream):
                if packet.size and not packet.is_discard:
                    times.append(packet.pts)
                    sizes.append(packet.size)
        if not sizes:
            raise VideoError(f"{source.name} holds no frames; is it complete?")
        known = [time for time in times if time is not None]
        if len(set(known)) < len(times):
            return cls(codec, len(sizes), None, [], dict(enumerate(sizes)), False)
        by_time = dict(zip(known, sizes, strict=True))
        order = sorted(range(len(known)), key=lambda place: known[place])
        slots = {known[place]: slot for slot, place in enumerate(order)} if ordered else None
        return cls(codec, len(sizes), slots, order, by_time, True)

    def size(self, number: int, pts: int | None) -> int:
        """Bytes of the packet of a frame; 0 where no packet is known to be its own."""
        key = pts if self.timed else number
        return 0 if key is None else self.sizes.get(key, 0)


class _Reader:
    """One pass of the decoder over a video; collects an entry for each wanted frame."""

    def __init__(self, source: Source, packets: _Packets, wanted: list[int], grid: tuple[int, int] | None) -> None:
        self.source, self.packets, self.wanted, self.grid = source, packets, wanted, grid
        self.maps: list[torch.Tensor] = []
        self.sizes: list[int] = []
        self.types: list[str] = []
        self.cuts: list[bool] = []
        self.pixels = 0
        self._bytes, self._cut, self._type = 0, False, "?"
        self._ahead: set[int] = set()
        self._scaler = VideoReformatter()

    def read(self, threads: int) -> int:
        """Decode up to the last wanted frame; return how many frames there are up to there."""
        number, before = -1, None
        for number, frame in self._numbered(threads):
            # a frame without a picture of its own shows the one before, at the start of the file the one behind
            if before is not None:
                self._emit_until(number)
            self._step(number, frame, before)
            before = frame
            self._emit_until(number + 1)
            if len(self.maps) == len(self.wanted):
                return self.packets.total
        if number < 0:
            raise VideoError(f"no frame of {self.source.name} can be decoded; is it complete, and undamaged?")
        if self.packets.slots is not None:
            self._emit_until(self.packets.total)
        return number + 1

    def signals(self) -> CodecSignals:
        """What was collected."""
        maps = torch.stack(self.maps, dim=1)
        if not self.packets.vectors:
            maps[0], maps[1:3] = 0, torch.nan
        else:
            maps[:3, 0] = torch.tensor([0.0, 1.0, 0.0])[:, None, None]  # nothing is known of what came before
        return CodecSignals(
            indices=torch.tensor(self.wanted, dtype=torch.int64),
            motion=maps[0], fresh=maps[1], still=maps[2], bits=maps[3],
            packet_bytes=torch.tensor(self.sizes, dtype=torch.int64),
            types=tuple(self.types), cuts=torch.tensor(self.cuts), pixels=self.pixels, vectors=self.packets.vectors,
        )  # fmt: skip

    def _numbered(self, threads: int) -> Iterator[tuple[int, VideoFrame]]:
        slots, last = self.packets.slots, -1
        with self.source.open(threads) as (container, stream):
            if self.packets.vectors:
                stream.codec_context.options = {**stream.codec_context.options, "flags2": "+export_mvs"}
            for packet in container.demux(stream):
                try:
                    frames = stream.decode(packet)
                except FFmpegError as error:
                    raise self._damaged(last + 1) from error
                for frame in frames:
                    slot = last + 1 if slots is None else slots.get(frame.pts, -1)  # type: ignore[arg-type]
                    if frame.is_corrupt or slot <= last:
                        raise self._damaged(last + 1)
                    last = slot
                    yield slot, frame

    def _damaged(self, number: int) -> VideoError:
        return VideoError(
            f"{self.source.name} is damaged at frame {number}, and signals need every frame; encode it anew, or do "
            "without them"
        )

    def _begin(self, frame: VideoFrame) -> None:
        self._size = (frame.height, frame.width)
        layout = layout_of(frame, None)
        self._turn = (layout.transpose, [axis - 3 for axis in layout.flips])
        self.pixels = frame.height * frame.width
        blocks = [-(-side // PITCH) for side in self._size]
        self._trace = Trace(*blocks)
        self._last_step = torch.zeros(2, *blocks)
        sides = self._size[::-1] if self._turn[0] else self._size
        grid = self.grid or tuple(max(1, round(side / PITCH)) for side in sides)
        cells = grid[::-1] if self._turn[0] else grid
        self._pool = [
            overlap((torch.arange(n + 1) * PITCH).clamp_max(side), m)
            for n, side, m in zip(blocks, self._size, cells, strict=True)
        ]

    def _step(self, number: int, frame: VideoFrame, before: VideoFrame | None) -> None:
        if before is None:
            self._begin(frame)
        elif (frame.height, frame.width) != self._size:
            raise VideoError(f"{self.source.name} changes its size at frame {number}; cut it there, or scale it first")
        self._type = _TYPES.get(frame.pict_type, "?")
        size = self.packets.size(number, frame.pts)
        self._bytes += size
        if not self.packets.vectors:
            self._trace.bits = self._trace.bits + (0 if frame.key_frame else 8 * size / self.pixels)
            return
        try:
            data = side_data(frame).get("MOTION_VECTORS")
        except ValueError as error:
            raise VideoError(
                f"{self.source.name} has side data that PyAV cannot list ({error}); convert it to H.264 first"
            ) from error
        rows, columns = self._last_step.shape[1:]
        field = block_field(None if data is None else data.to_ndarray(), rows, columns, *self._distances(number))
        step, moving, fresh = field.step, field.moving, field.fresh
        if field.untied and before is not None:
            step = torch.where(fresh < 1, step, self._last_step)
            fresh = unlike(self._luma(frame), self._luma(before), step)
            moving = (step != 0).any(0) * (1 - fresh)
            self._cut |= float(fresh.mean()) > 0.5
            size = round(size * float(fresh.mean()))
        self._trace.move(step, moving, fresh, size, self.pixels)
        self._last_step = step * (fresh < 0.5)

    def _luma(self, frame: VideoFrame) -> torch.Tensor:
        return torch.from_numpy(self._scaler.reformat(frame, format="gray", threads=1).to_ndarray())

    def _distances(self, number: int) -> tuple[int, int]:
        """How many frames back and ahead the nearest references of a frame are.

        Those ahead were decoded before it. Of those behind, I and P frames are references, and B frames which were
        decoded ahead of a frame that is shown before them.
        """
        rank = self.packets.rank
        if self.packets.slots is None:
            return 1, 1
        if self._type != "B":
            self._ahead.add(number)
        ahead = number + 1
        while ahead < len(rank) and rank[ahead] > rank[number] and ahead - number < 32:
            ahead += 1
        if ahead < len(rank) and rank[ahead] < rank[number]:
            self._ahead.add(ahead)
        else:
            ahead = number + 1
        behind = number - 1
        while behind > 0 and (behind not in self._ahead or rank[behind] > rank[number]) and number - behind < 32:
            behind -= 1
        return number - behind, ahead - number

    def _emit_until(self, number: int) -> None:
        """Give out the wanted frames below `number`, as things stand."""
        while len(self.maps) < len(self.wanted) and self.wanted[len(self.maps)] < number:
            trace = self._trace
            maps = torch.stack([trace.motion, trace.fresh, trace.still, trace.bits])
            maps = self._pool[0] @ maps @ self._pool[1].T
            transpose, flips = self._turn
            self.maps.append((maps.transpose(1, 2) if transpose else maps).flip(flips))
            self.sizes.append(self._bytes)
            self.types.append(self._type)
            self.cuts.append(self._cut)
            self._bytes, self._cut = 0, False
            trace.reset()
