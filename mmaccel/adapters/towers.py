"""Vision towers that get fewer frames or fewer pixels, while everything behind them sees the full size.

What a tower did not compute is filled with zeros; the tokens that stand for it are dropped in front of the language
model. So nothing between the two - projector, pooling, counting of placeholders - has to know.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["BatchedTower", "PackedTower", "Thinned", "corner", "kept_frames", "smaller"]

Tensors = Callable[[torch.Tensor], torch.Tensor]
# (number of the video in the call, how many frames or groups it has) -> which of them are encoded
Kept = Callable[[int, int], list[int]]


@dataclass(frozen=True)
class Thinned:
    """How one tower call was made smaller.

    output: brings a tensor of the tower's output to full size. tokens: the same for one value a token. grids: int64
    [items, 3], what a packed tower was really given; None for batched towers.
    """

    output: Tensors
    tokens: Tensors
    grids: torch.Tensor | None = None


def kept_frames(T: int, keep: int) -> list[int]:
    """`keep` of T frames, first and last included, as a uniformly sampled video has them."""
    return [math.floor(i * (T - 1) / max(1, keep - 1) + 0.5) for i in range(keep)] if keep > 1 else [T // 2]


def smaller(H: int, W: int, keep: float) -> tuple[int, int]:
    """A grid of the same shape, as near as whole numbers allow, with about `keep` of the H * W cells."""
    scale = math.sqrt(keep)
    return max(1, round(H * scale)), max(1, round(W * scale))


def corner(T: int, H: int, W: int, h: int, w: int) -> torch.Tensor:
    """bool [T * H * W]: the cells of the h x w corner of every frame, which hold the smaller frame."""
    inside = torch.zeros(T, H, W, dtype=torch.bool)
    inside[:, :h, :w] = True
    return inside.flatten()


def _spread(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    out = x.new_zeros(len(rows), *x.shape[1:])
    out[rows.to(x.device)] = x
    return out


class BatchedTower:
    """CLIP, SigLIP, InternViT: `pixel_values` [images, C, H, W], tokens [images, (1 +) patches, C]."""

    def __init__(self, config: Any, *, class_token: bool, patches_per_cell: int) -> None:
        size, patch = config.image_size, config.patch_size
        self.size = size if isinstance(size, int) else size[0]
        self.patch = patch if isinstance(patch, int) else patch[0]
        self.side = self.size // self.patch
        self.class_token, self.per_cell = class_token, patches_per_cell

    def frames(self, arguments: dict[str, Any], pixels: torch.Tensor, _: Any, kept: Kept) -> Any:
        """Keep some frames of each video of the call."""
        videos, T = arguments["pixel_values_videos"].shape[:2]
        shown = torch.zeros(videos, T, dtype=torch.bool)
        for video in range(videos):
            shown[video, kept(video, T)] = True
        rows = shown.flatten()

        def restore(x: torch.Tensor) -> torch.Tensor:
            return _spread(x, rows) if x.shape[0] == int(rows.sum()) else x

        return pixels[rows.to(pixels.device)], None, Thinned(restore, restore)

    def pixels(self, _arguments: dict[str, Any], pixels: torch.Tensor, _: Any, keep: Callable[[int], float]) -> Any:
        """Make every image smaller; the smaller token grid stands in the corner of the full one."""
        cells = math.ceil(self.side / self.per_cell)
        small = min(self.side, smaller(cells, cells, keep(cells * cells))[0] * self.per_cell)
        if small == self.side:
            return None
        resized = F.interpolate(
            pixels.float(), size=(small * self.patch,) * 2, mode="bicubic", antialias=True, align_corners=False
        ).to(pixels.dtype)
        inside = corner(1, self.side, self.side, small, small)
        if self.class_token:
            inside = torch.cat([torch.ones(1, dtype=torch.bool), inside])

        def restore(x: torch.Tensor) -> torch.Tensor:
            if x.dim() < 2 or x.shape[1] != int(inside.sum()):
                return x
            return _spread(x.transpose(0, 1), inside).transpose(0, 1).contiguous()

        return resized, None, Thinned(restore, restore)


class PackedTower:
    """Qwen-VL: patches of all items in one row [patches, C * tp * p * p], `grid_thw` [items, 3] says how many."""

    def __init__(self, config: Any) -> None:
        self.merge, self.patch, self.depth = config.spatial_merge_size, config.patch_size, config.temporal_patch_size

    def frames(self, _: dict[str, Any], pixels: torch.Tensor, grids: torch.Tensor, kept: Kept) -> Any:
        """Keep some temporal groups of each video."""
        rows, sizes = [], []
        for video, (t, h, w) in enumerate(grids.tolist()):
            shown = torch.zeros(t, dtype=torch.bool)
            shown[kept(video, t)] = True
            rows.append(shown.repeat_interleave(h * w))
            sizes.append([int(shown.sum()), h, w])
        patches = torch.cat(rows)
        tokens = patches[:: self.merge**2]
        new = grids.new_tensor(sizes)
        return pixels[patches.to(pixels.device)], new, self._thinned(patches, tokens, new)

    def pixels(self, _: dict[str, Any], pixels: torch.Tensor, grids: torch.Tensor, keep: Callable[[int], float]) -> Any:
        """Make every frame smaller, in whole merge groups."""
        parts, sizes, tokens, start = [], [], [], 0
        for t, h, w in grids.tolist():
            frame = self._image(pixels[start : start + t * h * w], t, h, w)
            start += t * h * w
            H, W = h // self.merge, w // self.merge
            gh, gw = smaller(H, W, keep(H * W))
            size = (gh * self.merge * self.patch, gw * self.merge * self.patch)
            frame = F.interpolate(frame.float(), size=size, mode="bicubic", antialias=True, align_corners=False)
            parts.append(self._patches(frame.to(pixels.dtype), t))
            sizes.append([t, gh * self.merge, gw * self.merge])
            tokens.append(corner(t, H, W, gh, gw))
        inside = torch.cat(tokens)
        if bool(inside.all()):
            return None
        patches = inside.repeat_interleave(self.merge**2)
        new = grids.new_tensor(sizes)
        return torch.cat(parts), new, self._thinned(patches, inside, new)

    def _thinned(self, patches: torch.Tensor, tokens: torch.Tensor, grids: torch.Tensor) -> Thinned:
        def output(x: torch.Tensor) -> torch.Tensor:
            for rows in (patches, tokens):
                if x.shape[0] == int(rows.sum()):
                    return _spread(x, rows)
            return x

        return Thinned(output, lambda x: _spread(x, tokens), grids)

    def _image(self, rows: torch.Tensor, t: int, h: int, w: int) -> torch.Tensor:
        m, p, d = self.merge, self.patch, self.depth
        x = rows.view(t, h // m, w // m, m, m, -1, d, p, p)
        return x.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(t * d, -1, h * p, w * p)

    def _patches(self, frames: torch.Tensor, t: int) -> torch.Tensor:
        m, p, d = self.merge, self.patch, self.depth
        C, H, W = frames.shape[1:]
        x = frames.view(t, d, C, H // (m * p), m, p, W // (m * p), m, p)
        return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, C * d * p * p)
