"""Every backend gives PyAV's frames, bit for bit, or refuses with the reason."""

from __future__ import annotations

import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from clips import HEIGHT, RECIPES, WIDTH, Recipe, coloured, encode, picture, resized, sequential, turned

from mmaccel.codecs import backends, iter_video, load_video, load_videos
from mmaccel.codecs.backends import BackendError, rgb
from mmaccel.errors import VideoError

Clip = Callable[[str], Path]
WANTED = [41, 3, 3, -1, 17, 18, 0, 55, 12, 11, -60]
# What both libraries must be able to give: without this list a backend that always refuses would pass.
TAKEN = {
    "b-frames.mp4", "open-gop.mp4", "one-gop.mp4", "intra.mp4", "fragments.mp4", "b-frames.mkv", "jitter.mkv",
    "jitter.mp4", "hevc.mp4", "lossless.mkv",
}  # fmt: skip


def needs(backend: str) -> str:
    """Skip where a library is missing."""
    reason = backends.probe(backend)
    if reason is not None:
        pytest.skip(reason)
    return backend


@pytest.fixture(params=backends.RGB)
def library(request: pytest.FixtureRequest) -> str:
    return needs(request.param)


@pytest.mark.parametrize("name", RECIPES)
def test_equal_to_sequential_decoding_or_refused(clip: Clip, library: str, name: str) -> None:
    path = clip(name)
    if name not in TAKEN:
        with pytest.raises(BackendError, match=f'backend="{library}" cannot be used: .*; use backend="pyav"'):
            load_video(path, 2, backend=library)  # type: ignore[arg-type]
        return
    reference = sequential(path)
    video = load_video(path, indices=WANTED, backend=library, threads=2)  # type: ignore[arg-type]
    assert (video.work.backend, video.work.note, video.total) == (library, "", 60)
    for index, image in zip(WANTED, video.numpy(), strict=True):
        np.testing.assert_array_equal(image, reference[index])
    small = load_video(path, 5, size=(40, 92), backend=library)  # type: ignore[arg-type]
    for index, image in zip(small.indices.tolist(), small.numpy(), strict=True):
        np.testing.assert_array_equal(image, resized(reference[index], 40, 92))
    assert torch.equal(small.pts, load_video(path, 5).pts)


def test_every_single_frame_is_sought_exactly(clip: Clip, library: str) -> None:
    for name in ("open-gop.mp4", "hevc.mp4"):
        reference = sequential(clip(name))
        for index in range(0, 60, 7):
            video = load_video(clip(name), indices=[index], backend=library)  # type: ignore[arg-type]
            np.testing.assert_array_equal(video.numpy()[0], reference[index])


@pytest.mark.parametrize("matrix", [(0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0), (0, 1, 1, 0), (-1, 0, 0, 1)])
def test_turned_recordings(clip: Clip, tmp_path: Path, library: str, matrix: tuple[int, ...]) -> None:
    path = turned(clip("b-frames.mp4"), tmp_path / "turned.mp4", matrix)
    for size in (None, (50, 44)):
        plain = load_video(path, 4, size=size)
        video = load_video(path, 4, size=size, backend=library)  # type: ignore[arg-type]
        assert torch.equal(video.frames, plain.frames)
        assert video.rotation == plain.rotation
    assert not torch.equal(load_video(clip("b-frames.mp4"), 1).frames, load_video(path, 1).frames)


@pytest.mark.parametrize(("space", "range_"), [(1, 1), (1, 2), (6, 1), (6, 2), (7, 1), (9, 1)])
def test_colours(tmp_path: Path, library: str, space: int, range_: int) -> None:
    path = coloured(tmp_path / "colours.mp4", space, range_)
    video = load_video(path, backend=library)  # type: ignore[arg-type]
    np.testing.assert_array_equal(video.numpy(), np.stack(sequential(path)))


