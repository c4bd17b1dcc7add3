"""mmaccel ask on real files: the embedded model, checkpoints of other families, and everything that can be wrong."""

from __future__ import annotations

import pytest
import torch

from mmaccel.codecs import load_video, write_video
from mmaccel.tiny import video_qa
from mmaccel.tiny.families import FAMILIES
from mmaccel.tiny.pipelines import tiny_text_lm
from mmaccel.tiny.scoring import answers
from mmaccel.tiny.world import render, sample_clip


@pytest.fixture(scope="module")
def expected(clip, question):
    model, processor = video_qa()
    return answers(model, processor, load_video(clip, frames=8).numpy(), [question])[0]


def test_dense_answer_is_the_models_own(document, clip, question, expected):
    found = document("ask", clip, question, "--repeats", 1)
    assert found["model"] == "embedded"
    assert found["methods"] == []
    (dense,) = found["answers"]
    assert dense["setting"] == "dense"
    assert dense["answer"] == expected
    assert dense["visual_tokens"] == [513]
    assert dense["report"] is None
    assert found["video"]["frames"] == load_video(clip, frames=8).indices.tolist()
    stages = dense["ttft"]["stages"]
    assert set(stages) == {"decode", "encode", "project", "prefill", "rest"}
    assert dense["ttft"]["total"]["median"] == pytest.approx(sum(stage["median"] for stage in stages.values()))


def test_compare_has_both_sides(document, clip, question, expected):
    found = document("ask", clip, question, "--compare", "-m", "random:keep=40", "--repeats", 1)
    dense, fast = found["answers"]
    assert (dense["setting"], fast["setting"]) == ("dense", "random:keep=40")
    assert dense["answer"] == expected
    assert fast["visual_tokens"] == [513, 40]
    assert fast["report"]["tokens"][0]["tokens_out"] == 40


def test_compare_without_a_method_takes_holitom(document, clip, question):
    assert document("ask", clip, question, "--compare", "--repeats", 1)["methods"] == ["holitom:keep=0.15"]


def test_neutral_method_gives_the_same_answer(document, clip, question, expected):
    (only,) = document("ask", clip, question, "-m", "evs:keep=1.0", "--repeats", 1)["answers"]
    assert only["answer"] == expected


def test_methods_are_put_on_together(document, clip, question):
    found = document("ask", clip, question, "-m", "fastv:keep=0.5", "-m", "evs:keep=200", "--repeats", 1)
    assert found["methods"] == ["evs:keep=200", "fastv"]
    assert found["answers"][0]["visual_tokens"] == [513, 200, 100]


@pytest.mark.parametrize("method", ["codec-frames:keep=0.5", "evs:keep=0.25;temporal=codec"])
def test_signals_of_the_codec_are_read_for_methods_that_take_them(document, cli, clip, question, method):
    (only,) = document("ask", clip, question, "-m", method, "--repeats", 1)["answers"]
    assert only["visual_tokens"][1] < 513
    code, out, _ = cli("ask", clip, question, "-m", method, "--repeats", 1)
    assert code == 0
    assert "signals of the codec took" in " ".join(out.split())


def test_for_people(cli, clip, question):
    code, out, err = cli("ask", clip, question, "--compare", "--repeats", 1)
    assert code == 0, err
    for piece in (question, "dense", "holitom:keep=0.15", "embedded model", "prefill", "of the dense time"):
        assert piece in out


def test_frames_and_length(document, clip):
    found = document("ask", clip, "how many objects are there ?", "--frames", 5, "--max-new-tokens", 1, "--repeats", 1)
    assert len(found["video"]["frames"]) == 5
    assert found["answers"][0]["visual_tokens"] == [5 * 64 + 1]
    assert len(found["answers"][0]["answer"].split()) == 1


def test_a_short_video_is_taken_as_it_is(document, tmp_path):
    path = write_video(tmp_path / "short.mp4", render(sample_clip(3), (0.0, 1.0)))
    found = document("ask", path, "how many objects are there ?", "--repeats", 1)
    assert found["video"]["frames"] == [0, 1]


def test_a_damaged_video_is_answered_with_a_warning(cli, clip, question, tmp_path):
    content = clip.read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(content[: int(len(content) * 0.6)])
    code, _, err = cli("ask", path, question, "--repeats", 1, "--json")
    assert code == 0, err
    assert err.startswith("warning: ")
    assert "lost" in err


