"""Text language models of transformers: anything that generates from token ids alone."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["TextLM", "fits"]


def fits(model: Any) -> bool:
    """Whether `model` is a transformers model that generates text."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return False
    return model.can_generate() and getattr(model, "main_input_name", "") == "input_ids"


class TextLM:
    """A text language model: `generate` is its only place of work."""

    def __init__(self, model: Any) -> None:
        self.target = model
        self.family = getattr(model.config, "model_type", type(model).__name__)
