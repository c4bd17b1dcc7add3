"""mmaccel demo stream with a few clips."""

from __future__ import annotations

import pytest

from mmaccel.cli import demo_stream
from mmaccel.tiny import video_qa
from mmaccel.tiny.scoring import answers
from mmaccel.tiny.world import render, sample_clip, sample_questions

CLIPS = 2


def test_what_is_rebuilt_answers_as_each_clip_by_itself(document):
    model, processor = video_qa()
    found = document("demo", "stream", "--clips", CLIPS)
    hits = []
    for number in range(CLIPS):
        clip = sample_clip(demo_stream.FIRST + number, "held-out")
        asked = sample_questions(clip)
        replies = answers(model, processor, render(clip), [question.text for question in asked])
        hits += [question.answer == reply for question, reply in zip(asked, replies, strict=True)]
    alone, turned, rebuilt = found["rows"]
    assert alone["accuracy"]["value"] == rebuilt["accuracy"]["value"] == pytest.approx(sum(hits) / len(hits))
    assert (rebuilt["difference"]["low"], rebuilt["difference"]["high"]) == (0, 0)
    for row in (turned, rebuilt):
        assert row["accuracy"]["n"] == found["settings"]["questions"] == len(hits)
        assert row["held"] == row["most_held"] == found["settings"]["max_tokens"] == 8 * 64
        assert row["frames"] == found["settings"]["frames"] == 8 * CLIPS
        assert row["evicted"] == 8 * 64 * (CLIPS - 1)


def test_methods_and_budget_are_those_that_were_asked_for(document, refused, cli):
    found = document("demo", "stream", "--clips", 1, "--method", "uniform:keep=16", "--max-tokens", 48)
    assert found["settings"]["methods"] == ["uniform:keep=16"]
    for row in found["rows"][1:]:
        assert row["held"] == 48
        assert row["reduced"] == 8 * 48
    code, out, _ = cli("demo", "stream", "--clips", 1, "-m", "uniform:keep=8")
    assert code == 0
    assert "uniform:keep=8" in out
    assert "each clip by itself" in out
    assert "8 frames" in out
    assert "evs needs the whole video" in refused(1, "demo", "stream", "-m", "evs")
    assert "less than the 64 visual tokens" in refused(1, "demo", "stream", "--max-tokens", 9)


@pytest.mark.parametrize("words", [["nothing"], ["--method", "random"], ["methods", "--max-tokens", "9"]])
def test_wrong_usage(refused, words):
    assert "mmaccel --help" in refused(2, "demo", *words)