def test_all_kinds_of_sources_and_calls(clip: Clip, library: str) -> None:
    path = clip("b-frames.mp4")
    plain, data = load_video(path, 6), path.read_bytes()
    with path.open("rb") as file:
        for src in (str(path), data, file):
            assert torch.equal(load_video(src, 6, backend=library).frames, plain.frames)  # type: ignore[arg-type]
        assert not file.closed
    parts = list(iter_video(path, 6, backend=library))  # type: ignore[arg-type]
    assert len(parts) > 1
    assert torch.equal(torch.cat([part.frames for part in parts]), plain.frames)
    several = load_videos([path, clip("b-frames.ts"), path], 6, backend=library, threads=2)  # type: ignore[arg-type]
    assert isinstance(several[1], BackendError)
    for video in (several[0], several[2]):
        assert not isinstance(video, VideoError)
        assert torch.equal(video.frames, plain.frames)


def test_names_that_look_like_urls(clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "http:x.mp4").write_bytes(clip("b-frames.mp4").read_bytes())
    assert len(load_video("http:x.mp4", 2, backend=library)) == 2  # type: ignore[arg-type]


def cut(clip: Clip, folder: Path) -> Path:
    (folder / "cut.mp4").write_bytes(clip("b-frames.mp4").read_bytes()[:-4000])
    return folder / "cut.mp4"


def edited(clip: Clip, folder: Path, first: int = 7, count: int = 60) -> Path:
    """An edit list that shows at most `count` frames, from frame `first` on."""
    data = bytearray(clip("b-frames.mp4").read_bytes())
    offset = data.index(b"elst") + 12
    duration, start = struct.unpack_from(">Ii", data, offset)
    with av.open(str(clip("b-frames.mp4"))) as container:
        ticks = int(1 / (8 * (container.streams.video[0].time_base or Fraction(1))))
    struct.pack_into(">Ii", data, offset, duration * min(count, 60 - first) // 60, start + first * ticks)
    (folder / "edited.mp4").write_bytes(data)
    return folder / "edited.mp4"


def spoilt(clip: Clip, folder: Path) -> Path:
    """The second keyframe is damaged."""
    data = bytearray(clip("b-frames.mkv").read_bytes())
    with av.open(str(clip("b-frames.mkv"))) as container:
        keys = [bytes(packet) for packet in container.demux(video=0) if packet.size and packet.is_keyframe]
    start = data.index(keys[1])
    data[start + 60 : start + len(keys[1])] = bytes(len(keys[1]) - 60)
    (folder / "spoilt.mkv").write_bytes(data)
    return folder / "spoilt.mkv"


REFUSED: dict[str, tuple[str, Callable[[Clip, Path], Path]]] = {
    "ten bits": (
        "pictures in yuv420p10le get other colours",
        lambda clip, folder: encode(Recipe("ten.mp4", count=3, pix_fmt="yuv420p10le"), folder),
    ),
    "cropped": (
        "",
        lambda clip, folder: coloured(folder / "c.mp4", 1, 1, {"x264-params": "crop-rect=2,4,6,8"}),
    ),
    "interlaced": (
        "it is interlaced",
        lambda clip, folder: coloured(folder / "i.mp4", 1, 1, {"x264-params": "interlaced=1"}, 64),
    ),
    "open groups": ("open groups of pictures", lambda clip, folder: clip("hevc-open.mkv")),
    "cut": ("ends early", cut),
    "hidden by an edit list": ("does not begin with a keyframe", edited),
    "a damaged keyframe": ("keyframe at frame 12 is damaged|not the one that FFmpeg gives", spoilt),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_the_reason(clip: Clip, tmp_path: Path, library: str, kind: str) -> None:
    reason, make = REFUSED[kind]
    path = make(clip, tmp_path)
    with pytest.raises(VideoError, match=f'{reason}.*use backend="pyav"'):
        load_video(path, backend=library)  # type: ignore[arg-type]


@pytest.mark.parametrize(("first", "count"), [(0, 60), (0, 50), (12, 48), (12, 40)])
def test_edit_lists(clip: Clip, tmp_path: Path, library: str, first: int, count: int) -> None:
    path = edited(clip, tmp_path, first, count)
    assert len(sequential(path)) == count
    if library == "decord" and first + count < 60:
        # It does not hide what an edit list cuts off at the end.
        with pytest.raises(BackendError, match=f"where the packets hold {count}"):
            load_video(path, backend="decord")
        return
    video = load_video(path, indices=range(count), backend=library)  # type: ignore[arg-type]
    np.testing.assert_array_equal(video.numpy(), np.stack(sequential(path)))


class Imitation:
    """Another library, honest or not: it decodes from start to end, and turns nothing."""

    turned = False
    lie = ""

    def __init__(self, data: str | bytes, threads: int) -> None:
        assert isinstance(data, str)
        assert threads >= 1
        self._images = sequential(Path(data))
        self.count = len(self._images) - (self.lie == "count")

    def get(self, slots: list[int]) -> tuple[np.ndarray, np.ndarray]:
        images = np.stack([self._images[slot] for slot in slots])
        times = np.array(slots) / 8
        if self.lie == "one level":
            images[0, 5, 5, 1] ^= 1
        if self.lie == "late":
            times[-1] += 1 / 8
        if self.lie == "size":
            images = images[:, :-2]
        if self.lie == "fewer":
            return images[1:], times[1:]
        return images, times

    def close(self) -> None:
        self._images = []


@pytest.fixture
def imitation(monkeypatch: pytest.MonkeyPatch) -> type[Imitation]:
    class Library(Imitation):
        pass

    monkeypatch.setattr(rgb, "load", lambda backend: Library)
    return Library


def test_an_honest_library_is_believed(clip: Clip, imitation: type[Imitation]) -> None:
    plain = load_video(clip("b-frames.mp4"), indices=WANTED, size=40)
    video = load_video(clip("b-frames.mp4"), indices=WANTED, size=40, backend="decord")
    assert torch.equal(video.frames, plain.frames)


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        ("count", "sees 59 frames where the packets hold 60"),
        ("one level", "not the one that FFmpeg gives"),
        ("size", "not the one that FFmpeg gives"),
        ("late", "shows frames at other times"),
        ("fewer", "shows frames at other times"),
    ],
)
def test_a_library_that_differs_is_found_out(clip: Clip, imitation: type[Imitation], lie: str, reason: str) -> None:
    imitation.lie = lie
    with pytest.raises(BackendError, match=reason):
        load_video(clip("b-frames.mp4"), indices=WANTED, backend="decord")


