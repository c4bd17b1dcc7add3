"""Other libraries that decode on the CPU and deliver RGB: used where their frames are provably those of PyAV.

They number frames on their own, convert colours on their own and do not tell of damage. So each is asked only for what
it is known to do alike, and the keyframe of every group is decoded by both and must be the same, pixel by pixel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from mmaccel.codecs.backends import load, unsuitable
from mmaccel.codecs.canvas import GeometryChangedError
from mmaccel.codecs.groups import FrameMismatchError, GroupReader, InterlacedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

    from mmaccel.codecs.backends import BackendError
    from mmaccel.codecs.canvas import Canvas
    from mmaccel.codecs.groups import Group
    from mmaccel.codecs.packets import PacketTable
    from mmaccel.codecs.picture import Painter
    from mmaccel.codecs.source import Source

__all__ = ["Pictures", "RgbHand", "open_rgb", "refusal"]

# In these, and with these codecs, both libraries were found to seek to the very frame. Of MPEG-4 and MPEG-2, and of
# program and transport streams, decord gives other frames. VP9 and AV1 may change their size from one frame to the
# next, which is not noticed where every picture comes in the size of the first one.
_CONTAINERS = ("mp4", "matroska")
_CODECS = frozenset({"ffv1", "h264", "hevc", "mjpeg"})
# Eight bits: more are rounded in other ways by each version of libswscale.
_FORMATS = frozenset({"yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p"})
# Odd sides take a path of libswscale on which versions differ.
_EVEN = frozenset({"yuv420p", "yuvj420p"})
_MOST_BYTES = 1 << 26


class Pictures(Protocol):
    """A video as a library sees it. Its errors are VideoErrors.

    count: how many frames it numbers. turned: whether it turns pictures upright (but never mirrors them).
    """

    count: int
    turned: bool

    def get(self, slots: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Pictures uint8 [n, H, W, 3] by ascending numbers, and float64 [n]: when, in seconds after the first frame."""
        ...

    def close(self) -> None:
        """Close the video."""
        ...


def refusal(container: InputContainer, stream: VideoStream, table: PacketTable) -> str | None:
    """Why another library might give other frames of this video; None if it would not, as far as the packets tell."""
    name, codec = container.format.name, stream.codec_context.codec.canonical_name
    if not any(part in name for part in _CONTAINERS):
        return f"frames in {name} are numbered and sought otherwise there; MP4, MOV and Matroska are taken"
    if codec not in _CODECS:
        taken = ", ".join(sorted(_CODECS))
        return f"frames of {codec} are not sought exactly there, or change their size unseen; {taken} are taken"
    if not table.exact or table.guessed:
        return "the packets do not number the frames"
    if table.cut:
        return f"it ends early, {table.cut} frames are missing"
    if not table.keys[0]:
        return "it does not begin with a keyframe"
    keys = np.flatnonzero(table.keys)
    following = np.minimum.accumulate(table.rank[keys][::-1])[::-1]
    later = np.searchsorted(keys, np.arange(len(table.slots)), side="right")
    closed = table.rank < np.append(following, np.iinfo(np.int64).max)[later]
    if not closed.all():
        return "it has open groups of pictures, into which other libraries do not seek exactly"
    return None


class RgbHand:
    """Draws the pictures of a library, in the order of time; for one thread.

    Raises BackendError for whatever may make them other pictures than PyAV's: other numbers or times, layouts that
    versions of libswscale convert otherwise, interlacing, a keyframe that is not the same.
    """

    def __init__(
        self,
        backend: str,
        pictures: Pictures,
        container: InputContainer,
        stream: VideoStream,
        table: PacketTable,
        painter: Painter,
    ) -> None:
        self._backend, self._pictures, self._table, self._painter = backend, pictures, table, painter
        self.reader = GroupReader(container, stream, table)
        steps = np.diff(table.pts)
        self._tolerance = 0.4 * table.tick * float(steps.min()) if len(steps) else np.inf
        if pictures.count != table.total:
            raise self._unsuitable(f"it sees {pictures.count} frames where the packets hold {table.total}")

    def draw(self, group: Group, canvas: Canvas, stopped: Callable[[], bool]) -> None:
        """See `Hand`."""
        frame = self._keyframe(group)
        layout, planes = self._painter.layout(frame), self._painter.planes(frame)
        wanted = set(group.slots)
        for slot, image in self._images(sorted({group.key, *wanted}), planes[0].size * 3):
            if stopped():
                return
            stored = np.rot90(image, layout.rotation // 90) if self._pictures.turned else image
            own = list(np.ascontiguousarray(stored.transpose(2, 0, 1)))
            if slot == group.key and not all(map(np.array_equal, own, planes)):
                raise self._unsuitable(f"its picture of frame {slot} is not the one that FFmpeg gives here")
            if slot in wanted:
                try:
                    canvas.draw_planes(slot, own, layout, self._painter)
                except GeometryChangedError:
                    raise self._unsuitable("pictures change their size or turn") from None

    def _keyframe(self, group: Group) -> VideoFrame:
        """The first picture of a group, decoded by PyAV."""
        alone = group.opening()
        try:
            ((_, frame),) = self.reader.read(alone)
        except InterlacedError:
            raise self._unsuitable("it is interlaced") from None
        except FrameMismatchError:
            raise self._unsuitable(f"its keyframe at frame {group.key} is damaged") from None
        if frame.interlaced_frame:
            raise self._unsuitable("it is interlaced")
        name = frame.format.name
        if name not in _FORMATS or (name in _EVEN and (frame.width % 2 or frame.height % 2)):
            odd = " with an odd side" if name in _EVEN else ""
            raise self._unsuitable(f"pictures in {name}{odd} get other colours there")
        return frame

    def _images(self, slots: list[int], size: int) -> Iterator[tuple[int, np.ndarray]]:
        table, step = self._table, max(1, _MOST_BYTES // size)
        for start in range(0, len(slots), step):
            part = slots[start : start + step]
            images, times = self._pictures.get(part)
            self.reader.decoded += len(images)
            own = (table.pts[[table.row(slot) for slot in part]] - table.ends[0]) * table.tick
            if len(images) != len(part) or not (np.abs(times - own) < self._tolerance).all():
                raise self._unsuitable("it shows frames at other times than the packets say")
            yield from zip(part, images, strict=True)

    def _unsuitable(self, reason: str) -> BackendError:
        return unsuitable(self._backend, reason)

    def close(self) -> None:
        """Close the video."""
        self._pictures.close()


def open_rgb(
    backend: str,
    source: Source,
    opened: tuple[InputContainer, VideoStream],
    table: PacketTable,
    painter: Painter,
    threads: int,
) -> RgbHand:
    """Let a library open a video that PyAV has opened; BackendError says why not."""
    make = load(backend)
    reason = refusal(*opened, table)
    if reason is not None:
        raise unsuitable(backend, reason)
    return RgbHand(backend, make(source.local(), threads), *opened, table, painter)
