"""How a session is used, fed and misused."""

from __future__ import annotations

import gc
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

import mmaccel
from mmaccel.core.stream import current_stream
from mmaccel.errors import (
    AdapterError,
    ConflictError,
    MethodError,
    NonFiniteError,
    NotApplicableError,
    StreamError,
)
from mmaccel.tiny.families import FAMILIES
from tests.checks import ids, snapshot
from tests.streams import QUESTION, STREAMED, frames_of, inputs_of, offline, options, same

ONEVISION, QWEN2, QWEN3 = STREAMED[0], STREAMED[2], STREAMED[4]


def asked(session, steps=4):
    return session.ask(QUESTION, max_new_tokens=steps, logits=True)


@pytest.fixture
def session(model):
    with mmaccel.stream(model(ONEVISION), **options(ONEVISION)) as made:
        yield made


@pytest.fixture
def pairs(model):
    with mmaccel.stream(model(QWEN2), **options(QWEN2)) as made:
        yield made


@pytest.mark.parametrize("family", STREAMED, ids=ids(STREAMED))
def test_the_model_is_as_it_was_behind_a_session(family):
    touched, twin = family.build(), family.build()
    for target, methods in ((touched, ["visionzip:keep=0.34"]), (twin, [])):
        with mmaccel.stream(target, *methods, **options(family), max_tokens=30) as session:
            session.follow(frames_of(family))
            asked(session)
    assert snapshot(touched) == snapshot(twin)


def test_all_kinds_of_frames_are_the_same_frame(session, model):
    from mmaccel.codecs.live import LiveFrame

    tensor = frames_of(ONEVISION, 1)[0]
    array = tensor.permute(1, 2, 0).numpy()
    kinds = [tensor, array, Image.fromarray(array), LiveFrame(tensor, 3.0, 0.0, 3, False, 0)]
    for kind in kinds:
        assert session.push(kind)
    same(asked(session), offline(model(ONEVISION), inputs_of(ONEVISION, torch.stack([tensor] * 4)), 4))


def test_an_array_may_be_written_to_behind_the_push(pairs, model):
    frames = frames_of(QWEN2, 2)
    array = frames[0].permute(1, 2, 0).numpy().copy()
    pairs.push(array)
    array[:] = 0
    pairs.push(frames[1])
    same(asked(pairs), offline(model(QWEN2), inputs_of(QWEN2, frames), 4))


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (torch.full((3, 20, 20), torch.nan), "uint8 RGB from 0 to 255, not float32"),
        (np.full((20, 20, 3), np.nan, dtype=np.float64), "uint8 RGB from 0 to 255, not float64"),
        (torch.zeros(20, 20, 3, dtype=torch.uint8), r"shape \[20, 20, 3\] is no frame"),
        (torch.zeros(8, 3, 20, 20, dtype=torch.uint8), "is no frame"),
        (torch.zeros(3, 0, 20, dtype=torch.uint8), "is no frame"),
        (np.zeros((3, 20, 20), dtype=np.uint8), r"shape \(3, 20, 20\) is no frame; give uint8 \[H, W, 3\]"),
        (np.zeros((20, 20), dtype=np.uint8), "is no frame"),
        (None, "a NoneType is no frame"),
        ("clip.mp4", "a str is no frame"),
    ],
)
def test_what_is_no_frame_is_refused_and_the_session_goes_on(session, model, frame, message):
    frames = frames_of(ONEVISION, 2)
    session.push(frames[0])
    with pytest.raises(StreamError, match=message):
        session.push(frame)
    session.push(frames[1])
    assert session.stats().frames == 2
    same(asked(session), offline(model(ONEVISION), inputs_of(ONEVISION, frames), 4))


