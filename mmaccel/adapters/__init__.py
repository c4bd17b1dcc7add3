"""Adapters: one short declarative file a model family. Looked up by `config.model_type`, imported when needed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mmaccel.errors import AdapterError

__all__ = ["families", "find_video_lm", "video_lm"]

_VIDEO_LM = {
    "llava": "mmaccel.adapters.llava:Llava",
    "llava_next_video": "mmaccel.adapters.llava_next_video:LlavaNextVideo",
    "llava_onevision": "mmaccel.adapters.llava_onevision:LlavaOnevision",
    "qwen2_vl": "mmaccel.adapters.qwen2_vl:Qwen2VL",
    "qwen2_5_vl": "mmaccel.adapters.qwen2_5_vl:Qwen25VL",
    "qwen3_vl": "mmaccel.adapters.qwen3_vl:Qwen3VL",
    "internvl": "mmaccel.adapters.internvl:InternVL",
}


def families() -> list[str]:
    """The model types that have an adapter for video and image language models."""
    return sorted(_VIDEO_LM)


def find_video_lm(target: Any) -> Any | None:
    """The adapter of a vision-language model of transformers, or None if `target` is something else."""
    model_type = getattr(getattr(target, "config", None), "model_type", None)
    entry = _VIDEO_LM.get(model_type or "")
    if entry is None:
        return None
    module, name = entry.split(":")
    return getattr(import_module(module), name)(target)


def video_lm(target: Any) -> Any:
    """Like `find_video_lm`.

    Raises:
        AdapterError: the model has no adapter.
    """
    found = find_video_lm(target)
    if found is None:
        raise AdapterError(f"no adapter for {type(target).__name__}; adapters exist for {', '.join(families())}.")
    return found
