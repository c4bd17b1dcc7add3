"""LLaVA-1.5: a CLIP tower, one square grid of tokens an image."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from mmaccel.adapters.base import VideoLM, raster, square
from mmaccel.core.prefill import Encoded, ItemLayout
from mmaccel.errors import AdapterError


class Llava(VideoLM):
    """LLaVA-1.5 and models of its class (images only)."""

    family = "llava"
    model_types = ("llava",)
    encoders: ClassVar[dict[str, str]] = {"image": "get_image_features"}

    def __init__(self, target: nn.Module) -> None:
        super().__init__(target)
        kind = self.config.vision_config.model_type
        if kind == "pixtral" or (kind == "clip_vision_model" and not self.has_class_token):
            why = "a Pixtral tower" if kind == "pixtral" else 'vision_feature_select_strategy="full"'
            raise AdapterError(
                f"this LLaVA has {why}, whose tokens form no square grid of patches; the adapter knows the towers that "
                "encode every image at one size, without their class token."
            )

    @property
    def has_class_token(self) -> bool:
        """CLIP towers have one; the select strategy "default" cuts it off."""
        return getattr(self.config, "vision_feature_select_strategy", "default") == "default"

    def layout(self, encoded: Encoded, where: torch.Tensor) -> list[ItemLayout]:  # noqa: ARG002
        """One grid an image."""
        return [
            ItemLayout("image", len(feature), (raster(1, *square(len(feature))),))
            for feature in encoded.output.pooler_output
        ]

    def token_scores(self, encoded: Encoded, kind: str) -> torch.Tensor:
        """Tokens are patches."""
        return self.raw_scores(encoded, kind).flatten()
