"""Leaving out what nothing refers to: every frame alone, and any subset, as sequential decoding gives it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import av
import numpy as np
import pytest
from clips import Recipe, encode, sequential

from mmaccel.codecs import load_video
from mmaccel.codecs.av1 import FrameHeaders

if TYPE_CHECKING:
    from pathlib import Path


def dropped_by_ffmpeg(path: Path) -> int:
    """How many frames the decoder itself leaves out when it is told to leave out what is no reference."""
    counts = []
    for skip in ("DEFAULT", "NONREF"):
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.skip_frame = skip
            counts.append(sum(1 for _ in container.decode(stream)))
    return counts[0] - counts[1]


def skipped_in(path: Path) -> int:
    """Read every frame alone and random subsets, compare, and return how many packets of the file can be left out."""
    expected = np.stack(sequential(path))
    singles = [load_video(path, indices=[number], threads=1) for number in range(len(expected))]
    for number, video in enumerate(singles):
        assert video.work.way == "groups"
        np.testing.assert_array_equal(video.numpy()[0], expected[number], err_msg=f"frame {number}")
    draw = np.random.default_rng(len(expected))
    for count in (2, 5, 11, 23):
        subset = np.sort(draw.choice(len(expected), count, replace=False))
        np.testing.assert_array_equal(load_video(path, indices=subset, threads=2).numpy(), expected[subset])
    return sum(video.work.skipped for video in singles)


AV1 = {
    "plain.mkv": {"g": "16", "preset": "12"},
    "plain.mp4": {"g": "16", "preset": "12"},
    "slow.mkv": {"g": "60", "preset": "7"},
    "low-delay.mkv": {"g": "60", "preset": "12", "svtav1-params": "pred-struct=1"},
    "open.mkv": {"g": "24", "preset": "12", "svtav1-params": "irefresh-type=1"},
    "levels.mp4": {"g": "60", "preset": "12", "svtav1-params": "hierarchical-levels=3"},
    "ten-bit.mkv": {"g": "33", "preset": "12"},
    "grain.mp4": {"g": "33", "preset": "8", "svtav1-params": "film-grain=20"},
}


def av1_clip(name: str, folder: Path) -> Path:
    options = {**AV1[name], "svtav1-params": ":".join([AV1[name].get("svtav1-params", "tune=1"), "lp=1"])}
    pix_fmt = "yuv420p10le" if name == "ten-bit.mkv" else "yuv420p"
    return encode(Recipe(name, "libsvtav1", pix_fmt=pix_fmt, options=options), folder)


@pytest.mark.parametrize("name", AV1)
def test_av1(name, tmp_path):
    path = av1_clip(name, tmp_path)
    assert skipped_in(path) > 0
    assert dropped_by_ffmpeg(path) > 0


def test_grain_is_laid_on_the_clip_that_is_named_after_it(tmp_path):
    path = av1_clip("grain.mp4", tmp_path)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.options = {"filmgrain": "0"}
        bare = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert all((one != other).any() for one, other in zip(bare, sequential(path), strict=True))


@pytest.mark.parametrize("name", ["plain.mkv", "levels.mp4"])
def test_av1_packets_that_are_left_out_are_among_those_that_the_decoder_drops(name, tmp_path):
    path = av1_clip(name, tmp_path)
    left_out, kept = set(), set()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        test = FrameHeaders(bytes(stream.codec_context.extradata or b""))
        left_out = {packet.pts for packet in container.demux(stream) if packet.size and test(memoryview(packet))}
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.skip_frame = "NONREF"
        kept = {frame.pts for frame in container.decode(stream)}
    assert left_out
    assert not left_out & kept
