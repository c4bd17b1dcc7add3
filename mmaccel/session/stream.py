"""The session: frames in, answers out."""

from __future__ import annotations

import copy
import functools
import threading
import time as clocks
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Concatenate, Literal, ParamSpec, Self, TypeVar, get_args

import torch

from mmaccel.compose import arrange, normalise
from mmaccel.core.rolling import Block, RollingPrefill
from mmaccel.core.rotation import check_rotary
from mmaccel.core.stream import Stream
from mmaccel.errors import MethodError, StreamError
from mmaccel.method import Method
from mmaccel.report import Report
from mmaccel.session.answer import Answer, StreamStats
from mmaccel.session.budget import Budget, Evict
from mmaccel.session.frames import Feeder, Picture, picture_of, seconds_of
from mmaccel.session.groups import Group, Groups, Place
from mmaccel.session.settings import is_whole, rate_of
from mmaccel.session.sharing import Shared, check_streams
from mmaccel.session.sources import Sources
from mmaccel.targets import resolve

__all__ = ["StreamSession", "stream"]

OnEvict = Literal["rotate", "rebuild"]

_PLACE = "on each frame of a stream"
_LATENCIES = 2048  # groups over which latency is told

P = ParamSpec("P")
T = TypeVar("T")


def _alone(method: Callable[Concatenate[StreamSession, P], T]) -> Callable[Concatenate[StreamSession, P], T]:
    """One call at a time, whichever thread it comes from."""

    @functools.wraps(method)
    def locked(self: StreamSession, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self._lock:
            return method(self, *args, **kwargs)

    return locked


def stream(
    model: Any,
    *methods: Method | str | Iterable[Method | str],
    processor: Any,
    max_tokens: int | None = None,
    evict: Evict = "oldest",
    on_evict: OnEvict = "rotate",
    slack: float = 0.1,
    fps: float = 1.0,
    prompt: str | None = None,
) -> StreamSession:
    """Follow a video as it comes: `with stream(model, processor=p) as s: s.push(frame); print(s.ask("what is it ?"))`.

    Each frame is encoded, reduced and read by the language model when it is pushed, so that a question costs its own
    tokens only. Until the first eviction the answers are those that the model gives to the whole video.

    Args:
        model: a vision-language model of transformers with videos, or a pipeline of it.
        methods: what `accelerate` takes, as far as it works frame by frame (`Method.streams`). They are on the model
            until the session is closed, for other callers too; sessions on one model at the same time share them.
        processor: the model's own; it prepares frames and questions.
        max_tokens: how many visual tokens are held at most; None holds all, until the model's longest sequence.
        evict: which go when they are too many. "oldest": those of the oldest frames, whole frames at a time.
            "least-salient": of all frames those least unlike the mean of all tokens so far (1 - cosine of what goes
            into the language model, taken when a token comes; no attention is needed), the older of equals first.
        on_evict: "rotate" turns the keys that stay to their new positions. That is exact for the first layer; keys and
            values of later layers were made with the evicted tokens in sight, and go on telling of them. "rebuild"
            computes all that stays anew: equal to a video of it, at the price of a prefill each time.
        slack: fraction of max_tokens that is free after an eviction, so that the next one is some frames away.
        fps: frames a second, for frames that come without a time.
        prompt: the whole prompt, with the processor's video token and "{question}" in it; by default the chat template
            makes one of a single user turn.

    Positions have no holes: what is left after an eviction closes up, so that a stream may go on for ever. With M-RoPE
    what is left of a frame keeps its rows and columns, and frames close up; where all frames of a video share their
    origin (Qwen2-VL, Qwen2.5-VL), they do so along the time axis.

    Raises:
        MethodError: a setting or knob is out of range. AdapterError: nothing is known of the model. StreamError: the
        processor does not fit. NotApplicableError: a method needs the whole video, or the model cannot be streamed.
        ConflictError: other methods are on the model.
    """
    return StreamSession(
        model, methods, processor=processor, budget=Budget(max_tokens, evict, slack), on_evict=on_evict, fps=fps,
        prompt=prompt,
    )  # fmt: skip


class StreamSession:
    """One stream; made by `stream`. A thread may push while another asks: each call waits for the one before it."""

    def __init__(
        self, model: Any, methods: Iterable[Any], *, processor: Any, budget: Budget, on_evict: OnEvict, fps: float,
        prompt: str | None,
    ) -> None:  # fmt: skip
        if on_evict not in get_args(OnEvict):
            raise MethodError(f"on_evict must be one of {', '.join(get_args(OnEvict))}, not {on_evict!r}.")
        self._fps, self._budget, self._lock = rate_of(fps), budget, threading.RLock()
        given = list(methods)
        wanted = arrange(normalise(given)) if given else []
        target = resolve(model)
        check_streams(target, wanted)
        self._site: Any = target.site
        self._feeder = Feeder(self._site, processor, prompt)
        if budget.limited and on_evict == "rotate":
            check_rotary(getattr(self._site.language_model, "rotary_emb", None), self._site.rotary_axes)
        rebuild = budget.limited and on_evict == "rebuild"
        self._held = RollingPrefill(self._site.language_model, self._site.rotary_axes, rebuild=rebuild)
        self._memory = Stream()
        self._waiting: list[tuple[Picture, float]] = []
        self._last_group: Group | None = None
        self._flushed: Group | None = None
        self._first = self._last = 0.0
        self._counted: tuple[float, int] | None = None
        self._frames = self._late = self._groups = self._made = 0
        self._latencies: deque[float] = deque(maxlen=_LATENCIES)
        self._cut = False
        self._sources = Sources()
        self._shared: Shared | None = Shared.join(target, wanted)
        # a session that is dropped without being closed must not leave its methods on the model for good
        self._leave = weakref.finalize(self, self._shared.leave)
        self._leave.atexit = False
        self._report = self._shared.report
        self._maker = Groups(self._site, self._feeder, wanted, self._report)
        try:
            if self._feeder.before:
                self._held.extend([self._maker.text(self._feeder.before)])
        except BaseException:
            self.close()
            raise

    @_alone
    def close(self) -> None:
        """End the session; methods go from the model with the last session that has them. May be called twice."""
        self._shared = None
        self._leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @_alone
    def push(self, frame: Any, time: float | None = None) -> bool:
        """Read one frame; False if it was dropped, and counted, because it is not later than the one before.

        frame: uint8 [3, H, W] tensor, uint8 [H, W, 3] array, PIL image, or a frame of `open_stream`. Sizes may change.
        time: seconds; by default that of the frame, or 1 / fps after the frame before. Gaps are allowed; one that would
        pass the model's longest sequence by itself is closed, and `report` says so.

        Where the encoder joins frames, they wait until their group is full; a frame of another size, or behind an
        interruption (`LiveFrame.discontinuity`), begins a new group, and the one before it is filled up with its last
        frame. If this raises, the frame was not taken.

        Raises:
            StreamError: it is no frame, or no time, or the budget is below one frame, or the sequence gets too long.
            NonFiniteError: the encoder made NaN or infinity of it.
        """
        self._check_open()
        picture = picture_of(frame)
        at, counted = self._time(picture, time)
        self._cut = self._cut or picture.cut
        if self._frames and at <= self._last:
            self._late += 1
            return False
        if self._waiting and (self._cut or self._waiting[-1][0].pixels.shape != picture.pixels.shape):
            self._take(self._filled())
        if self._cut:
            self._memory.clear()
        self._first = self._first if self._frames else at
        waiting = [*self._waiting, (picture, at)]
        if len(waiting) == self._site.frames_at_once:
            self._take(waiting)
        else:
            self._waiting = waiting
        self._frames += 1
        self._last, self._counted, self._flushed, self._cut = at, counted, None, False
        return True

    def follow(self, source: Any, *, fps: float | None = None, frames: int | None = None) -> int:
        """Push frames of `source` until it ends, or until `frames` were taken; how many that were.

        source: what `open_stream` gives, inside its with-block; what `load_video` gives; an iterable of frames; or a
        path or URL, which is opened. fps: frames a second, taken from a path or URL, or told of an iterable of frames
        without times.

        A path is read from its beginning. Where a source with a clock of its own begins at a time that has passed
        already, as a second file does, it goes on 1 / fps after the last frame, as behind an interruption.

        Raises:
            StreamError, NonFiniteError: as `push`. VideoError: the source fails. MethodError: fps or frames is out of
            range.
        """
        self._check_open()
        rate = None if fps is None else rate_of(fps)
        if frames is not None and not (is_whole(frames) and frames >= 0):
            raise MethodError(f"frames must be a whole number or None, not {frames!r}.")
        if isinstance(source, str) or hasattr(source, "__fspath__"):
            from mmaccel.codecs import open_stream

            with open_stream(source, fps=rate, drop="block") as live:
                return self.follow(live, fps=rate, frames=frames)
        coming, over = self._sources.frames(source), object()
        before, taken = self._fps, 0
        self._set_rate(before if rate is None else rate)
        try:
            # no frame is drawn beyond the last that is wanted: a live source would lose it
            while frames is None or taken < frames:
                frame = next(coming, over)
                if frame is over:
                    break
                last = self._last if self._frames else None
                taken += self.push(self._sources.timed(frame, source, last, 1 / self._fps))
        finally:
            self._set_rate(before)
        return taken

    @_alone
    @torch.no_grad()
    def ask(self, question: str, *, max_new_tokens: int = 128, logits: bool = False) -> Answer:
        """Answer a question about what has been seen, greedily; the stream is left as it was.

        Frames that wait for the rest of their group are shown with the last one repeated, as the processor does at the
        end of a video; for the frames to come they still wait. Room for them is made at once if the budget is full.

        Raises:
            StreamError: there is no frame yet, the question is empty, or it does not fit into the longest sequence.
        """
        self._check_open()
        if not self._frames:
            raise StreamError("there is no frame yet; push one before you ask.")
        if not is_whole(max_new_tokens) or max_new_tokens < 1:
            raise MethodError(f"max_new_tokens must be a whole number of at least 1, not {max_new_tokens!r}.")
        began = clocks.perf_counter()
        tail = [self._maker.text(self._feeder.question(question))]
        pending = self._pending()
        last = pending or self._last_group
        assert last is not None
        if len(last.closing):
            tail.insert(0, self._maker.plain(last.closing))
        with self._held.aside():
            if pending is not None and len(pending.block):
                self._held.extend([self._near(pending.block)])
            self._check_length(sum(map(len, tail)) + max_new_tokens - 1, "the question with its answer")
            ids, rows = self._decode(self._held.extend(tail), max_new_tokens)
            seen = self._held.tokens
        text, seconds = self._feeder.text(ids), clocks.perf_counter() - began
        return Answer(text, tuple(ids), seen, seconds, torch.cat(rows) if logits else None)

    @_alone
    def stats(self) -> StreamStats:
        """What has happened so far; also after the session was closed."""
        took = sorted(self._latencies) or [0.0]
        held, evicted = self._held.tokens, self._budget.evicted
        return StreamStats(
            frames=self._frames, late=self._late, pending=len(self._waiting), made=self._made,
            reduced=self._made - evicted - held, evicted=evicted, evictions=self._budget.evictions, held=held,
            cache_bytes=self._held.nbytes(), next_position=self._held.next,
            push_seconds=(took[len(took) // 2], took[min(len(took) - 1, int(0.99 * len(took)))], took[-1]),
        )  # fmt: skip

    def report(self) -> Report:
        """What the methods report; sessions that share them share it."""
        return self._report

    def _time(self, picture: Picture, given: Any) -> tuple[float, tuple[float, int]]:
        """When a frame was, and from where those without a time of their own are counted."""
        own = picture.time if given is None else given
        if own is not None or self._counted is None:
            at = 0.0 if own is None else seconds_of(own)
            return at, (at, 0)
        # counted, not added up, so that times are those of a video with this rate
        since, count = self._counted[0], self._counted[1] + 1
        return since + count / self._fps, (since, count)

    def _set_rate(self, fps: float) -> None:
        if fps != self._fps:
            self._fps = fps
            self._counted = (self._last, 0) if self._frames else None

    def _take(self, frames: list[tuple[Picture, float]]) -> None:
        """Encode a full group, and have the language model read it; nothing waits any more."""
        began = clocks.perf_counter()
        memory = self._memory.copy()
        group = self._maker.group(frames, self._place(frames), memory)
        with self._whole():
            self._budget.make_room(self._held, group.block.tokens, self._head)
            block = self._near(group.block)
            self._check_length(block.advance, "this frame", block.gap or 0)
            if len(block):
                self._held.extend([self._budget.weigh(block)])
        self._waiting, self._last_group, self._memory = [], group, memory
        self._groups += 1
        self._made += group.made
        for name, tokens_in, tokens_out in group.counts:
            self._report.count(name, _PLACE, tokens_in, tokens_out)
        took = clocks.perf_counter() - began
        self._latencies.append(took)
        self._report.spend("frames of a stream", took)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """What happens to the tokens that are held happens as a whole, or not at all."""
        budget = copy.copy(self._budget)
        try:
            with self._held.whole():
                yield
        except BaseException:
            self._budget = budget
            raise

    def _place(self, frames: list[tuple[Picture, float]]) -> Place:
        last = self._last_group
        return Place(self._groups, frames[0][1] - self._first, 0.0 if last is None else last.clock)

    def _filled(self) -> list[tuple[Picture, float]]:
        missing = self._site.frames_at_once - len(self._waiting)
        return [*self._waiting, *[self._waiting[-1]] * missing]

    def _pending(self) -> Group | None:
        """The frames that wait, as if the video ended here; methods do not remember that."""
        if not self._waiting:
            return None
        if self._flushed is None:
            frames = self._filled()
            self._flushed = self._maker.group(frames, self._place(frames), self._memory.copy())
        with self._whole():
            self._budget.make_room(self._held, self._flushed.block.tokens, self._head)
        return self._flushed

    def _decode(self, hidden: torch.Tensor, most: int) -> tuple[list[int], list[torch.Tensor]]:
        head, ends = self._site.target.get_output_embeddings(), _ends(self._site.target)
        ids: list[int] = []
        rows: list[torch.Tensor] = []
        while True:
            rows.append(head(hidden[:, -1]).float())
            token = int(rows[-1].argmax(-1))
            if token in ends:
                return ids, rows
            ids.append(token)
            if len(ids) == most:
                return ids, rows
            hidden = self._held.extend([self._maker.text([token])])

    def _near(self, block: Block) -> Block:
        """The block, brought near to the one before it if their distance in time is too long for the model."""
        limit = self._limit
        if limit is None or not block.gap or self._held.end + block.gap <= limit:
            return block
        self._report.note("a gap in time longer than the model's longest sequence was closed")
        return replace(block, gap=1)

    @property
    def _head(self) -> int:
        """Blocks that come before the video."""
        return int(bool(self._feeder.before))

    @property
    def _limit(self) -> int | None:
        return getattr(self._site.language_model.config, "max_position_embeddings", None)

    def _check_length(self, more: int, what: str, gap: float = 0) -> None:
        limit = self._limit
        length = max(self._held.next + more, self._held.end + int(gap))
        if limit is not None and length > limit:
            raise StreamError(
                f"{what} would make a sequence of {length} positions, and this model was made for {limit}; give a "
                "smaller max_tokens."
            )

    def _check_open(self) -> None:
        if self._shared is None:
            raise StreamError("this session is closed; make a new one with mmaccel.stream.")
        self._shared.check()


def _ends(model: Any) -> set[int]:
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return set() if found is None else set(found) if isinstance(found, (list, tuple)) else {int(found)}
