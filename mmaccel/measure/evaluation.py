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
from mmaccel.measure.flops import own_flops, prefill_flops
from mmaccel.measure.outcome import Cost, Evaluation, Outcome, mean_cost, merge
from mmaccel.measure.quality import kl_to_dense
from mmaccel.measure.replay import Replay, encoder_key
from mmaccel.measure.stages import DENSE
from mmaccel.reducer import INSIDE_ENCODER
from mmaccel.report import Report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from mmaccel.handle import Handle
    from mmaccel.method import Method

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
    first_clip: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Answer every question with the dense model and under each spec; an answer is the most likely next token.

    `batch` clips go through together, one question of each at a time. With `share_encoder` a batch is encoded once for
    all questions and for all settings that treat the encoder alike; the results are the same. `progress(n)` is called
    after each batch with the number of clips done. A method with a `seed` knob draws anew for every clip, because the
    intervals take clips as independent: its seed is seed * 1000003 + number of the clip, and clips go through one by
    one. Clips are numbered from `first_clip`, those without a question left out.

    Raises:
        MMAccelError: there is no case with a question, or an answer is not one token of the tokenizer.
        MethodError, NotApplicableError: as `mmaccel.accelerate`.
    """
    if batch < 1:
        raise MMAccelError(f"batch must be at least 1 clip, not {batch}.")
    stacks = {spec: arrange(normalise([spec])) for spec in specs}
    parts: list[Evaluation] = []
    done = 0
    for group in _groups(cases, batch):
        parts.append(_one_batch(model, processor, group, first_clip + done, stacks, share_encoder))
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


def _seeded(method: Method) -> bool:
    return any(entry.name == "seed" for entry in fields(method))


def _reseeded(method: Method, number: int) -> Method:
    if not _seeded(method):
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


def _one_batch(
    model: Any, processor: Any, cases: list[Case], first_clip: int, stacks: dict[str, list[Method]], share: bool
) -> Evaluation:
    together = {spec: stack for spec, stack in stacks.items() if not any(map(_seeded, stack))}
    questions = _Questions(model, processor, cases, first_clip)
    answers = _answers(model, questions, {DENSE: [], **together}, share)
    alone = [spec for spec in stacks if spec not in together]
    clips: dict[str, list[_Answers]] = {spec: [] for spec in alone}
    for number, case in enumerate(cases if alone else (), start=first_clip):
        settings = {spec: [_reseeded(method, number) for method in stacks[spec]] for spec in alone}
        for spec, answer in _answers(model, _Questions(model, processor, [case], number), settings, share).items():
            clips[spec].append(answer)
    answers |= {spec: _concatenated(parts) for spec, parts in clips.items()}
    dense = answers[DENSE].logits
    outcomes = {spec: _outcome(answers[spec], dense, questions) for spec in (DENSE, *stacks)}
    return Evaluation(outcomes, questions.clips, questions.kinds)


@dataclass(frozen=True)
class _Answers:
    """The questions of some clips under one setting: logits [n, V], what they cost on average, how long they took."""

    logits: torch.Tensor
    cost: Cost
    seconds: float


def _concatenated(parts: list[_Answers]) -> _Answers:
    weights = [float(len(part.logits)) for part in parts]
    return _Answers(
        torch.cat([part.logits for part in parts]),
        mean_cost([part.cost for part in parts], weights),
        sum(part.seconds for part in parts),
    )


def _answers(
    model: Any, questions: _Questions, settings: dict[str, list[Method]], share: bool
) -> dict[str, _Answers]:  # fmt: skip
    site, patcher = video_lm(model), Patcher()
    found: dict[str, _Answers] = {}
    try:
        replay = Replay(site, patcher, share=share)
        for spec, methods in settings.items():
            replay.key = encoder_key(methods)
            start = time.perf_counter()
            with ExitStack() as stack:
                handle = stack.enter_context(accelerate(model, methods)) if methods else None
                rounds = [_one_round(model, inputs, handle, replay) for inputs in questions.rounds]
            seconds = time.perf_counter() - start
            logits = torch.stack([rounds[q].logits[row] for q, row in questions.used])
            found[spec] = _Answers(logits, _cost(model, questions, rounds, replay), seconds)
    finally:
        patcher.undo()
    return found


@dataclass(frozen=True)
class _Round:
    """One question of each clip.

    logits [rows, V]. lengths: for each row the tokens at each decoder layer, padding left out. own: FLOPs of the
    methods behind the encoder, all rows together.
    """

    logits: torch.Tensor
    lengths: list[tuple[int, ...]]
    own: int


def _one_round(model: Any, inputs: dict[str, Any], handle: Handle | None, replay: Replay) -> _Round:
    ran = replay.ran
    with own_flops(model) as own, torch.no_grad():
        replay.own, replay.all = (lambda: own.scored), (lambda: own.all)
        logits = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].float()
        replay.own = replay.all = int
    layers = len(video_lm(model).layers)
    lengths = [[length] * layers for length in inputs["attention_mask"].sum(1).tolist()]
    report = handle.report() if handle else Report()
    for entry in report.tokens.values():
        if not entry.calls or entry.place == INSIDE_ENCODER:
            continue
        inner = re.fullmatch(r"layer (\d+)", entry.place)
        first = int(inner[1]) if inner else 0
        for row, kept in enumerate(report.kept(entry.method, entry.place)):
            lengths[row][first:] = [len(kept)] * (layers - first)
    return _Round(logits, [tuple(row) for row in lengths], own.total - (replay.ran - ran))


def _outcome(answers: _Answers, dense: torch.Tensor, questions: _Questions) -> Outcome:
    logits = answers.logits
    chosen, reference = logits.argmax(-1).cpu().numpy(), dense.argmax(-1).cpu().numpy()
    words = [questions.tokenizer.decode([token]).strip() for token in chosen.tolist()]
    divergence = kl_to_dense(dense, logits)
    return Outcome(
        chosen == questions.answers, chosen == reference, divergence, words, answers.cost, answers.seconds
    )  # fmt: skip


def _cost(model: Any, questions: _Questions, rounds: list[_Round], replay: Replay) -> Cost:
    site = video_lm(model)
    visual = []
    for inputs in questions.rounds:
        ids = inputs["input_ids"]
        visual.append(sum(where.sum(1) for where in site.placeholders(ids, ids).values()).tolist())  # type: ignore[union-attr]
    lengths = np.array([rounds[q].lengths[row] for q, row in questions.used], dtype=np.float64)
    texts = np.array(
        [int(questions.rounds[q]["attention_mask"][row].sum()) - visual[q][row] for q, row in questions.used]
    )
    prefill = {row: prefill_flops(model, row) for row in {rounds[q].lengths[row] for q, row in questions.used}}
    clips = len(rounds[0].logits)
    return Cost(
        float(np.mean([visual[q][row] for q, row in questions.used])),
        float((lengths[:, 0] - texts).mean()),
        float((lengths[:, -1] - texts).mean()),
        lengths.mean(0),
        replay.flops / clips,
        float(np.mean([prefill[rounds[q].lengths[row]] for q, row in questions.used])),
        replay.flops_own / clips + float(np.mean([rounds[q].own / clips for q, _ in questions.used])),
    )
