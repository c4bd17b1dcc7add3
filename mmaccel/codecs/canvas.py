"""Where decoded pictures go: one tensor with a row for each wanted frame, filled by several threads."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch

from mmaccel.codecs.sampling import allocate

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from av.video.frame import VideoFrame

    from mmaccel.codecs.backends.picture import Picture
    from mmaccel.codecs.picture import Layout, Painter

__all__ = ["Canvas", "GeometryChangedError"]


class GeometryChangedError(Exception):
    """A picture has another size or turn than those before."""


class Canvas:
    """The wanted frames as one tensor; each is drawn once, and shown in every row that wants it.

    `numbers` int64 [N] names the frame for each row of the result; `steady` refuses pictures that are stored in another
    size, or turned otherwise, than the first, which may be any one where several threads draw. After the first picture:
    `frames` uint8 [N, 3, H, W] on `device`, and `height`, `width` (before resizing) and `rotation` of that picture.
    """

    def __init__(self, numbers: np.ndarray, steady: bool = True, device: torch.device | None = None) -> None:
        self._rows: dict[int, list[int]] = {}
        for row, number in enumerate(numbers.tolist()):
            self._rows.setdefault(number, []).append(row)
        self._count, self._steady, self._lock = len(numbers), steady, threading.Lock()
        self.device = device or torch.device("cpu")
        self.targets = sorted(self._rows)
        self.frames = torch.empty(0)
        self.height = self.width = self.rotation = 0

    def draw(self, number: int, frame: VideoFrame, painter: Painter) -> None:
        """Put a decoded frame into every row that wants it.

        Raises GeometryChangedError, and VideoError if the rows are more than memory can hold.
        """
        layout = painter.layout(frame)
        self._prepare(frame.height, frame.width, layout, painter)
        self._show(number, lambda target: painter.paint(frame, layout, target))

    def draw_planes(self, number: int, planes: list[np.ndarray], layout: Layout, painter: Painter) -> None:
        """Put a stored RGB picture, three planes [h, w] of uint8, into every row that wants it; errors as in `draw`."""
        height, width = planes[0].shape
        self._prepare(height, width, layout, painter)
        self._show(number, lambda target: painter.finish(planes, layout, target))

    def draw_picture(self, number: int, picture: Picture, layout: Layout, painter: Painter) -> None:
        """Put a hardware decoder's picture into every row that wants it, which may be on another GPU; errors as above.

        It is there when the device's current stream has got so far.
        """
        height, width = picture.y.shape
        self._prepare(height, width, layout, painter)
        rows, here = self._rows[number], picture.y.device
        if here == self.frames.device:
            painter.draw(picture, layout, self.frames, rows)
            return
        own = torch.empty(1, *self.frames.shape[1:], dtype=torch.uint8, device=here)
        painter.draw(picture, layout, own, [0])
        for row in rows:
            self.frames[row].copy_(own[0])

    def _prepare(self, height: int, width: int, layout: Layout, painter: Painter) -> None:
        native, wanted = painter.shape(height, width, layout)
        with self._lock:
            if not self.height:
                self.frames = allocate(self._count, *wanted, self.device)
                (self.height, self.width), self.rotation = native, layout.rotation
        if self._steady and (*native, layout.rotation) != (self.height, self.width, self.rotation):
            raise GeometryChangedError

    def _show(self, number: int, paint: Callable[[torch.Tensor], None]) -> None:
        first, *others = self._rows[number]
        paint(self.frames[first])
        for row in others:
            self.frames[row] = self.frames[first]
