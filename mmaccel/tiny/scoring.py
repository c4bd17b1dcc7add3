"""Accuracy of a video-QA folder on clips of a split, through processor and model as a user would call them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mmaccel.tiny.world import frame_times, render, sample_clip, sample_questions

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["answers", "prompt", "score_folder"]


def prompt(question: str) -> list[dict[str, Any]]:
    """The chat of one question about one video."""
    return [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]


@torch.no_grad()
def answers(model: Any, processor: Any, frames: Any, asked: list[str]) -> list[str]:
    """Greedy one-word answers to several questions about the same frames uint8 [T, H, W, 3]."""
    text = [processor.apply_chat_template(prompt(question), add_generation_prompt=True) for question in asked]
    inputs = processor(text=text, videos=[frames] * len(asked), padding=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    replies = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [reply.strip() for reply in replies]


def score_folder(folder: Path, split: str, clips: int, first: int = 0) -> dict[str, Any]:
    """Accuracy (exact match of the answer) per kind and overall on `clips` clips of a split, with question counts."""
    from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration

    model = LlavaOnevisionForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    hits: dict[str, list[bool]] = {}
    for index in range(first, first + clips):
        clip = sample_clip(index, split)
        asked = sample_questions(clip)
        replies = answers(model, processor, render(clip, frame_times()), [question.text for question in asked])
        for question, reply in zip(asked, replies, strict=True):
            hits.setdefault(question.kind, []).append(reply == question.answer)
    every = [hit for values in hits.values() for hit in values]
    return {
        "clips": clips,
        "questions": len(every),
        "accuracy": sum(every) / len(every),
        "by_kind": {kind: {"accuracy": sum(v) / len(v), "questions": len(v)} for kind, v in hits.items()},
    }
