"""`load_video` through the hardware decoders, whose classes decode in software here: device "cpu" in their place."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import fake_nvvideocodec as fake
import numpy as np
import pytest
import torch
from clips import RECIPES, Recipe, coloured, encode, sequential, turned

from mmaccel.codecs import VideoWarning, backends, iter_video, load_video, load_videos, reader
from mmaccel.codecs.backends import BackendError, choice, cuda
from mmaccel.codecs.backends.picture import Colours, Picture
from mmaccel.codecs.canvas import Canvas
from mmaccel.codecs.picture import Painter
from mmaccel.errors import VideoError

Clip = Callable[[str], Path]
WANTED = [41, 3, 3, -1, 17, 18, 0, 55, 12, 11, -60]
TAKEN = {
    "b-frames.mp4", "open-gop.mp4", "one-gop.mp4", "intra.mp4", "fragments.mp4", "b-frames.mkv", "b-frames.ts",
    "jitter.mkv", "jitter.mp4", "hevc.mp4", "hevc-open.mkv", "vp9.webm", "av1.mkv", "mpeg2.mpg",
}  # fmt: skip
# PyNvVideoCodec knows no others; FFmpeg's GPU decoders take these too.
MORE = {"cuda": {"mpeg4.mp4", "mpeg4.avi", "mjpeg.avi"}, "pynvvideocodec": set[str]()}
CPU = (torch.device("cpu"),)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is there, but every choice of hardware is granted, on the CPU."""
    monkeypatch.setitem(sys.modules, "PyNvVideoCodec", fake)
    fake.sessions.clear()
    fake.failures.clear()

    def choose(backend: str, device: object) -> tuple[str, tuple[torch.device, ...], str]:
        return ("cuda" if backend == "auto" else backend), (() if backend == "pyav" else CPU), ""

    monkeypatch.setattr(reader, "choose", choose)


