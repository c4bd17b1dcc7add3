"""Readers of sampled frames, each used as a user would who wants the right frames, fast: nothing is approximate.

A reader takes (path, frame numbers in rising order, (height,
width) or None for the video's own size, threads, 0 for the reader's own choice) and gives the frames, uint8 RGB
[N, H, W, 3] or [N, 3, H, W], in whatever array it has, and how many frames it decoded for them, None where it does not
tell. Libraries are imported by the reader that needs them: the interpreter may lack the others.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["READERS"]

Size = tuple[int, int] | None
# With B-frames as references H.264 holds back two pictures.
_REORDER = 2


def read_mmaccel(path: str, wanted: Sequence[int], size: Size, threads: int) -> tuple[Any, int | None]:
    """`load_video` as it stands."""
    from mmaccel.codecs import load_video

    video = load_video(path, indices=wanted, size=size, threads=threads or None)
    return video.frames, video.decoded


def read_pyav(path: str, wanted: Sequence[int], size: Size, threads: int) -> tuple[Any, int | None]:
    """PyAV by hand, for a constant frame rate: seek by presentation time, but only over more than a seek costs."""
    import av

    with av.open(path) as container:
        stream: Any = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "AUTO", threads
        keys = [number for number, entry in enumerate(stream.index_entries) if entry.is_keyframe]
        start, step = stream.start_time or 0, 1 / (stream.average_rate * stream.time_base)
        pays = _REORDER + (threads or os.cpu_count() or 1) - 1
        out, decoded, last = _Pictures(wanted, size), 0, -1
        frames = container.decode(stream)
        for target in wanted:
            key = keys[bisect_right(keys, target) - 1]
            if key - last > pays:
                container.seek(start + round(target * step), stream=stream)
                frames = container.decode(stream)
            for frame in frames:
                decoded += 1
                last = round(((frame.pts or 0) - start) / step)
                if last >= target:
                    out.add(frame)
                    break
        return out.pictures, decoded


def read_pyav_sequential(path: str, wanted: Sequence[int], size: Size, threads: int) -> tuple[Any, int | None]:
    """PyAV from the first frame to the last wanted one."""
    import av

    with av.open(path) as container:
        stream: Any = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "AUTO", threads
        out, chosen = _Pictures(wanted, size), set(wanted)
        for number, frame in enumerate(container.decode(stream)):
            if number in chosen:
                out.add(frame)
            if number == wanted[-1]:
                break
        return out.pictures, wanted[-1] + 1


class _Pictures:
    """PyAV's frames as one array, converted and resized in one pass."""

    def __init__(self, wanted: Sequence[int], size: Size) -> None:
        self.pictures, self._count, self._size, self._place = np.empty(0), len(wanted), size, 0

    def add(self, frame: Any) -> None:
        height, width = self._size or (frame.height, frame.width)
        if not self._place:
            self.pictures = np.empty((self._count, height, width, 3), dtype=np.uint8)
        resized = frame.reformat(width, height, "rgb24", interpolation="BICUBIC")
        self.pictures[self._place] = resized.to_ndarray()
        self._place += 1


def read_decord(path: str, wanted: Sequence[int], size: Size, threads: int) -> tuple[Any, int | None]:
    """decord, which resizes while it decodes."""
    import decord

    height, width = size or (-1, -1)
    reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=threads, width=width, height=height)
    return reader.get_batch(wanted).asnumpy(), None


def read_opencv(path: str, wanted: Sequence[int], size: Size, threads: int) -> tuple[Any, int | None]:
    """OpenCV: grab every frame, retrieve the wanted ones; setting the position is not exact."""
    import cv2  # pyright: ignore[reportMissingImports]

    options = [cv2.CAP_PROP_N_THREADS, threads] if threads else []
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, options)
    pictures, chosen = [], set(wanted)
    for number in range(wanted[-1] + 1):
        if not capture.grab():
            break
        if number in chosen:
            _, picture = capture.retrieve()
            if size is not None:
                picture = cv2.resize(picture, (size[1], size[0]))
            pictures.append(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))
    capture.release()
    return np.stack(pictures), wanted[-1] + 1


def read_torchcodec(path: str, wanted: Sequence[int], size: Size, threads: int) -> tuple[Any, int | None]:
    """torchcodec in its exact mode, which resizes while it decodes."""
    from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportMissingImports]
    from torchcodec.transforms import Resize  # pyright: ignore[reportMissingImports]

    resize = [] if size is None else [Resize(size)]
    decoder = VideoDecoder(path, num_ffmpeg_threads=threads, seek_mode="exact", transforms=resize)
    return decoder.get_frames_at(list(wanted)).data, None


def read_pynvvideocodec(path: str, wanted: Sequence[int], size: Size, threads: int) -> tuple[Any, int | None]:  # noqa: ARG001
    """PyNvVideoCodec on the first GPU, resized there by torch; the frames stay on the GPU."""
    import PyNvVideoCodec  # pyright: ignore[reportMissingImports]
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("there is no GPU")
    decoder = PyNvVideoCodec.SimpleDecoder(
        path, gpu_id=0, use_device_memory=True, output_color_type=PyNvVideoCodec.OutputColorType.RGBP
    )
    pictures = []
    for picture in decoder.get_batch_frames_by_index(list(wanted)):
        tensor = torch.from_dlpack(picture)
        if size is not None:
            resized = torch.nn.functional.interpolate(tensor[None].float(), size, mode="bicubic", antialias=True)
            tensor = resized.round().clamp(0, 255).to(torch.uint8)[0]
        pictures.append(tensor)
    frames = torch.stack(pictures)
    torch.cuda.synchronize()
    return frames, None


READERS: dict[str, tuple[str, str, Callable[..., tuple[Any, int | None]]]] = {
    # what is imported, the distribution that says the version, the reader
    "mmaccel": ("mmaccel.codecs.reader", "mmaccel", read_mmaccel),
    "pyav": ("av", "av", read_pyav),
    "pyav-sequential": ("av", "av", read_pyav_sequential),
    "decord": ("decord", "decord", read_decord),
    "opencv": ("cv2", "opencv-python-headless", read_opencv),
    "torchcodec": ("torchcodec.decoders", "torchcodec", read_torchcodec),
    "pynvvideocodec": ("PyNvVideoCodec", "PyNvVideoCodec", read_pynvvideocodec),
    "limit": ("mmaccel.measure.codec_limit", "av", lambda *_: (None, None)),
}
