"""What the blocks of one decoded frame say: where each came from, and whether the frame before foretells it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

__all__ = ["EXPORTING", "BlockField", "Trace", "block_field", "predicted", "upright"]

# Decoders of FFmpeg that export motion vectors; those of HEVC, VP8, VP9 and AV1 do not, and intra codecs have none.
EXPORTING = frozenset(
    {
        "flv1", "h263", "h264", "mpeg1video", "mpeg2video", "mpeg4", "msmpeg4v1", "msmpeg4v2", "msmpeg4v3", "wmv1",
        "wmv2",
    }
)  # fmt: skip
# The smallest block that FFmpeg reports.
_BLOCK = 8
# A block whose luma differs by this much on average from what motion foretells shows something else.
_OTHER = 10.0


@dataclass(frozen=True)
class BlockField:
    """The blocks of one frame on a grid of `pitch` pixels.

    step: float32 [2, h, w], where the content was one frame earlier, as (x, y) pixels from its place now. fresh:
    float32 [h, w], the share without a vector (coded anew). backward: the share that only a later frame foretells.
    """

    step: torch.Tensor
    fresh: torch.Tensor
    backward: torch.Tensor
    pitch: int

    @property
    def untied(self) -> bool:
        """Whether vectors do not tie most of the frame to what was shown before it."""
        return float((self.fresh + self.backward).mean()) > 0.5


def block_field(vectors: np.ndarray | None, height: int, width: int, pitch: int, before: int, after: int) -> BlockField:
    """Rasterise FFmpeg's motion vectors of one frame of height x width pixels.

    before, after: how many frames away the references are in which the vectors point. A vector says where a block lies
    in its reference; which of several references it is FFmpeg does not tell, so the nearest is taken and the step from
    frame to frame is the vector over its distance, the mean of both directions where there are two.
    """
    rows, columns = -(-height // _BLOCK), -(-width // _BLOCK)
    total = np.zeros((2, rows, columns), dtype=np.float32)
    count = np.zeros((rows, columns), dtype=np.float32)
    past = np.zeros((rows, columns), dtype=bool)
    for sign, distance in ((-1, before), (1, -after)):
        if vectors is None:
            break
        mine = vectors[np.sign(vectors["source"]) == sign]
        steps = np.stack([mine["motion_x"], mine["motion_y"]]) / (mine["motion_scale"] * float(distance))
        left = (mine["dst_x"].astype(np.int64) - mine["w"] // 2) // _BLOCK
        top = (mine["dst_y"].astype(np.int64) - mine["h"] // 2) // _BLOCK
        for down in range(2):
            for right in range(2):
                y, x = top + down, left + right
                inside = (mine["h"] > down * _BLOCK) & (mine["w"] > right * _BLOCK)
                inside &= (y >= 0) & (y < rows) & (x >= 0) & (x < columns)
                y, x = y[inside], x[inside]
                # within one direction blocks do not overlap
                total[:, y, x] += steps[:, inside]
                count[y, x] += 1
                if sign < 0:
                    past[y, x] = True
    tied = count > 0
    values = np.concatenate(
        [total / np.maximum(count, 1), ~tied[None], (tied & ~past)[None], np.ones((1, rows, columns))]
    ).astype(np.float32)
    out = torch.from_numpy(values)
    if pitch > _BLOCK:
        size = pitch // _BLOCK
        # the last row or column of large blocks may be half outside: zeros there do not count
        padded = F.pad(out, (0, -columns % size, 0, -rows % size))
        out = F.avg_pool2d(padded[None], size)[0]
        out = out / out[4:]
    # content without a vector has no step that could thin that of its neighbours
    step = out[:2] / (1 - out[2:3]).clamp_min(1e-6) * (out[2:3] < 1)
    return BlockField(step, out[2], out[3], pitch)


def predicted(frame: VideoFrame, before: VideoFrame, step: torch.Tensor, pitch: int) -> torch.Tensor:
    """float32 [h, w]: 1 where a block of a frame is not what the frame before shows at `step`, by luma, else 0."""
    now, then = (torch.from_numpy(picture.to_ndarray(format="gray")).float() for picture in (frame, before))
    height, width = now.shape
    if bool(step.any()):
        dx, dy = step.round().long().repeat_interleave(pitch, 1).repeat_interleave(pitch, 2)[:, :height, :width]
        y = (torch.arange(height)[:, None] + dy).clamp(0, height - 1)
        x = (torch.arange(width)[None] + dx).clamp(0, width - 1)
        then = then[y, x]
    rows, columns = step.shape[1:]
    off = torch.stack([(now - then).abs(), torch.ones_like(now)])
    off = F.avg_pool2d(F.pad(off, (0, columns * pitch - width, 0, rows * pitch - height))[None], pitch)[0]
    return (off[0] / off[1] > _OTHER).float()


class Trace:
    """What happened to the content of each block since the last wanted frame; one frame at a time, in display order.

    The content of a block at frame k was at `step` in frame k - 1, and what is known of it there is handed on from
    there, between blocks by linear interpolation. So motion adds up to a displacement along the path of the content:
    what swings back has not moved.
    """

    def __init__(self, rows: int, columns: int, pitch: int) -> None:
        self.pitch = pitch
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

    def move(self, step: torch.Tensor, fresh: torch.Tensor, packet_bytes: float, area: int) -> None:
        """Go on by one frame. area: pixels of the frame, over the busy share of which the packet is spread."""
        moved = (step != 0).any(0)
        busy = torch.maximum(moved.float(), fresh)
        if bool(moved.any()):
            where = ((self._place + step / self.pitch) / self._scale - 1).permute(1, 2, 0)[None]
            self._state = F.grid_sample(
                self._state[None], where, mode="bilinear", padding_mode="border", align_corners=True
            )[0]
            self._state[:2] += step
        self._state[:2] *= 1 - fresh
        self._state[2] = torch.maximum(self._state[2], fresh)
        self.still = self.still * ~moved * (1 - fresh)
        if float(busy.sum()) > 0:
            self.bits = self.bits + busy * (8 * packet_bytes / (area * float(busy.mean())))


def upright(frame: VideoFrame) -> tuple[bool, list[int]]:
    """How a map [..., rows, columns] of a stored frame comes upright: whether transposed first, and axes to flip."""
    rotation = -90 * round(frame.rotation / 90) % 360
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:
        matrix = None  # side data of a kind that PyAV has no name for: the turn is all that is known
    if matrix is None:
        transpose, right, down = rotation in (90, 270), rotation in (90, 180), rotation in (180, 270)
    else:
        # x' = a x + c y and y' = b x + d y, with x to the right and y downwards
        a, b, _, c, d = np.frombuffer(bytes(matrix), dtype=np.int32)[:5].tolist()
        transpose = abs(b) > abs(a)
        right, down = (c < 0, b < 0) if transpose else (a < 0, d < 0)
    return transpose, [axis for axis, flip in ((-1, right), (-2, down)) if flip]
