"""Quality of many methods on the same questions, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Case", "Evaluation", "Outcome", "evaluate"]


@dataclass(frozen=True)
class Case:
    """A clip and what is asked about it: frames uint8 [T, H, W, 3], questions as (text, answer, kind)."""

    frames: Any
    questions: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Outcome:
    """What one setting did on every question, in order.

    hits: bool [n]. answers: the words. kl: float64 [n], nats to the dense model. tokens_in, tokens_out: visual tokens
    a question, before and after all reduction. tokens_per_layer: float64 [layers], mean sequence length, text
    included. encoder_flops, prefill_flops: mean closed forms a question. seconds: spent in forwards, for progress only.
    """

    hits: np.ndarray
    answers: list[str]
    kl: np.ndarray
    tokens_in: float
    tokens_out: float
    tokens_per_layer: np.ndarray
    encoder_flops: float
    prefill_flops: float
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """Outcomes by spec, "dense" first; `clips` int64 [n] tells which clip a question belongs to, `kinds` its kind."""

    outcomes: dict[str, Outcome]
    clips: np.ndarray
    kinds: list[str]

    def rows(self, *, samples: int = 10_000, seed: int = 0) -> list[dict[str, Any]]:
        """One row a spec: spec, n, clips, accuracy and difference to dense with intervals (drawn by clip), ratio to
        dense, agreement, kl, tokens_in, tokens_out, encoder_flops, prefill_flops, flops, accuracy_by_kind.
        """
        raise NotImplementedError


def evaluate(
    model: Any,
    processor: Any,
    cases: Iterable[Case],
    specs: Sequence[str],
    *,
    batch: int = 16,
    share_encoder: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Answer every question with the dense model and under each spec; an answer is the most likely next token.

    `batch` clips with all their questions go through together. With `share_encoder` the clips of a batch are encoded
    once for all settings that leave the encoder alone; results are the same. `progress(n)` is called after each batch
    with the number of clips done. A method with a `seed` knob draws anew for every batch: its seed is seed * 1000003 +
    number of the batch.

    Raises:
        MMAccelError: there is no case, or an answer is not one token of the tokenizer.
        MethodError, NotApplicableError: as `mmaccel.accelerate`.
    """
    raise NotImplementedError
