"""InternVL: InternViT tower with class token, pixel shuffle, one tile a frame."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from mmaccel.adapters.base import VideoLM, raster, square
from mmaccel.core.prefill import Encoded, GridLayout, ItemLayout

# frames are announced by a short text ("Frame3: "), whose length changes with the digits of the number
_FRAME_GAP, _GAP_SPREAD, _MIN_FRAMES = 32, 2, 3
# a gap ends a frame ("</img>", newline) before it announces the next one
_CLOSING = 2


class InternVL(VideoLM):
    """InternVL.

    The model is handed tiles and does not say which are the frames of a video. Three or more single-tile runs that
    are separated by short texts of the same length are taken for one (inferred); where the text before a frame is that
    before the first frame again ("Frame1: "), the next video begins. Other runs are images, each tile a grid of its
    own.
    """

    family = "internvl"
    model_types = ("internvl",)
    encoders: ClassVar[dict[str, str]] = {"image": "get_image_features"}
    vision_layers: ClassVar[str] = "encoder.layer"
    vision_attention: ClassVar[str] = "attention"

    @property
    def interpolates(self) -> bool:
        """InternViT fits its position table by itself."""
        return False

    @property
    def patches_per_cell(self) -> int:  # type: ignore[override]
        """Pixel shuffle joins this many patches along each side."""
        return round(1 / self.config.downsample_ratio)

    def resizable(self, kind: str) -> bool:  # noqa: ARG002
        """Every tile is."""
        return True

    @property
    def has_class_token(self) -> bool:
        """InternViT has one; the select strategy "default" cuts it off."""
        return getattr(self.config, "vision_feature_select_strategy", "default") == "default"

    def layout(self, encoded: Encoded, where: torch.Tensor) -> list[ItemLayout]:
        """Items are read off the runs of placeholders in the prompt."""
        tiles, per_tile = encoded.output.pooler_output.shape[:2]
        side = square(per_tile)
        placed, made = int(where.sum()), tiles * per_tile
        if placed == 0 or placed % made:
            return [ItemLayout("image", made, ())]  # a part of the prompt: what reads this sees that the counts differ
        items: list[ItemLayout] = []
        for number in range(0, len(where), placed // made):
            prompt = None if encoded.prompt is None else encoded.prompt[number]
            items += _row_items(where[number], per_tile, side, prompt)
        return items

    def token_scores(self, encoded: Encoded, kind: str) -> torch.Tensor:
        """Mean over the patches that pixel shuffle joins."""
        scores = self.raw_scores(encoded, kind)
        root: Any = self.root
        grid = scores.view(len(scores), *square(scores.shape[1]), 1)
        return root.pixel_shuffle(grid, scale_factor=self.config.downsample_ratio).mean(-1).flatten()


def _begins_again(prompt: torch.Tensor | None, first: int, here: int, gap: int) -> bool:
    """Whether the text before the frame at `here` is the one before the frame at `first`."""
    if prompt is None:
        return False
    label = gap - _CLOSING
    return first >= label and torch.equal(prompt[first - label : first], prompt[here - label : here])


def _row_items(
    row: torch.Tensor, per_tile: int, side: tuple[int, int], prompt: torch.Tensor | None = None
) -> list[ItemLayout]:
    edges = torch.diff(row.int(), prepend=row.new_zeros(1).int(), append=row.new_zeros(1).int())
    starts, stops = (edges == 1).nonzero().squeeze(1).tolist(), (edges == -1).nonzero().squeeze(1).tolist()
    items: list[ItemLayout] = []
    position = 0
    while position < len(starts):
        end = position + 1
        gaps: list[int] = []
        while end < len(starts) and stops[end - 1] - starts[end - 1] == per_tile == stops[end] - starts[end]:
            gap = starts[end] - stops[end - 1]
            if gap > _FRAME_GAP or (gaps and abs(gap - gaps[0]) > _GAP_SPREAD):
                break
            if _begins_again(prompt, starts[position], starts[end], gap):
                break
            gaps.append(gap)
            end += 1
        frames = end - position
        if frames >= _MIN_FRAMES:
            items.append(ItemLayout("video", frames * per_tile, (raster(frames, *side),)))
        else:
            for start, stop in zip(starts[position:end], stops[position:end], strict=True):
                grids = [raster(1, *side, start=first) for first in range(0, stop - start, per_tile)]
                items.append(ItemLayout("image", stop - start, tuple[GridLayout, ...](grids)))
        position = end
    return items
