"""Live streams from every kind of source, thinned out by time, under every drop policy."""

from __future__ import annotations

import io
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from clips import HEIGHT, JITTER, RECIPES, WIDTH, sequential
from live_servers import (
    all_decoded,
    free_port,
    grow,
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
from mmaccel.codecs.live_buffer import LiveBuffer
from mmaccel.codecs.live_reader import Arrival, Timeline
from mmaccel.errors import VideoError

Clip = Callable[[str], Path]
COUNT = 60

__all__ = ["nothing_left"]
pytestmark = pytest.mark.usefixtures("nothing_left")


def is_whole(frames: list[LiveFrame], path: Path) -> None:
    """All frames of the clip, in order, each bit for bit what PyAV decodes from the file."""
    assert [number(frame) for frame in frames] == list(range(COUNT))
    assert [frame.index for frame in frames] == list(range(COUNT))
    assert not any(frame.dropped_before or frame.discontinuity for frame in frames)
    for frame, wanted in zip(frames, sequential(path), strict=True):
        assert frame.frame.dtype == torch.uint8
        assert frame.frame.is_contiguous()
        assert torch.equal(frame.frame, torch.from_numpy(wanted).permute(2, 0, 1))


@pytest.mark.parametrize("name", ["b-frames.ts", "fragments.mp4", "b-frames.mkv", "vp9.webm", "mjpeg.avi"])
def test_pipe(clip: Clip, name: str) -> None:
    data = clip(name).read_bytes()
    before = time.time()
    with pipe() as (source, sink), thread(pour(data, sink)), open_stream(source, drop="block") as stream:
        frames = list(stream)
        assert stream.ended
        assert stream.read() is None
        assert not source.closed
    is_whole(frames, clip(name))
    rate = RECIPES[name].rate
    assert [frame.pts for frame in frames] == pytest.approx([k / rate for k in range(COUNT)], abs=1e-3)
    stamps = [before, *(frame.arrived for frame in frames), time.time()]
    assert stamps == sorted(stamps)


def test_file_objects_are_read_from_where_they_stand_and_left_open(clip: Clip) -> None:
    data = clip("b-frames.ts").read_bytes()
    file = io.BytesIO(b"prefix" + data)
    file.seek(6)
    with open_stream(file, drop="block") as stream:
        is_whole(list(stream), clip("b-frames.ts"))
    assert not file.closed


def test_named_pipe(clip: Clip, tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with open_stream(path, drop="block") as stream:
        # The reader waits for the writer, not the other way round.
        assert stream.read(timeout=0.1) is None
        with path.open("wb", buffering=0) as sink, thread(pour(clip("b-frames.ts").read_bytes(), sink)):
            frames = list(stream)
    is_whole(frames, clip("b-frames.ts"))


@pytest.mark.parametrize("name", ["b-frames.ts", "fragments.mp4", "b-frames.mkv"])
@pytest.mark.parametrize("by_path", [True, False])
def test_growing_file(clip: Clip, tmp_path: Path, name: str, by_path: bool) -> None:
    data = clip(name).read_bytes()
    path = tmp_path / name
    path.write_bytes(data[:700])
    with thread(grow(path, data[700:], 8)), path.open("rb") as file:
        source = path if by_path else file
        with open_stream(source, follow=True, idle=1.0, drop="block") as stream:
            frames = list(stream)
    is_whole(frames, clip(name))


def test_a_growing_file_may_be_empty_at_first_but_not_for_ever(clip: Clip, tmp_path: Path) -> None:
    path = tmp_path / "late.ts"
    path.touch()
    writer = grow(path, clip("b-frames.ts").read_bytes(), 2)
    with thread(writer), open_stream(path, follow=True, idle=1.0, drop="block") as stream:
        is_whole(list(stream), clip("b-frames.ts"))
    path.write_bytes(b"")
    with open_stream(path, follow=True, idle=0.1) as stream, pytest.raises(VideoError, match="cannot be read"):
        stream.read()


def test_a_followed_file_that_is_cut_short_is_an_error(clip: Clip, tmp_path: Path) -> None:
    path = tmp_path / "cut.ts"
    path.write_bytes(clip("b-frames.ts").read_bytes())
    with open_stream(path, follow=True, idle=20, drop="block", buffer=COUNT) as stream:
        all_decoded(stream, 40)
        with path.open("r+b") as file:
            file.truncate(100)
        with pytest.raises(VideoError, match="cut shorter"):
            list(stream)


def test_tcp_client(clip: Clip) -> None:
    with tcp_server(sends(clip("b-frames.ts").read_bytes())) as url, open_stream(url, drop="block") as stream:
        is_whole(list(stream), clip("b-frames.ts"))


def test_tcp_listening_for_a_sender(clip: Clip) -> None:
    port, path = free_port(), clip("b-frames.ts")

    def send() -> None:
        for _ in range(200):
            with suppress(av.error.ConnectionRefusedError):
                with av.open(str(path)) as file, av.open(f"tcp://127.0.0.1:{port}", "w", format="mpegts") as sink:
                    copy = sink.add_stream_from_template(file.streams.video[0])
                    for packet in file.demux(video=0):
                        if packet.size:
                            packet.stream = copy
                            sink.mux(packet)
                return
            time.sleep(0.05)

    with open_stream(f"tcp://127.0.0.1:{port}?listen=1", drop="block") as stream, thread(send):
        is_whole(list(stream), path)


def test_http_response_that_grows(clip: Clip) -> None:
    data = clip("b-frames.ts").read_bytes()
    half, seen = len(data) // 2, threading.Event()
    # The second half is sent only after a frame of the first one has been shown.
    server = http_server([data[:half], data[half:]], lambda place: place and seen.wait(20))
    with server as url, open_stream(url, drop="block", options={"analyzeduration": "1000000"}) as stream:
        first = stream.read()
        assert first is not None
        seen.set()
        is_whole([first, *stream], clip("b-frames.ts"))


_PUSH = """
import sys, time, av
with av.open(sys.argv[1]) as file:
    for _ in range(200):
        try:
            sink = av.open(sys.argv[2], "w", format="rtsp", options={"rtsp_transport": "tcp"})
            copy = sink.add_stream_from_template(file.streams.video[0])
            sink.start_encoding()
            break
        except av.error.ConnectionRefusedError:
            time.sleep(0.05)
    with sink:
        for packet in file.demux(video=0):
            if packet.size:
                packet.stream = copy
                sink.mux(packet)
"""


def test_rtsp(clip: Clip) -> None:
    path, url = clip("b-frames.ts"), f"rtsp://127.0.0.1:{free_port()}/live"
    with open_stream(url, drop="block", timeout=20, options={"rtsp_flags": "listen"}) as stream:
        # In a process of its own: PyAV holds the interpreter's lock while an RTSP sender shakes hands.
        with subprocess.Popen([sys.executable, "-c", _PUSH, str(path), url]) as sender:
            frames = list(stream)
        assert sender.returncode == 0
    is_whole(frames, path)


def test_device() -> None:
    with open_stream("testsrc=size=64x48:rate=25", format="lavfi", drop="block", buffer=2) as stream:
        frames = list(itertools.islice(stream, 5))
    with av.open("testsrc=size=64x48:rate=25", format="lavfi") as container:
        wanted = [frame.to_ndarray(format="rgb24") for frame in itertools.islice(container.decode(video=0), 5)]
    assert [frame.pts for frame in frames] == [k / 25 for k in range(5)]
    for frame, image in zip(frames, wanted, strict=True):
        assert np.array_equal(frame.frame.permute(1, 2, 0).numpy(), image)


def test_size(clip: Clip) -> None:
    with open_stream(clip("b-frames.ts"), size=(32, 96), drop="block") as stream:
        frames = list(stream)
    for frame, wanted in zip(frames, sequential(clip("b-frames.ts"), (32, 96)), strict=True):
        assert frame.frame.shape == (3, 32, 96)
        difference = frame.frame.permute(1, 2, 0).numpy().astype(int) - wanted
        assert np.abs(difference).mean() < 2


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation(clip: Clip, tmp_path: Path, degrees: int) -> None:
    turned = tmp_path / "turned.mkv"
    with av.open(str(clip("b-frames.ts"))) as source, av.open(str(turned), "w") as sink:
        copy = sink.add_stream_from_template(source.streams.video[0])
        copy.set_display_rotation(degrees)
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = copy
                sink.mux(packet)
    with open_stream(turned, drop="block") as stream:
        frame = next(iter(stream)).frame
    # FFmpeg's angle is counter-clockwise, as numpy's is.
    wanted = np.rot90(sequential(clip("b-frames.ts"))[0], degrees // 90)
    assert np.array_equal(frame.permute(1, 2, 0).numpy(), wanted)
    with open_stream(turned, size=32, drop="block") as stream:
        frame = next(iter(stream)).frame
    assert frame.shape == ((3, WIDTH * 32 // HEIGHT, 32) if degrees != 180 else (3, 32, WIDTH * 32 // HEIGHT))


@pytest.mark.parametrize("fps", [0.7, 2, 3.3, 8, Fraction(30000, 1001), 100])
def test_fps_of_a_variable_frame_rate(clip: Clip, fps: float) -> None:
    times = [Fraction(t - JITTER[0], 1000) for t in JITTER]
    rate, slack = Fraction(fps).limit_denominator(10**6), Fraction(1, 1000)
    points = range(int(times[-1] * rate) + 2)
    firsts = {next((n for n, t in enumerate(times) if t + slack >= k / rate), None) for k in points}
    wanted = sorted(firsts - {None})
    data = clip("jitter.mkv").read_bytes()
    with pipe() as (source, sink), thread(pour(data, sink)), open_stream(source, fps=fps, drop="block") as stream:
        frames = list(stream)
        stats = stream.stats()
    assert [number(frame) for frame in frames] == wanted
    assert [frame.index for frame in frames] == wanted
    assert [frame.pts for frame in frames] == pytest.approx([float(times[n]) for n in wanted], abs=1e-9)
    assert (stats.decoded, stats.skipped, stats.returned) == (COUNT, COUNT - len(wanted), len(wanted))


@pytest.mark.parametrize("tick", [Fraction(1, 90_000), Fraction(1, 1000)])
@pytest.mark.parametrize("rate", [24, 25, 30, 50, 60, Fraction(30_000, 1001), Fraction(24_000, 1001)])
def test_fps_of_the_stream_itself_takes_every_frame(tick: Fraction, rate: Fraction) -> None:
    timeline = Timeline(Fraction(float(rate)).limit_denominator(1_000_000))
    stamps = [round(k / Fraction(rate) / tick) * tick for k in range(7, 2000)]
    placed = [timeline.place(stamp, 0.0, 1 / Fraction(rate)) for stamp in stamps]
    assert all(timeline.wanted(seconds, tick) for seconds, _ in placed)


def test_timeline_over_jumps() -> None:
    timeline, step = Timeline(None), Fraction(1, 10)
    timeline.disconnect()
    assert timeline.place(Fraction(50), 100.0, step) == (0, False)
    assert timeline.place(Fraction(51), 101.0, step) == (1, False)
    timeline.disconnect()
    assert timeline.place(Fraction(7), 104.5, step) == (Fraction(9, 2), True)
    assert timeline.place(Fraction(8), 105.5, step) == (Fraction(11, 2), False)
    # The sender's clock starts again, and our own is set back meanwhile.
    assert timeline.place(Fraction(1), 90.0, step) == (Fraction(56, 10), True)
    assert timeline.place(None, 91.0, step) == (Fraction(57, 10), False)
    assert timeline.place(Fraction(2), 92.0, step) == (Fraction(66, 10), False)


def test_slow_consumer_that_drops_the_oldest(clip: Clip) -> None:
    data = clip("b-frames.ts").read_bytes()
    with pipe() as (source, sink), thread(pour(data, sink)), open_stream(source, buffer=4) as stream:
        all_decoded(stream, COUNT)
        wait_until(lambda: stream.stats().dropped == COUNT - 4, "all but four dropped")
        frames = list(stream)
        stats = stream.stats()
    assert [(number(frame), frame.index, frame.dropped_before) for frame in frames] == [
        (56, 56, 56), (57, 57, 0), (58, 58, 0), (59, 59, 0),
    ]  # fmt: skip
    assert (stats.dropped, stats.returned, stats.waiting) == (56, 4, 0)


def test_slow_consumer_that_drops_the_newest(clip: Clip) -> None:
    data = clip("b-frames.ts").read_bytes()
    with pipe() as (source, sink), open_stream(source, buffer=4, drop="newest") as stream:
        with thread(pour(data, sink, close=False)):
            pass
        wait_until(lambda: stream.stats().dropped > 20, "the buffer overflowed")
        before = stream.stats().dropped
        early = [stream.read() for _ in range(4)]
        with thread(pour(data, sink)):
            late = list(stream)
        stats = stream.stats()
    assert [frame and (number(frame), frame.dropped_before) for frame in early] == [(k, 0) for k in range(4)]
    assert late[0].dropped_before == before
    assert late[0].index == 4 + before
    assert [b.index - a.index - 1 for a, b in itertools.pairwise(late)] == [f.dropped_before for f in late[1:]]
    assert stats.decoded == stats.dropped + stats.returned


def test_slow_consumer_that_lets_the_source_wait(clip: Clip) -> None:
    data = clip("b-frames.ts").read_bytes()
    with pipe() as (source, sink), thread(pour(data, sink)), open_stream(source, buffer=3, drop="block") as stream:
        all_decoded(stream, 4)
        time.sleep(0.1)
        assert stream.stats().decoded == 4  # one is in the hand of the thread
        assert stream.stats().dropped == 0
        is_whole(list(stream), clip("b-frames.ts"))


def test_latest(clip: Clip) -> None:
    data = clip("b-frames.ts").read_bytes()
    with pipe() as (source, sink), thread(pour(data, sink)), open_stream(source, buffer=COUNT) as stream:
        wait_until(lambda: stream.stats().waiting == COUNT, "all frames wait")
        frame = stream.latest()
        assert frame is not None
        assert (number(frame), frame.dropped_before) == (COUNT - 1, COUNT - 1)
        assert stream.latest() is None
        assert stream.ended


def test_marks_outlive_the_frames_that_carry_them() -> None:
    def arrival(index: int, jump: bool) -> Arrival:
        return Arrival(None, 0.0, 0.0, index, jump)  # type: ignore[arg-type]

    for drop in ("oldest", "newest"):
        buffer = LiveBuffer(1, drop)
        for index in range(4):
            buffer.put(arrival(index, jump=index == 2))
        taken = [buffer.take(0, False, lambda: 1.0)]
        buffer.put(arrival(4, jump=False))
        taken.append(buffer.take(0, False, lambda: 1.0))
        told = [item and (item.arrival.index, item.dropped, item.discontinuity) for item in taken]
        assert told == ([(3, 3, True), (4, 0, False)] if drop == "oldest" else [(0, 0, False), (4, 3, True)])


def test_read_within_a_time(clip: Clip) -> None:
    data = clip("b-frames.ts").read_bytes()
    with pipe() as (source, sink), open_stream(source) as stream:
        assert stream.read(timeout=0) is None
        assert stream.latest(timeout=0.05) is None
        assert not stream.ended
        with thread(pour(data, sink)):
            assert stream.read(timeout=20) is not None


def test_two_streams_at_once(clip: Clip) -> None:
    left, right = clip("b-frames.ts"), clip("b-frames.mkv")
    with (
        tcp_server(sends(left.read_bytes())) as url,
        pipe() as (source, sink),
        thread(pour(right.read_bytes(), sink)),
        open_stream(url, drop="block", buffer=2) as first,
        open_stream(source, drop="block", buffer=2) as second,
    ):
        pairs = list(zip(first, second, strict=True))
    is_whole([a for a, _ in pairs], left)
    is_whole([b for _, b in pairs], right)


def test_consumers_share_the_frames(clip: Clip) -> None:
    taken: list[int] = []
    with open_stream(clip("b-frames.ts"), drop="block") as stream:
        workers = [threading.Thread(target=lambda: taken.extend(f.index for f in stream)) for _ in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert sorted(taken) == list(range(COUNT))
