"""Training that can be stopped and resumed: one file a phase, replaced in one step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["load_progress", "save_progress"]


def save_progress(path: Path, step: int, parts: Mapping[str, Any]) -> None:
    """Write the number of finished steps and the `state_dict` of every part."""
    fresh = path.with_suffix(".new")
    torch.save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, fresh)
    fresh.replace(path)


def load_progress(path: Path, parts: Mapping[str, Any]) -> int:
    """Fill the parts from a file of `save_progress`; the number of finished steps, 0 if there is no file."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["step"]