TEMPLATES = {
    "llava": ("<image>", "image"),
    "llava-onevision": ("<video>", "video"),
    "qwen2.5-vl": ("<|vision_start|><|video_pad|><|vision_end|>", "video"),
    "internvl": ("<video>", "video"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_checkpoints_of_other_families(document, clip, tmp_path, name):
    family, (marker, kind) = FAMILIES[name], TEMPLATES[name]
    family.build().save_pretrained(tmp_path)
    processor = family.processor()
    processor.chat_template = (
        "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == '" + kind + "' %}"
        + marker + "{% else %}{{ part.get('text', '') }}{% endif %}{% endfor %}{% endfor %}"
    )  # fmt: skip
    processor.save_pretrained(tmp_path)
    found = document(
        "ask", clip, "Why?", "--model", tmp_path, "--frames", 4, "--max-new-tokens", 3, "--compare", "-m",
        "uniform:keep=0.5", "--repeats", 1,
    )  # fmt: skip
    dense, fast = found["answers"]
    assert found["model"] == str(tmp_path)
    (report,) = fast["report"]["tokens"]
    assert report["tokens_in"] <= dense["visual_tokens"][0]
    assert abs(report["tokens_out"] - report["tokens_in"] / 2) <= 4
    assert len(dense["answer"]) <= 3 * 4


def test_a_prompt_beyond_the_models_limit(refused, clip, tmp_path):
    path = write_video(tmp_path / "long.mp4", torch.zeros(100, 3, 64, 64, dtype=torch.uint8))
    line = refused(1, "ask", path, "how many objects are there ?", "--frames", 100)
    assert "--frames" in line
    assert str(100 * 64 + 1)[:2] in line


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("no video at all, but long enough to look at " * 50)
    return folder


@pytest.mark.parametrize("name", ["missing.mp4", "empty.mp4", "text.mp4", ""])
def test_videos_that_will_not_do(refused, broken, question, name):
    assert (name or str(broken)) in refused(1, "ask", broken / name, question)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["does the zebra dance ?"], "'zebra', 'dance'"),
        ([" "], "question is empty"),
        (["<video>"], "<video> cannot stand in a question"),
        (["<image> what"], "<image> cannot stand in a question"),
        (["what <|END|> color ?"], "<|end|> cannot stand in a question"),
        (["how many ?", "--max-new-tokens", "100000"], "--max-new-tokens"),
        (["how many ?", "--frames", "99"], "99"),
        (["how many ?", "-m", "hollitom"], "'holitom'"),
        (["how many ?", "-m", "evs:kep=0.5"], "no knob 'kep'"),
        (["how many ?", "-m", "evs:keep=1.5"], "(0, 1]"),
        (["how many ?", "-m", "evs:keep=100000"], "100000"),
        (["how many ?", "-m", "first-block-cache"], "diffusion"),
        (["how many ?", "-m", "evs+uniform"], "exclude each other"),
        (["how many ?", "-m", ":"], "names no method"),
        (["how many ?", "--model", "nobody/nothing"], "nobody/nothing"),
        (["how many ?", "--model", "./no-such-folder"], "no-such-folder"),
    ],
)
def test_requests_that_will_not_do(refused, clip, words, reason):
    assert reason in refused(1, "ask", clip, *words)


def test_models_that_will_not_do(refused, clip, tmp_path):
    assert str(tmp_path) in refused(1, "ask", clip, "Why?", "--model", tmp_path)
    model, tokenizer = tiny_text_lm()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "no processor for text and pictures" in refused(1, "ask", clip, "Why?", "--model", tmp_path)


def test_a_checkpoint_without_weights(refused, clip, tmp_path):
    family = FAMILIES["llava-onevision"]
    family.config().save_pretrained(tmp_path)
    family.processor().save_pretrained(tmp_path)
    assert "cannot be loaded" in refused(1, "ask", clip, "Why?", "--model", tmp_path)


def test_a_checkpoint_without_chat_template(refused, clip, tmp_path):
    family = FAMILIES["llava-onevision"]
    family.build().save_pretrained(tmp_path)
    family.processor().save_pretrained(tmp_path)
    assert "chat template" in refused(1, "ask", clip, "Why?", "--model", tmp_path, "--frames", 2)
