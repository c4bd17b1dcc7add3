"""A stream answers as the model does to the whole video, to what is kept of it, and to what is left of it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

import mmaccel
from mmaccel.method import Info, Stage, parse, registry
from mmaccel.reducer import BEFORE_LLM, GridReducer
from mmaccel.tokens.place import Reduction
from tests.checks import cache_of, call, closed_up, ids, seen_by_language_model
from tests.streams import QUESTION, STREAMED, frames_of, inputs_of, offline, options, same


@dataclass(frozen=True)
class _Every(GridReducer):
    """Keeps every third cell, from another one on in each frame."""

    keep: float | int = 0.5
    info: ClassVar[Info] = Info(
        name="every-third", verb="drop", stage=Stage.BEFORE_LLM, summary="test", source="test", year=2026,
        targets=("video-lm",), slots=(BEFORE_LLM,),
    )  # fmt: skip
    streams: ClassVar[bool] = True

    def reduce(self, tokens):
        return Reduction(torch.arange(tokens.number % 3, len(tokens), 3))


def asked(session, question=QUESTION, steps=5):
    return session.ask(question, max_new_tokens=steps, logits=True)


def streamed(model, family, frames, *methods, **more):
    with mmaccel.stream(model, *methods, **options(family), **more) as session:
        session.follow(frames)
        return asked(session)


@pytest.mark.parametrize("family", STREAMED, ids=ids(STREAMED))
def test_answers_are_those_to_the_whole_video_at_any_time(family, model):
    frames = frames_of(family)
    with mmaccel.stream(model(family), **options(family)) as session:
        for number, frame in enumerate(frames):
            session.push(frame)
            if number == 0 and family.name == "qwen3-vl":
                continue  # the library refuses a video of one frame
            same(asked(session), offline(model(family), inputs_of(family, frames[: number + 1])))
            other = inputs_of(family, frames[: number + 1], question="Why?")
            assert asked(session, "Why?").ids == offline(model(family), other)[0]
        first, second = asked(session), asked(session)
        assert first == second
        assert torch.equal(first.logits, second.logits)


@pytest.mark.parametrize("fps", [2.0, 4.0, 30.0])
@pytest.mark.parametrize("family", STREAMED[2:], ids=ids(STREAMED[2:]))
def test_time_is_told_to_the_model_as_a_video_of_that_rate_tells_it(family, model, fps):
    frames = frames_of(family)
    same(streamed(model(family), family, frames, fps=fps), offline(model(family), inputs_of(family, frames, fps=fps)))
    with mmaccel.stream(model(family), **options(family)) as session:
        for number, frame in enumerate(frames):
            session.push(frame, time=number / fps)
        same(asked(session), offline(model(family), inputs_of(family, frames, fps=fps)))


def test_the_embedded_model_says_what_it_says_offline():
    from mmaccel.tiny.world import render, sample_clip, sample_questions

    model, processor = mmaccel.tiny.video_qa()
    for number in (3, 4):
        clip = sample_clip(400_000 + number)
        frames = render(clip)
        with mmaccel.stream(model, processor=processor) as session:
            assert session.follow(frames) == 8
            for question in sample_questions(clip):
                content = [{"type": "video"}, {"type": "text", "text": question.text}]
                text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
                inputs = dict(processor(text=[text], videos=[frames], do_sample_frames=False, return_tensors="pt"))
                out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
                want = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
                got = session.ask(question.text, max_new_tokens=4)
                assert str(got) == want.strip()
                assert got.tokens == 8 * 64


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("family", STREAMED, ids=ids(STREAMED))
def test_kept_tokens_are_read_as_by_the_dense_language_model(family, model, positions):
    """The reference hands the dense model's embeddings of the kept tokens to its language model, at their positions."""
    frames, target = frames_of(family), model(family)
    inputs = inputs_of(family, frames)
    places = family.places("video")[0]
    assert len(places) == inputs["input_ids"].shape[1]
    columns = 1 + max(p.x for p in places if p is not None)
    rows = 1 + max(p.y for p in places if p is not None)
    kept = [
        number
        for number, p in enumerate(places)
        if p is None or p.x < 0 or ((p.y * columns + p.x - p.t % 3) % 3 == 0 and p.y * columns + p.x >= p.t % 3)
    ]
    assert len(places) - len(kept) > len(frames)
    seen = seen_by_language_model(target, lambda: call(target, inputs))
    position = seen.get("position_ids")
    position = torch.arange(len(places)) if position is None else position
    position = position.reshape(-1, len(places))[-3:]
    position = position[:, kept] if positions == "original" else closed_up(position, places, kept)
    more = {}
    if seen.get("visual_pos_masks") is not None:
        mask = seen["visual_pos_masks"][0]
        alive = torch.zeros(len(places), dtype=torch.bool)
        alive[kept] = True
        more = {
            "visual_pos_masks": mask[kept][None],
            "deepstack_visual_embeds": [level[alive[mask]] for level in seen["deepstack_visual_embeds"]],
        }
    with torch.no_grad():
        hidden = target.model.language_model(
            inputs_embeds=seen["inputs_embeds"][:, kept],
            position_ids=position if len(position) == 1 else position[:, None],
            attention_mask=torch.ones(1, len(kept), dtype=torch.int64), **more,
        ).last_hidden_state  # fmt: skip
    want = target.lm_head(hidden[0, -1:])
    got = streamed(target, family, frames, _Every(positions=positions))
    assert got.tokens == sum(places[k] is not None and places[k].x >= 0 for k in kept) < rows * columns * 8
    torch.testing.assert_close(got.logits[:1], want, atol=1e-5, rtol=0)


