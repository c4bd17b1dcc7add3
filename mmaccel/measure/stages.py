"""Time to first token, stage by stage, and time per output token."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmaccel.adapters import video_lm
from mmaccel.api import accelerate
from mmaccel.core.patching import Patcher
from mmaccel.errors import MMAccelError
from mmaccel.measure.boundaries import split, watch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["DENSE", "DeviceClock", "Spread", "StageTimes", "compare", "first_token", "time_per_output_token", "ttft"]

DENSE = "dense"


@dataclass(frozen=True)
class Spread:
    """Seconds over repeats: median, 20th and 80th percentile, and how many repeats there were."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of some values."""
        low, median, high = np.percentile(values, (20, 50, 80)).tolist()
        return cls(median, low, high, len(values))

    def as_dict(self) -> dict[str, float]:
        """Plain data, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class StageTimes:
    """Where the time to first token goes, in seconds.

    stages: disjoint, in the order of the pipeline: what was passed as `before` (such as "decode"), then "encode" (the
    vision tower), "project" (the rest of the encoder call: projector, pooling, packing), "prefill" (the language
    model) and "rest" (token embedding, output head, what `generate` does). total: their sum, call by call. overhead:
    how much of the total mmaccel's own scoring, selecting and placing took; contained in the stages.
    """

    stages: dict[str, Spread]
    total: Spread
    overhead: Spread

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: {"total": {...}, "overhead": {...}, "stages": {name: {...}}}."""
        return asdict(self)


class DeviceClock:
    """Reads the time of the host, or marks a place in the stream of a GPU without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.cuda, self.device = device.type == "cuda", device

    def read(self) -> Any:
        """The time now."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """The time between two readings; on a GPU both must have happened."""
        return start.elapsed_time(end) / 1e3 if self.cuda else end - start

    def wait(self) -> float:
        """The time of the host when all work is done."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class _Samples:
    """The calls of one setting."""

    def __init__(self, before: Mapping[str, float] | None) -> None:
        self.before = dict(before or {})
        self.stages: list[dict[str, float]] = []
        self.own: list[float] = []

    def add(self, stages: dict[str, float], own: float) -> None:
        self.stages.append({**self.before, **stages})
        self.own.append(own)

    def times(self) -> StageTimes:
        return StageTimes(
            {name: Spread.of([sample[name] for sample in self.stages]) for name in self.stages[0]},
            Spread.of([sum(sample.values()) for sample in self.stages]),
            Spread.of(self.own),
        )


def first_token(model: Any, inputs: Mapping[str, Any]) -> Any:
    """Run a model up to its first new token: `generate` with one greedy token, or a forward where there is none."""
    with torch.no_grad():
        if hasattr(model, "generate"):
            return model.generate(**inputs, max_new_tokens=1, do_sample=False)
        return model(**inputs)


def ttft(
    model: Any,
    inputs: Mapping[str, Any],
    *,
    repeats: int = 5,
    warmup: int = 1,
    before: Mapping[str, float] | None = None,
) -> StageTimes:
    """Time `model` as it stands, methods on it included, from its inputs to the first new token.

    A call is `generate` with one greedy new token, or a forward if the model has no `generate`. `inputs` are those of
    `model(**inputs)`; `before` adds stages that came earlier, in seconds ("decode", "preprocess"). On CUDA stages are
    told apart by events on the stream, without a wait between them. The model is left exactly as it was.

    Raises:
        AdapterError: the model is no vision-language model that has an adapter.
        MMAccelError: repeats < 1 or warmup < 0.
    """
    _check(repeats, warmup)
    samples = _Samples(before)
    for number in range(warmup + repeats):
        sample = _one_call(model, inputs)
        if number >= warmup:
            samples.add(*sample)
    return samples.times()


def compare(
    model: Any,
    inputs: Mapping[str, Any],
    specs: Sequence[str],
    *,
    repeats: int = 5,
    warmup: int = 1,
    before: Mapping[str, float] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, StageTimes]:
    """Time the dense model and each stack of methods in turn, round by round, so that drift hits all alike.

    The result has "dense" first, then the specs as given. Methods are put on and taken off outside of the timed part.
    `progress(done, total)` is called after each call.

    Raises:
        MMAccelError: the dense model runs eager attention (a ratio against it would flatter), or as `ttft`.
        MethodError, NotApplicableError: as `mmaccel.accelerate`.
    """
    _check(repeats, warmup)
    implementation = getattr(video_lm(model).language_model.config, "_attn_implementation", None)
    if implementation == "eager":
        raise MMAccelError(
            "the model runs eager attention, and a ratio against it would flatter every method; call "
            "model.set_attn_implementation('sdpa') first."
        )
    samples = {spec: _Samples(before) for spec in (DENSE, *specs)}
    done = 0
    for number in range(warmup + repeats):
        for spec, sample in samples.items():
            with ExitStack() as stack:
                if spec != DENSE:
                    stack.enter_context(accelerate(model, spec))
                times = _one_call(model, inputs)
            if number >= warmup:
                sample.add(*times)
            done += 1
            if progress is not None:
                progress(done, (warmup + repeats) * len(samples))
    return {spec: sample.times() for spec, sample in samples.items()}


def _one_call(model: Any, inputs: Mapping[str, Any]) -> tuple[dict[str, float], float]:
    clock = DeviceClock(next(video_lm(model).target.parameters()).device)
    with watch(model, clock.read) as spans:
        start = clock.wait()
        first_token(model, inputs)
        whole = clock.wait() - start
    return split(spans.totals(clock.seconds), whole)


def time_per_output_token(
    model: Any, inputs: Mapping[str, Any], *, new_tokens: int = 16, repeats: int = 3, warmup: int = 1
) -> Spread:
    """Seconds for each token behind the first one, greedy: (end of last step - end of prefill) / (steps - 1).

    Raises:
        MMAccelError: new_tokens < 2, the model has no `generate`, or it stopped after the first token.
    """
    _check(repeats, warmup)
    if new_tokens < 2:
        raise MMAccelError(f"new_tokens must be at least 2 to time a token behind the first one, not {new_tokens}.")
    if not hasattr(model, "generate"):
        raise MMAccelError(f"{type(model).__name__} has no generate, so it has no output tokens to time.")
    language_model = video_lm(model).language_model
    clock = DeviceClock(next(model.parameters()).device)
    seconds = []
    for number in range(warmup + repeats):
        ends: list[Any] = []
        patcher = Patcher()
        patcher.after(language_model, lambda *_, ends=ends: ends.append(clock.read()))
        try:
            with torch.no_grad():
                model.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
            clock.wait()
        finally:
            patcher.undo()
        if len(ends) < 2:
            raise MMAccelError("the model stopped after its first token, so there is no time per output token.")
        if number >= warmup:
            seconds.append(clock.seconds(ends[0], ends[-1]) / (len(ends) - 1))
    return Spread.of(seconds)


def _check(repeats: int, warmup: int) -> None:
    if repeats < 1 or warmup < 0:
        raise MMAccelError(f"repeats must be at least 1 and warmup at least 0, not {repeats} and {warmup}.")
