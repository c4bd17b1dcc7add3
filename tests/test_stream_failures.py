"""What goes wrong in the middle of a stream leaves it, and the model, as they were."""

from __future__ import annotations

import gc
import threading
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np
import pytest
import torch

import mmaccel
from mmaccel.codecs.live import LiveFrame
from mmaccel.core.stream import current_stream
from mmaccel.errors import MethodError, StreamError
from mmaccel.method import Info, Stage
from mmaccel.reducer import BEFORE_LLM, GridReducer
from mmaccel.tokens.place import Reduction
from tests.checks import ids, snapshot
from tests.streams import QUESTION, STREAMED, frames_of, options

ONEVISION, NEXT, QWEN2, QWEN3 = STREAMED[0], STREAMED[1], STREAMED[2], STREAMED[4]


def asked(session):
    return session.ask(QUESTION, max_new_tokens=4, logits=True)


def _layers(target):
    vision = next(m for n, m in target.named_modules() if "language" not in n and n.endswith(("layers.1", "blocks.1")))
    return {"encoder": vision, "decoder": target.model.language_model.layers[1]}


@pytest.mark.parametrize("where", ["encoder", "decoder"])
@pytest.mark.parametrize("spec", ["stc:keep=0.34;refresh=0.5;interval=none", "stc:keep=1.0;refresh=0.3;interval=3"])
@pytest.mark.parametrize("family", STREAMED, ids=ids(STREAMED))
def test_a_frame_that_is_pushed_again_is_read_as_if_nothing_had_happened(family, model, spec, where):
    target, frames = model(family), frames_of(family, 9)
    failed = []

    def stop(_module, _args):
        failed.append(1)
        raise KeyboardInterrupt

    more = options(family) | {"max_tokens": 100}
    with mmaccel.stream(target, spec, **more) as broken, mmaccel.stream(target, spec, **more) as whole:
        for number, frame in enumerate(frames):
            whole.push(frame)
            if number in (3, 5, 7):
                hook = _layers(target)[where].register_forward_pre_hook(stop)
                with pytest.raises(KeyboardInterrupt):
                    broken.push(frame)
                hook.remove()
            broken.push(frame)
        assert len(failed) == 3
        assert torch.equal(asked(broken).logits, asked(whole).logits)
        assert broken.stats().made == whole.stats().made


def test_a_frame_that_is_refused_is_not_remembered(model):
    class Memory:
        frames = 0

    def count(_module, _args):
        current_stream().get(Memory).frames += 1

    hook = model(QWEN3).model.visual.register_forward_pre_hook(count)
    try:
        with mmaccel.stream(model(QWEN3), **options(QWEN3), max_tokens=20) as session:
            session.follow(frames_of(QWEN3, 4))
            large = torch.zeros(3, 48, 48, dtype=torch.uint8)
            session.push(large)
            with pytest.raises(StreamError, match="max_tokens=20 is less than the 36"):
                session.push(large)
            assert session._memory.get(Memory).frames == 2
    finally:
        hook.remove()


def test_an_interruption_is_not_forgotten_with_a_late_frame(model):
    class Memory:
        calls = 0

    def count(_module, _args):
        current_stream().get(Memory).calls += 1

    hook = model(QWEN2).model.visual.register_forward_pre_hook(count)
    try:
        with mmaccel.stream(model(QWEN2), **options(QWEN2)) as session:
            times = [0.0, 1.0, 2.0, 2.0, 3.0, 4.0]
            for number, (frame, time) in enumerate(zip(frames_of(QWEN2, 6), times, strict=True)):
                session.push(LiveFrame(frame, time, 0.0, number, number == 3, 0))
            assert session.stats().late == 1
            assert session.stats().made == 45  # 0 and 1, 2 twice, 4 and 5
            assert session._memory.get(Memory).calls == 1
    finally:
        hook.remove()


def test_a_session_that_is_dropped_unclosed_leaves_the_model_as_it_was():
    target, twin = ONEVISION.build(), ONEVISION.build()
    with mmaccel.stream(twin, **options(ONEVISION)) as plain:
        plain.push(frames_of(ONEVISION, 1)[0])
    session = mmaccel.stream(target, "uniform:keep=3", **options(ONEVISION))
    session.push(frames_of(ONEVISION, 1)[0])
    del session
    gc.collect()
    assert snapshot(target) == snapshot(twin)
    with mmaccel.accelerate(target, "visionzip:keep=0.5") as handle:
        assert handle.methods == (mmaccel.VisionZip(keep=0.5),)