def load(path: Path, *args: Any, backend: str, **kwargs: Any) -> Any:
    return load_video(path, *args, backend=backend, device="cpu", **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", backends.HARDWARE)
@pytest.mark.parametrize("name", RECIPES)
def test_equal_to_sequential_decoding_or_refused(clip: Clip, backend: str, name: str) -> None:
    path = clip(name)
    if name not in TAKEN | MORE[backend]:
        with pytest.raises(BackendError, match=f'backend="{backend}" cannot be used: .*; use backend="pyav"'):
            load(path, 2, backend=backend)
        return
    reference = sequential(path)
    for threads in (1, 3):
        video = load(path, indices=WANTED, backend=backend, threads=threads)
        assert (video.work.backend, video.work.note, video.total) == (backend, "", 60)
        for index, image in zip(WANTED, video.numpy(), strict=True):
            np.testing.assert_array_equal(image, reference[index])
    plain, small = load_video(path, 5, size=(40, 92), backend="pyav"), load(path, 5, size=(40, 92), backend=backend)
    assert torch.equal(small.frames, plain.frames)
    assert torch.equal(small.pts, plain.pts)


@pytest.mark.parametrize("turn", itertools.product((1, -1), (1, -1), (False, True)))
def test_turned_recordings(clip: Clip, tmp_path: Path, turn: tuple[int, int, bool]) -> None:
    p, q, across = turn
    path = turned(clip("b-frames.mp4"), tmp_path / "turned.mp4", (0, p, q, 0) if across else (p, 0, 0, q))
    for size in (None, (50, 44)):
        plain, video = load_video(path, 4, size=size, backend="pyav"), load(path, 4, size=size, backend="cuda")
        assert torch.equal(video.frames, plain.frames)
        assert (video.rotation, video.height, video.width) == (plain.rotation, plain.height, plain.width)


@pytest.mark.parametrize(("space", "range_"), [(1, 1), (1, 2), (6, 2), (9, 1)])
def test_colours(tmp_path: Path, space: int, range_: int) -> None:
    path = coloured(tmp_path / "colours.mp4", space, range_)
    for backend in backends.HARDWARE:
        assert torch.equal(load(path, backend=backend).frames, load_video(path, backend="pyav").frames)


@pytest.mark.parametrize("name", RECIPES)
def test_auto_reads_everything(clip: Clip, name: str) -> None:
    path = clip(name)
    video, plain = load(path, 6, backend="auto"), load_video(path, 6, backend="pyav")
    assert torch.equal(video.frames, plain.frames)
    if name in TAKEN | MORE["cuda"]:
        assert (video.work.backend, video.work.note) == ("cuda", "")
    else:
        assert video.work.backend == "pyav"
        assert video.work.note.startswith('backend="cuda" cannot be used: ')


@pytest.mark.parametrize("backend", backends.HARDWARE)
def test_packets_that_nothing_needs_are_left_out(clip: Clip, backend: str) -> None:
    path = clip("b-frames.mp4")
    plain = load_video(path, indices=[11, 23, 35], backend="pyav")
    video = load(path, indices=[11, 23, 35], backend=backend)
    assert video.work.skipped == plain.work.skipped > 0
    # The keyframe of the first group is decoded by both, once for a session.
    assert plain.work.decoded < video.work.decoded <= plain.work.decoded + 2 * video.work.threads
    everything = load(path, indices=[11, 23, 35], skip_nonref=False, backend=backend)
    assert everything.work.skipped == 0
    assert torch.equal(everything.frames, video.frames)


def test_in_parts_and_many(clip: Clip) -> None:
    path, odd = clip("b-frames.mp4"), clip("animation.gif")
    plain, other = load_video(path, 6, backend="pyav"), load_video(odd, 6, backend="pyav")
    for src, want, least in ((path, plain, 2), (odd, other, 1)):
        parts = list(iter_video(src, 6, device="cpu"))
        assert len(parts) >= least
        assert [part.start for part in parts] == sorted({part.start for part in parts})
        assert torch.equal(torch.cat([part.frames for part in parts]), want.frames)
    found = load_videos([path, odd, path], 6, device="cpu", threads=2)
    for video, want, backend in zip(found, (plain, other, plain), ("cuda", "pyav", "cuda"), strict=True):
        assert not isinstance(video, VideoError)
        assert video.work.backend == backend
        assert torch.equal(video.frames, want.frames)


def test_a_session_that_fails(clip: Clip) -> None:
    path = clip("b-frames.mp4")
    fake.failures.append(fake.PyNvVCException("out of order"))
    with pytest.raises(BackendError, match="PyNvVideoCodec failed"):
        load(path, 6, backend="pynvvideocodec", threads=1)
    assert torch.equal(load(path, 6, backend="pynvvideocodec").frames, load_video(path, 6, backend="pyav").frames)


def test_damage_that_the_headers_show(clip: Clip, tmp_path: Path) -> None:
    data = bytearray(clip("b-frames.mkv").read_bytes())
    with av.open(str(clip("b-frames.mkv"))) as container:
        packet = [bytes(packet) for packet in container.demux(video=0) if packet.size][14]
    start = data.index(packet)
    data[start + len(packet) // 3 : start + len(packet)] = bytes(len(packet) - len(packet) // 3)
    path = tmp_path / "spoilt.mkv"
    path.write_bytes(data)
    with pytest.raises(BackendError, match="is damaged"):
        load(path, 60, backend="cuda")
    with pytest.warns(VideoWarning, match="1 of 60 frames are lost"):
        video = load(path, 60, backend="auto")
    assert (video.lost, video.work.backend) == (1, "pyav")
    assert "is damaged" in video.work.note


def test_other_colours_are_found_out(clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "colours_of", lambda *args: Colours("bt709"))
    with pytest.raises(BackendError, match="a keyframe is not the one that FFmpeg's software gives"):
        load(clip("b-frames.mp4"), 2, backend="cuda")
    video = load(clip("b-frames.mp4"), 2, backend="auto")
    assert "a keyframe is not the one" in video.work.note
    assert torch.equal(video.frames, load_video(clip("b-frames.mp4"), 2, backend="pyav").frames)


def test_a_kernel_that_runs_out_of_memory(clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr("mmaccel.codecs.backends.picture.nv12_to_rgb", no_memory)
    with pytest.raises(BackendError, match=r'cannot be used: CUDA out of memory\.; use backend="pyav"'):
        load(clip("b-frames.mp4"), 2, backend="cuda")


def test_ten_bits_are_left_to_the_cpu(tmp_path: Path) -> None:
    path = encode(Recipe("ten.mp4", count=3, pix_fmt="yuv420p10le"), tmp_path)
    with pytest.raises(BackendError, match="pictures in yuv420p10le"):
        load(path, 2, backend="cuda")
    assert torch.equal(load(path, 2, backend="auto").frames, load_video(path, 2, backend="pyav").frames)


def test_interlaced_video_is_left_to_the_cpu(tmp_path: Path) -> None:
    path = coloured(tmp_path / "i.mp4", 1, 1, {"x264-params": "interlaced=1"}, 64)
    for backend in backends.HARDWARE:
        with pytest.raises(BackendError, match="the video is interlaced"):
            load(path, 2, backend=backend)


def test_a_picture_on_another_gpu_than_the_canvas(clip: Clip) -> None:
    path, drawn = clip("b-frames.mp4"), []

    class Elsewhere:
        """A picture whose device is not called that of the canvas."""

        def __init__(self, picture: Picture) -> None:
            self._picture = picture
            self.y = SimpleNamespace(shape=picture.y.shape, device=torch.device("cpu", 0))

        def draw(self, out: torch.Tensor, rows: list[int], **how: Any) -> None:
            drawn.append(len(out))
            self._picture.draw(out, rows, **how)

    canvas, painter = Canvas(np.array([0, 1, 0])), Painter(40)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        decoder = cuda.CudaDecoder(stream, "cpu")
        first = next(av.open(str(path)).decode(video=0))
        pts = int(first.pts or 0)
        for _, picture in decoder.decode(container.demux(stream), [pts]):
            canvas.draw_picture(0, Elsewhere(picture), painter.layout(first), painter)  # type: ignore[arg-type]
    assert drawn == [1]
    expected = load_video(path, 1, size=40, backend="pyav").frames[0]
    for row in (0, 2):
        assert torch.equal(canvas.frames[row], expected)


def test_errors_of_the_request_stay_what_they_are(clip: Clip) -> None:
    with pytest.raises(VideoError, match="frame 60 is outside") as caught:
        load(clip("b-frames.mp4"), indices=[60], backend="auto")
    assert not isinstance(caught.value, BackendError)


class TestChoice:
    def test_auto(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[tuple[str, int]] = []

        def probe(backend: str, device: int) -> str | None:
            asked.append((backend, device))
            return "no driver" if device == 1 else None

        monkeypatch.setattr(choice, "probe", probe)
        assert choice.choose("auto", None) == choice.choose("auto", "cpu") == ("pyav", (), "")
        first, second = torch.device("cuda", 0), torch.device("cuda", 1)
        assert choice.choose("auto", "cuda:0") == ("cuda", (first,), "")
        assert choice.choose("auto", ["cuda:0", "cuda:1"]) == ("pyav", (), "decoded on the CPU: no driver")
        assert asked == [("cuda", 0), ("cuda", 0), ("cuda", 1)]
        with pytest.raises(BackendError, match='backend="pynvvideocodec" cannot be used: no driver'):
            choice.choose("pynvvideocodec", second)
        assert choice.choose("pyav", "cuda:0") == ("pyav", (), "")

    def test_what_does_not_fit(self) -> None:
        for device, reason in (("cpu", "leaves frames on a GPU"), ([], "device is empty"), ("gpu", "cannot be put")):
            with pytest.raises(VideoError, match=reason):
                choice.choose("cuda", device)
        for backend, device in (("decord", ["cuda:0", "cuda:1"]), ("auto", ["cpu", "cuda:0"])):
            with pytest.raises(VideoError, match="pass one device"):
                choice.choose(backend, device)  # type: ignore[arg-type]

    def test_hardware_by_name_where_there_is_none(self, clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        monkeypatch.setattr(reader, "choose", choice.choose)
        with pytest.raises(BackendError, match="torch sees no GPU"):
            load_video(clip("intra.mp4"), 1, backend="cuda")
