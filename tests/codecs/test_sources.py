"""Servers, stills, file objects and requests that a video cannot be read from, or that ask for too much."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import number_in, picture
from PIL import Image, ImageOps

from mmaccel.codecs import load_video, sampling
from mmaccel.errors import VideoError

Clip = Callable[[str], Path]


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """serve(content, sized) -> the URL of a server that gives it as a whole, never a range of it."""
    content: dict[str, tuple[bytes, bool]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data, sized = content[self.path]
            self.send_response(200)
            if sized:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def url(data: bytes, *, sized: bool = True) -> str:
        path = f"/{len(content)}.mp4"
        content[path] = data, sized
        return f"http://127.0.0.1:{server.server_port}{path}"

    yield url
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["b-frames.mp4", "vp9.webm", "mpeg4.avi"])
def test_a_server_that_states_no_length(clip: Clip, serve: Callable[..., str], name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        video = load_video(serve(clip(name).read_bytes(), sized=False), indices=[0, 37, 59])
    assert [number_in(image) for image in video.numpy()] == [0, 37, 59]
    assert (video.total, video.lost) == (60, 0)


def test_an_index_at_the_end_behind_a_server_that_cannot_jump(clip: Clip, serve: Callable[..., str]) -> None:
    # The filler makes FFmpeg jump over the pictures instead of reading them.
    data = clip("intra.mp4").read_bytes()
    place = data.index(b"mdat") - 4
    end = data.index(b"moov") - 4
    filler = bytes(3_000_000)
    size = (end - place + len(filler)).to_bytes(4, "big")
    data = data[:place] + size + data[place + 4 : end] + filler + data[end:]
    assert load_video(data, 1).total == 60
    with pytest.raises(VideoError, match=r"range requests.*download.*faststart"):
        load_video(serve(data), 1)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_stills_come_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    path = tmp_path / f"still.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == "webp" else {"quality": 95} if suffix == "jpg" else {}
    Image.fromarray(picture(77)).save(path, exif=exif, **options)
    with Image.open(path) as stored:
        expected = np.array(ImageOps.exif_transpose(stored).convert("RGB")).astype(int)
    for src in (path, path.read_bytes()):
        video = load_video(src)
        image = video.numpy()[0]
        assert image.shape == expected.shape
        assert (video.height, video.width) == expected.shape[:2]
        assert np.abs(image - expected).mean() < (1 if suffix == "png" else 12)
        assert video.rotation == {3: 180, 4: 180, 5: 270, 6: 90, 7: 90, 8: 270}.get(orientation, 0)


def test_the_name_of_a_still_is_no_pattern(tmp_path: Path) -> None:
    for number in range(3):
        Image.fromarray(picture(number)).save(tmp_path / f"shot{number}.png")
    for name in ("shot%d.png", "shot*.png"):
        Image.fromarray(picture(200)).save(tmp_path / name)
        video = load_video(tmp_path / name)
        assert video.total == 1
        assert number_in(video.numpy()[0]) == 200


def test_an_animation_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "moving.webp"
    first, *others = (Image.fromarray(picture(number)) for number in range(3))
    first.save(path, save_all=True, append_images=others, duration=100)
    with pytest.raises(VideoError, match="still WebP pictures only"):
        load_video(path)


def test_a_file_prefix(clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.mp4").write_bytes(clip("intra.mp4").read_bytes())
    monkeypatch.chdir(tmp_path)
    for src in ("file:a.mp4", f"file:{tmp_path}/a.mp4", f"file://{tmp_path}/a.mp4"):
        assert number_in(load_video(src, indices=[9]).numpy()[0]) == 9
    (tmp_path / "file:a.mp4").write_bytes(b"")
    with pytest.raises(VideoError, match=r"file:a\.mp4 is empty"):
        load_video("file:a.mp4")


class TestFileObjects:
    def test_closed(self, clip: Clip) -> None:
        with clip("intra.mp4").open("rb") as file:
            pass
        for src in (file, _closed(io.BytesIO(b"abc"))):
            with pytest.raises(VideoError, match="closed file"):
                load_video(src)

    def test_open_for_writing(self, tmp_path: Path) -> None:
        with (tmp_path / "a.mp4").open("wb") as file, pytest.raises(VideoError, match='mode "rb"'):
            load_video(file)

    def test_without_seekable(self, clip: Clip) -> None:
        class Reader:
            def __init__(self, data: bytes) -> None:
                self._data = io.BytesIO(data)

            def read(self, count: int = -1) -> bytes:
                return self._data.read(count)

        video = load_video(Reader(clip("intra.mp4").read_bytes()), indices=[9])  # type: ignore[arg-type]
        assert number_in(video.numpy()[0]) == 9

    def test_that_cannot_be_read(self) -> None:
        class Broken(io.BytesIO):
            def read(self, *_: object) -> bytes:
                raise OSError("the disk is gone")

        with pytest.raises(VideoError, match="the disk is gone"):
            load_video(Broken(b"abc"))


def _closed(file: io.BytesIO) -> io.BytesIO:
    file.close()
    return file


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"size": 70_000}, "at most 32768 pixels"),
        ({"size": 10**9}, "at most 32768 pixels"),
        ({"size": 10**30}, "at most 32768 pixels"),
        ({"size": (10**6, 10**6)}, "at most 32768 pixels"),
        ({"size": (10**30, 8)}, "at most 32768 pixels"),
        ({"size": 20_000}, "at most 32768 pixels"),  # the other side is twice as long
        ({"frames": 10**30, "on_short": "repeat"}, "at most 1000000 frames"),
        ({"frames": 10**9, "on_short": "repeat"}, "at most 1000000 frames"),
        ({"indices": range(10**9)}, "at most 1000000 frames"),
        ({"threads": 10**10}, "at most 256"),
        ({"frames": 1_000_000, "on_short": "repeat", "size": (16_384, 16_384)}, "GiB of memory"),
        ({"size": np.array([5, 6, 7])}, "size must be"),
        ({"size": np.array([5.5, 6.0])}, "whole number"),
    ],
)
def test_too_much(clip: Clip, request_: dict, message: str) -> None:
    with pytest.raises(VideoError, match=message) as caught:
        load_video(clip("intra.mp4"), **request_)
    assert "\n" not in str(caught.value)


def test_memory_that_is_not_to_be_had(clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "free_memory", lambda *_: 2 * 3 * 64 * 128 - 1)
    assert len(load_video(clip("intra.mp4"), 1)) == 1
    with pytest.raises(VideoError, match=r"2 frame\(s\) of 64 x 128 need .* fewer frames or a smaller size"):
        load_video(clip("intra.mp4"), 2)
    monkeypatch.setattr(sampling, "free_memory", lambda *_: None)
    with pytest.raises(VideoError, match="not to be had"):
        sampling.allocate(10**12, 10**4, 10**4)


@pytest.mark.parametrize("size", [np.array([40, 30]), torch.tensor([40, 30]), [40, 30], (np.int64(40), 30)])
def test_pairs_of_any_kind(clip: Clip, size: object) -> None:
    assert load_video(clip("intra.mp4"), 1, size=size).frames.shape == (1, 3, 40, 30)  # type: ignore[arg-type]