def test_pictures_that_change_their_size(tmp_path: Path, imitation: type[Imitation]) -> None:
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=8)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
        for number in range(4):
            encoder = av.CodecContext.create("mjpeg", "w")
            encoder.width, encoder.height = (WIDTH, HEIGHT) if number < 2 else (WIDTH // 2, HEIGHT // 2)  # type: ignore[attr-defined]
            encoder.pix_fmt, encoder.time_base = "yuvj420p", Fraction(1, 8)  # type: ignore[attr-defined]
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            frame = frame.reformat(encoder.width, encoder.height, "yuvj420p")  # type: ignore[attr-defined]
            frame.pts, frame.time_base = number, Fraction(1, 8)
            for packet in [*encoder.encode(frame), *encoder.encode(None)]:  # type: ignore[attr-defined]
                packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 8)
                container.mux(packet)
    assert [image.shape[0] for image in sequential(path)] == [64, 64, 32, 32]
    with pytest.raises(BackendError, match=r"not the one|change their size"):
        load_video(path, backend="decord")


def test_the_choice_itself(clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    path = clip("intra.mp4")
    for backend in ("auto", "pyav"):
        assert load_video(path, 1, backend=backend).work.backend == "pyav"  # type: ignore[arg-type]
    with pytest.raises(VideoError, match="backend must be one of auto, pyav, decord"):
        load_video(path, 1, backend="opencv")  # type: ignore[arg-type]
    assert backends.probe("pyav") is None
    with pytest.raises(VideoError, match="'opencv' is not known"):
        backends.probe("opencv")
