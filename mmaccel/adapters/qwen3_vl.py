"""Qwen3-VL: like Qwen2-VL, with features of inner vision layers added in the first decoder layers (deep stack)."""

from __future__ import annotations

from mmaccel.adapters.qwen2_vl import Qwen2VL


class Qwen3VL(Qwen2VL):
    """Qwen3-VL: every frame pair is a run of tokens of its own behind a time stamp."""

    family = "qwen3-vl"
    model_types = ("qwen3_vl",)

    def clock(self, group: int, seconds: float) -> float | None:  # noqa: ARG002
        """Time is told by the text between the frames."""
        return None
