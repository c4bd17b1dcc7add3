"""`write_video`: what is written comes back."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import av
import numpy as np
import pytest
import torch
from clips import number_in, picture

from mmaccel.codecs import load_video, write_video
from mmaccel.errors import VideoError

if TYPE_CHECKING:
    from pathlib import Path

PICTURES = np.stack([picture(number) for number in range(12)])


@pytest.mark.parametrize(
    ("name", "codec", "crf", "pix_fmt"),
    [
        ("a.mp4", "libx264", 18, "yuv420p"),
        ("a.mkv", "libx264", 10, "yuv444p"),
        ("a.webm", "libvpx-vp9", 20, "yuv420p"),
        ("a.avi", "mjpeg", None, "yuvj420p"),
        ("a.mkv", "ffv1", None, "bgr0"),
        ("a.gif", "gif", None, "rgb8"),
    ],
)
def test_round_trip(tmp_path: Path, name: str, codec: str, crf: int | None, pix_fmt: str) -> None:
    options = {"deadline": "realtime", "cpu-used": "8"} if codec == "libvpx-vp9" else {}
    path = write_video(tmp_path / name, PICTURES, fps=10, codec=codec, crf=crf, pix_fmt=pix_fmt, options=options)
    assert path == tmp_path / name
    video = load_video(path, 12)
    assert (video.total, video.fps, video.lost) == (12, 10.0, 0)
    assert [number_in(image) for image in video.numpy()] == list(range(12))
    error = np.abs(video.numpy().astype(int) - PICTURES).mean()
    assert error == 0 if codec == "ffv1" else error < (20 if codec == "gif" else 6)


@pytest.mark.parametrize("height", [72, 720])
def test_colours_come_back_below_and_above_high_definition(tmp_path: Path, height: int) -> None:
    colour = np.array([210, 50, 30], dtype=np.uint8)
    path = write_video(tmp_path / "a.mp4", np.broadcast_to(colour, (2, height, 64, 3)), crf=1)
    seen = load_video(path, 1).numpy()[0, height // 2, 32].astype(int)
    assert np.abs(seen - colour).max() <= 3
    with av.open(str(path)) as container:
        assert container.streams.video[0].colorspace == (6 if height < 720 else 1)


def test_a_tensor_with_channels_first_is_the_same_as_an_array(tmp_path: Path) -> None:
    a = write_video(tmp_path / "a.mp4", PICTURES)
    b = write_video(tmp_path / "b.mp4", torch.from_numpy(PICTURES).permute(0, 3, 1, 2))
    assert a.read_bytes() == b.read_bytes()


def test_odd_sides_are_extended_by_one_pixel(tmp_path: Path) -> None:
    odd = PICTURES[:, :63, :127]
    frames = load_video(write_video(tmp_path / "a.mp4", odd, crf=1), 1).numpy()[0].astype(int)
    assert frames.shape == (64, 128, 3)
    assert np.abs(frames[:63, :127] - odd[0]).mean() < 6
    assert np.abs(frames[63] - frames[62]).mean() < 6
    exact = load_video(write_video(tmp_path / "b.mkv", odd, codec="ffv1", crf=None, pix_fmt="bgr0"), 1)
    np.testing.assert_array_equal(exact.numpy()[0], odd[0])


def test_gop_sets_the_keyframes(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", PICTURES, gop=4)
    with av.open(str(path)) as container:
        keys = [frame.key_frame for frame in container.decode(video=0)]
    assert [number for number, key in enumerate(keys) if key] == [0, 4, 8]
    assert path.read_bytes().index(b"moov") < path.read_bytes().index(b"mdat")


@pytest.mark.parametrize(
    ("frames", "options", "message"),
    [
        (PICTURES[:0], {}, "at least one frame"),
        (PICTURES.astype(np.float32), {}, "uint8"),
        (PICTURES[0], {}, r"\[T, H, W, 3\]"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.bfloat16), {}, "uint8"),
        (torch.from_numpy(PICTURES), {}, r"a tensor \[T, 3, H, W\]"),
        (PICTURES, {"fps": 0}, "fps must be above 0"),
        (PICTURES, {"codec": "no-such-codec"}, "cannot be written"),
        (PICTURES, {"codec": "aac"}, "encodes audio"),
        (PICTURES, {"pix_fmt": "no-such-format"}, "cannot be written"),
        (PICTURES, {"options": {"preset": "no-such-preset"}}, "cannot be written"),
    ],
)
def test_bad_input_leaves_the_old_file_and_no_other(
    tmp_path: Path, frames: object, options: dict, message: str
) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"precious")
    with pytest.raises(VideoError, match=message):
        write_video(path, frames, **options)  # type: ignore[arg-type]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]
    assert path.read_bytes() == b"precious"


def test_bad_paths(tmp_path: Path) -> None:
    for path in (tmp_path / "none" / "a.mp4", tmp_path / "a.unknown", tmp_path / "no suffix"):
        with pytest.raises(VideoError, match="cannot be written"):
            write_video(path, PICTURES)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="needs scheduling policies")
def test_the_thread_that_encodes_av1_is_scheduled_as_before(tmp_path: Path) -> None:
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    write_video(tmp_path / "a.mp4", PICTURES, codec="libsvtav1")
    assert (os.sched_getscheduler(0), os.sched_getparam(0)) == before
    with pytest.raises(VideoError):
        write_video(tmp_path / "b.mp4", PICTURES, codec="libsvtav1", pix_fmt="no-such-format")
    assert (os.sched_getscheduler(0), os.sched_getparam(0)) == before
