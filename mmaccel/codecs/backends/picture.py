"""A picture as a hardware decoder leaves it, and what every backend must know of a stream to make one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mmaccel.errors import VideoError
from mmaccel.kernels.nv12_to_rgb import nv12_to_rgb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from av.video.codeccontext import VideoCodecContext

__all__ = ["Colours", "Picture", "check_chroma", "colours_of", "torch_device"]

# AVColorSpace; libswscale takes BT.601 for what is not stated and for what it does not know.
_MATRICES = {1: "bt709", 4: "fcc", 7: "smpte240m", 9: "bt2020", 10: "bt2020"}
_UNSPECIFIED_MATRIX, _FULL_RANGE = 2, 2
# Four luma samples to a chroma sample: what NV12 and P010 can hold.
_CHROMA = frozenset({"yuv420p", "yuvj420p", "yuv420p10le", "nv12", "p010le", "cuda"})


@dataclass(frozen=True)
class Colours:
    """How numbers become colours: `matrix` as `nv12_to_rgb` names it, and whether luma goes from 0 to 255."""

    matrix: str = "bt601"
    full_range: bool = False


def colours_of(space: int, colour_range: int, otherwise: Colours | None = None) -> Colours:
    """The colours that AVColorSpace and AVColorRange numbers say; where they say nothing, `otherwise`."""
    other = otherwise or Colours()
    return Colours(
        other.matrix if space == _UNSPECIFIED_MATRIX else _MATRICES.get(space, "bt601"),
        colour_range == _FULL_RANGE if colour_range else other.full_range,
    )


def check_chroma(context: VideoCodecContext) -> None:
    """Raise VideoError for a stream whose pictures are not 4:2:0 with 8 or 10 bits."""
    stated = None if context.format is None else context.format.name
    if stated is not None and stated not in _CHROMA:
        raise VideoError(
            f"pictures in {stated} are decoded on the CPU only: hardware decoding takes 4:2:0 with 8 or 10 bits"
        )


def torch_device(device: int | str) -> torch.device:
    """GPU number `device`, or a device by its name ("cpu" for pictures in the host's memory)."""
    return torch.device(f"cuda:{device}" if isinstance(device, int) else device)


@dataclass(frozen=True)
class Picture:
    """y uint8 or uint16 [H, W] and uv [ceil(H/2), ceil(W/2), 2], NV12 or P010, as the decoder holds them.

    The memory is the decoder's: it may change as soon as the decoder is asked for the next picture.
    """

    y: torch.Tensor
    uv: torch.Tensor
    colours: Colours

    def draw(
        self,
        out: torch.Tensor,
        rows: Sequence[int],
        *,
        transpose: bool = False,
        flip_right: bool = False,
        flip_down: bool = False,
        interpolation: str = "BICUBIC",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        """Write it as RGB into some rows of out [N, 3, h, w], a tensor on the picture's device, resized to (h, w).

        transpose swaps rows and columns after resizing; then the flips are along width and height. mean and std are as
        in `nv12_to_rgb`.
        """
        # every orientation is a turn, mirrored or not
        rotation, mirror = {
            (False, False, False): (0, False),
            (False, True, False): (0, True),
            (False, True, True): (180, False),
            (False, False, True): (180, True),
            (True, True, False): (90, False),
            (True, False, False): (90, True),
            (True, False, True): (270, False),
            (True, True, True): (270, True),
        }[transpose, flip_right, flip_down]
        if not rows:
            return
        nv12_to_rgb(
            self.y, self.uv, out=out, slots=[rows[0]], matrix=self.colours.matrix, full_range=self.colours.full_range,
            interpolation=interpolation, rotation=rotation, mirror=mirror, mean=mean, std=std,
        )  # fmt: skip
        for row in rows[1:]:
            out[row] = out[rows[0]]