# with a third of the 9 or 15 tokens of a frame, a budget that is spread evenly is the same for one frame and for many
PER_FRAME = {
    "visionzip": ["visionzip:contextual=0.4"],
    "prumerge": ["prumerge:neighbours=2"],
    "stc": ["stc:refresh=1.0", "stc:refresh=0.5;interval=3", "stc:rule=similarity;similarity=0.9;interval=none"],
}


@pytest.mark.parametrize("spec", [spec for name, specs in PER_FRAME.items() if name in registry() for spec in specs])
@pytest.mark.parametrize("family", STREAMED, ids=ids(STREAMED))
def test_a_method_that_works_frame_by_frame_gives_what_it_gives_offline(family, model, spec):
    (method,) = parse(spec)
    method, frames = replace(method, keep=1 / 3), frames_of(family)
    with mmaccel.accelerate(model(family), method):
        want = offline(model(family), inputs_of(family, frames))
    with mmaccel.stream(model(family), method, **options(family)) as session:
        for frame in frames:
            session.push(frame)
            asked(session, steps=1)
        same(asked(session), want)
        stats = session.stats()
        assert stats.held * 3 == stats.made
        assert stats.reduced == stats.made - stats.held
        assert session.report().tokens[method.info.name, "on each frame of a stream"].tokens_out == stats.held
    assert not torch.equal(offline(model(family), inputs_of(family, frames))[1], want[1])  # it does something


@pytest.mark.parametrize("family", STREAMED, ids=ids(STREAMED))
def test_a_method_inside_the_encoder_gives_what_it_gives_offline(family, model):
    frames = frames_of(family)
    with mmaccel.accelerate(model(family), "tome:keep=0.5"):
        want = offline(model(family), inputs_of(family, frames))
    same(streamed(model(family), family, frames, "tome:keep=0.5"), want)
    assert not torch.equal(offline(model(family), inputs_of(family, frames))[1], want[1])  # it does something


@pytest.mark.parametrize("spec", ["random:keep=1.0", "visionzip:keep=1.0"])
@pytest.mark.parametrize("family", STREAMED[1:3], ids=ids(STREAMED[1:3]))
def test_a_neutral_method_changes_nothing(family, model, spec):
    frames = frames_of(family)
    want = streamed(model(family), family, frames)
    got = streamed(model(family), family, frames, spec)
    assert got == want
    assert torch.equal(got.logits, want.logits)


@pytest.mark.parametrize("family", STREAMED, ids=ids(STREAMED))
def test_what_is_left_after_the_oldest_went_is_a_video_of_its_own(family, model):
    frames, joined = frames_of(family, 14), 2 if "qwen" in family.name else 1
    per_group = 15 if joined == 2 else 9
    with mmaccel.stream(
        model(family), **options(family), max_tokens=3 * per_group, on_evict="rebuild", slack=0
    ) as session:
        for end in range(joined, 15, joined):
            session.follow(frames[end - joined : end])
            begin = max(0, end - 3 * joined)
            same(asked(session), offline(model(family), inputs_of(family, frames[begin:end], begin)))
        stats = session.stats()
        assert (stats.held, stats.evicted) == (3 * per_group, stats.made - 3 * per_group)


@pytest.mark.parametrize("on_evict", ["rotate", "rebuild"])
@pytest.mark.parametrize("fps", [3.0, 8.0, 24.0])
def test_times_between_the_steps_of_the_model_close_up_as_those_of_a_video_of_its_own(model, fps, on_evict):
    family, frames = STREAMED[3], frames_of(STREAMED[3], 16)
    more = {"max_tokens": 45, "on_evict": on_evict, "slack": 0, "fps": fps}
    with mmaccel.stream(model(family), **options(family), **more) as session:
        for end in range(2, 17, 2):
            session.follow(frames[end - 2 : end])
            begin = max(0, end - 6)
            inputs = inputs_of(family, frames[begin:end], begin, fps=fps)
            want = seen_by_language_model(model(family), lambda inputs=inputs: call(model(family), inputs))
            held = session._held.positions
            assert torch.equal(held, want["position_ids"][-3:, 0, : held.shape[1]])
            if on_evict == "rebuild":
                same(asked(session), offline(model(family), inputs))


