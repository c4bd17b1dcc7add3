"""Let a vision tower do less, and bring its output back to full size for everything behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mmaccel.core.patching import Patcher
from mmaccel.core.prefill import encoding
from mmaccel.core.run import current

__all__ = ["gate_tower"]

# thin(modality, arguments of the encoder call, pixels, grids) -> (pixels, grids, Thinned), or None to leave it alone
Thin = Callable[[str, dict[str, Any], torch.Tensor, "torch.Tensor | None"], Any]


@dataclass
class _Open:
    """The gates that the running tower call went through, outermost first."""

    passed: dict[object, Any] = field(default_factory=dict)


def gate_tower(patcher: Patcher, site: Any, thin: Thin) -> None:
    """Pass every call of the vision tower that encodes a prompt's images or video through `thin`."""
    key = object()

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run, encoded = current(site.root), encoding(site)
        if run is None or encoded is None:
            return None
        kwargs = dict(kwargs)
        name = next((n for n in ("pixel_values", "hidden_states") if n in kwargs), None)
        pixels = kwargs[name] if name else args[0]
        made = thin(encoded.modality, encoded.arguments, pixels, kwargs.get("grid_thw"))
        if made is None:
            return None
        pixels, grids, thinned = made
        run.get(_Open).passed[key] = thinned
        encoded.thinned.append(thinned)
        if grids is not None:
            kwargs["grid_thw"] = grids
        elif site.interpolates:
            kwargs["interpolate_pos_encoding"] = True
        if name:
            kwargs[name] = pixels
            return args, kwargs
        return (pixels, *args[1:]), kwargs

    def after(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
        run = current(site.root)
        thinned = run.get(_Open).passed.pop(key, None) if run is not None else None
        return None if thinned is None else _restored(output, thinned.output)

    patcher.before(site.vision_tower, before)
    # of several gates the innermost is undone first
    patcher.after(site.vision_tower, after, first=True)


def _restored(value: Any, restore: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return restore(value)
    if isinstance(value, dict):  # a ModelOutput is one, and must stay what it is
        for name in list(value):
            value[name] = _restored(value[name], restore)
        return value
    if isinstance(value, (tuple, list)):
        return type(value)(_restored(part, restore) for part in value)
    return value