def test_a_question_before_the_first_frame_or_without_words_is_refused(session):
    with pytest.raises(StreamError, match="there is no frame yet"):
        session.ask(QUESTION)
    session.push(frames_of(ONEVISION, 1)[0])
    for empty in ("", "  ", None):
        with pytest.raises(StreamError, match="the question is empty"):
            session.ask(empty)
    with pytest.raises(StreamError, match="holds <video> once, and this one holds it 2 times"):
        session.ask("what is <video> ?")
    for most in (0, 1.5, True):
        with pytest.raises(MethodError, match="max_new_tokens"):
            session.ask(QUESTION, max_new_tokens=most)


def test_frames_that_are_not_later_are_dropped_and_counted(session, model):
    frames = frames_of(ONEVISION, 4)
    assert session.push(frames[0], time=5.0)
    assert not session.push(frames[3], time=5.0)
    assert not session.push(frames[3], time=-1)
    assert session.push(frames[1], time=5.5)
    assert session.push(frames[2], time=1e6)  # a gap is no failure
    for time in (float("nan"), float("inf"), "soon"):
        with pytest.raises(StreamError, match="time must be a"):
            session.push(frames[3], time=time)
    assert (session.stats().frames, session.stats().late) == (3, 2)
    same(asked(session), offline(model(ONEVISION), inputs_of(ONEVISION, frames[:3]), 4))


def test_a_budget_below_one_frame_is_refused_with_its_number(model):
    for family, needed in ((ONEVISION, 9), (QWEN2, 15)):
        message = f"max_tokens={needed - 1} is less than the {needed} visual tokens"
        small = mmaccel.stream(model(family), **options(family), max_tokens=needed - 1)
        with small as session, pytest.raises(StreamError, match=message):
            session.follow(frames_of(family, 2))
        with mmaccel.stream(model(family), **options(family), max_tokens=needed) as session:
            session.follow(frames_of(family, 4))
            assert session.stats().held == needed
    with mmaccel.stream(model(ONEVISION), "uniform:keep=3", **options(ONEVISION), max_tokens=3) as session:
        session.follow(frames_of(ONEVISION, 4))
        assert session.stats().held == 3


@pytest.mark.parametrize("max_tokens", [30, 31, 44, 45, 46, 100])
@pytest.mark.parametrize("slack", [0, 0.1, 0.9])
@pytest.mark.parametrize("evict", ["oldest", "least-salient"])
def test_no_more_is_held_than_the_budget(model, evict, slack, max_tokens):
    with mmaccel.stream(model(QWEN3), **options(QWEN3), max_tokens=max_tokens, slack=slack, evict=evict) as session:
        for number, frame in enumerate(frames_of(QWEN3, 20)):
            session.push(frame)
            stats = session.stats()
            assert stats.held <= max_tokens
            assert stats.held + stats.evicted == stats.made == (number + 1) // 2 * 15
            # a question shows the frame that waits too
            assert session.ask("Why?", max_new_tokens=1).tokens == session.stats().held + 15 * (1 - number % 2)
            assert session.ask("Why?", max_new_tokens=1).tokens <= max_tokens
            stamps = sum(block.tokens > 0 for block in session._held.blocks)
            assert stamps * 15 >= session.stats().held
        layers = session._held.cache.layers
        assert {layer.keys.shape[-2] for layer in layers} == {session._held.positions.shape[1]}
        if slack == 0:
            assert session.stats().held > max_tokens - (15 if evict == "oldest" else 1)


def test_a_frame_that_waits_is_shown_and_waits_on(pairs, model):
    frames = frames_of(QWEN2, 4)
    pairs.follow(frames[:3])
    assert pairs.stats().pending == 1
    before = pairs._held.cache.layers[0].keys
    first = asked(pairs)
    same(first, offline(model(QWEN2), inputs_of(QWEN2, frames[:3]), 4))
    assert pairs._held.cache.layers[0].keys is before
    assert asked(pairs) == first
    pairs.push(frames[3])
    same(asked(pairs), offline(model(QWEN2), inputs_of(QWEN2, frames), 4))


