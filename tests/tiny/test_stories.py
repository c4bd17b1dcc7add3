"""The prompt language: what is written is read, splits share no combination, clips show what their prompt says."""

from __future__ import annotations

import numpy as np
import pytest

from mmaccel.errors import VocabularyError
from mmaccel.tiny.generators import prompt_tokenizer
from mmaccel.tiny.read_back import asked
from mmaccel.tiny.stories import (
    FRAMES,
    WINDOW,
    Clause,
    Story,
    framed,
    parse,
    render_story,
    sample_story,
    stage,
    unseen,
)
from mmaccel.tiny.world import COLORS, DIRECTIONS, SHAPES, SIZE, coverage, frame_times, questions

EVERY = [Clause(color, shape, way) for color in COLORS for shape in SHAPES for way in DIRECTIONS]


def test_what_is_written_is_read():
    for index in range(300):
        story = sample_story(index, ("train", "held-out")[index % 2])
        assert parse(str(story)) == story
        assert parse("  " + str(story).upper().replace(" ,", ",")) == story


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a red ring",
        "a red ring moves still",
        "a red ring stays left",
        "a pink ring moves left",
        "a red ring moves left and a red cross moves up",
        "a red ring moves left and",
        "a red ring moves left and a blue ring moves up and a green ring moves up",
    ],
)
def test_other_prompts_are_refused(prompt):
    with pytest.raises(VocabularyError, match="write one or two clauses"):
        parse(prompt)


def test_a_fifth_of_the_combinations_is_kept_out_of_training():
    out = [clause for clause in EVERY if unseen(clause)]
    assert len(out) == 24
    assert len({(clause.color, clause.shape) for clause in out}) == 24
    for index in range(500):
        assert not any(map(unseen, sample_story(index, "train").clauses))
        assert any(map(unseen, sample_story(index, "held-out").clauses))


def test_all_kinds_of_stories_are_drawn():
    stories = [sample_story(index, "train") for index in range(600)]
    shares = [
        np.mean([len(story.clauses) == 1 for story in stories]),
        np.mean([len(story.clauses) == 2 and story.link == "and" for story in stories]),
        np.mean([story.link == "then" for story in stories]),
    ]
    assert all(0.2 < share < 0.55 for share in shares)
    with pytest.raises(ValueError, match="unknown split"):
        sample_story(0, "test")


def test_a_clip_shows_its_story():
    grid = np.arange(SIZE) + 0.5
    edge = (SIZE - WINDOW) // 2
    for index in range(60):
        story = sample_story(index)
        clip = stage(story, index)
        first = []
        for clause, thing in zip(story.clauses, clip.things, strict=True):
            masks = [coverage(thing, time) for time in frame_times(FRAMES)]
            seen = [n for n, mask in enumerate(masks) if mask.any()]
            first.append(seen[0])
            assert seen[-1] == FRAMES - 1
            assert max(mask.sum() - mask[edge:-edge, edge:-edge].sum() for mask in masks) == 0
            x, y = ([(mask.sum(axis) @ grid) / mask.sum() for mask in masks if mask.any()] for axis in (0, 1))
            moved = np.array([x[-1] - x[0], y[-1] - y[0]])
            way = np.array(DIRECTIONS[clause.direction])
            assert (np.abs(moved - (moved @ way) * way) < 0.5).all()
            assert moved @ way > 10 or clause.direction == "still"
        assert first == ([0, first[-1]] if len(first) == 2 else [0])
        assert (first[-1] in range(7, 12)) == (story.link == "then")


def test_answers_depend_on_the_prompt_alone():
    for index in range(80):
        story = sample_story(index)
        wanted = asked(story)
        assert wanted
        for seed in (1, 22, 333):
            assert questions(stage(story, seed)) == wanted


def test_frames_are_repeatable_and_framed_in_gray():
    clip = stage(Story((Clause("red", "ring", "left"),)), 3)
    frames = render_story(clip)
    assert frames.shape == (FRAMES, WINDOW, WINDOW, 3)
    assert np.array_equal(frames, render_story(clip))
    assert not np.array_equal(frames, render_story(stage(Story((Clause("red", "ring", "left"),)), 4)))
    shown = framed(frames)
    assert shown.shape == (6, SIZE, SIZE, 3)
    assert np.array_equal(shown[:, 32:-32, 32:-32], frames[::4])
    assert (shown[:, :32] == 105).all()


def test_every_prompt_is_made_of_known_words():
    tokenizer = prompt_tokenizer()
    for index in range(100):
        text = str(sample_story(index))
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert ids[-1] == tokenizer.eos_token_id
        assert len(ids) == len(text.split()) + 1 <= 14
