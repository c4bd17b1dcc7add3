"""What the blocks of one decoded frame say: where each came from, and whether the frame before foretells it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    pass

__all__ = ["EXPORTING", "PITCH", "BlockField", "Trace", "block_field", "unlike"]

# Decoders of FFmpeg that export motion vectors; those of HEVC, VP8, VP9 and AV1 do not, and intra codecs have none.
EXPORTING = frozenset(
    {
        "flv1", "h263", "h264", "mpeg1video", "mpeg2video", "mpeg4", "msmpeg4v1", "msmpeg4v2", "msmpeg4v3", "wmv1",
        "wmv2",
    }
)  # fmt: skip
# Vectors are gathered on macroblocks: smaller ones change the signals of a token by next to nothing.
PITCH = 16
# A block whose luma differs by this much on average from what motion foretells shows something else.
_OTHER = 10.0


@dataclass(frozen=True)
class BlockField:
    """The macroblocks of one frame: float32 maps [h, w] of shares in [0, 1], and a step.

    step: [2, h, w], where the content was one frame earlier, as (x, y) pixels from its place now. moving: the share
    with a vector other than zero. fresh: the share without a vector (coded anew). backward: the share that only a later
    frame foretells.
    """

    step: torch.Tensor
    moving: torch.Tensor
    fresh: torch.Tensor
    backward: torch.Tensor

    @property
    def untied(self) -> bool:
        """Whether vectors do not tie most of the frame to what was shown before it."""
        return float((self.fresh + self.backward).mean()) > 0.5


def block_field(vectors: np.ndarray | None, rows: int, columns: int, before: int, after: int) -> BlockField:
    """Gather FFmpeg's motion vectors of one frame of rows x columns macroblocks.

    before, after: how many frames away the references are in which the vectors point. A vector says where a block lies
    in its reference; which of several references it is FFmpeg does not tell, so the nearest is taken and the step from
    frame to frame is the vector over its distance, the mean of both directions where there are two.
    """
    n = rows * columns
    if vectors is None:
        none, all_ = torch.zeros(rows, columns), torch.ones(rows, columns)
        return BlockField(torch.zeros(2, rows, columns), none, all_, none)
    width, height = vectors["w"].astype(np.int64), vectors["h"].astype(np.int64)
    x, y = (vectors["dst_x"] - width // 2) // PITCH, (vectors["dst_y"] - height // 2) // PITCH
    dx, dy, past = vectors["motion_x"], vectors["motion_y"], vectors["source"] < 0
    # a stored frame may reach beyond the shown one
    shown = (x >= 0) & (x < columns) & (y >= 0) & (y < rows)
    place = np.where(shown, y * columns + x, n)
    area = width * height / PITCH**2
    scale = area / (vectors["motion_scale"] * np.where(past, before, -after))
    columns_of = (dx * scale, dy * scale, area * ((dx != 0) | (dy != 0)), area, area * past)
    sums = [np.bincount(place, values, minlength=n + 1)[:n] for values in columns_of]
    maps = torch.from_numpy(np.stack(sums).astype(np.float32)).view(5, rows, columns)
    # a block that points both ways counts twice
    weight = maps[3].clamp_min(1e-6)
    tied, behind = maps[3].clamp_max(1), maps[4].clamp_max(1)
    return BlockField(maps[:2] / weight, maps[2] / weight * tied, 1 - tied, tied - behind)


def unlike(now: torch.Tensor, then: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """float32 [h, w]: 1 where a macroblock is not what the frame before shows at `step`, else 0.

    now, then: luma of the frame and of the one before, uint8 [H, W]. step: [2, h, w], as in `BlockField`.
    """
    now, then = now.float(), then.float()
    height, width = now.shape
    if bool(step.any()):
        dx, dy = step.round().long().repeat_interleave(PITCH, 1).repeat_interleave(PITCH, 2)[:, :height, :width]
        y = (torch.arange(height)[:, None] + dy).clamp(0, height - 1)
        x = (torch.arange(width)[None] + dx).clamp(0, width - 1)
        then = then[y, x]
    rows, columns = step.shape[1:]
    off = F.pad((now - then).abs(), (0, columns * PITCH - width, 0, rows * PITCH - height))
    off = F.avg_pool2d(off[None], PITCH)[0]
    # blocks at the edge may lie half outside
    for axis, side in ((1, width), (0, height)):
        if side % PITCH:
            off.select(axis, -1).mul_(PITCH / (side % PITCH))
    return (off > _OTHER).float()


class Trace:
    """What happened to the content of each macroblock since the last wanted frame; frame by frame, as they are shown.

    The content of a macroblock at frame k was at `step` in frame k - 1, and what is known of it there is handed on from
    there, between macroblocks by linear interpolation. So motion adds up to a displacement along the path of the
    content: what swings back has not moved.
    """

    def __init__(self, rows: int, columns: int) -> None:
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        self._place = torch.stack([x, y]).float()
        # grid_sample counts from -1 to 1, between the centres of the outer blocks
        self._scale = torch.tensor([max(1, columns - 1), max(1, rows - 1)]).view(2, 1, 1) / 2
        self.reset()

    def reset(self) -> None:
        """Start anew: this frame is the one to compare with."""
        rows, columns = self._place.shape[1:]
        self._state = torch.zeros(3, rows, columns)
        self.still = torch.ones(rows, columns)
        self.bits = torch.zeros(rows, columns)

    @property
    def motion(self) -> torch.Tensor:
        """float32 [rows, columns]: displacement in pixels."""
        return torch.linalg.vector_norm(self._state[:2], dim=0)

    @property
    def fresh(self) -> torch.Tensor:
        """float32 [rows, columns] in [0, 1]: how much of the content was coded anew."""
        return self._state[2]

    def move(
        self, step: torch.Tensor, moving: torch.Tensor, fresh: torch.Tensor, packet_bytes: float, pixels: int
    ) -> None:
        """Go on by one frame of so many pixels; its packet is spread over what is not still."""
        busy = (moving + fresh).clamp_max(1)
        share = float(busy.mean())
        if share == 0:
            return
        self._state = F.grid_sample(
            self._state[None], ((self._place + step / PITCH) / self._scale - 1).permute(1, 2, 0)[None],
            mode="bilinear", padding_mode="border", align_corners=True,
        )[0]  # fmt: skip
        self._state[:2] = (self._state[:2] + step) * (1 - fresh)
        self._state[2] = torch.maximum(self._state[2], fresh)
        self.still = self.still * (1 - busy)
        self.bits = self.bits + busy * (8 * packet_bytes / (pixels * share))