def test_what_methods_remember_is_not_touched_by_a_question(model):
    class Memory:
        def __init__(self):
            self.frames = 0

    def count(_module, _args):
        stream = current_stream()
        assert stream is not None
        stream.get(Memory).frames += 1

    hook = model(QWEN2).model.visual.register_forward_pre_hook(count)
    try:
        with mmaccel.stream(model(QWEN2), **options(QWEN2)) as session:
            session.follow(frames_of(QWEN2, 5))
            assert session._memory.get(Memory).frames == 2
            asked(session), asked(session)
            assert session._memory.get(Memory).frames == 2
            session.push(frames_of(QWEN2, 6)[5])
            assert session._memory.get(Memory).frames == 3
    finally:
        hook.remove()
    assert current_stream() is None


def test_an_interruption_begins_anew(model):
    from mmaccel.codecs.live import LiveFrame

    class Memory:
        def __init__(self):
            self.calls = 0

    def count(_module, _args):
        current_stream().get(Memory).calls += 1

    hook = model(QWEN2).model.visual.register_forward_pre_hook(count)
    try:
        with mmaccel.stream(model(QWEN2), **options(QWEN2)) as session:
            for number, frame in enumerate(frames_of(QWEN2, 6)):
                session.push(LiveFrame(frame, float(number), 0.0, number, number == 3, 0))
            assert session.stats().made == 45  # 0 and 1, 2 twice, 3 and 4
            assert session.stats().pending == 1
            assert session._memory.get(Memory).calls == 1
    finally:
        hook.remove()


def test_a_gap_longer_than_the_model_is_closed(model):
    family = STREAMED[3]
    frames = frames_of(family, 6)
    with mmaccel.stream(model(family), **options(family)) as session:
        for time, frame in zip([0, 1, 2, 3, 1e7, 1e7 + 1], frames, strict=True):
            session.push(frame, time=time)
        assert session._held.positions[0].unique()[-3:].tolist() == [7, 11, 12]
        assert any("gap in time" in note for note in session.report().notes)
        assert len(asked(session).ids) == 4


def test_frames_of_another_size(pairs, session):
    sizes = [(24, 40), (24, 40), (24, 40), (32, 24), (32, 24), (20, 60)]
    frames = [torch.full((3, *size), 90, dtype=torch.uint8) for size in sizes]
    for frame in frames:
        pairs.push(frame)
        session.push(frame)
    assert pairs.stats().made == 15 + 15 + 12  # the third frame is a group of its own, the last one waits
    assert pairs.stats().pending == 1
    assert session.stats().made == 6 * 9
    assert len(asked(pairs).ids) == len(asked(session).ids) == 4


def test_a_stream_cannot_outgrow_the_model():
    model = ONEVISION.build()
    model.model.language_model.config.max_position_embeddings = 64
    frames = frames_of(ONEVISION, 8)
    with mmaccel.stream(model, **options(ONEVISION)) as session:
        with pytest.raises(StreamError, match=r"this frame would make a sequence of 69 positions, .* made for 64"):
            session.follow(frames)
        assert session.stats().frames == 6
        with pytest.raises(StreamError, match="the question with its answer"):
            session.ask(QUESTION)
    with mmaccel.stream(model, **options(ONEVISION), max_tokens=18) as session:
        for _ in range(5):
            session.follow(frames)
        assert len(asked(session).ids) == 4
        assert session.stats().next_position < 64


def test_an_encoder_that_makes_nan_is_named_and_nothing_is_kept():
    model = ONEVISION.build()
    frames = frames_of(ONEVISION, 2)
    with mmaccel.stream(model, **options(ONEVISION)) as session:
        session.push(frames[0])
        want = asked(session)
        bias = model.model.multi_modal_projector.linear_2.bias
        with torch.no_grad():
            old = bias.clone()
            bias.fill_(torch.nan)
            with pytest.raises(NonFiniteError, match="vision encoder"):
                session.push(frames[1])
            bias.copy_(old)
        assert torch.equal(asked(session).logits, want.logits)
        assert session.push(frames[1])


