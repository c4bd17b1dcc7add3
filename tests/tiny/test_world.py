"""The tiny world: same seed same pixels, disjoint splits, and answers that an observer of rendered masks would give."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pytest

from mmaccel.tiny.world import (
    COLORS,
    KINDS,
    SIZE,
    SPLITS,
    coverage,
    encode,
    frame_times,
    questions,
    render,
    sample_clip,
    sample_crowd,
    sample_questions,
)

PINNED = "897ef41137bd8bbb7050bc66d25a55c042ca02f1682f1d4f1b7dc4df2ace699a"


def seen(clip):
    """What a viewer of the eight frames can tell of each object: first frame seen, first and last centre of mass."""
    times = frame_times()
    grid = np.arange(SIZE) + 0.5
    story = {}
    for thing in clip.things:
        centers = {}
        for k, time in enumerate(times):
            mask = coverage(thing, time)
            if mask.sum() > 0:
                centers[k] = (mask.sum(0) @ grid / mask.sum(), mask.sum(1) @ grid / mask.sum())
        story[thing.color] = centers
    return story


def way(centers):
    frames = sorted(centers)
    dx = centers[frames[-1]][0] - centers[frames[0]][0]
    dy = centers[frames[-1]][1] - centers[frames[0]][1]
    if max(abs(dx), abs(dy)) < 2:
        return "still"
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


def test_pixels_are_pinned():
    # Integers and exact float arithmetic only: a change here changes every score that was ever reported.
    digest = hashlib.sha256(b"".join(render(sample_clip(n)).tobytes() for n in range(3))).hexdigest()
    assert digest == PINNED


def test_same_seed_same_pixels_and_other_seed_other_pixels():
    a, b, c = render(sample_clip(7)), render(sample_clip(7)), render(sample_clip(8))
    assert a.dtype == np.uint8
    assert a.shape == (8, SIZE, SIZE, 3)
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_frames_do_not_depend_on_how_many_are_drawn():
    clip = sample_clip(3)
    many = render(clip, frame_times(15))
    assert np.array_equal(many[::2], render(clip, frame_times(8)))


def test_splits_share_no_seed():
    ranges = list(SPLITS.values())
    for n, one in enumerate(ranges):
        assert all(one.stop <= other.start or other.stop <= one.start for other in ranges[n + 1 :])
    assert len({sample_clip(5, split).seed for split in SPLITS}) == len(SPLITS)


def test_answers_follow_from_the_rendered_masks():
    kinds = set()
    for index in range(150):
        clip = sample_clip(index)
        story = seen(clip)
        born = {color: min(centers) for color, centers in story.items()}
        shape = {thing.color: thing.shape for thing in clip.things}
        for question in questions(clip):
            kinds.add(question.kind)
            words = re.findall(r"\w+", question.text)
            named = [word for word in words if word in COLORS]
            if question.kind == "count":
                expected = str(len(story))
            elif question.kind == "direction":
                expected = way(story[named[0]])
            elif question.kind == "shape":
                expected = shape[named[0]]
            elif question.kind == "color":
                (expected,) = [color for color, form in shape.items() if form == words[-1]]
            elif question.kind == "order":
                assert born[named[0]] != born[named[1]]
                expected = min(named, key=born.__getitem__)
            else:
                expected = max(born, key=born.__getitem__)
                assert list(born.values()).count(born[expected]) == 1
                assert born[expected] > 0
            assert question.answer == expected, (index, question)
    assert kinds == set(KINDS)


def test_objects_are_drawn_in_their_color_and_nowhere_else():
    clip = sample_clip(11)
    times = frame_times()
    with_things, without = render(clip, times), render(clip, times, things=False)
    for k, time in enumerate(times):
        covered = sum(coverage(thing, time) for thing in clip.things)
        assert np.array_equal(with_things[k][covered == 0], without[k][covered == 0])
        for thing in clip.things:
            full = coverage(thing, time) == 1.0
            assert (with_things[k][full] == thing.rgb).all()


def test_objects_stay_apart_and_inside():
    for index in range(100):
        clip = sample_clip(index)
        for time in frame_times():
            total = sum(coverage(thing, time) for thing in clip.things)
            assert total.max() <= 1.0
            for thing in clip.things:
                x, y = thing.at(time)
                if thing.visible(time):
                    assert thing.radius <= x <= SIZE - thing.radius
                    assert thing.radius <= y <= SIZE - thing.radius


def test_part_of_the_background_drifts_and_the_rest_stands_still():
    clip = sample_clip(2)
    first, last = render(clip, (0.0, 0.5), things=False).astype(int)
    changed = np.abs(first - last).sum(-1) > 0
    low, high = clip.band
    inside = np.zeros(SIZE, dtype=bool)
    inside[low:high] = True
    lines = changed.mean(0) if clip.band_vertical else changed.mean(1)
    assert lines[inside].min() > 0.5
    assert lines[~inside].max() == 0


def test_scoring_set_is_part_of_all_questions():
    for index in range(20):
        clip = sample_clip(index)
        chosen = sample_questions(clip)
        assert set(chosen) <= set(questions(clip))
        assert len({question.kind for question in chosen}) == len(chosen)
        assert chosen == sample_questions(clip)


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="unknown split"):
        sample_clip(0, "test")
    with pytest.raises(IndexError):
        sample_clip(10_000_000)
    with pytest.raises(ValueError, match="at least 1"):
        frame_times(0)


def test_encoded_clip_is_the_rendered_clip(tmp_path):
    av = pytest.importorskip("av")
    clip = sample_clip(1)
    encode(clip, tmp_path / "clip.mp4", frames=16)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    rendered = render(clip, frame_times(16))
    assert decoded.shape == rendered.shape
    assert np.abs(decoded.astype(int) - rendered).mean() < 8


def test_crowds_are_full_and_still():
    for index in range(20):
        crowd = sample_crowd(index)
        assert 5 <= len(crowd.things) <= 10
        total = sum(coverage(thing, 0.0) for thing in crowd.things)
        assert total.max() <= 1.0
        assert all(thing.at(0.0) == thing.at(1.0) and thing.visible(0.5) for thing in crowd.things)
