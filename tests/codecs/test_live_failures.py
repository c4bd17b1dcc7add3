"""Live streams that break: lost and silent senders, damage, refusals, and leaving while something blocks."""

from __future__ import annotations

import io
import itertools
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from clips import B_FRAMES, QUIET, RECIPES, Recipe, encode, sequential
from live_servers import (
    all_decoded,
    falls_silent,
    free_port,
    http_server,
    nothing_left,
    number,
    pipe,
    pour,
    sends,
    tcp_server,
    thread,
    wait_until,
)

from mmaccel.codecs.live import LiveFrame, open_stream
from mmaccel.errors import VideoError

__all__ = ["nothing_left"]
pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.filterwarnings("error")]

Clip = Callable[[str], Path]
COUNT, PACKET = 60, 188


def is_sound(frames: list[LiveFrame], path: Path) -> None:
    """Each frame is bit for bit what the undamaged file gives for the number that is drawn into it."""
    whole = sequential(path)
    for frame in frames:
        assert torch.equal(frame.frame, torch.from_numpy(whole[number(frame)]).permute(2, 0, 1))


def keyframes(path: Path) -> list[int]:
    with av.open(str(path)) as container:
        return [place for place, frame in enumerate(container.decode(video=0)) if frame.key_frame]


def collect(stream: object) -> tuple[list[LiveFrame], str]:
    """All frames, and the message of the error that ended them."""
    frames: list[LiveFrame] = []
    with pytest.raises(VideoError) as caught:
        frames.extend(iter(stream))  # type: ignore[call-overload]
    return frames, str(caught.value)


