"""Scores of the embedded generators: what the video-QA model reads back of prompts, and what it reads in real clips."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmaccel.tiny import IMAGE_CALL, VIDEO_CALL, video_qa
from mmaccel.tiny.read_back import read_back, still
from mmaccel.tiny.stories import Clause, Story, render_story, stage

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["IMAGE_KINDS", "generate_clips", "generate_images", "image_scores", "image_story", "video_scores"]

IMAGE_KINDS = ("color", "shape", "count")


def _generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def generate_clips(pipe: Any, prompts: Sequence[str], seeds: Sequence[int], batch: int = 8, **call: Any) -> np.ndarray:
    """Clips uint8 [N, FRAMES, WINDOW, WINDOW, 3] of prompts, each from its own seed; `call` overrides `VIDEO_CALL`."""
    parts = []
    for first in range(0, len(prompts), batch):
        some = slice(first, first + batch)
        found = pipe(
            list(prompts[some]), generator=_generators(seeds[some]), output_type="np", **{**VIDEO_CALL, **call}
        )
        parts.append(np.floor(found.frames * 255.0 + 0.5).astype(np.uint8))
    return np.concatenate(parts)


def generate_images(pipe: Any, labels: Sequence[int], seeds: Sequence[int], batch: int = 24, **call: Any) -> np.ndarray:
    """Images uint8 [N, WINDOW, WINDOW, 3] of class numbers, each from its own seed; `call` overrides `IMAGE_CALL`."""
    parts = []
    for first in range(0, len(labels), batch):
        some = slice(first, first + batch)
        found = pipe(
            class_labels=list(labels[some]),
            generator=_generators(seeds[some]),
            output_type="np",
            **{**IMAGE_CALL, **call},
        )
        parts.append(np.floor(found.images * 255.0 + 0.5).astype(np.uint8))
    return np.concatenate(parts)


def video_scores(clips: np.ndarray, stories: Sequence[Story], real: bool = False) -> dict[str, Any]:
    """Read-back of generated clips, or (`real`) of rendered clips of the same stories: the ceiling."""
    model, processor = video_qa()
    if real:
        clips = np.stack([render_story(stage(story, 5_000_000 + n)) for n, story in enumerate(stories)])
    return read_back(model, processor, clips, stories)


def image_story(name: str) -> Story:
    """The story of an image label such as `red ring`: one object that stays still."""
    color, shape = name.split()
    return Story((Clause(color, shape, "still"),))


def image_scores(images: np.ndarray, names: Sequence[str], real: bool = False) -> dict[str, Any]:
    """The same for images of labels, shown as clips that stand still; color, shape and count are asked."""
    model, processor = video_qa()
    stories = [image_story(name) for name in names]
    if real:
        images = np.stack([render_story(stage(story, 5_000_000 + n), 1)[0] for n, story in enumerate(stories)])
    return read_back(model, processor, [still(image) for image in images], stories, IMAGE_KINDS)
