"""From a decoded frame to an upright RGB picture of the wanted size: one way of converting, whatever has decoded it."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from av.sidedata.sidedata import SideDataContainer
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from mmaccel.codecs.sampling import Size, target_size

__all__ = ["Interpolation", "Layout", "Painter", "layout_of", "resized", "side_data"]

Interpolation = Literal["BICUBIC", "BILINEAR", "AREA", "LANCZOS", "POINT"]

# Layouts that libswscale turns into planar RGB and into packed RGB by the same arithmetic, as long as both sides are
# even; planar is faster, and it is what is wanted. Other layouts differ by rounding or in their chroma.
_PLANAR = frozenset({"yuv420p", "yuvj420p", "yuva420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p"})
# EXIF orientation: whether to transpose, to mirror, to turn upside down after that; clockwise degrees without a mirror.
_EXIF = {
    1: (False, False, False, 0), 2: (False, True, False, 0), 3: (False, True, True, 180), 4: (False, False, True, 180),
    5: (True, False, False, 270), 6: (True, True, False, 90), 7: (True, True, True, 90), 8: (True, False, True, 270),
}  # fmt: skip


class Layout(NamedTuple):
    """How a stored picture comes upright: transposed or not, then axes of [C, H, W] to flip; clockwise degrees."""

    transpose: bool
    flips: tuple[int, ...]
    rotation: int


class Painter:
    """Converts and resizes frames, one after another, for one thread.

    Native pictures are what libswscale's unscaled conversion to RGB gives, by the stream's own matrix and range.
    Resized ones are made from these, each colour plane by libswscale as a picture in grey: so they are the same whether
    a decoder delivers YUV or RGB. `exif` is the orientation of a still image.
    """

    def __init__(self, size: Size = None, interpolation: Interpolation = "BICUBIC", exif: int | None = None) -> None:
        self._size, self._exif = size, exif
        self._interpolation: Interpolation = interpolation
        self._convert = VideoReformatter()
        # One for each plane would do the same: the context is kept from one plane to the next.
        self._scale = VideoReformatter()

    def layout(self, frame: VideoFrame) -> Layout:
        """Say how the frame comes upright."""
        return layout_of(frame, self._exif)

    def shape(self, height: int, width: int, layout: Layout) -> tuple[tuple[int, int], tuple[int, int]]:
        """Height and width of the upright picture of a stored one: native, and as wanted."""
        native = (width, height) if layout.transpose else (height, width)
        return native, target_size(*native, self._size)

    def picture(self, frame: VideoFrame) -> torch.Tensor:
        """The upright picture of a frame, uint8 [3, H, W]."""
        layout = self.layout(frame)
        target = torch.empty(3, *self.shape(frame.height, frame.width, layout)[1], dtype=torch.uint8)
        self.paint(frame, layout, target)
        return target

    def paint(self, frame: VideoFrame, layout: Layout, target: torch.Tensor) -> None:
        """Fill `target`, uint8 [3, H, W], with the upright picture."""
        self.finish(self.planes(frame), layout, target)

    def finish(self, planes: list[np.ndarray], layout: Layout, target: torch.Tensor) -> None:
        """Fill `target`, uint8 [3, H, W], with a stored RGB picture (planes [h, w] of uint8), resized and turned."""
        rows, columns = target.shape[1:]
        stored = (columns, rows) if layout.transpose else (rows, columns)
        upright = layout.transpose or layout.flips
        picture = torch.empty(3, *stored, dtype=torch.uint8) if upright else target
        for row, plane in zip(picture.numpy(), planes, strict=True):
            np.copyto(row, resized(plane, stored, self._interpolation, self._scale))
        if upright:
            turned = picture.transpose(1, 2) if layout.transpose else picture
            target.copy_(turned.flip(layout.flips))

    def planes(self, frame: VideoFrame) -> list[np.ndarray]:
        """The stored picture in RGB, native size."""
        even = frame.width % 2 == frame.height % 2 == 0
        # FFmpeg 8.1 leaves the last columns of other widths unwritten.
        if frame.format.name in _PLANAR and even and not 0 < frame.width % 16 <= 8:
            green, blue, red = _views(self._convert.reformat(frame, format="gbrp", threads=1))
            return [red, green, blue]
        packed = self._convert.reformat(frame, format="rgb24", threads=1).to_ndarray()
        return list(np.ascontiguousarray(packed.transpose(2, 0, 1)))


def side_data(frame: VideoFrame) -> SideDataContainer:
    """What came with a frame; `frame.side_data` would tie the two to each other, until the garbage is collected."""
    return SideDataContainer(frame)  # type: ignore[call-arg]


def resized(
    plane: np.ndarray, shape: tuple[int, int], interpolation: Interpolation, scaler: VideoReformatter
) -> np.ndarray:
    """Resize one plane [H, W] of uint8 by libswscale; the result is a view that holds as long as it is referred to."""
    if plane.shape == shape:
        return plane
    gray = VideoFrame.from_numpy_buffer(plane, "gray")
    height, width = shape
    return _views(scaler.reformat(gray, width, height, "gray", interpolation=interpolation, threads=1))[0]


def _views(frame: VideoFrame) -> list[np.ndarray]:
    return [
        np.frombuffer(memoryview(plane), dtype=np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]
        for plane in frame.planes
    ]


def layout_of(frame: VideoFrame, exif: int | None = None) -> Layout:
    """Say how a frame comes upright; `exif` is the orientation of a still image."""
    if exif is not None:
        transpose, right, down, rotation = _EXIF[exif]
        return Layout(transpose, tuple(axis for axis, flip in ((2, right), (1, down)) if flip), rotation)
    rotation = -90 * round(frame.rotation / 90) % 360
    try:
        matrix = side_data(frame).get("DISPLAYMATRIX")
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
    return Layout(transpose, tuple(axis for axis, flip in ((2, right), (1, down)) if flip), rotation)
