"""LLaVA-NeXT-Video: CLIP tower, tiled images with a newline token a row, videos pooled without newlines."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from mmaccel.adapters.base import VideoLM, raster, square
from mmaccel.core.prefill import Encoded, GridLayout, ItemLayout


class TiledVideoLM(VideoLM):
    """Families that pack an image as a small base grid, then a large grid with a newline token behind each row."""

    @property
    def has_class_token(self) -> bool:
        """CLIP towers have one; the select strategy "default" cuts it off."""
        return getattr(self.config, "vision_feature_select_strategy", "default") == "default"

    patches_per_cell: ClassVar[int] = 2
    closing_tokens: ClassVar[int] = 0  # newlines behind a video

    @property
    def side(self) -> int:
        """Patches along each side of a tile or frame."""
        vision = self.config.vision_config
        return vision.image_size // vision.patch_size

    def resizable(self, kind: str) -> bool:
        """Tiled images are not: their tiles are packed by their full size."""
        return kind == "video"

    def tiles(self, encoded: Encoded) -> list[int]:
        """Number of tiles of each image."""
        raise NotImplementedError

    def packed(self, encoded: Encoded, features: torch.Tensor, newline: float) -> list[torch.Tensor]:
        """Features [tiles, patches, 1] of one channel, packed by the model's own code; [tokens] an image."""
        raise NotImplementedError

    def pooled(self, features: torch.Tensor) -> torch.Tensor:
        """Frame features [frames, patches, 1] of one channel, pooled by the model's own code."""
        raise NotImplementedError

    def layout(self, encoded: Encoded, where: torch.Tensor) -> list[ItemLayout]:  # noqa: ARG002
        """Image: base grid and large grid, newlines apart. Video: one grid, whatever follows it is structure."""
        if encoded.modality == "video":
            videos, frames = encoded.arguments["pixel_values_videos"].shape[:2]
            per_frame = self.pooled(torch.zeros(1, self.side**2, 1)).shape[1]
            grid = raster(frames, *square(per_frame))
            return [ItemLayout("video", frames * per_frame + self.closing_tokens, (grid,)) for _ in range(videos)]
        side = self.side
        count = sum(self.tiles(encoded))
        # the model's own packing of a channel that is zero on patches and infinite on newlines shows which is which
        marked = self.packed(encoded, torch.zeros(count, side * side, 1), float("inf"))
        return [_image_layout(torch.isinf(marks), side) for marks in marked]

    def token_scores(self, encoded: Encoded, kind: str) -> torch.Tensor:
        """Scores go the way of the features: pooled for videos, packed for images."""
        scores = self.raw_scores(encoded, kind).unsqueeze(-1)
        if encoded.modality == "image":
            return torch.cat(self.packed(encoded, scores, 0.0))
        videos = encoded.arguments["pixel_values_videos"].shape[0]
        flat = self.pooled(scores).reshape(videos, -1)
        return torch.nn.functional.pad(flat, (0, self.closing_tokens)).flatten()


def _image_layout(newline: torch.Tensor, side: int) -> ItemLayout:
    base = raster(1, side, side)
    large = newline[side * side :]
    places = (~large).nonzero().squeeze(1) + side * side
    if places.numel() == 0:
        return ItemLayout("image", len(newline), (base,))
    width = int(large.nonzero()[0]) if large.any() else places.numel()
    shape = (1, places.numel() // width, width)
    return ItemLayout("image", len(newline), (base, GridLayout(shape, places)))


class LlavaNextVideo(TiledVideoLM):
    """LLaVA-NeXT-Video."""

    family = "llava-next-video"
    model_types = ("llava_next_video",)
    encoders: ClassVar[dict[str, str]] = {"image": "get_image_features", "video": "get_video_features"}

    def tiles(self, encoded: Encoded) -> list[int]:
        """As many as the image's best resolution takes, and the base."""
        from transformers.models.llava_next_video.modeling_llava_next_video import image_size_to_num_patches

        size = self.config.vision_config.image_size
        grid = self.config.image_grid_pinpoints
        return [image_size_to_num_patches(s, grid, size) for s in encoded.arguments["image_sizes"]]

    def packed(self, encoded: Encoded, features: torch.Tensor, newline: float) -> list[torch.Tensor]:
        """The model's `pack_image_features` on one channel."""
        parts = torch.split(features, self.tiles(encoded))
        strategy = self.config.vision_feature_select_strategy
        root: Any = self.root
        marks, _ = root.pack_image_features(
            parts, encoded.arguments["image_sizes"], strategy, image_newline=features.new_full((1,), newline)
        )
        return [mark.squeeze(-1) for mark in marks]

    def pooled(self, features: torch.Tensor) -> torch.Tensor:
        """The model's average pooling."""
        pool: Any = self.root.vision_resampler
        return pool(features)
