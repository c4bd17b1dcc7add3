"""Time to first token, stage by stage, and time per output token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["DENSE", "Spread", "StageTimes", "compare", "time_per_output_token", "ttft"]

DENSE = "dense"


@dataclass(frozen=True)
class Spread:
    """Seconds over repeats: median, 20th and 80th percentile, and how many repeats there were."""

    median: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float]:
        """Plain data, ready for JSON."""
        raise NotImplementedError


@dataclass(frozen=True)
class StageTimes:
    """Where the time to first token goes, in seconds.

    stages: disjoint, in the order of the pipeline: what was passed as `before` (such as "decode"), then "encode" (the
    vision tower), "project" (the rest of the encoder call: projector, pooling, packing), "prefill" (the language
    model) and "rest" (token embedding, output head, what generate does). total: their sum, call by call. overhead: how
    much of the total was spent in mmaccel's own scoring, selecting and placing; 0 without a handle.
    """

    stages: dict[str, Spread]
    total: Spread
    overhead: Spread

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: {"total": {...}, "overhead": {...}, "stages": {name: {...}}}."""
        raise NotImplementedError


def ttft(
    model: Any,
    inputs: Mapping[str, Any],
    *,
    repeats: int = 5,
    warmup: int = 1,
    before: Mapping[str, float] | None = None,
) -> StageTimes:
    """Time `model` from its inputs to the first new token, as it stands: with what is on it, and SDPA or whatever it runs.

    A call is `generate` with one greedy new token, or a forward if the model has no `generate`. `inputs` are those of
    `model(**inputs)`; `before` adds stages that came earlier, in seconds ("decode", "preprocess"). On CUDA stages are
    told apart by events on the stream, without a wait between them. The model is left exactly as it was.

    Raises:
        AdapterError: the model is no vision-language model that has an adapter.
        MMAccelError: repeats < 1 or warmup < 0.
    """
    raise NotImplementedError


def compare(
    model: Any,
    inputs: Mapping[str, Any],
    specs: Sequence[str],
    *,
    repeats: int = 5,
    warmup: int = 1,
    before: Mapping[str, float] | None = None,
) -> dict[str, StageTimes]:
    """Time the dense model and each stack of methods in turn, round by round, so that drift hits all alike.

    The result has "dense" first, then the specs as given. Methods are put on and taken off outside of the timed part.

    Raises:
        MMAccelError: the dense model runs eager attention (a ratio against it would flatter), or as `ttft`.
        MethodError, NotApplicableError: as `mmaccel.accelerate`.
    """
    raise NotImplementedError


def time_per_output_token(
    model: Any, inputs: Mapping[str, Any], *, new_tokens: int = 16, repeats: int = 3, warmup: int = 1
) -> Spread:
    """Seconds for each token behind the first one, greedy: (end of last step - end of prefill) / (new_tokens - 1).

    Raises:
        MMAccelError: new_tokens < 2, the model has no `generate`, or it stopped after the first token.
    """
    raise NotImplementedError
