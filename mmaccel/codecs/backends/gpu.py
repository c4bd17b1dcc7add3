"""Groups of pictures through hardware decoders: packets from PyAV, pictures drawn into a canvas on the GPU."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from mmaccel.codecs.backends import BackendError, decoder_class, unsuitable
from mmaccel.codecs.canvas import GeometryChangedError
from mmaccel.codecs.groups import FrameMismatchError, InterlacedError
from mmaccel.errors import MethodError, VideoError

if TYPE_CHECKING:
    from collections.abc import Callable

    from av.video.stream import VideoStream

    from mmaccel.codecs.backends.picture import Picture
    from mmaccel.codecs.canvas import Canvas
    from mmaccel.codecs.groups import Group, GroupReader
    from mmaccel.codecs.packets import PacketTable
    from mmaccel.codecs.picture import Layout, Painter

__all__ = ["GpuHand"]

# What the conversion on the GPU turns into libswscale's numbers, as long as both sides are even.
_FORMATS = frozenset({"nv12", "yuv420p", "yuvj420p"})


class GpuHand:
    """A decoding session on a device; for one thread.

    The turn of the pictures is that of a frame which PyAV decodes first; the session's picture of this frame must be
    the same, pixel by pixel. Raises BackendError, from which on the session is closed, for whatever may make pictures
    other ones than PyAV's, and for every failure of the hardware.
    """

    def __init__(
        self,
        backend: str,
        device: torch.device,
        stream: VideoStream,
        table: PacketTable,
        reader: GroupReader,
        painter: Painter,
    ) -> None:
        self._backend, self._device, self._table = backend, device, table
        self.reader, self._painter = reader, painter
        self._known: tuple[Layout, int, int] | None = None
        number = device.type if device.type == "cpu" else device.index
        try:
            self._decoder = decoder_class(backend)(stream, number)
        except VideoError as error:
            raise unsuitable(backend, str(error)) from error

    def draw(self, group: Group, canvas: Canvas, stopped: Callable[[], bool]) -> None:
        """See `Hand`."""
        before = self._decoder.decoded
        try:
            # Kernels are launched on the current device, which is one for each thread.
            with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
                self._draw(group, canvas, stopped)
        except InterlacedError:
            raise unsuitable(self._backend, "the video is interlaced") from None
        except FrameMismatchError:
            raise unsuitable(self._backend, "packets are damaged, or not where the container says") from None
        except GeometryChangedError:
            raise unsuitable(self._backend, "pictures change their size or turn") from None
        except BackendError:
            raise
        except (VideoError, MethodError, RuntimeError) as error:
            raise unsuitable(self._backend, str(error).strip().partition("\n")[0]) from error
        finally:
            self.reader.decoded += self._decoder.decoded - before

    def _draw(self, group: Group, canvas: Canvas, stopped: Callable[[], bool]) -> None:
        slots, proof = {*group.slots}, None
        if self._known is None:
            slots.add(group.key)
            proof = self._proof(group)
        assert self._known is not None
        layout, *size = self._known
        table, needed = self._table, replace(group, slots=tuple(sorted(slots)))
        slot_at = {int(table.pts[table.row(slot)]): slot for slot in slots}
        for pts, picture in self._decoder.decode(self.reader.packets(needed), slot_at):
            if stopped():
                return
            slot = slot_at[pts]
            if list(picture.y.shape) != size:
                raise GeometryChangedError
            if proof is not None and slot == group.key:
                self._compare(picture, proof)
            if slot in group.slots:
                canvas.draw_picture(slot, picture, layout, self._painter)

    def _proof(self, group: Group) -> np.ndarray:
        """Learn from PyAV what the first picture of a group is like, and return it: uint8 [3, H, W] as stored."""
        alone = group.opening()
        ((_, frame),) = self.reader.read(alone)
        if frame.interlaced_frame:
            raise InterlacedError
        if frame.format.name not in _FORMATS or frame.width % 2 or frame.height % 2:
            size = f"{frame.width} x {frame.height}"
            raise unsuitable(self._backend, f"pictures in {frame.format.name}, {size}, get other colours on the GPU")
        self._known = self._painter.layout(frame), frame.height, frame.width
        return np.stack(self._painter.planes(frame))

    def _compare(self, picture: Picture, proof: np.ndarray) -> None:
        own = torch.empty(1, *proof.shape, dtype=torch.uint8, device=picture.y.device)
        picture.draw(own, [0])
        if not np.array_equal(own[0].cpu().numpy(), proof):
            raise unsuitable(self._backend, "a keyframe is not the one that FFmpeg's software gives")

    def close(self) -> None:
        """Give the session back."""
        self._decoder.close()
