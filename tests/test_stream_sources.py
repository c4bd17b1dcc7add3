"""Sources of frames that come one after the other, end too early, or fall silent."""

from __future__ import annotations

import os
import threading

import pytest
import torch

import mmaccel
from mmaccel.errors import VideoError
from mmaccel.tiny.world import encode, render, sample_clip
from tests.streams import STREAMED, frames_of, options

QUESTION = "how many objects are there ?"


@pytest.fixture(scope="module")
def embedded():
    return mmaccel.tiny.video_qa()


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for number in (0, 1):
        encode(sample_clip(400_000 + number), folder / f"{number}.mp4", frames=16, fps=8.0)
    return [folder / f"{number}.mp4" for number in (0, 1)]


def asked(session):
    return session.ask(QUESTION, max_new_tokens=2, logits=True)


@pytest.mark.parametrize("kind", ["path", "live", "video"])
def test_a_second_file_goes_on_behind_the_first(embedded, paths, kind):
    model, processor = embedded
    videos = [mmaccel.load_video(path, fps=4) for path in paths]
    with mmaccel.stream(model, processor=processor, fps=4) as session:
        for path, video in zip(paths, videos, strict=True):
            if kind == "live":
                with mmaccel.open_stream(path, fps=4, drop="block") as live:
                    # to come back to a source that has been followed goes on with it
                    taken = session.follow(live, frames=3) + session.follow(live)
            else:
                taken = session.follow(path if kind == "path" else video, fps=4)
            assert taken == len(video) == 8
        assert (session.stats().frames, session.stats().late) == (16, 0)
        assert session._last == pytest.approx(15 / 4)
        got = asked(session)
    with mmaccel.stream(model, processor=processor, fps=4) as session:
        session.follow(torch.cat([video.frames for video in videos]))
        torch.testing.assert_close(got.logits, asked(session).logits, atol=1e-5, rtol=0)


def test_a_second_file_is_another_scene(embedded, paths):
    model, processor = embedded
    with mmaccel.stream(model, "stc:keep=1.0;interval=none", processor=processor) as session:
        for path in (*paths, paths[0]):
            session.follow(path, fps=4)
        assert session.report().events["stc frames encoded whole"] == 3


def test_times_that_repeat_within_a_source_are_still_late():
    from mmaccel.codecs.live import LiveFrame

    family = STREAMED[0]
    frames = frames_of(family, 4)
    live = [LiveFrame(frames[n], at, 0.0, n, False, 0) for n, at in enumerate((0.0, 1.0, 1.0, 2.0))]
    with mmaccel.stream(family.build(), **options(family)) as session:
        assert session.follow(live) == 3
        assert session.follow(live) == 0
        assert session.stats().late == 5


@pytest.mark.parametrize("share", [0, 0.3, 0.6, 0.9])
def test_a_file_that_breaks_off_gives_what_it_has(embedded, paths, tmp_path, share):
    model, processor = embedded
    whole = paths[0].read_bytes()
    path = tmp_path / "short.mp4"
    path.write_bytes(whole[: int(len(whole) * share)])
    with mmaccel.stream(model, "stc", processor=processor) as session:
        try:
            taken = session.follow(path)
        except VideoError:
            taken = 0
        assert taken == session.stats().frames < 16
        assert (taken > 0) == (share > 0.5)
        session.push(render(sample_clip(1))[0])
        assert asked(session).ids


def test_a_source_that_falls_silent_is_an_error_and_the_session_goes_on(embedded, paths, tmp_path):
    import av

    model, processor = embedded
    path = tmp_path / "clip.ts"
    with av.open(str(paths[0])) as source, av.open(str(path), "w", format="mpegts") as sink:
        stream = sink.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                sink.mux(packet)
    reading, writing = os.pipe()
    over = threading.Event()

    def feed():
        os.write(writing, path.read_bytes()[:20_000])
        over.wait(20)
        os.close(writing)

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        with mmaccel.stream(model, processor=processor) as session:
            with (
                os.fdopen(reading, "rb", buffering=0) as file,
                mmaccel.open_stream(file, timeout=0.5, drop="block") as live,
                pytest.raises(VideoError, match="nothing arrived"),
            ):
                session.follow(live)
            before = session.stats().frames
            assert before > 0
            assert asked(session).ids
            assert session.follow(paths[1], frames=4) == 4
            assert session.stats().frames == before + 4
    finally:
        over.set()
        feeder.join()
