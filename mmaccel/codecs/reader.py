"""Exact sampled frames of video files, upright and in RGB: one video, one in parts, or many."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch

from mmaccel.codecs.backends import HARDWARE, BackendError
from mmaccel.codecs.backends.choice import Backend, Device, choose, places
from mmaccel.codecs.picture import Interpolation
from mmaccel.codecs.pool import Crew, thread_count
from mmaccel.codecs.reading import Options, Reading
from mmaccel.codecs.sampling import Facts, OnShort, Request, Size, target_size
from mmaccel.codecs.source import Source, VideoSource
from mmaccel.codecs.video import Part, Video, video_of
from mmaccel.errors import VideoError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from mmaccel.codecs.cache import FrameCache
    from mmaccel.codecs.groups import Group
    from mmaccel.codecs.pool import Ticket
    from mmaccel.codecs.reading import Outcome

__all__ = [
    "Backend",
    "Device",
    "Normalize",
    "iter_video",
    "load_chosen",
    "load_video",
    "load_videos",
]

Normalize = tuple["float | Sequence[float]", "float | Sequence[float]"]

# Sessions of decoding on a GPU, which has one to seven engines and keeps each busy with more than one session.
_USUAL_SESSIONS = 4


def load_video(
    src: VideoSource,
    frames: int | None = None,
    *,
    fps: float | None = None,
    indices: Iterable[int] | torch.Tensor | None = None,
    seconds: Iterable[float] | None = None,
    size: Size = None,
    interpolation: Interpolation = "BICUBIC",
    on_short: OnShort = "error",
    snap: Literal["keyframe"] | None = None,
    skip_nonref: bool = True,
    normalize: Normalize | None = None,
    device: Device = None,
    backend: Backend = "auto",
    threads: int | None = None,
    cache: FrameCache | None = None,
) -> Video:
    """Read exactly the wanted frames of a video, upright, in RGB, resized if asked.

    src is a path, a URL that FFmpeg opens, the encoded bytes, or a binary file object (read from its start, left open).

    Which frames: frames=N samples N frames evenly, the first and the last included; indices=[...] takes frame numbers
    in presentation order, negative ones from the end; seconds=[...] takes the frames that are shown at these times
    after the first frame, fps=r those at 0, 1/r, 2/r ... before the end. Order and duplicates are kept. With none of
    these, 32 frames or, of a shorter video, all. on_short says what frames=N does when there are fewer: "error", "all"
    (each once) or "repeat" (evenly, up to N). snap="keyframe" takes the keyframe nearest to each wanted frame instead:
    much faster, and approximate; `indices` and `pts` are then those of the keyframes.

    How: size is None, the shorter side, or (height, width), in pixels of the upright picture; pixels are taken as
    square. A side has at most 32768 pixels, a call at most a million frames, and the result must fit in the free
    memory. normalize=(mean, std), each a number or three, gives float32 (frames / 255 - mean) / std. device is where
    the frames come to lie; several GPUs share the decoding, and the frames lie on the first. threads is the number of
    decoding threads, at most 256, by default one a core and at most 16; of sessions on GPUs, by default four on each.

    backend is what decodes; all give the same frames, bit for bit, or raise BackendError, a VideoError that says why:
    "pyav", which reads everything; "decord" and "torchcodec", which must be installed, for H.264, HEVC, Motion JPEG and
    FFV1 of 8 bits in MP4, MOV and Matroska, with closed groups of pictures; "cuda" (FFmpeg on an NVIDIA GPU) and
    "pynvvideocodec" (NVIDIA's library) for 4:2:0 of 8 bits with even sides. "auto" is "cuda" for frames that are wanted
    on a GPU, as far as that goes, and else "pyav"; `work.note` says why not. One keyframe of every group (of every
    session on a GPU) is decoded by PyAV too and compared. Only PyAV tells of all damage: the others may show a damaged
    frame between keyframes as they decode it, without a warning.

    cache is a FrameCache, which decodes the same request for the same content once.

    Only groups of pictures that hold wanted frames are decoded, each from its keyframe to its last wanted frame by one
    thread, the longest first; frames that no other refers to are left out where they are not wanted (skip_nonref=False
    decodes them, to the same result). Where there are fewer groups than threads, FFmpeg's threads help inside of them.
    The frames are the same for any number of threads.

    Colours follow the stream's own matrix and range (BT.601 where it states none): libswscale's unscaled conversion to
    RGB, then each colour resized by libswscale. Rotated and mirrored recordings come upright (turns that are no
    multiple of 90 degrees go to the nearest one). Frames are told apart by presentation time, so variable frame rates,
    B-frames, open groups of pictures and edit lists are exact. A still image is a video of one frame, turned and
    mirrored as its EXIF data say. Pictures that change their size within a video all get that of the first wanted one.

    Damaged videos, clips that start inside a group of pictures among them: every frame keeps its number whatever is
    asked for, which is its place in presentation order among the file's packets (among the decoder's outputs where the
    packets do not tell: raw streams, joined transport streams, rarer codecs). What decodes is returned, a wanted frame
    that is lost shows the nearest earlier decodable one (the nearest later, if there is none), and a VideoWarning says
    how many are lost. A frame is lost if the decoder fails on it, gives nothing for it, or reports that it patched it
    up. Parts that no wanted frame needs are not decoded, so damage there goes unseen.

    Raises VideoError: wrong type, missing, a directory, empty, not a video, no video stream, nothing decodable, or a
    request that the video cannot satisfy.
    """
    if cache is not None:
        return cache.load(
            src, frames, fps=fps, indices=indices, seconds=seconds, size=size, interpolation=interpolation,
            on_short=on_short, snap=snap, skip_nonref=skip_nonref, normalize=normalize, device=device, backend=backend,
            threads=threads,
        )  # fmt: skip
    request = Request.of(frames, fps, indices, seconds, on_short)
    options = _options(size, interpolation, snap, skip_nonref, backend, device)
    finish = Finish.of(normalize, device, backend)
    return _load(Source(src), request, options, finish, _hands(threads, options))


def load_chosen(src: VideoSource, choose: Callable[[Facts], Iterable[int]]) -> Video:
    """Read the frames whose numbers `choose(facts)` gives, in one pass over the file; all else as in `load_video`.

    Of a damaged video, `choose` may be asked again with a better count.
    """
    return _load(Source(src), Request(choose=choose), Options(), Finish.of(None), thread_count(None))


def _load(source: Source, request: Request, options: Options, finish: Finish, threads: int) -> Video:
    with Crew["Outcome"](threads) as crew:
        outcome = _result(crew, Reading(source, request, options))
    return video_of(outcome, source.name, finish(outcome.canvas.frames), stacklevel=3)


def _result(crew: Crew[Outcome], reading: Reading, ticket: Ticket[Outcome] | None = None) -> Outcome:
    """Wait for a reading that the crew works on, or is to; PyAV reads the video anew where that is allowed."""
    try:
        return crew.result(crew.add(reading) if ticket is None else ticket)
    except BackendError as error:
        if not reading.options.spare:
            raise
        options = replace(reading.options, backend="pyav", devices=(), spare=False, note=str(error))
        return crew.result(crew.add(Reading(reading.source, reading.request, options)))
    except MemoryError as error:
        raise VideoError(
            f"{reading.source.name}: the memory does not hold its pictures while they are converted ({error}); use "
            "fewer threads, or see with `mmaccel probe` whether the file has the size that it claims"
        ) from error


def iter_video(
    src: VideoSource,
    frames: int | None = None,
    *,
    fps: float | None = None,
    indices: Iterable[int] | torch.Tensor | None = None,
    seconds: Iterable[float] | None = None,
    size: Size = None,
    interpolation: Interpolation = "BICUBIC",
    on_short: OnShort = "error",
    snap: Literal["keyframe"] | None = None,
    skip_nonref: bool = True,
    normalize: Normalize | None = None,
    device: Device = None,
    backend: Backend = "auto",
    threads: int | None = None,
) -> Iterator[Part]:
    """Give the rows of `load_video` in parts, in order, each as soon as it is decoded: encoding may start early.

    A part holds the frames of one group of pictures, or of several where rows were asked for in another order than that
    of time. Decoding goes on in the meantime; leaving the loop early ends it. Of a damaged video all that is left comes
    as one last part. Arguments and errors are those of `load_video`; a bad argument is an error of the call, a bad
    video one of the first part. The frames of all parts are held until the end.
    """
    request = Request.of(frames, fps, indices, seconds, on_short)
    options = _options(size, interpolation, snap, skip_nonref, backend, device)
    finish = Finish.of(normalize, device, backend)
    return _parts(Source(src), request, options, finish, _hands(threads, options))


def _parts(source: Source, request: Request, options: Options, finish: Finish, threads: int) -> Iterator[Part]:
    # A group that is drawn, or None: the outcome is there.
    news: SimpleQueue[Group | None] = SimpleQueue()
    reading = Reading(source, request, options, in_time=True, drawn=news.put)
    there: set[int] = set()
    row = 0
    with Crew["Outcome"](threads) as crew:
        ticket = crew.add(reading, lambda: news.put(None))
        while (group := news.get()) is not None:
            there.update(group.slots)
            numbers, start = reading.numbers, row
            while row < len(numbers) and int(numbers[row]) in there:
                row += 1
            if row > start:
                yield Part(
                    start=start,
                    frames=finish(reading.canvas.frames[start:row]),
                    pts=torch.from_numpy(reading.seconds[start:row]),
                    indices=torch.from_numpy(numbers[start:row]),
                )
        outcome = _result(crew, reading, ticket)
    video = video_of(outcome, source.name, outcome.canvas.frames, stacklevel=2)
    if row < len(video):
        yield Part(row, finish(video.frames[row:]), video.pts[row:], video.indices[row:])


def load_videos(
    sources: Iterable[VideoSource],
    frames: int | None = None,
    *,
    fps: float | None = None,
    seconds: Iterable[float] | None = None,
    indices: Iterable[int] | torch.Tensor | None = None,
    size: Size = None,
    interpolation: Interpolation = "BICUBIC",
    on_short: OnShort = "error",
    snap: Literal["keyframe"] | None = None,
    skip_nonref: bool = True,
    normalize: Normalize | None = None,
    device: Device = None,
    backend: Backend = "auto",
    threads: int | None = None,
    on_error: Literal["return", "raise"] = "return",
) -> list[Video | VideoError]:
    """Read the same frames of many videos with one set of threads; the results are in the order of the sources.

    Each thread reads a video of its own, and at the end idle ones help with those that are left. At most `threads`
    videos are open at once. A video that cannot be read has its VideoError in its place and does not disturb the
    others; on_error="raise" raises the first one. Other arguments are those of `load_video`, and so are the frames.
    """
    if on_error not in ("return", "raise"):
        raise VideoError(f'on_error must be "return" or "raise", not {on_error!r}')
    if isinstance(sources, (str, bytes, os.PathLike)) or hasattr(sources, "read"):
        raise VideoError("load_videos takes a list of videos; for one video use load_video")
    request = Request.of(frames, fps, indices, seconds, on_short)
    options = _options(size, interpolation, snap, skip_nonref, backend, device)
    finish = Finish.of(normalize, device, backend)
    videos: list[Video | VideoError] = []
    with Crew["Outcome"](_hands(threads, options)) as crew:
        entries = deque(_entry(crew, src, request, options) for src in sources)
        while entries:
            entry = entries.popleft()
            try:
                if isinstance(entry, VideoError):
                    raise entry
                reading, ticket = entry
                outcome = _result(crew, reading, ticket)
                videos.append(video_of(outcome, reading.source.name, finish(outcome.canvas.frames), stacklevel=2))
            except VideoError as error:
                if on_error == "raise":
                    raise
                videos.append(error)
    return videos


def _entry(
    crew: Crew[Outcome], src: VideoSource, request: Request, options: Options
) -> tuple[Reading, Ticket[Outcome]] | VideoError:
    try:
        reading = Reading(Source(src), request, options)
    except VideoError as error:
        return error
    return reading, crew.add(reading)


def _options(
    size: Size, interpolation: Interpolation, snap: str | None, skip_nonref: bool, backend: Backend, device: Device
) -> Options:
    if interpolation not in get_args(Interpolation):
        raise VideoError(f"interpolation must be one of {', '.join(get_args(Interpolation))}, not {interpolation!r}")
    if snap not in (None, "keyframe"):
        raise VideoError(f'snap must be None or "keyframe", not {snap!r}')
    target_size(1, 1, size)
    chosen, devices, note = choose(backend, device)
    spare = backend == "auto" and chosen != "pyav"
    return Options(size, interpolation, bool(skip_nonref), snap is not None, chosen, devices, spare, note)


def _hands(threads: int | None, options: Options) -> int:
    """Check `threads`; by default one a core, or some sessions a GPU."""
    if threads is None and options.backend in HARDWARE:
        threads = _USUAL_SESSIONS * len(options.devices)
    return thread_count(threads)


@dataclass(frozen=True)
class Finish:
    """What is done to the frames after decoding: normalised, and moved to a device."""

    mean: torch.Tensor | None
    std: torch.Tensor | None
    device: torch.device

    @classmethod
    def of(cls, normalize: Normalize | None, device: Device = None, backend: Backend = "auto") -> Finish:
        """Check the arguments."""
        place = places(device, backend)[0]
        try:
            torch.empty(0, device=place)
        except (RuntimeError, AssertionError, TypeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise VideoError(f"frames cannot be put on device {device!r} ({reason})") from error
        if normalize is None:
            return cls(None, None, place)
        try:
            mean, std = (torch.tensor(np.broadcast_to(value, 3).copy(), dtype=torch.float32) for value in normalize)
        except (TypeError, ValueError):
            raise VideoError(f"normalize must be (mean, std), each a number or three, not {normalize!r}") from None
        if not (std > 0).all() or not mean.isfinite().all():
            raise VideoError(f"normalize needs a finite mean and a std above 0, not {normalize!r}")
        return cls(mean.view(3, 1, 1), std.view(3, 1, 1), place)

    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames uint8 [N, 3, H, W] as they are wanted."""
        frames = frames.to(self.device)
        if self.mean is None or self.std is None:
            return frames
        scaled = frames.to(torch.float32).div_(255)
        return scaled.sub_(self.mean.to(self.device)).div_(self.std.to(self.device))