@pytest.mark.parametrize("evict", ["oldest", "least-salient"])
@pytest.mark.parametrize("on_evict", ["rotate", "rebuild"])
def test_what_is_broken_off_leaves_no_trace(model, on_evict, evict):
    frames = frames_of(ONEVISION, 5)
    layer = model(ONEVISION).model.language_model.layers[2]

    def stop(_module, _args):
        raise KeyboardInterrupt

    more = options(ONEVISION) | {"max_tokens": 36, "on_evict": on_evict, "evict": evict}
    with mmaccel.stream(model(ONEVISION), **more) as broken, mmaccel.stream(model(ONEVISION), **more) as whole:
        for session in (broken, whole):
            session.follow(frames[:4])
        want = asked(broken)
        hook = layer.register_forward_pre_hook(stop)
        for call in (lambda: broken.ask(QUESTION), lambda: broken.push(frames[4])):
            with pytest.raises(KeyboardInterrupt):
                call()
        hook.remove()
        assert torch.equal(asked(broken).logits, want.logits)
        assert broken.stats().evicted == 0
        for session in (broken, whole):
            session.push(frames[4])
        assert broken.stats().evicted > 0
        assert torch.equal(asked(broken).logits, asked(whole).logits)


@pytest.mark.parametrize("spec", ["evs:keep=0.3", "holitom:keep=0.3", "fastv", "fewer-frames:keep=0.5"])
def test_methods_that_need_more_than_a_frame_are_refused(model, spec):
    with pytest.raises(NotApplicableError, match=r"needs the whole video or prompt.*random, uniform"):
        mmaccel.stream(model(ONEVISION), spec, **options(ONEVISION))


@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_models_without_videos_are_refused(model, name):
    with pytest.raises(NotApplicableError, match="takes frames as images"):
        mmaccel.stream(model(FAMILIES[name]), processor=FAMILIES[name].processor(), prompt="<video>{question}")