@pytest.mark.parametrize(("family", "other"), [(ONEVISION, NEXT), (NEXT, ONEVISION)])
def test_a_processor_that_makes_pictures_of_another_size_is_named(model, family, other):
    with mmaccel.stream(model(family), processor=other.processor(), prompt="<video>{question}") as session:
        with pytest.raises(
            StreamError, match=r"Processor makes pictures that the encoder cannot take .* own processor"
        ):
            session.push(frames_of(family, 1)[0])
        assert session.stats().frames == 0


def test_what_an_encoder_raises_itself_is_passed_on(model):
    def broken(_module, _args):
        raise RuntimeError("out of paper")

    hook = _layers(model(QWEN2))["encoder"].register_forward_pre_hook(broken)
    try:
        with mmaccel.stream(model(QWEN2), **options(QWEN2)) as session:
            session.push(frames_of(QWEN2, 1)[0])
            with pytest.raises(RuntimeError, match="out of paper"):
                session.push(frames_of(QWEN2, 2)[1])
    finally:
        hook.remove()


def test_numbers_of_numpy_are_numbers(model):
    frames = frames_of(QWEN2, 6)
    answers = []
    for settings, most in (
        ({"max_tokens": np.int64(30), "slack": np.float32(0.5), "fps": np.float64(2)}, np.int32(4)),
        ({"max_tokens": 30, "slack": 0.5, "fps": Fraction(2)}, 4),
    ):
        with mmaccel.stream(model(QWEN2), **options(QWEN2), **settings) as session:
            session.follow(frames, frames=np.int64(6))
            answers.append(session.ask(QUESTION, max_new_tokens=most))
            for wrong in (-1, 2.5, True, "all"):
                with pytest.raises(MethodError, match="frames must be a whole number"):
                    session.follow(frames, frames=wrong)
            with pytest.raises(StreamError, match="time must be a number"):
                session.push(frames[0], time=10**400)
    assert answers[0] == answers[1]


def test_the_report_says_that_frames_were_read(model):
    with mmaccel.stream(model(ONEVISION), **options(ONEVISION)) as session:
        assert session.report().lines() == ["the model has not been called yet"]
        session.follow(frames_of(ONEVISION, 3))
        assert session.report().lines() == []
        assert session.report().calls == {"frames of a stream": 3}


@dataclass(frozen=True)
class _Novel(GridReducer):
    """Keeps four tokens of every third frame group, and nothing of the others."""

    keep: float | int = 0.5
    info: ClassVar[Info] = Info(
        name="novel-frames", verb="drop", stage=Stage.BEFORE_LLM, summary="test", source="test", year=2026,
        targets=("video-lm",), slots=(BEFORE_LLM,),
    )  # fmt: skip
    streams: ClassVar[bool] = True

    def reduce(self, tokens):
        return Reduction(torch.arange(0 if tokens.number % 3 else 4))


@pytest.mark.parametrize("evict", ["oldest", "least-salient"])
@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("family", STREAMED, ids=ids(STREAMED))
def test_frames_of_which_nothing_is_kept_do_not_pile_up(family, model, positions, evict):
    with mmaccel.stream(model(family), _Novel(positions=positions), **options(family), max_tokens=9, evict=evict) as s:
        for number in range(8):
            s.follow(frames_of(family, 6, seed=number))
            assert len(s._held.blocks) <= 1 + 3 * 9
            assert asked(s).tokens <= 9
        assert s.stats().made - s.stats().reduced - s.stats().evicted == s.stats().held


@pytest.mark.parametrize("on_evict", ["rotate", "rebuild"])
def test_nothing_may_stand_before_the_video(model, on_evict):
    frames, prompt = frames_of(NEXT, 5), "<video>{question}"
    more = {"processor": NEXT.processor(), "prompt": prompt}
    with mmaccel.stream(model(NEXT), **more, max_tokens=9, on_evict=on_evict) as session:
        session.follow(frames)
        assert session.stats().evictions == 4
        got = asked(session)
    with mmaccel.stream(model(NEXT), **more) as session:
        session.push(frames[-1])
        torch.testing.assert_close(got.logits, asked(session).logits, atol=1e-5, rtol=0)


def test_one_thread_may_ask_while_another_pushes(model):
    frames = frames_of(ONEVISION, 24)
    with mmaccel.stream(model(ONEVISION), **options(ONEVISION)) as session:
        session.follow(frames)
        want = asked(session)
    failed = []
    with mmaccel.stream(model(ONEVISION), **options(ONEVISION)) as session:
        session.push(frames[0])

        def work():
            try:
                session.follow(frames[1:])
            except Exception as error:
                failed.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        seen = []
        while thread.is_alive():
            seen.append(asked(session).tokens)
            assert session.stats().held % 9 == 0
        thread.join()
        assert failed == []
        assert seen == sorted(seen)
        got = asked(session)
    assert got == want
    torch.testing.assert_close(got.logits, want.logits, atol=1e-5, rtol=0)
