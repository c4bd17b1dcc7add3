"""What reading a video gives."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import numpy as np

    from mmaccel.codecs.reading import Outcome, Work

__all__ = ["Part", "Video", "VideoWarning", "video_of"]


class VideoWarning(UserWarning):
    """A video was read, but part of it was damaged or missing."""


@dataclass(frozen=True, eq=False)
class Video:
    """Sampled frames of one video, and where they come from.

    frames: uint8 [N, C, H, W], RGB, contiguous, upright; float32 if normalised. pts: float64 [N], seconds after the
    video's first frame. indices: int64 [N], the numbers of the frames, in presentation order from 0: those asked for,
    or with `snap` those shown. total: how many frames the video has. fps: mean frames a second. duration: seconds, the
    last frame's display time included. rotation: clockwise degrees (0, 90, 180, 270) by which the stored pictures were
    turned to come upright. height, width: pixels of the upright video before `size`. lost: how many frames are known to
    be damaged or cut off. replaced: those of `indices` that are lost and show their nearest decodable neighbour
    instead. work: what reading has taken.
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
    work: Work

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def decoded(self) -> int:
        """How many frames the decoder delivered for that."""
        return self.work.decoded

    def numpy(self) -> np.ndarray:
        """Give the frames as [N, H, W, C]: a view where they are on the CPU, for what wants channels last."""
        return self.frames.permute(0, 2, 3, 1).cpu().numpy()

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
            "video_backend": self.work.backend,
            "frames_indices": self.indices.tolist(),
        }


@dataclass(frozen=True, eq=False)
class Part:
    """Some rows of what `load_video` would give, as soon as they are decoded.

    start: the first of these rows. frames: uint8 [n, C, H, W], RGB, upright; float32 if normalised. pts: float64 [n],
    seconds after the video's first frame. indices: int64 [n], frame numbers.
    """

    start: int
    frames: torch.Tensor = field(repr=False)
    pts: torch.Tensor
    indices: torch.Tensor

    def __len__(self) -> int:
        return len(self.frames)


def video_of(outcome: Outcome, name: str, frames: torch.Tensor, stacklevel: int) -> Video:
    """Put an outcome into words; warns if part of the video was lost. `frames` are its pictures as they are wanted."""
    if outcome.lost:
        replaced = len(outcome.replaced)
        instead = f"; {replaced} of the wanted ones show a neighbour instead" if replaced else ""
        warnings.warn(
            f"{name}: {outcome.lost} of {outcome.everything} frames are lost, damaged or cut off{instead}",
            VideoWarning,
            stacklevel=stacklevel + 1,
        )
    canvas = outcome.canvas
    return Video(
        frames=frames,
        pts=torch.from_numpy(outcome.seconds),
        indices=torch.from_numpy(outcome.numbers),
        total=outcome.total,
        fps=outcome.clock.fps,
        duration=outcome.clock.duration,
        rotation=canvas.rotation,
        height=canvas.height,
        width=canvas.width,
        lost=outcome.lost,
        replaced=outcome.replaced,
        work=outcome.work,
    )
