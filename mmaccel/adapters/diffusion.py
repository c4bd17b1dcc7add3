"""Diffusion transformers of diffusers, alone or inside a pipeline."""

from __future__ import annotations

import sys
from typing import Any

from mmaccel.errors import AdapterError

__all__ = ["Diffusion", "fits"]


def _classes(*names: str) -> tuple[type, ...]:
    # an object of diffusers cannot exist before diffusers is imported, so nothing is imported here to ask
    diffusers = sys.modules.get("diffusers")
    return tuple(getattr(diffusers, name) for name in names) if diffusers is not None else ()


def fits(model: Any) -> bool:
    """Whether `model` is a pipeline or a model of diffusers."""
    return isinstance(model, _classes("DiffusionPipeline", "ModelMixin"))


class Diffusion:
    """A pipeline's transformer, or a transformer by itself.

    Raises:
        AdapterError: the pipeline has no transformer (U-Net pipelines are not supported).
    """

    def __init__(self, model: Any) -> None:
        self.pipeline = model if isinstance(model, _classes("DiffusionPipeline")) else None
        transformer = getattr(model, "transformer", None) if self.pipeline is not None else model
        if transformer is None:
            raise AdapterError(f"{type(model).__name__} has no transformer; only transformer pipelines are supported.")
        self.transformer = self.target = transformer
        self.family = type(transformer).__name__
