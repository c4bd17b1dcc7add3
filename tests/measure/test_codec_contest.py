"""Contestants: right frames by every reader, turns in a fair order, and reasons instead of figures where one fails."""

from __future__ import annotations

import importlib.util
import os

import numpy as np
import pytest

from mmaccel.measure import codec_contest
from mmaccel.measure.codec_clips import Recipe, make_clip
from mmaccel.measure.codec_contest import Crew, Entry, contest
from mmaccel.measure.codec_marks import numbers_in
from mmaccel.measure.codec_peers import READERS


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clips"), Recipe("h264", 96, 12, 2), 4)


def job(clip, wanted, size=None):
    return {"paths": [str(clip.path)], "wanted": wanted, "size": size}


@pytest.mark.parametrize("reader", ["mmaccel", "pyav", "pyav-sequential", "decord", "opencv", "torchcodec"])
@pytest.mark.parametrize("wanted", [[0], [119], [11, 12, 13], [0, 50, 51, 118], list(range(120))])
@pytest.mark.parametrize("size", [None, (64, 114)])
def test_readers_give_the_frames_that_are_wanted(clip, reader, wanted, size):
    module, _, read = READERS[reader]
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        pytest.skip(f"{module} is not installed")
    frames, decoded = read(str(clip.path), wanted, size, 1)
    frames = np.asarray(frames)
    height, width = size or (96, clip.recipe.columns)
    assert frames.shape in {(len(wanted), height, width, 3), (len(wanted), 3, height, width)}
    assert numbers_in(frames) == clip.numbers[wanted].tolist()
    assert decoded is None or len(wanted) <= decoded <= wanted[-1] + 1


def test_the_hand_written_loop_seeks_where_that_pays(clip):
    read = READERS["pyav"][2]
    assert read(str(clip.path), [0, 118], None, 1)[1] == 1 + 11
    assert read(str(clip.path), [0, 13], None, 1)[1] == 1 + 2
    assert read(str(clip.path), [10, 13], None, 1)[1] == 14  # one frame on is the keyframe


class Scripted:
    """A process whose answers are written beforehand; what it is asked is noted in `log`."""

    alive = True

    def __init__(self, name, log, answers):
        self.name, self.log, self.answers = name, log, iter(answers)

    def send(self, **message):
        self.log.append((self.name, message["do"]))

    def answer(self):
        answer = next(self.answers)
        if isinstance(answer, str):
            raise codec_contest._Failed(answer)
        return answer


def test_turns(monkeypatch):
    log = []
    scripts = {
        "a": [{"ready": True}, *({"seconds": n} for n in range(4))],
        "b": [{"ready": True}, {"seconds": 0}, {"seconds": 1}, "it broke"],
        "c": ["no such codec"],
        "d": [{"ready": True}, *({"seconds": n} for n in range(4))],
    }
    processes = {name: Scripted(name, log, answers) for name, answers in scripts.items()}
    monkeypatch.setattr(Crew, "get", lambda self, name, reader: (processes[name], f"{reader} 1"))
    done = []
    with Crew("", 1.0) as crew:
        found = contest(crew, {name: Entry("pyav") for name in scripts}, {}, 3, done.append)
    assert done == [1, 2, 3]
    runs = [name for name, do in log if do == "run"]
    assert runs == ["a", "b", "d", *"abd", *"bda", *"ad"]  # warm up; then each round begins with another
    assert [answer["seconds"] for answer in found["a"].rounds] == [1, 2, 3]
    assert (found["a"].missing, found["a"].version, found["a"].warm_up) == (None, "pyav 1", {"seconds": 0})
    assert (found["b"].missing, found["c"].missing) == ("it broke", "no such codec")
    assert [name for name, do in log if do == "end"] == ["c", "d", "b", "a"]


def test_real_processes(clip, tmp_path):
    entries = {"pyav": Entry("pyav"), "other": Entry("pyav-sequential", "pool", 1, 2)}
    wanted = [0, 40, 119]
    with Crew("", 60.0) as crew:
        lost = contest(crew, entries, {**job(clip, wanted), "paths": [str(tmp_path / "none.mp4")]}, 1, lambda _: None)
        assert all("No such file" in outcome.missing for outcome in lost.values())
        odd = contest(crew, entries, job(clip, wanted, (32, 57)), 2, lambda _: None)
        held = [crew.get(name, entry.reader)[0] for name, entry in entries.items()]
        assert all(process.alive for process in held)
        pid = held[0]._popen.pid
    for outcome in odd.values():
        assert outcome.missing is None
        assert len(outcome.rounds) == 2
        for answer in (outcome.warm_up, *outcome.rounds):
            assert answer["numbers"] == [clip.numbers[wanted].tolist()]
            assert answer["seconds"] > 0
            assert answer["cpu"] > 0
            assert answer["growth"] is None or answer["growth"] >= 0
    assert odd["other"].warm_up["decoded"] == 120
    assert odd["pyav"].warm_up["decoded"] < 120
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.fixture
def interpreter(tmp_path):
    def write(text):
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return str(path)

    return write


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("sleep 60", "no answer within 0.5 s"),
        ("echo out of luck >&2; exit 3", "its process ended with 3: out of luck"),
        ('echo \'{"error": "no driver"}\'; sleep 60', "no driver"),
    ],
)
def test_a_library_that_does_not_load(interpreter, clip, text, reason):
    if importlib.util.find_spec("PyNvVideoCodec") is not None:
        pytest.skip("it is installed here")
    with Crew(interpreter(text), 0.5) as crew:
        for _ in range(2):
            found = contest(crew, {"nv": Entry("pynvvideocodec")}, job(clip, [0]), 1, lambda _: None)
            assert found["nv"].missing == reason


def test_a_library_that_is_not_there(clip):
    if importlib.util.find_spec("PyNvVideoCodec") is not None:
        pytest.skip("it is installed here")
    with Crew("", 5.0) as crew:
        found = contest(crew, {"nv": Entry("pynvvideocodec")}, job(clip, [0]), 1, lambda _: None)
    assert "no package PyNvVideoCodec here" in found["nv"].missing


@pytest.mark.parametrize(
    ("body", "patience", "reason"),
    [("os.abort()", 60.0, "its process ended with -6"), ("time.sleep(60)", 3.0, "no answer within 3 s")],
)
def test_a_reader_that_crashes_or_hangs(clip, tmp_path, monkeypatch, body, patience, reason):
    if importlib.util.find_spec("decord") is None:
        pytest.skip("its version is asked for")
    (tmp_path / "decord.py").write_text(f"import os, time\ncpu = int\ndef VideoReader(*_, **__):\n    {body}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    entries = {"decord": Entry("decord"), "pyav": Entry("pyav")}
    with Crew("", patience) as crew:
        found = contest(crew, {"decord": entries["decord"]}, job(clip, [0]), 1, lambda _: None)
        assert found["decord"].missing == reason
        crew._patience = 60.0  # of processes that start from here
        found = contest(crew, {"pyav": entries["pyav"]}, job(clip, [0]), 1, lambda _: None)
        assert found["pyav"].missing is None
