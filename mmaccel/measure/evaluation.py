"""Quality of many methods on the same questions, in batches."""

from __future__ import annotations

import re
import time
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmaccel.adapters import video_lm
from mmaccel.api import accelerate
from mmaccel.compose import arrange, normalise
from mmaccel.core.patching import Patcher
from mmaccel.errors import MMAccelError
from mmaccel.measure.flops import prefill_flops
from mmaccel.measure.outcome import Cost, Evaluation, Outcome, merge
from mmaccel.measure.quality import kl_to_dense
from mmaccel.measure.replay import Replay, encoder_key
from mmaccel.measure.stages import DENSE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from mmaccel.method import Method
    from mmaccel.report import Report

__all__ = ["Case", "Evaluation", "Outcome", "evaluate"]

_SEED_STEP = 1_000_003


@dataclass(frozen=True)
class Case:
    """A clip and what is asked about it: frames uint8 [T, H, W, 3], questions as (text, answer, kind)."""

    frames: Any
    questions: Sequence[tuple[str, str, str]]


def evaluate(
    model: Any,
    processor: Any,
    cases: Iterable[Case],
    specs: Sequence[str],
    *,
    batch: int = 16,
    share_encoder: bool = True,
    first_batch: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Answer every question with the dense model and under each spec; an answer is the most likely next token.

    `batch` clips go through together, one question of each at a time. With `share_encoder` a batch is encoded once for
    all questions and for all settings that treat the encoder alike; the results are the same. `progress(n)` is called
    after each batch with the number of clips done. A method with a `seed` knob draws anew for every batch: its seed is
    seed * 1000003 + number of the batch, counted from `first_batch`.

    Raises:
        MMAccelError: there is no case with a question, or an answer is not one token of the tokenizer.
        MethodError, NotApplicableError: as `mmaccel.accelerate`.
    """
    if batch < 1:
        raise MMAccelError(f"batch must be at least 1 clip, not {batch}.")
    stacks = {spec: arrange(normalise([spec])) for spec in specs}
    parts: list[Evaluation] = []
    done = 0
    for number, group in enumerate(_groups(cases, batch), start=first_batch):
        settings = {spec: [_reseeded(method, number) for method in stack] for spec, stack in stacks.items()}
        parts.append(_one_batch(model, _Questions(model, processor, group, done), settings, share_encoder))
        done += len(group)
        if progress is not None:
            progress(done)
    if not parts:
        raise MMAccelError("there is no clip with a question to evaluate on.")
    return merge(parts)


def _groups(cases: Iterable[Case], size: int) -> Iterator[list[Case]]:
    iterator = (case for case in cases if case.questions)
    while group := list(islice(iterator, size)):
        yield group


def _reseeded(method: Method, number: int) -> Method:
    if not any(entry.name == "seed" for entry in fields(method)):
        return method
    seed: int = method.seed  # type: ignore[attr-defined]
    return replace(method, seed=seed * _SEED_STEP + number)  # type: ignore[call-arg]


class _Questions:
    """The questions of some clips as inputs: in round q each clip is asked its q-th question.

    A clip with fewer questions than others repeats its first one in the rounds left over; that answer is not used.
    `used` are the places (round, row) of the questions, in the order of clips and questions.
    """

    def __init__(self, model: Any, processor: Any, cases: Sequence[Case], first_clip: int) -> None:
        self.tokenizer = processor.tokenizer
        self.clips = np.array([first_clip + row for row, case in enumerate(cases) for _ in case.questions])
        self.kinds = [kind for case in cases for _, _, kind in case.questions]
        self.answers = np.array([self._token(answer) for case in cases for _, answer, _ in case.questions])
        self.used = [(q, row) for row, case in enumerate(cases) for q in range(len(case.questions))]
        videos = [torch.as_tensor(np.asarray(case.frames)).permute(0, 3, 1, 2) for case in cases]
        self.rounds: list[dict[str, Any]] = []
        for q in range(max(len(case.questions) for case in cases)):
            asked = [case.questions[q if q < len(case.questions) else 0][0] for case in cases]
            text = [processor.apply_chat_template(_chat(question), add_generation_prompt=True) for question in asked]
            given = processor(text=text, videos=videos, padding=True, return_tensors="pt").to(model.device)
            pixels = {name: value.to(model.dtype) for name, value in given.items() if value.is_floating_point()}
            # the pixels are the same in every round, so one copy serves
            self.rounds.append({**given, **(pixels if q == 0 else {name: self.rounds[0][name] for name in pixels})})

    def _token(self, answer: str) -> int:
        ids = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            raise MMAccelError(
                f"the answer {answer!r} is not one token of this model; only one-word answers are scored."
            )
        return ids[0]


def _chat(question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]


def _one_batch(model: Any, questions: _Questions, settings: dict[str, list[Method]], share: bool) -> Evaluation:
    site, patcher = video_lm(model), Patcher()
    outcomes: dict[str, Outcome] = {}
    dense: torch.Tensor | None = None
    try:
        replay = Replay(site, patcher, share=share)
        for spec, methods in {DENSE: [], **settings}.items():
            replay.key = encoder_key(methods)
            start = time.perf_counter()
            with ExitStack() as stack:
                handle = stack.enter_context(accelerate(model, methods)) if methods else None
                answered = [_last_logits(model, inputs) for inputs in questions.rounds]
            seconds = time.perf_counter() - start
            logits = torch.stack([answered[q][row] for q, row in questions.used])
            dense = logits if dense is None else dense
            encoder = replay.flops / len(answered[0])
            cost = _cost(model, questions, handle.report() if handle else None, encoder)
            outcomes[spec] = _outcome(logits, dense, questions, cost, seconds)
    finally:
        patcher.undo()
    return Evaluation(outcomes, questions.clips, questions.kinds)


def _last_logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].float()


def _outcome(
    logits: torch.Tensor, dense: torch.Tensor, questions: _Questions, cost: Cost, seconds: float
) -> Outcome:  # fmt: skip
    chosen, reference = logits.argmax(-1).cpu().numpy(), dense.argmax(-1).cpu().numpy()
    words = [questions.tokenizer.decode([token]).strip() for token in chosen.tolist()]
    return Outcome(chosen == questions.answers, chosen == reference, kl_to_dense(dense, logits), words, cost, seconds)


def _cost(model: Any, questions: _Questions, report: Report | None, encoder: float) -> Cost:
    site = video_lm(model)
    rows = sum(len(inputs["input_ids"]) for inputs in questions.rounds)
    length = sum(int(inputs["attention_mask"].sum()) for inputs in questions.rounds) / rows
    visual = 0.0
    for inputs in questions.rounds:
        ids = inputs["input_ids"]
        visual += sum(int(where.sum()) for where in site.placeholders(ids, ids).values()) / rows
    layers = np.full(len(site.layers), length)
    for entry in report.tokens.values() if report is not None else ():
        inner = re.fullmatch(r"layer (\d+)", entry.place)
        layers[int(inner[1]) if inner else 0 :] -= (entry.tokens_in - entry.tokens_out) / rows
    gone = length - layers
    return Cost(
        visual,
        visual - float(gone[0]),
        visual - float(gone[-1]),
        layers,
        encoder,
        prefill_flops(model, layers.tolist()),
    )