@pytest.mark.parametrize("family", STREAMED, ids=ids(STREAMED))
def test_turned_keys_are_those_of_the_new_positions(family, model):
    """In the first layer keys and values depend on token and position alone, so they are those of less video."""
    frames, joined = frames_of(family, 12), 2 if "qwen" in family.name else 1
    budget = 3 * (15 if joined == 2 else 9)
    with mmaccel.stream(model(family), **options(family), max_tokens=budget, slack=0) as session:
        session.follow(frames)
        begin = 12 - 3 * joined
        output = call(model(family), inputs_of(family, frames[begin:], begin), use_cache=True)
        got, want = session._held.cache.layers, cache_of(output).layers
        n = got[0].keys.shape[-2]
        assert n >= budget
        for name in ("keys", "values"):
            torch.testing.assert_close(getattr(got[0], name), getattr(want[0], name)[..., :n, :], atol=1e-5, rtol=0)
        # in the last layer what has gone is still told of
        assert (got[-1].values - want[-1].values[..., :n, :]).abs().max() > 1e-3
        assert session.stats().evictions == (12 // joined) - 3


@pytest.mark.parametrize("family", STREAMED, ids=ids(STREAMED))
def test_the_least_salient_tokens_go(family, model):
    """Against a naive account of the mean and of the scores, kept as plain lists."""
    frames, joined = frames_of(family, 12), 2 if "qwen" in family.name else 1
    target, per_group = model(family), 15 if joined == 2 else 9
    budget = int(2.5 * per_group)
    told = inputs_of(family, frames)
    visual = {k: v for k, v in told.items() if k in ("pixel_values_videos", "video_grid_thw")}
    with torch.no_grad():
        features = torch.cat(tuple(target.model.get_video_features(**visual).pooler_output))
    features = features[: 12 // joined * per_group].view(12 // joined, per_group, -1)
    held, everything = [], []
    for group in features:
        if len(held) + per_group > budget:
            for _ in range(len(held) + per_group - budget):
                held.remove(min(held))
        mean = torch.stack([*everything, *group]).double().mean(0)
        for vector in group:
            everything.append(vector)
            score = 1 - torch.cosine_similarity(vector.double(), mean, dim=0)
            held.append((float(score), len(everything)))
    want = sorted(round(score, 4) for score, _ in held)
    sessions = {}
    for on_evict in ("rotate", "rebuild"):
        with mmaccel.stream(
            target, **options(family), max_tokens=budget, evict="least-salient", on_evict=on_evict, slack=0
        ) as session:
            session.follow(frames)
            got = [float(s) for block in session._held.blocks for s in block.salience[block.visual]]
            assert sorted(round(score, 4) for score in got) == pytest.approx(want, abs=2e-4)
            sessions[on_evict] = session
            asked(session)
    turned, rebuilt = (sessions[name]._held for name in ("rotate", "rebuild"))
    assert torch.equal(turned.positions, rebuilt.positions)
    # the first layer sees tokens and positions alone
    torch.testing.assert_close(turned.cache.layers[0].keys, rebuilt.cache.layers[0].keys, atol=1e-5, rtol=0)
    if len(turned.positions) == 1:
        assert turned.positions[0].tolist() == list(range(turned.positions.shape[1]))


@pytest.mark.parametrize(
    "method", [(), *((f"{name}:keep=0.34",) for name in PER_FRAME if name in registry())], ids=lambda m: "".join(m)
)
@pytest.mark.parametrize("family", STREAMED, ids=ids(STREAMED))
def test_two_streams_on_one_model_never_mix(family, model, method):
    videos = [frames_of(family, 10, seed) for seed in (0, 50)]
    alone = [streamed(model(family), family, video, *method, max_tokens=40) for video in videos]
    made = [mmaccel.stream(model(family), *method, **options(family), max_tokens=40) for _ in videos]
    try:
        for number in range(10):
            for session, video in zip(made, videos, strict=True):
                session.push(video[number])
                asked(session, steps=1)
        for session, want in zip(made, alone, strict=True):
            got = asked(session)
            assert got == want
            assert torch.equal(got.logits, want.logits)
    finally:
        for session in made:
            session.close()
    assert not torch.equal(alone[0].logits, alone[1].logits)


def test_streams_in_threads_never_mix(model):
    family = STREAMED[3]
    videos = [frames_of(family, 8, seed) for seed in (0, 50)]
    want = [streamed(model(family), family, video, "visionzip:keep=0.34") for video in videos]
    got, failed = {}, []

    def work(number):
        try:
            got[number] = streamed(model(family), family, videos[number], "visionzip:keep=0.34")
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    for number in (0, 1):
        assert torch.equal(got[number].logits, want[number].logits)
