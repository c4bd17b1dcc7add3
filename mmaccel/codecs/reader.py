"""Exact sampled frames of a video file, upright and in RGB, through PyAV."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch

from mmaccel.codecs.decode import Canvas, FrameMismatchError, decode_in_order, decode_slots, survey
from mmaccel.codecs.packets import PacketTable, Source, VideoSource, scan
from mmaccel.codecs.sampling import OnShort, Size, as_numbers, frame_indices, target_size, whole_number
from mmaccel.errors import VideoError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Interpolation", "Video", "VideoWarning", "load_video"]

Interpolation = Literal["BICUBIC", "BILINEAR", "AREA", "LANCZOS", "POINT"]

_MOST_THREADS = 256


class VideoWarning(UserWarning):
    """A video was read, but part of it was damaged or missing."""


@dataclass(frozen=True, eq=False)
class Video:
    """Sampled frames of one video, and where they come from.

    frames: uint8 [N, C, H, W], RGB, contiguous, upright. pts: float64 [N], seconds after the video's first frame.
    indices: int64 [N], the frame numbers asked for, in presentation order from 0. total: how many frames the video has.
    fps: mean frames a second. duration: seconds, the last frame's display time included. rotation: clockwise degrees
    (0, 90, 180, 270) by which the stored pictures were turned to come upright. height, width: pixels of the upright
    video before `size`. lost: how many frames are known to be damaged or cut off. replaced: those of `indices` that are
    lost and show their nearest decodable neighbour instead. decoded: how many frames had to be decoded.
    """

    frames: torch.Tensor = field(repr=False)
    pts: torch.Tensor = field(repr=False)
    indices: torch.Tensor
    total: int
    fps: float
    duration: float
    rotation: int
    height: int
    width: int
    lost: int
    replaced: tuple[int, ...]
    decoded: int

    def __len__(self) -> int:
        return len(self.frames)

    def numpy(self) -> np.ndarray:
        """Give the frames as uint8 [N, H, W, C]: a view, for what wants channels last."""
        return self.frames.permute(0, 2, 3, 1).numpy()

    @property
    def metadata(self) -> dict[str, object]:
        """The same facts in the fields of transformers' VideoMetadata.

        Use: `processor(videos=[v.frames], video_metadata=[v.metadata], do_sample_frames=False, ...)`; without the last
        argument some processors sample a second time.
        """
        return {
            "total_num_frames": self.total,
            "fps": self.fps,
            "width": self.width,
            "height": self.height,
            "duration": self.duration,
            "video_backend": "pyav",
            "frames_indices": self.indices.tolist(),
        }


def load_video(
    src: VideoSource,
    frames: int | None = None,
    *,
    indices: Iterable[int] | None = None,
    size: Size = None,
    interpolation: Interpolation = "BICUBIC",
    on_short: OnShort = "error",
    threads: int | None = None,
) -> Video:
    """Read exactly the wanted frames of a video, upright, in RGB, resized if asked.

    src is a path, a URL that FFmpeg opens, the encoded bytes, or a binary file object (read from its start, left open).
    frames=N samples N frames evenly, the first and the last included; indices=[...] takes frame numbers in presentation
    order, order and duplicates kept, negative ones from the end; with neither, 32 frames or, of a shorter video, all.
    on_short says what frames=N does when there are fewer: "error", "all" (each once) or "repeat" (evenly, up to N).
    size is None, the shorter side, or (height, width), in pixels of the upright picture; pixels are taken as square.
    A side has at most 32768 pixels, a call at most a million frames, and the result must fit in the free memory.
    threads is the number of decoding threads, at most 256, by default one a core and at most 8.

    Colours follow the stream's own matrix and range (BT.601 where it states none); conversion and resizing are one
    libswscale pass. Rotated and mirrored recordings come upright (turns that are no multiple of 90 degrees go to the
    nearest one). Frames are told apart by presentation time, so variable frame rates, B-frames and edit lists are
    exact; decoding starts at the keyframe before a wanted frame where that saves work, and ends at the last wanted one.
    A still image is a video of one frame, turned and mirrored as its EXIF data say.

    Damaged videos, clips that start inside a group of pictures among them: every frame keeps its number whatever is
    asked for, which is its place in presentation order among the file's packets (among the decoder's outputs where the
    packets do not tell: raw streams, joined transport streams, rarer codecs). What decodes is returned, a wanted frame
    that is lost shows the nearest earlier decodable one (the nearest later, if there is none), and a VideoWarning says
    how many are lost. A frame is lost if the decoder fails on it, gives nothing for it, or reports that it patched it
    up. Parts that no wanted frame needs are not decoded, so damage there goes unseen.

    Raises VideoError: wrong type, missing, a directory, empty, not a video, no video stream, nothing decodable, or a
    request that the video cannot satisfy.
    """
    if frames is not None and indices is not None:
        raise VideoError("give frames or indices, not both")
    if frames is None and indices is None:
        frames, on_short = 32, "all"
    if interpolation not in get_args(Interpolation):
        raise VideoError(f"interpolation must be one of {', '.join(get_args(Interpolation))}, not {interpolation!r}")
    asked = None if indices is None else as_numbers(indices)
    target_size(1, 1, size)
    workers = min(os.cpu_count() or 1, 8) if threads is None else whole_number(threads, "threads")
    if not 1 <= workers <= _MOST_THREADS:
        raise VideoError(f"threads must be at least 1 and at most {_MOST_THREADS}")
    source = Source(src)
    table = scan(source)

    # Where times are guessed, the picture behind a jump may be another than its time says.
    ways = () if not table.exact else (False,) if table.guessed else (True, False)
    for seek in ways:
        wanted = frame_indices(len(table.pts), frames, asked, on_short, source.name, table.cut)
        canvas = Canvas(wanted, size, interpolation, table.exif)
        try:
            decoded = decode_slots(source, table, canvas, workers, seek)
        except FrameMismatchError:
            continue
        total, times, lost, replaced, everything = len(table.pts), table.pts, table.cut, (), len(table.pts) + table.cut
        break
    else:
        found = survey(source, table)
        total, times, lost = found.total, found.times, found.lost + table.cut
        everything = total + found.unplaced + table.cut
        wanted = frame_indices(total, frames, asked, on_short, source.name, table.cut)
        shown = found.nearest(wanted)
        canvas = Canvas(np.array([found.number[slot] for slot in shown.tolist()]), size, interpolation, table.exif)
        decoded = found.decoded + decode_in_order(source, canvas)
        replaced = tuple(sorted(set(wanted[shown != wanted].tolist()) - found.held))

    seconds, fps, duration = _clock(total, times, table)
    if lost:
        instead = f"; {len(replaced)} of the wanted ones show a neighbour instead" if replaced else ""
        warnings.warn(
            f"{source.name}: {lost} of {everything} frames are lost, damaged or cut off{instead}",
            VideoWarning,
            stacklevel=2,
        )
    return Video(
        frames=canvas.frames,
        pts=torch.from_numpy(seconds[wanted]),
        indices=torch.from_numpy(wanted),
        total=total,
        fps=fps,
        duration=duration,
        rotation=canvas.rotation,
        height=canvas.height,
        width=canvas.width,
        lost=lost,
        replaced=replaced,
        decoded=decoded,
    )


def _clock(total: int, times: np.ndarray | None, table: PacketTable) -> tuple[np.ndarray, float, float]:
    """Turn ticks into seconds after the first frame [total], the mean frame rate and the duration in seconds."""
    rate = table.rate or 1.0
    if times is None:
        return np.arange(total) / rate, rate, total / rate
    seconds = (times - times[0]) * table.tick
    shown = float(seconds[-1])
    # The header's rate is the exact one where the container rounds times to ticks; where it disagrees, it is wrong.
    if shown > 0 and abs((total - 1) / rate - shown) > 2 * table.tick:
        rate = (total - 1) / shown
    return seconds, rate, shown + (table.span * table.tick or 1 / rate)
