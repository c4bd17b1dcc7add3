"""mmaccel ask: one question about one video, dense, accelerated, or both side by side."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mmaccel.errors import MMAccelError, NotApplicableError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.table import Table

    from mmaccel.cli.models import Loaded
    from mmaccel.cli.terminal import Terminal
    from mmaccel.codecs import Video

__all__ = ["chat_inputs", "run"]

DEFAULT = "holitom:keep=0.15"
_EMBEDDED_WORDS, _WORDS = 4, 128


def run(
    terminal: Terminal,
    path: str,
    question: str,
    *,
    source: str | None,
    specs: Sequence[str],
    frames: int | None,
    both: bool,
    max_new_tokens: int | None,
    repeats: int,
) -> None:
    """Answer, and show what it took.

    Raises:
        MMAccelError: the video, the question, a method or the model will not do; what is cheap is checked first.
    """
    if not question.strip():
        raise MMAccelError("the question is empty.")
    if source is None:
        from mmaccel.tiny.processing import check_vocabulary

        check_vocabulary(question)
    video, seconds = _read(path, frames, 8 if source is None else 32)
    methods = _methods(specs, both)

    from mmaccel.cli.models import load

    loaded = load(source)
    inputs = chat_inputs(loaded, video, question)
    words = max_new_tokens or (_EMBEDDED_WORDS if loaded.embedded else _WORDS)
    _check_length(loaded.model, inputs, words)

    stack = "+".join(method.spec for method in methods)
    runs: dict[str, dict[str, Any]] = {}
    if both or not methods:
        runs["dense"] = _answer(loaded, inputs, words, [])
    with _signals(path, video, methods) as signals:
        if methods:
            runs[stack] = _answer(loaded, inputs, words, methods)
        _time(loaded.model, inputs, runs, stack, repeats, seconds)

    remarks = [*_remarks(runs, stack), *([] if signals is None else [signals])]
    terminal.show(_table(loaded, runs, question), *remarks)
    terminal.finish(
        {
            "model": source or "embedded",
            "label": loaded.label,
            "question": question,
            "video": {
                "path": path, "frames": video.indices.tolist(), "total": video.total, "lost": video.lost,
                "replaced": list(video.replaced), "seconds": video.duration,
            },
            "methods": [method.spec for method in methods],
            "repeats": repeats,
            "answers": [{"setting": name, **values} for name, values in runs.items()],
        }
    )  # fmt: skip


def _read(path: str, frames: int | None, default: int) -> tuple[Video, float]:
    from mmaccel.codecs import load_video

    start = time.perf_counter()
    # Asked for by number, a short video is an error; by default it is taken as it is.
    video = load_video(path, frames or default, on_short="all" if frames is None else "error")
    return video, time.perf_counter() - start


@contextmanager
def _signals(path: str, video: Video, methods: Sequence[Any]) -> Iterator[str | None]:
    """The codec's signals for methods that take them, and a remark on what they took; nothing for others."""
    if not any(
        "codec signals" in method.info.needs or getattr(method, "temporal", None) == "codec" for method in methods
    ):
        yield None
        return
    from mmaccel.codecs import codec_signals, using_signals

    start = time.perf_counter()
    found = codec_signals(path, indices=video.indices)
    took = time.perf_counter() - start
    with using_signals(found):
        yield f"reading the signals of the codec took {_seconds(took)}, which is in none of the times"


def _methods(specs: Sequence[str], both: bool) -> list[Any]:
    from mmaccel.compose import arrange, normalise

    wanted = list(specs) or ([DEFAULT] if both else [])
    return arrange(normalise(wanted)) if wanted else []


