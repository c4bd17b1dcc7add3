"""Quality of generated clips and images: is the prompt read back by the video-QA model, how far apart are two clips."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmaccel.tiny.scoring import answers, prompt
from mmaccel.tiny.stories import Story, framed, stage
from mmaccel.tiny.world import questions

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mmaccel.tiny.world import Question

__all__ = ["asked", "clip_features", "feature_distance", "psnr", "read_back", "replies_right", "still"]


def asked(story: Story) -> list[Question]:
    """What can be asked of any clip of a story, with the answers that its prompt gives."""
    return questions(stage(story, 0))


def still(image: np.ndarray) -> np.ndarray:
    """An image uint8 [H, W, 3] as a clip of 21 equal frames."""
    return np.repeat(image[None], 21, axis=0)


def read_back(
    model: Any, processor: Any, clips: Iterable[np.ndarray], stories: Sequence[Story], kinds: Sequence[str] = ()
) -> dict[str, Any]:
    """Ask the video-QA model about clips uint8 [T, WINDOW, WINDOW, 3] and compare with what the prompts say.

    Returns `clips`, `whole` (the share of clips with every answer right), `answers` (the share of right answers) and
    `by_kind` (the same of each kind, with its number of questions). `kinds` leaves other questions out.
    """
    hits: dict[str, list[bool]] = {}
    whole = []
    for frames, story in zip(clips, stories, strict=True):
        right = replies_right(model, processor, frames, story, kinds)
        whole.append(all(hit for _, hit in right))
        for kind, hit in right:
            hits.setdefault(kind, []).append(hit)
    every = [hit for values in hits.values() for hit in values]
    return {
        "clips": len(whole),
        "whole": float(np.mean(whole)),
        "answers": float(np.mean(every)),
        "by_kind": {kind: {"share": float(np.mean(v)), "questions": len(v)} for kind, v in sorted(hits.items())},
    }


def replies_right(
    model: Any, processor: Any, frames: np.ndarray, story: Story, kinds: Sequence[str] = ()
) -> list[tuple[str, bool]]:
    """The kind of each question about one clip uint8 [T, WINDOW, WINDOW, 3], and whether the answer was the prompt's.

    `kinds` leaves other questions out.
    """
    wanted = [question for question in asked(story) if not kinds or question.kind in kinds]
    replies = answers(model, processor, framed(frames), [question.text for question in wanted])
    return [(question.kind, question.answer == reply) for question, reply in zip(wanted, replies, strict=True)]


def psnr(frames: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 arrays of one shape; infinite if they are equal."""
    error = np.mean((frames.astype(np.float64) - reference.astype(np.float64)) ** 2)
    return math.inf if error == 0 else float(10.0 * np.log10(255.0**2 / error))


def feature_distance(model: Any, processor: Any, frames: np.ndarray, reference: np.ndarray) -> float:
    """Mean cosine distance, 0 to 2, between the video-QA model's visual tokens of two clips uint8 [T, H, W, 3]."""
    first, second = clip_features(model, processor, frames), clip_features(model, processor, reference)
    return float(1.0 - torch.cosine_similarity(first, second, dim=-1).mean())


@torch.no_grad()
def clip_features(model: Any, processor: Any, frames: np.ndarray) -> torch.Tensor:
    """The video-QA model's visual tokens of a clip uint8 [T, H, W, 3], float64 [tokens, width]."""
    text = [processor.apply_chat_template(prompt("how many objects are there ?"), add_generation_prompt=True)]
    pixels = processor(text=text, videos=[framed(frames)], return_tensors="pt")["pixel_values_videos"]
    seen = model.model.get_video_features(pixels).pooler_output
    return (seen[0] if isinstance(seen, (list, tuple)) else seen).double()
