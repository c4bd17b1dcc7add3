"""Qwen2-VL: native resolution, packed patches, 2 x 2 merger, M-RoPE."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from mmaccel.adapters.base import VideoLM, raster
from mmaccel.adapters.towers import PackedTower
from mmaccel.core.prefill import Encoded, ItemLayout


class Qwen2VL(VideoLM):
    """Qwen2-VL."""

    family = "qwen2-vl"
    model_types = ("qwen2_vl",)
    vision: ClassVar[str] = "visual"
    vision_layers: ClassVar[str] = "blocks"
    vision_attention: ClassVar[str] = "attn"
    projector: ClassVar[str] = "visual.merger"
    rotary_axes: ClassVar[int] = 3

    @property
    def frames_at_once(self) -> int:
        """Frames of a temporal patch."""
        return self.config.vision_config.temporal_patch_size

    def clock(self, group: int, seconds: float) -> float | None:  # noqa: ARG002
        """One step a group."""
        return group

    def tower(self) -> PackedTower:
        """Patches of all items in one row."""
        return PackedTower(self.config.vision_config)

    def grids(self, encoded: Encoded) -> torch.Tensor:
        """int64 [items, 3]: patches of each item along time, height and width."""
        return encoded.arguments[f"{encoded.modality}_grid_thw"]

    def layout(self, encoded: Encoded, where: torch.Tensor) -> list[ItemLayout]:  # noqa: ARG002
        """One grid an item, in merged tokens; time stamps between the frames of Qwen3-VL are text."""
        merge = self.config.vision_config.spatial_merge_size
        items = []
        for t, h, w in self.grids(encoded).tolist():
            grid = raster(t, h // merge, w // merge)
            items.append(ItemLayout(encoded.modality, grid.offsets.numel(), (grid,)))
        return items

    def video_frames(self, encoded: Encoded) -> list[tuple[int, int]]:
        """Frames are temporal groups."""
        grids = encoded.thinned[-1].grids if encoded.thinned else self.grids(encoded)
        return [(t, h * w) for t, h, w in grids.tolist()]

    def frame_boundary(self) -> list[nn.Module | tuple[nn.Module, str]]:
        """The mergers: what follows them in the tower puts rows in order."""
        tower: Any = self.vision_tower
        return [tower.merger, *getattr(tower, "deepstack_merger_list", ())]

    def score_layer(self, chosen: Any = None) -> int:  # noqa: ARG002
        """The last block: its output goes to the merger."""
        return len(self.vision_blocks()) - 1

    def token_scores(self, encoded: Encoded, kind: str) -> torch.Tensor:
        """Mean over the patches that the merger joins; attention runs frame by frame, so every frame sums to one."""
        unit = self.config.vision_config.spatial_merge_size**2
        flat = torch.cat([part.flatten() for part in encoded.scores[kind]])
        grids = encoded.thinned[-1].grids if encoded.thinned else self.grids(encoded)
        scores = self.in_order(grids, flat.view(-1, unit).mean(1))
        for thinned in reversed(encoded.thinned):
            scores = thinned.tokens(scores)
        return scores

    def in_order(self, grids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """From the order of the blocks to the order of the features."""
        return scores
