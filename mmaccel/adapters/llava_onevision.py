"""LLaVA-OneVision: SigLIP tower without class token, videos pooled 2 x 2 with one newline token at the end."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from mmaccel.adapters.llava_next_video import TiledVideoLM
from mmaccel.core.prefill import Encoded


class LlavaOnevision(TiledVideoLM):
    """LLaVA-OneVision."""

    family = "llava-onevision"
    closing_tokens: ClassVar[int] = 1
    model_types = ("llava_onevision",)
    encoders: ClassVar[dict[str, str]] = {"image": "get_image_features", "video": "get_video_features"}

    def tiles(self, encoded: Encoded) -> list[int]:
        """Single images are tiled; of several in one prompt each is one tile."""
        from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

        sizes = encoded.arguments["image_sizes"]
        counts = encoded.arguments.get("batch_num_images")
        tiled = [True] * len(sizes) if counts is None else [n == 1 for n in counts for _ in range(n)]
        size = self.config.vision_config.image_size
        grid = self.config.image_grid_pinpoints
        return [image_size_to_num_patches(s, grid, size) if t else 1 for s, t in zip(sizes, tiled, strict=True)]

    def packed(self, encoded: Encoded, features: torch.Tensor, newline: float) -> list[torch.Tensor]:
        """The model's `pack_image_features` on one channel."""
        parts = torch.split(features, self.tiles(encoded))
        aspect = encoded.arguments.get("vision_aspect_ratio") or self.config.vision_aspect_ratio
        root: Any = self.root
        marks, _ = root.pack_image_features(
            parts,
            encoded.arguments["image_sizes"],
            image_newline=features.new_full((1,), newline),
            vision_aspect_ratio=aspect,
        )
        return [mark.squeeze(-1) for mark in marks]

    def frame_boundary(self) -> list[nn.Module | tuple[nn.Module, str]]:
        """Pooling comes last."""
        return [(self.root, "apply_pooling")]

    def pooled(self, features: torch.Tensor) -> torch.Tensor:
        """The model's bilinear pooling."""
        root: Any = self.root
        return root.apply_pooling(features)
