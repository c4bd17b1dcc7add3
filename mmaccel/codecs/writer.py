"""Writes frames as a real video file, for the demo, the benchmarks and the tests."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, cast

import av
import numpy as np
import torch
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter

from mmaccel.codecs.priority import kept_priority
from mmaccel.errors import VideoError

if TYPE_CHECKING:
    import os

    from av.container import OutputContainer
    from av.video.stream import VideoStream

__all__ = ["write_video"]

# AVCOL_SPC_BT709 and AVCOL_SPC_SMPTE170M; PyAV's enum holds libswscale's numbers, the stream wants FFmpeg's.
_BT709, _BT601 = 1, 6


def write_video(
    path: str | os.PathLike[str],
    frames: np.ndarray | torch.Tensor,
    fps: float = 8.0,
    codec: str = "libx264",
    crf: int | None = 18,
    gop: int | None = None,
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
) -> Path:
    """Encode RGB frames into a video file and return its path; the suffix of the path chooses the container.

    frames: uint8, an array [T, H, W, 3] or a tensor [T, 3, H, W], T at least 1. fps: frames a second. codec: an encoder
    of FFmpeg. crf: constant quality, lower is better, None for codecs without it. gop: largest distance of two
    keyframes in frames, None for the encoder's choice. options: further options of the encoder.

    Formats with halved chroma (yuv420p) hold even sides only: an odd last row or column is repeated once, so that the
    video is one pixel larger. Colours are BT.709 from 720 rows on, BT.601 below, and tagged so.

    Raises VideoError for frames of another kind, an unknown codec or container, or a path that cannot be written; no
    partial file stays behind.
    """
    pictures = _pictures(frames)
    if not fps > 0:
        raise VideoError(f"fps must be above 0, got {fps}")
    path = Path(path)
    settings = dict(options or {})
    if crf is not None:
        settings.setdefault("crf", str(crf))
    if gop is not None:
        settings.setdefault("g", str(gop))
    rate = Fraction(fps).limit_denominator(100_000)
    part = path.with_name(f"{path.stem}.part{path.suffix}")
    try:
        kind = av.Codec(codec, "w").type
        if kind != "video":
            raise VideoError(f"{codec} encodes {kind}, not video")
        # With its index in front, a file that is cut off later can still be read up to the cut.
        layout = {"movflags": "+faststart"} if path.suffix.lower() in (".mp4", ".mov", ".m4v") else {}
        with kept_priority(), av.open(str(part), "w", container_options=layout) as container:
            stream = cast("VideoStream", container.add_stream(codec, rate=rate, options=settings))
            _encode(container, stream, pictures, pix_fmt)
        part.replace(path)
    except (FFmpegError, OSError, ValueError) as error:
        if isinstance(error, VideoError):
            raise
        raise VideoError(f"{path} cannot be written as {codec} video ({error})") from error
    finally:
        part.unlink(missing_ok=True)
    return path


def _pictures(frames: np.ndarray | torch.Tensor) -> np.ndarray:
    """Check the frames and bring them to [T, H, W, 3]."""
    if isinstance(frames, torch.Tensor):
        wanted, usable = "a tensor [T, 3, H, W]", frames.dtype == torch.uint8 and frames.ndim == 4
        array = frames.detach().cpu().permute(0, 2, 3, 1).numpy() if usable else None
    else:
        wanted, usable = "an array [T, H, W, 3]", frames.dtype == np.uint8 and frames.ndim == 4
        array = frames if usable else None
    if array is None or array.shape[-1] != 3 or not array.size:
        raise VideoError(
            f"frames must be {wanted} of uint8 with at least one frame, not {frames.dtype} {tuple(frames.shape)}"
        )
    return array


def _encode(container: OutputContainer, stream: VideoStream, pictures: np.ndarray, pix_fmt: str) -> None:
    layout = av.VideoFormat(pix_fmt)
    _, height, width, _ = pictures.shape
    below = height % 2 if layout.chroma_height(2) == 1 else 0
    right = width % 2 if layout.chroma_width(2) == 1 else 0
    stream.height, stream.width, stream.pix_fmt = height + below, width + right, pix_fmt
    colours: dict[str, int] = {}
    if not layout.is_rgb:
        hd = height >= 720
        full = pix_fmt.startswith("yuvj")
        colours = {
            "dst_colorspace": Colorspace.ITU709 if hd else Colorspace.ITU601,
            "dst_color_range": ColorRange.JPEG if full else ColorRange.MPEG,
        }
        context = stream.codec_context
        context.colorspace, context.color_range = _BT709 if hd else _BT601, colours["dst_color_range"]
        context.color_primaries = ColorPrimaries.BT709 if hd else ColorPrimaries.SMPTE170M
        context.color_trc = ColorTrc.BT709 if hd else ColorTrc.SMPTE170M
    scaler = VideoReformatter()
    for number, picture in enumerate(pictures):
        padded = np.pad(picture, ((0, below), (0, right), (0, 0)), mode="edge")
        frame = scaler.reformat(VideoFrame.from_ndarray(padded, format="rgb24"), format=pix_fmt, threads=1, **colours)
        frame.pts = number
        frame.time_base = 1 / Fraction(stream.codec_context.framerate)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