@pytest.mark.parametrize("silent", [False, True])
def test_reconnect(clip: Clip, silent: bool) -> None:
    path = clip("b-frames.ts")
    data = path.read_bytes()
    part = data[: len(data) // 2]
    first = falls_silent(part) if silent else sends(part)
    with tcp_server(first, sends(data), sends(b"")) as url:
        with open_stream(url, drop="block", timeout=1.0, reconnect=2, backoff=0.05) as stream:
            frames, message = collect(stream)
        stats = stream.stats()
    again = next(place for place, frame in enumerate(frames) if frame.discontinuity)
    assert 10 < again < COUNT
    assert [number(frame) for frame in frames] == [*range(again), *range(COUNT)]
    assert [frame.index for frame in frames] == list(range(again + COUNT))
    assert sum(frame.discontinuity for frame in frames) == 1
    is_sound(frames, path)
    times = [frame.pts for frame in frames]
    assert all(b > a for a, b in itertools.pairwise(times))
    # Over the gap stream time is wall-clock time; on both sides it is the sender's.
    gap = frames[again].arrived - frames[again - 1].arrived
    assert times[again] - times[again - 1] == pytest.approx(max(gap, 1 / 8), abs=1e-5)
    assert np.diff(times[again:]) == pytest.approx(1 / 8)
    assert stats.reconnects == 1
    assert "2 attempt(s) to reconnect have failed" in message


def test_the_mark_of_a_reconnect_falls_on_the_next_wanted_frame(clip: Clip) -> None:
    data = clip("b-frames.ts").read_bytes()
    again = {"reconnect": 1, "backoff": 0.05}
    with tcp_server(sends(data), sends(data)) as url, open_stream(url, drop="block", fps=0.5, **again) as stream:
        frames, _ = collect(stream)
    assert [number(frame) for frame in frames[:4]] == [0, 16, 32, 48]
    assert [frame.discontinuity for frame in frames].index(True) == 4
    assert sum(frame.discontinuity for frame in frames) == 1
    assert [int(frame.pts * 0.5) for frame in frames] == sorted({int(frame.pts * 0.5) for frame in frames})


def test_attempts_are_counted_anew_after_every_success(clip: Clip) -> None:
    data = clip("b-frames.ts").read_bytes()
    scripts = [sends(content) for content in (data, b"", data, b"", data)]
    with tcp_server(*scripts) as url, open_stream(url, drop="block", reconnect=2, backoff=0.02) as stream:
        frames, message = collect(stream)
    assert [number(frame) for frame in frames] == 3 * list(range(COUNT))
    assert stream.stats().reconnects == 2
    assert "reconnect" in message


def test_without_reconnect_an_end_is_an_end_and_silence_an_error(clip: Clip) -> None:
    data = clip("b-frames.ts").read_bytes()
    with tcp_server(falls_silent(data)) as url, open_stream(url, drop="block", timeout=1.0) as stream:
        frames, message = collect(stream)
        with pytest.raises(VideoError, match="sent nothing for 1 s"):
            stream.read()
    # What the decoder held back is shown.
    assert [number(frame) for frame in frames] == list(range(COUNT))
    assert "sent nothing for 1 s" in message


@pytest.mark.parametrize("scheme", ["tcp", "http", "rtsp"])
def test_a_server_that_accepts_and_never_sends(scheme: str) -> None:
    for read in (True, False):
        with tcp_server(falls_silent(b"")) as url, open_stream(url.replace("tcp", scheme), timeout=0.5) as stream:
            if read:
                with pytest.raises(VideoError, match=r"sent nothing for 0\.5 s"):
                    stream.read()
            else:
                assert stream.read(timeout=0.05) is None


def test_senders_that_are_not_there() -> None:
    for scheme in ("tcp", "http", "rtsp"):
        with open_stream(f"{scheme}://user:secret@127.0.0.1:{free_port()}/x", timeout=2) as stream:
            _, message = collect(stream)
        assert "refused" in message
        assert "secret" not in message
    with (
        open_stream(f"udp://127.0.0.1:{free_port()}", timeout=0.5) as stream,
        pytest.raises(VideoError, match=r"0\.5 s"),
    ):
        stream.read()
    with http_server([]) as url, open_stream(url.replace("live", "gone")) as stream, pytest.raises(VideoError):
        stream.read()


def test_a_pipe_that_falls_silent_is_an_error(clip: Clip) -> None:
    data = clip("b-frames.ts").read_bytes()
    with (
        pipe() as (source, sink),
        thread(pour(data, sink, False)),
        open_stream(source, drop="block", timeout=1.0) as stream,
    ):
        frames, message = collect(stream)
    assert [number(frame) for frame in frames] == list(range(COUNT))
    assert "the given file object" in message
    assert "nothing arrived for 1 s" in message


@pytest.mark.parametrize("content", [np.random.default_rng(1).bytes(100_000), b"words, and no video\n" * 500, b""])
def test_garbage(content: bytes) -> None:
    with pipe() as (source, sink), thread(pour(content, sink)), open_stream(source) as stream:
        with pytest.raises(VideoError):
            stream.read()
        assert stream.ended
    with tcp_server(sends(content)) as url, open_stream(url, timeout=2) as stream, pytest.raises(VideoError):
        stream.read()


def test_sound_only(tmp_path: Path) -> None:
    path = tmp_path / "sound.ts"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mp2", rate=44_100, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.int16), "s16", "mono")
        sound.rate = 44_100
        for packet in itertools.chain(stream.encode(sound), stream.encode(None)):
            container.mux(packet)
    with open_stream(path) as live, pytest.raises(VideoError, match=r"no video \(its streams: audio\)"):
        live.read()


def test_joined_inside_a_group_of_pictures(clip: Clip) -> None:
    path = clip("b-frames.ts")
    packets = path.read_bytes()
    keys = keyframes(path)
    assert len(keys) > 3
    for share in (0.2, 0.35, 0.5):
        start = int(len(packets) * share) // PACKET * PACKET
        rest = packets[start:]
        with pipe() as (source, sink), thread(pour(rest, sink)), open_stream(source, drop="block") as stream:
            frames = list(stream)
        assert number(frames[0]) in keys
        assert [number(frame) for frame in frames] == list(range(number(frames[0]), COUNT))
        assert frames[0].pts == 0
        assert frames[0].index == 0
        assert not frames[0].discontinuity
        assert stream.stats().damaged > 0
        is_sound(frames, path)


def test_no_keyframe_ever_comes(tmp_path: Path) -> None:
    path = encode(Recipe("one-gop.ts", options={"bf": "2", "g": "250"}), tmp_path)
    data = path.read_bytes()
    rest = data[len(data) // 2 // PACKET * PACKET :]
    with pipe() as (source, sink), thread(pour(rest, sink)), open_stream(source) as stream, pytest.raises(VideoError):
        stream.read()


@pytest.mark.parametrize(
    "recipe",
    [
        RECIPES["b-frames.ts"],
        Recipe("open.ts", options={**B_FRAMES, "x264-params": "open-gop=1:b-pyramid=2"}),
        Recipe("hevc.ts", codec="libx265", options={"x265-params": f"keyint=12:bframes=3:open-gop=1:{QUIET}"}),
        Recipe("mpeg2.ts", codec="mpeg2video", options={**B_FRAMES, "q": "2"}, rate=25),
    ],
    ids=lambda recipe: recipe.name,
)
def test_damage_is_hidden_up_to_the_next_keyframe(recipe: Recipe, tmp_path: Path) -> None:
    path = encode(recipe, tmp_path)
    whole = path.read_bytes()
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    stamps = sorted(packet.pts for packet in packets)
    for start in np.linspace(0.3, 0.7, 12) * (len(whole) // PACKET):
        # A burst of packets is lost somewhere in the middle.
        cut = int(start) * PACKET
        data = whole[:cut] + whole[cut + 6 * PACKET :]
        with pipe() as (source, sink), thread(pour(data, sink)), open_stream(source, drop="block") as stream:
            frames = list(stream)
            stats = stream.stats()
        is_sound(frames, path)
        shown = [number(frame) for frame in frames]
        assert shown == sorted(set(shown))
        assert 0 < COUNT - len(shown) < COUNT // 2
        # A parser may make two packets of one that is torn.
        assert 0 < stats.damaged <= COUNT - len(shown) + 1
        # After a gap comes a keyframe, or a frame that was already with the decoder.
        early = {stamps.index(packet.pts) for packet in packets if packet.pos < cut}
        assert {b for a, b in itertools.pairwise(shown) if b > a + 1} <= early | set(keyframes(path))


def test_packets_that_the_decoder_refuses(clip: Clip) -> None:
    path = clip("fragments.mp4")
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    for packet in packets[14:20]:
        data = bytearray(path.read_bytes())
        data[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
        with pipe() as (source, sink), thread(pour(bytes(data), sink)), open_stream(source, drop="block") as stream:
            frames = list(stream)
        is_sound(frames, path)
        shown = [number(frame) for frame in frames]
        assert shown == sorted(set(shown))
        assert 24 <= len(shown) < COUNT
        assert shown[-1] == COUNT - 1
        assert stream.stats().damaged == COUNT - len(shown)


def test_clock_that_starts_again_within_a_connection(clip: Clip) -> None:
    data = clip("b-frames.ts").read_bytes()
    with pipe() as (source, sink), thread(pour(data + data, sink)), open_stream(source, drop="block") as stream:
        frames = list(stream)
    times = [frame.pts for frame in frames]
    assert times == sorted(times)
    assert sum(frame.discontinuity for frame in frames) == 1
    # Where MPEG-TS counts a loss at the seam, the first group of pictures behind it is not trusted.
    assert next(number(frame) for frame in frames if frame.discontinuity) in keyframes(clip("b-frames.ts"))[:2]


def test_raw_streams_are_timed_by_their_rate(clip: Clip) -> None:
    data = clip("no-times.h264").read_bytes()
    with pipe() as (source, sink), thread(pour(data, sink)), open_stream(source, drop="block") as stream:
        frames = list(stream)
    assert [number(frame) for frame in frames] == list(range(COUNT))
    steps = np.diff([frame.pts for frame in frames])
    assert steps == pytest.approx(steps[0])
    assert steps[0] > 0
    with tcp_server(sends(data)) as url, open_stream(url, drop="block") as stream:
        frames = list(stream)
    for frame in frames:
        assert frame.pts == pytest.approx(frame.arrived - frames[0].arrived, abs=1e-5)


def test_exceptions_pass_through_the_block(clip: Clip) -> None:
    def fail() -> None:
        with open_stream(clip("b-frames.ts")) as stream:
            stream.read()
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()


def test_leaving_wakes_who_waits_in_another_thread(clip: Clip) -> None:
    seen: list[object] = []

    def iterate(stream: object) -> None:
        seen.append(len(list(stream)))  # type: ignore[call-overload]

    def read(stream: object) -> None:
        try:
            stream.read()  # type: ignore[attr-defined]
        except VideoError as error:
            seen.append(str(error))

    for consume in (iterate, read):
        with pipe() as (source, _sink):
            with open_stream(source, timeout=30) as stream:
                waiter = threading.Thread(target=consume, args=(stream,))
                waiter.start()
                assert stream.read(timeout=0.1) is None
            waiter.join()
    assert seen[0] == 0
    assert "closed" in str(seen[1])


def test_leaving_while_the_thread_waits_for_room(clip: Clip) -> None:
    with open_stream(clip("b-frames.ts"), drop="block", buffer=1) as stream:
        all_decoded(stream, 2)
    stats = stream.stats()
    assert (stats.waiting, stats.returned, stats.dropped) == (0, 0, stats.decoded)


def test_leaving_during_a_pause_before_reconnecting() -> None:
    with open_stream(f"tcp://127.0.0.1:{free_port()}", reconnect=3, backoff=60) as stream:
        assert stream.read(timeout=0.2) is None


def test_fifty_streams_leave_nothing(clip: Clip) -> None:
    data = clip("b-frames.ts").read_bytes()
    for _ in range(50):
        with pipe() as (source, sink), thread(pour(data, sink)), open_stream(source, buffer=2) as stream:
            assert stream.read() is not None
            source.close()  # lets the sender end; the stream only sees that nothing comes any more
    with tcp_server(*[sends(data)] * 50) as url:
        for _ in range(50):
            with open_stream(url, buffer=2) as stream:
                assert stream.read() is not None


def test_a_file_object_that_never_returns() -> None:
    release = threading.Event()

    class Stuck(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: object) -> int:
            release.wait(60)
            return 0

    stream, left = open_stream(io.BufferedReader(Stuck()), timeout=0.1), "does not return from reading"
    with pytest.warns(UserWarning, match=left), stream, pytest.raises(VideoError, match=r"has not answered for 1\.2 s"):
        stream.read()
    release.set()
    wait_until(lambda: not any("mmaccel live" in worker.name for worker in threading.enumerate()), "the thread ends")


def test_a_file_object_that_raises() -> None:
    class Broken(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def read(self, size: int = -1) -> bytes:
            raise struct.error("a bug of its own")

    with open_stream(Broken()) as stream, pytest.raises(VideoError, match="a bug of its own"):  # type: ignore[arg-type]
        stream.read()


def test_use_outside_of_the_block(clip: Clip) -> None:
    stream = open_stream(clip("b-frames.ts"))
    for use in (stream.read, stream.latest, lambda: list(stream)):
        with pytest.raises(VideoError, match="not open"):
            use()
    with stream:
        assert stream.read() is not None
        with pytest.raises(VideoError, match="entered before"):
            stream.__enter__()
    for use in (stream.read, stream.latest, lambda: list(stream)):
        with pytest.raises(VideoError, match="closed"):
            use()
    with pytest.raises(VideoError, match="entered before"), stream:
        pass


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"drop": "all"}, "drop"),
        ({"fps": 0}, "fps"),
        ({"fps": float("nan")}, "fps"),
        ({"fps": 1e-9}, "fps"),
        ({"size": (0, 4)}, "size"),
        ({"interpolation": "CUBIC"}, "interpolation"),
        ({"buffer": 0}, "buffer"),
        ({"reconnect": -1}, "reconnect"),
        ({"reconnect": 1}, "URL"),
        ({"timeout": 0}, "timeout"),
        ({"backoff": "1"}, "backoff"),
        ({"follow": True, "idle": -1}, "idle"),
        ({"format": "v4l3"}, "format"),
        ({"threads": 0}, "threads"),
    ],
)
def test_wrong_requests(clip: Clip, wrong: dict, words: str) -> None:
    with pytest.raises(VideoError, match=words):
        open_stream(clip("b-frames.ts"), **wrong)


def test_wrong_sources(tmp_path: Path) -> None:
    closed = io.BytesIO()
    closed.close()
    (tmp_path / "file").write_bytes(b"x")
    with (tmp_path / "file").open("ab") as writer:
        for source, words in (
            (tmp_path, "directory"),
            (tmp_path / "none", "No such file"),
            (closed, "closed"),
            (io.StringIO("x"), "text mode"),
            (writer, "cannot be read from"),
            (b"bytes", "not bytes"),
            ("nul\0", "cannot be opened"),
            ("", "empty"),
        ):
            with pytest.raises(VideoError, match=words):
                open_stream(source)  # type: ignore[arg-type]
    os.mkfifo(tmp_path / "fifo")
    with pipe() as (source, _):
        for other in ("tcp://127.0.0.1:1", tmp_path / "fifo", source):
            with pytest.raises(VideoError, match="follow"):
                open_stream(other, follow=True)
    with open_stream("/dev/video77", format="v4l2") as stream, pytest.raises(VideoError, match="No such file"):
        stream.read()