def test_other_models_are_refused():
    from mmaccel.tiny.pipelines import tiny_text_lm

    text, tokenizer = tiny_text_lm()
    with pytest.raises(AdapterError, match="is a text-lm"):
        mmaccel.stream(text, processor=tokenizer)
    with pytest.raises(AdapterError, match="no output head"):
        mmaccel.stream(ONEVISION.build().model, **options(ONEVISION))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_tokens", 0), ("max_tokens", 2.5), ("max_tokens", True), ("evict", "newest"), ("on_evict", "forget"),
        ("slack", 1.0), ("slack", -0.1), ("slack", "a"), ("fps", 0), ("fps", float("inf")), ("fps", "fast"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(model, setting, value):
    with pytest.raises(MethodError, match=setting):
        mmaccel.stream(model(ONEVISION), **options(ONEVISION), **{setting: value})


def test_prompts_that_cannot_be_used_are_refused(model):
    processor = ONEVISION.processor()
    with pytest.raises(StreamError, match="no chat template"):
        mmaccel.stream(model(ONEVISION), processor=processor)
    with pytest.raises(StreamError, match=r"needs .question. where"):
        mmaccel.stream(model(ONEVISION), processor=processor, prompt="<video>")
    with pytest.raises(StreamError, match="once, and this one holds it 0 times"):
        mmaccel.stream(model(ONEVISION), processor=processor, prompt="{question}")
    with pytest.raises(StreamError, match="prepares no videos"):
        mmaccel.stream(model(ONEVISION), processor=processor.tokenizer)
    with pytest.raises(StreamError, match="does not belong to this qwen2-vl"):
        mmaccel.stream(model(QWEN2), **options(ONEVISION))
    with mmaccel.stream(model(ONEVISION), processor=processor, prompt="{question}<video>") as session:
        session.push(frames_of(ONEVISION, 1)[0])
        with pytest.raises(StreamError, match="puts the question before the video"):
            session.ask(QUESTION)


def test_sessions_on_one_model_share_their_methods_or_are_refused(model):
    target, more = model(ONEVISION), options(ONEVISION)
    first = mmaccel.stream(target, "uniform:keep=3", **more)
    with pytest.raises(ConflictError, match=r"another session with uniform:keep=3 is open .* has no method"):
        mmaccel.stream(target, **more)
    second = mmaccel.stream(target, mmaccel.Uniform(keep=3), **more)
    first.close()
    first.close()
    second.push(frames_of(ONEVISION, 1)[0])
    assert second.stats().held == 3
    with pytest.raises(StreamError, match="this session is closed"):
        first.push(frames_of(ONEVISION, 1)[0])
    second.close()
    with mmaccel.stream(target, **more) as third:
        third.push(frames_of(ONEVISION, 1)[0])
        message = "uniform:keep=3 is on this model, and the session has no method"
        with mmaccel.accelerate(target, "uniform:keep=3"), pytest.raises(ConflictError, match=message):
            third.push(frames_of(ONEVISION, 1)[0])
    with mmaccel.accelerate(target, "uniform:keep=3"), pytest.raises(ConflictError, match=r"give the methods to"):
        mmaccel.stream(target, **more)


def test_follow_takes_as_many_as_are_wanted(session):
    source = iter(frames_of(ONEVISION, 6))
    assert session.follow(source, frames=2) == 2
    assert session.follow(source, frames=0) == 0
    assert len(list(source)) == 4
    assert session.follow(iter([])) == 0
    for wrong in (7, None):
        with pytest.raises(StreamError, match="gives no frames"):
            session.follow(wrong)
    with pytest.raises(StreamError, match="a NoneType is no frame"):
        session.follow([None])


def test_follow_reads_files_and_live_streams(tmp_path):
    from mmaccel.tiny.world import encode, sample_clip

    model, processor = mmaccel.tiny.video_qa()
    path = tmp_path / "clip.mp4"
    encode(sample_clip(400_000), path, frames=32, fps=8.0)
    video = mmaccel.load_video(path, fps=2)
    answers = []
    for source in (path, str(path), "live", list(video.frames)):
        with mmaccel.stream(model, processor=processor) as session:
            if source == "live":
                with mmaccel.open_stream(path, fps=2, drop="block") as live:
                    taken = session.follow(live)
            else:
                taken = session.follow(source, fps=2)
            assert taken == len(video) == session.stats().frames
            answers.append(session.ask("how many objects are there ?", max_new_tokens=3, logits=True))
    for answer in answers[1:]:
        torch.testing.assert_close(answer.logits, answers[0].logits, atol=1e-5, rtol=0)
    with mmaccel.stream(model, processor=processor) as session, pytest.raises(mmaccel.MMAccelError, match="nowhere"):
        session.follow(tmp_path / "nowhere.mp4")


def test_memory_and_cache_do_not_grow_on_a_long_stream():
    from mmaccel.tiny.world import render, sample_clip

    model, processor = mmaccel.tiny.video_qa()
    frames = render(sample_clip(400_001))
    with mmaccel.stream(model, "uniform:keep=8", processor=processor, max_tokens=64) as session:
        for number in range(60):
            session.push(frames[number % 8])
        full = session.stats().cache_bytes
        gc.collect()
        tracemalloc.start()
        try:
            before = tracemalloc.take_snapshot()
            for number in range(240):
                session.push(frames[number % 8])
                if number % 80 == 79:
                    session.ask("how many objects are there ?", max_new_tokens=2)
            gc.collect()
            grown = sum(entry.size_diff for entry in tracemalloc.take_snapshot().compare_to(before, "filename"))
        finally:
            tracemalloc.stop()
        stats = session.stats()
        tensors = [t for layer in session._held.cache.layers for t in (layer.keys, layer.values)]
        assert stats.cache_bytes <= full * 64 / 57
        assert sum(t.untyped_storage().nbytes() for t in tensors) <= 2 * stats.cache_bytes
        assert 57 <= stats.held <= 64
        assert stats.evicted == 300 * 8 - stats.held
        assert stats.next_position <= 80
        assert grown < 200_000  # 240 frames of 8 tokens would be 983 kB of keys and values alone
