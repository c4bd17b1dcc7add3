"""Rendered clips whose frame number is drawn into the pixels, and a plain sequential decoder to compare with."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING

import av
import numpy as np

from mmaccel.codecs.priority import kept_priority

if TYPE_CHECKING:
    from pathlib import Path

os.environ.setdefault("SVT_LOG", "0")

BITS, BLOCK = 8, 16
HEIGHT, WIDTH = 4 * BLOCK, BITS * BLOCK


def picture(number: int) -> np.ndarray:
    """[64, 128, 3]: the bits of the number as black and white blocks in the top row, a moving texture below."""
    bits = [(number >> bit) & 1 for bit in range(BITS)]
    top = np.repeat(np.array(bits, dtype=np.uint8) * 255, BLOCK)
    image = np.empty((HEIGHT, WIDTH, 3), dtype=np.uint8)
    image[:BLOCK] = top[None, :, None]
    y, x = np.mgrid[: HEIGHT - BLOCK, :WIDTH]
    for channel, speed in enumerate((1, 2, 3)):
        image[BLOCK:, :, channel] = 128 + 100 * np.sin((x + speed * number) / 9 + channel) * np.cos(y / 7)
    return image


def number_in(image: np.ndarray) -> int:
    """Read the number back from an upright image [H, W, 3] of any size."""
    height, width = image.shape[:2]
    row = int(height * 0.5 * BLOCK / HEIGHT)
    columns = [int(width * (bit + 0.5) / BITS) for bit in range(BITS)]
    return sum(1 << bit for bit, column in enumerate(columns) if image[row, column].mean() > 127)


@dataclass(frozen=True)
class Recipe:
    """How a clip is encoded. `times`: presentation times in milliseconds, None for `rate` frames a second."""

    name: str
    codec: str = "libx264"
    count: int = 60
    pix_fmt: str = "yuv420p"
    options: dict[str, str] = field(default_factory=dict)
    container: dict[str, str] = field(default_factory=dict)
    times: tuple[int, ...] | None = None
    rate: int = 8


def encode(recipe: Recipe, folder: Path) -> Path:
    path = folder / recipe.name
    with kept_priority(), av.open(str(path), "w", container_options=recipe.container) as container:
        stream = container.add_stream(recipe.codec, rate=recipe.rate, options=recipe.options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, recipe.pix_fmt
        if recipe.times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(recipe.count):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24").reformat(format=recipe.pix_fmt)
            frame.time_base = Fraction(1, recipe.rate) if recipe.times is None else Fraction(1, 1000)
            frame.pts = number if recipe.times is None else recipe.times[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def coloured(path: Path, space: int, range_: int, options: dict[str, str] | None = None, height: int = 50) -> Path:
    """Noise, so that every pixel depends on matrix and range."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options=options or {})
        stream.width, stream.height, stream.pix_fmt = 102, height, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = space, range_
        for number in range(3):
            noise = np.random.default_rng(number).integers(0, 256, (height * 3 // 2, 102), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(noise, format="yuv420p")
            frame.colorspace, frame.color_range, frame.pts = space, range_, number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def turned(path: Path, target: Path, matrix: tuple[int, ...]) -> Path:
    """Write an MP4 file anew with a display matrix: (a, b, c, d) of x' = a x + c y, y' = b x + d y."""
    a, b, c, d = matrix
    data = bytearray(path.read_bytes())
    shift = (WIDTH * (a < 0) + HEIGHT * (c < 0), WIDTH * (b < 0) + HEIGHT * (d < 0))
    numbers = [n << 16 for n in (a, b, 0, c, d, 0, *shift)]
    # tkhd, version 0: the matrix (a b u c d v x y w) starts 40 bytes into the payload.
    struct.pack_into(">9i", data, data.index(b"tkhd") + 44, *numbers, 1 << 30)
    target.write_bytes(data)
    return target


def sequential(path: Path, size: tuple[int, int] | None = None) -> list[np.ndarray]:
    """All frames in the order in which PyAV decodes them, as [H, W, 3]; `size` is (height, width)."""
    with av.open(str(path)) as container:
        frames = container.decode(video=0)
        if size is None:
            return [frame.to_ndarray(format="rgb24") for frame in frames]
        return [resized(frame.to_ndarray(format="rgb24"), *size) for frame in frames]


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Each colour of an image [H, W, 3] resized by libswscale as a picture in grey."""
    planes = [av.VideoFrame.from_ndarray(np.ascontiguousarray(image[..., c]), format="gray") for c in range(3)]
    small = [plane.reformat(width, height, "gray", interpolation="BICUBIC").to_ndarray() for plane in planes]
    return np.stack(small, axis=-1)


B_FRAMES = {"bf": "3", "g": "12"}
QUIET = "log-level=none"
JITTER = tuple(int(t) for t in np.cumsum(np.random.default_rng(3).integers(20, 400, 60)))

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("b-frames.mp4", options=B_FRAMES, container={"movflags": "faststart"}),
        Recipe("open-gop.mp4", options={**B_FRAMES, "x264-params": "open-gop=1:b-pyramid=2"}),
        Recipe("one-gop.mp4", options={"bf": "2", "g": "250"}),
        Recipe("intra.mp4", options={"g": "1"}),
        Recipe("fragments.mp4", options=B_FRAMES, container={"movflags": "frag_keyframe+empty_moov"}),
        Recipe("b-frames.mkv", options=B_FRAMES),
        Recipe("b-frames.ts", options=B_FRAMES),
        Recipe("no-times.h264", options=B_FRAMES),
        Recipe("jitter.mkv", options=B_FRAMES, times=JITTER),
        Recipe("jitter.mp4", options=B_FRAMES, times=JITTER),
        Recipe("hevc.mp4", codec="libx265", options={"x265-params": f"keyint=12:bframes=3:open-gop=0:{QUIET}"}),
        Recipe("hevc-open.mkv", codec="libx265", options={"x265-params": f"keyint=12:bframes=3:open-gop=1:{QUIET}"}),
        Recipe("vp9.webm", codec="libvpx-vp9", options={"g": "15", "deadline": "realtime", "cpu-used": "8"}),
        Recipe("vp8.webm", codec="libvpx", options={"g": "15", "deadline": "realtime", "cpu-used": "8"}),
        Recipe("av1.mkv", codec="libsvtav1", options={"g": "16", "preset": "12", "svtav1-params": "lp=1"}),
        Recipe("mpeg4.avi", codec="mpeg4", options={**B_FRAMES, "q": "2"}),
        Recipe("mpeg4.mp4", codec="mpeg4", options={**B_FRAMES, "q": "2"}),
        Recipe("mpeg2.mpg", codec="mpeg2video", options={**B_FRAMES, "q": "2"}, rate=25),
        Recipe("mjpeg.avi", codec="mjpeg", pix_fmt="yuvj420p", options={"q": "2"}),
        Recipe("lossless.mkv", codec="ffv1"),
        Recipe("animation.gif", codec="gif", pix_fmt="rgb8"),
    )
}
