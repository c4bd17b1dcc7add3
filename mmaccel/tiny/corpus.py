"""Training data of the embedded video-QA model: rendered frames, patch labels, and questions as token rows."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from mmaccel.tiny.processing import PATCH
from mmaccel.tiny.world import (
    COLORS,
    DIRECTIONS,
    FRAMES,
    KINDS,
    SHAPES,
    SIZE,
    coverage,
    frame_times,
    questions,
    render,
    sample_clip,
    sample_crowd,
    sample_questions,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from mmaccel.tiny.world import Clip

__all__ = ["GRID", "TAIL", "Corpus", "build_corpus", "question_rows"]

GRID = SIZE // PATCH
MOST = 4
CROWD = 10
TAIL = 15


@dataclass
class Corpus:
    """Arrays of N clips. `P` = GRID * GRID patches, `MOST` = objects at most; absent objects have attribute -1.

    frames uint8 [N, FRAMES, SIZE, SIZE, 3]; share float16 [N, FRAMES, MOST, P] (covered share of each patch);
    center float16 [N, FRAMES, MOST, 2] in [-1, 1]; traits int8 [N, MOST, 4] (color, shape, direction, first frame);
    empty uint8 [N, SIZE, SIZE, 3] (frame `empty_at` int8 [N] without its objects).
    crowd, crowd_share, crowd_center, crowd_traits: the same for N single frames of up to CROWD still objects.
    """

    frames: np.ndarray
    share: np.ndarray
    center: np.ndarray
    traits: np.ndarray
    empty: np.ndarray
    empty_at: np.ndarray
    crowd: np.ndarray
    crowd_share: np.ndarray
    crowd_center: np.ndarray
    crowd_traits: np.ndarray

    def save(self, folder: Path) -> None:
        """Write one .npy file an array."""
        folder.mkdir(parents=True, exist_ok=True)
        for field in fields(self):
            np.save(folder / f"{field.name}.npy", getattr(self, field.name))

    @classmethod
    def load(cls, folder: Path) -> Corpus:
        """Map the files that `save` wrote."""
        return cls(*(np.load(folder / f"{field.name}.npy", mmap_mode="r") for field in fields(cls)))


def _labels(clip: Clip, times: Sequence[float], most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    share = np.zeros((len(times), most, GRID, GRID))
    center = np.zeros((len(times), most, 2))
    traits = np.full((most, 4), -1)
    for n, thing in enumerate(clip.things):
        traits[n] = (
            list(COLORS).index(thing.color),
            SHAPES.index(thing.shape),
            list(DIRECTIONS).index(thing.direction),
            next(k for k, time in enumerate(times) if thing.visible(time)),
        )
        for k, time in enumerate(times):
            share[k, n] = coverage(thing, time).reshape(GRID, PATCH, GRID, PATCH).mean(axis=(1, 3))
            center[k, n] = np.array(thing.at(time)) / (SIZE / 2) - 1.0
    return share.reshape(len(times), most, -1).astype(np.float16), center.astype(np.float16), traits.astype(np.int8)


def _one(split: str, index: int) -> tuple[np.ndarray, ...]:
    clip = sample_clip(index, split)
    times = frame_times()
    share, center, traits = _labels(clip, times, MOST)
    shown = [k for k in range(FRAMES) if share[k].any()]
    at = shown[index % len(shown)]
    crowd = sample_crowd(index)
    crowd_share, crowd_center, crowd_traits = _labels(crowd, (0.0,), CROWD)
    return (
        render(clip, times),
        share,
        center,
        traits,
        render(clip, times[at : at + 1], things=False)[0],
        np.array(at, dtype=np.int8),
        render(crowd, (0.0,))[0],
        crowd_share[0],
        crowd_center[0],
        crowd_traits,
    )


def _chunk(job: tuple[str, int, int]) -> tuple[np.ndarray, ...]:
    split, start, stop = job
    return tuple(np.stack(column) for column in zip(*(_one(split, i) for i in range(start, stop)), strict=True))


def build_corpus(split: str, count: int, workers: int = 2, first: int = 0) -> Corpus:
    """Render and label clips `first .. first + count` of a split with `workers` processes."""
    jobs = [(split, start, min(start + 50, first + count)) for start in range(first, first + count, 50)]
    with ProcessPoolExecutor(workers) as pool:
        parts = list(pool.map(_chunk, jobs))
    return Corpus(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def question_rows(
    split: str, index: int, tokenizer: PreTrainedTokenizerBase, sampled: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The questions of a clip as token rows int16 [n, TAIL] and kinds int8 [n].

    A row is the prompt after the video, `<|assistant|>`, the answer and `<|end|>`, padded on the right. `sampled`
    takes the scoring set (`sample_questions`) instead of every question.
    """
    clip = sample_clip(index, split)
    found = sample_questions(clip) if sampled else questions(clip)
    rows = np.zeros((len(found), TAIL), dtype=np.int16)
    for row, question in zip(rows, found, strict=True):
        ids = tokenizer(f"{question.text}<|end|><|assistant|>{question.answer}<|end|>")["input_ids"]
        row[: len(ids)] = ids
    return rows, np.array([KINDS.index(question.kind) for question in found], dtype=np.int8)