def chat_inputs(loaded: Loaded, video: Video, question: str) -> Any:
    """The inputs of one chat turn, on the model's device: a video, or, where a model takes none, its frames as images.

    Raises:
        MMAccelError: the processor cannot make a prompt of them.
    """
    processor = loaded.processor
    if getattr(processor, "video_processor", None) is not None:
        seen = [{"type": "video"}]
        given = {"videos": [video.frames], "video_metadata": [video.metadata], "do_sample_frames": False}
    else:
        seen = [{"type": "image"}] * len(video)
        given = {"images": list(video.frames)}
    try:
        text = processor.apply_chat_template(
            [{"role": "user", "content": [*seen, {"type": "text", "text": question}]}], add_generation_prompt=True
        )
        inputs = processor(text=[text], return_tensors="pt", **given)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise MMAccelError(f"{loaded.label}: its processor makes no prompt of this video: {error}") from error
    return inputs.to(loaded.model.device, loaded.model.dtype)


def _check_length(model: Any, inputs: Any, words: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = inputs["input_ids"].shape[1]
    if limit is not None and length + words > limit:
        raise MMAccelError(
            f"the prompt has {length} tokens, with the answer more than the {limit} that this model was made for; "
            "ask for fewer --frames or fewer --max-new-tokens."
        )


def _answer(loaded: Loaded, inputs: Any, words: int, methods: Sequence[Any]) -> dict[str, Any]:
    import contextlib

    from mmaccel.api import accelerate

    with accelerate(loaded.model, list(methods)) if methods else contextlib.nullcontext() as handle:
        out = loaded.model.generate(**inputs, max_new_tokens=words, do_sample=False)
        report = handle.report().as_dict() if handle is not None else None
    prompt = inputs["input_ids"]
    visual = _visual_tokens(loaded.model, prompt)
    reply = loaded.processor.batch_decode(out[:, prompt.shape[1] :], skip_special_tokens=True)[0].strip()
    path = [visual, *(entry["tokens_out"] for entry in report["tokens"])] if report else [visual]
    return {"answer": reply, "visual_tokens": path, "report": report}


def _visual_tokens(model: Any, prompt: Any) -> int:
    from mmaccel.targets import resolve

    target = resolve(model)
    if target.kind != "video-lm":
        raise NotApplicableError(f"{type(model).__name__} is a {target.kind} and cannot see a video.")
    return sum(int(where.sum()) for where in target.site.placeholders(prompt, prompt).values())


def _time(model: Any, inputs: Any, runs: dict[str, dict[str, Any]], stack: str, repeats: int, seconds: float) -> None:
    from mmaccel.api import accelerate
    from mmaccel.measure import compare, ttft

    before = {"decode": seconds}
    # The answers above have warmed everything up.
    if len(runs) == 2:
        times = compare(model, inputs, [stack], repeats=repeats, warmup=0, before=before)
    elif stack:
        with accelerate(model, stack):
            times = {stack: ttft(model, inputs, repeats=repeats, warmup=0, before=before)}
    else:
        times = {"dense": ttft(model, inputs, repeats=repeats, warmup=0, before=before)}
    for name, values in runs.items():
        values["ttft"] = times[name].as_dict()


def _table(loaded: Loaded, runs: dict[str, dict[str, Any]], question: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(question), caption=Text(f"{loaded.label}; times include reading the video"))
    stages = list(next(iter(runs.values()))["ttft"]["stages"])
    for heading in ("setting", "answer", "visual tokens", "first token", *stages):
        table.add_column(heading, justify="left" if heading in ("setting", "answer") else "right")
    for name, values in runs.items():
        times = values["ttft"]
        cells = [times["total"]["median"], *(times["stages"][stage]["median"] for stage in stages)]
        table.add_row(
            Text(name), Text(values["answer"]), " -> ".join(map(str, values["visual_tokens"])), *map(_seconds, cells)
        )
    return table


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def _remarks(runs: dict[str, dict[str, Any]], stack: str) -> list[str]:
    remarks = list(runs[stack]["report"]["notes"]) if stack else []
    if len(runs) == 2:
        ratio = runs[stack]["ttft"]["total"]["median"] / runs["dense"]["ttft"]["total"]["median"]
        same = "the same" if runs[stack]["answer"] == runs["dense"]["answer"] else "another"
        remarks.append(f"{same} answer; first token after {ratio:.2f} of the dense time")
    return remarks
