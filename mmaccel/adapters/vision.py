"""Vision encoders by themselves: those of transformers, timm and open_clip, alone or in a model with a text side."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from mmaccel.adapters.base import get_module
from mmaccel.adapters.blocks import take_apart
from mmaccel.core.encoder import Encoder
from mmaccel.errors import AdapterError

__all__ = ["VisionModel", "fits", "of_vision_tower", "window_order"]

# model type of transformers -> (blocks below the tower, tokens ahead of the patches)
_TRANSFORMERS = {
    "clip_vision_model": ("encoder.layers", 1),
    "siglip_vision_model": ("encoder.layers", 0),
    "siglip2_vision_model": ("encoder.layers", 0),
    "internvl_vision": ("encoder.layer", 1),
}
_PACKED = ("qwen2_vl_vision", "qwen2_5_vl_vision", "qwen3_vl_vision")


def fits(model: Any) -> bool:
    """Whether `model` is a vision encoder, or a pair of encoders one of which is."""
    return _tower(model) is not None


class VisionModel:
    """A vision encoder without a language model that generates.

    Raises:
        AdapterError: its blocks are built in a way that is not known.
    """

    def __init__(self, model: nn.Module) -> None:
        found = _tower(model)
        assert found is not None
        self.target = self.root = model
        self._path, self.family, self._blocks, self._prefix = found
        self._tower = get_module(model, self._path)
        if getattr(getattr(self._tower, "transformer", None), "batch_first", True) is False:
            raise AdapterError("this open_clip model was built with batch_first=False; build it without that.")

    def encoder(self) -> Encoder:
        """The encoder, taken apart."""
        blocks = [take_apart(block) for block in get_module(self._tower, self._blocks)]  # type: ignore[union-attr]
        if not blocks:
            raise AdapterError(f"this {self.family} has no blocks to put a method on.")
        packed = self.family in _PACKED
        config: Any = getattr(self._tower, "config", None)
        merge = config.spatial_merge_size if packed else 1
        return Encoder(self._tower, self._path or type(self._tower).__name__, blocks, len(blocks) - 1, self._prefix,
                       packed, merge, _read(self._tower), _order(config))  # fmt: skip


def of_vision_tower(site: Any) -> Encoder:
    """The vision encoder of a vision-language model."""
    blocks = [take_apart(block) for block in site.vision_blocks()]
    if not blocks:
        raise AdapterError(f"the vision tower of this {site.family} has no blocks to put a method on.")
    config = site.config.vision_config
    packed = not hasattr(config, "image_size")
    prefix = 0 if packed else _TRANSFORMERS.get(config.model_type, ("", int(site.has_class_token)))[1]
    return Encoder(
        site.vision_tower, site.module_paths()[0], blocks, site.score_layer() if not packed else len(blocks) - 1,
        prefix, packed, config.spatial_merge_size if packed else 1, _read(site.vision_tower), _order(config),
    )  # fmt: skip


def _read(tower: Any) -> tuple[int, ...]:
    return tuple(getattr(tower, "deepstack_visual_indexes", ()))


def _order(config: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    return partial(window_order, config) if hasattr(config, "fullatt_block_indexes") else None


def window_order(config: Any, grids: torch.Tensor) -> torch.Tensor:
    """Qwen2.5's vision blocks work in the order of their windows: which merge group stands where, int64 [groups]."""
    from transformers.vision_utils import get_vision_window_index

    order, _ = get_vision_window_index(
        grids, spatial_merge_size=config.spatial_merge_size, window_size=config.window_size,
        patch_size=config.patch_size,
    )  # fmt: skip
    return order


def _tower(model: Any) -> tuple[str, str, str, int] | None:
    """(path of the tower, family, path of its blocks, tokens ahead of the patches)."""
    if not isinstance(model, nn.Module):
        return None
    for path in ("", "vision_model", "visual", "visual.trunk"):
        part: Any = model
        for name in filter(None, path.split(".")):
            part = getattr(part, name, None)
        found = _described(part)
        if found is not None:
            return path, *found
    return None


def _described(part: Any) -> tuple[str, str, int] | None:
    if part is None or not isinstance(part, nn.Module):
        return None
    kind = getattr(getattr(part, "config", None), "model_type", None)
    if kind in _TRANSFORMERS and hasattr(part, "encoder"):
        return kind, *_TRANSFORMERS[kind]
    if kind in _PACKED and hasattr(part, "blocks"):
        return kind, "blocks", 0
    timm = sys.modules.get("timm.models.vision_transformer")
    if timm is not None and isinstance(part, timm.VisionTransformer):
        return "timm", "blocks", int(part.num_prefix_tokens)  # type: ignore[arg-type]
    open_clip = sys.modules.get("open_clip.transformer")
    if open_clip is not None and isinstance(part, open_clip.VisionTransformer):
        return "open_clip", "transformer.resblocks", 1
    return None
