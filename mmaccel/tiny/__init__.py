"""The embedded models: real library classes with small configs, trained on worlds that the project renders itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor

__all__ = ["VIDEO_QA_FOLDER", "video_qa"]

VIDEO_QA_FOLDER = Path(__file__).parent / "video_qa"


def video_qa(
    dtype: torch.dtype | None = None,
) -> tuple[LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor]:
    """Load the embedded video-QA model, in eval mode with SDPA attention, and its processor.

    `dtype` defaults to `torch.float32`. Scores and limits: README.md in `VIDEO_QA_FOLDER`.
    """
    import torch
    from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor

    model = LlavaOnevisionForConditionalGeneration.from_pretrained(
        VIDEO_QA_FOLDER, dtype=torch.float32 if dtype is None else dtype, attn_implementation="sdpa"
    )
    return model.eval(), LlavaOnevisionProcessor.from_pretrained(VIDEO_QA_FOLDER)
