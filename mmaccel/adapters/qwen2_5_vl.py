"""Qwen2.5-VL: like Qwen2-VL, but most vision blocks attend inside windows."""

from __future__ import annotations

from typing import Any

import torch

from mmaccel.adapters.qwen2_vl import Qwen2VL
from mmaccel.adapters.vision import window_order


class Qwen25VL(Qwen2VL):
    """Qwen2.5-VL: scores are read at the last block that sees the whole frame."""

    family = "qwen2.5-vl"
    model_types = ("qwen2_5_vl",)

    def score_layer(self, chosen: Any = None) -> int:  # noqa: ARG002
        """The last full-attention block."""
        return max(self.config.vision_config.fullatt_block_indexes)

    def sees_whole_frames(self, layer: int) -> int:
        """Most blocks work in windows; before the first that does not, none sees a frame."""
        whole = self.config.vision_config.fullatt_block_indexes
        return max((block for block in whole if block <= layer), default=min(whole))

    def clock(self, group: int, seconds: float) -> float | None:  # noqa: ARG002
        """Absolute time, in steps of the config."""
        return seconds * self.config.vision_config.tokens_per_second

    def in_order(self, grids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The blocks work in window order."""
        order = window_order(self.config.vision_config, grids)
        return scores[torch.argsort(order.to(scores.device))]
