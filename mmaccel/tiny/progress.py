"""Training that can be stopped and resumed, and folders that are replaced in one step."""

from __future__ import annotations

import copy
import json
import platform
import shutil
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

__all__ = ["export_pipeline", "load_progress", "save_progress", "timed", "versions"]


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


@contextmanager
def timed(seconds: dict[str, int], phase: str) -> Iterator[None]:
    """Note in `seconds` how long the block took."""
    begun = time.monotonic()
    yield
    seconds[phase] = round(time.monotonic() - begun)


def versions() -> dict[str, str]:
    """Versions of what a training run stands on."""
    import diffusers
    import numpy
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
    }


def export_pipeline(pipe: Any, folder: Path, facts: Mapping[str, Any], card: str) -> None:
    """Write a diffusers pipeline with float16 weights, `facts` as scores.json and a card, replacing what is there."""
    fresh = folder.with_name(folder.name + ".new")
    old = folder.with_name(folder.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    copy.deepcopy(pipe).to(torch.float16).save_pretrained(fresh)
    (fresh / "scores.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (fresh / "README.md").write_text(card, encoding="utf-8")
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
