"""mmaccel demo with three settings and a few clips, and its parts."""

from __future__ import annotations

import base64
import io
import itertools
from html.parser import HTMLParser

import pytest
from PIL import Image

from mmaccel.cli import demo
from mmaccel.codecs import load_video
from mmaccel.method import registry
from mmaccel.tiny import video_qa
from mmaccel.tiny.scoring import answers
from mmaccel.tiny.world import sample_clip, sample_questions

SPECS = ["fewer-pixels:keep=0.25", "holitom:keep=0.25", "random:keep=0.1"]
CLIPS = 3


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The document and the folder of one small run, without the progress of the real one."""
    import contextlib
    import json

    from mmaccel.cli import main

    folder = tmp_path_factory.mktemp("demo") / "new" / "report"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "settings", lambda _: SPECS)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main(["demo", "--out", str(folder), "--clips", str(CLIPS), "--json"]) == 0
    return json.loads(out.getvalue()), folder


def test_every_budgeted_method_at_both_budgets():
    names = [
        name
        for name, cls in registry().items()
        if hasattr(cls, "keep") and name != "codec-frames" and cls.info.targets != ("diffusion",)
    ]
    model, _ = video_qa()
    assert demo.settings(model) == [f"{name}:keep={keep}" for name in names for keep in ("0.25", "0.1")]
    assert {"holitom", "visionzip", "fastv", "evs", "random", "uniform", "fewer-frames", "fewer-pixels"} <= set(names)


def test_dense_accuracy_is_that_of_the_files(made):
    document, folder = made
    model, processor = video_qa()
    hits = []
    for number in range(CLIPS):
        asked = sample_questions(sample_clip(demo.FIRST + number, "held-out"))
        frames = load_video(folder / "clips" / f"clip-{number:03}.mp4", frames=8).numpy()
        replies = answers(model, processor, frames, [question.text for question in asked])
        hits += [question.answer == reply for question, reply in zip(asked, replies, strict=True)]
    dense = document["rows"][0]
    assert dense["spec"] == "dense"
    assert dense["n"] == len(hits)
    assert dense["clips"] == CLIPS
    assert dense["accuracy"]["value"] == pytest.approx(sum(hits) / len(hits))


def test_rows_are_relative_to_dense(made):
    document, _ = made
    dense, *others = document["rows"]
    assert [row["spec"] for row in others] == SPECS
    assert (dense["flops_ratio"], dense["ttft_ratio"]) == (1, 1)
    for row in others:
        assert row["flops_ratio"] == pytest.approx(row["flops"] / dense["flops"])
        assert row["ttft_ratio"] == pytest.approx(row["ttft"]["total"]["median"] / dense["ttft"]["total"]["median"])
        assert row["flops_ratio"] < 1
        assert row["difference"]["value"] == pytest.approx(row["accuracy"]["value"] - dense["accuracy"]["value"])
    assert document["settings"]["questions"] == dense["n"]
    assert "embedded" in document["settings"]["label"]


class Page(HTMLParser):
    """Text, cells and sources of a page."""

    def __init__(self, text):
        super().__init__()
        self.text, self.rows, self.sources, self.links, self.open = "", [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.open += [tag] if tag not in ("meta", "img", "link", "br") else []
        self.sources += [values["src"]] if "src" in values else []
        self.links += [values["href"]] if "href" in values else []
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_the_page_is_whole_and_needs_nothing_else(made):
    document, folder = made
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert not page.open
    assert [row[0] for row in page.rows] == ["setting", "dense", *SPECS]
    assert len({len(row) for row in page.rows}) == 1
    assert page.rows[1][1].startswith(f"{document['rows'][0]['accuracy']['value'] * 100:.1f} [")
    assert "Embedded model" in page.text
    assert f"{document['rows'][0]['n']} questions" in page.text
    assert document["settings"]["machine"]["cpu"] in page.text
    assert page.links == []
    kinds, pictures = [], []
    for source in page.sources:
        head, _, data = source.partition(",")
        kinds.append(head)
        pictures.append(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))
    # the plot, the frames, and the frames under the two methods at the larger budget
    assert kinds == ["data:image/png;base64", *["data:image/jpeg;base64"] * 3]
    assert all(picture.size == pictures[1].size and picture.height == 128 for picture in pictures[1:])


def test_the_plot_is_written(made):
    document, folder = made
    assert document["plot"] == str(folder / "pareto.png")
    with Image.open(folder / "pareto.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300


def clock(monkeypatch, steps):
    times = itertools.accumulate(itertools.chain([0.0], itertools.repeat(steps)))
    monkeypatch.setattr(demo.time, "perf_counter", lambda: next(times))


@pytest.fixture
def quick_clips(monkeypatch):
    seen = demo._clip

    def make(folder, number):
        return demo._Seen(folder / f"{number}", first.video, first.questions, 0.0)

    def prepare(folder):
        nonlocal first
        (folder / "clips").mkdir()
        first = seen(folder, 0)
        monkeypatch.setattr(demo, "_clip", make)
        return first

    first = None
    return prepare


def test_clips_end_with_the_budget(monkeypatch, quick_clips, tmp_path):
    first = quick_clips(tmp_path)
    clock(monkeypatch, steps=10.0)
    # every batch takes 10 s by this clock; the first ends at 10, and one that would end behind 35 must not begin
    cases = list(demo._cases(tmp_path, first, 100, deadline=35.0))
    assert len(cases) == 3 * demo.BATCH


def test_clips_end_with_their_number(monkeypatch, quick_clips, tmp_path):
    first = quick_clips(tmp_path)
    clock(monkeypatch, steps=0.0)
    assert len(list(demo._cases(tmp_path, first, demo.BATCH + 1, deadline=1.0))) == demo.BATCH + 1


def test_one_batch_is_always_run(monkeypatch, quick_clips, tmp_path):
    first = quick_clips(tmp_path)
    clock(monkeypatch, steps=10.0)
    assert len(list(demo._cases(tmp_path, first, 100, deadline=-1.0))) == demo.BATCH


def test_a_folder_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").touch()
    line = refused(1, "demo", "--out", tmp_path / "file" / "report")
    assert "--out" in line
    assert "Not a directory" in line
