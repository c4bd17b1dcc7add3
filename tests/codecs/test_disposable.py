"""Leaving out what nothing refers to: every frame alone, and any subset, as sequential decoding gives it."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

import av
import numpy as np
import pytest
from clips import HEIGHT, WIDTH, Recipe, encode, number_in, picture, sequential

import mmaccel.codecs.groups
from mmaccel.codecs import load_video
from mmaccel.codecs.disposable import disposable_test

if TYPE_CHECKING:
    from pathlib import Path


def left_out(path: Path) -> set[int | None]:
    """Times of the packets that may be left out."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        test = disposable_test(stream.codec_context)
        assert test is not None
        return {packet.pts for packet in container.demux(stream) if packet.size and test(memoryview(packet))}


def dropped(path: Path) -> set[int | None]:
    """Times of the frames that the decoder itself leaves out when it is told to leave out what is no reference."""
    times = []
    for skip in ("DEFAULT", "NONREF"):
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.skip_frame = skip
            times.append({frame.pts for frame in container.decode(stream)})
    return times[0] - times[1]


def skipped_in(path: Path, ways: tuple[str, ...] = ("groups",)) -> int:
    """Read every frame alone and random subsets, compare, and return how many packets were left out in all."""
    expected = np.stack(sequential(path))
    singles = [load_video(path, indices=[number], threads=1) for number in range(len(expected))]
    for number, video in enumerate(singles):
        assert video.work.way in ways
        np.testing.assert_array_equal(video.numpy()[0], expected[number], err_msg=f"frame {number}")
    draw = np.random.default_rng(len(expected))
    for count in (2, 5, 11, 23):
        subset = np.sort(draw.choice(len(expected), count, replace=False))
        np.testing.assert_array_equal(load_video(path, indices=subset, threads=2).numpy(), expected[subset])
    return sum(video.work.skipped for video in singles)


def encoded(codec: str, options: dict[str, str]) -> list[av.Packet]:
    """60 frames as packets; times count frames."""
    context = av.CodecContext.create(codec, "w")
    assert isinstance(context, av.VideoCodecContext)
    context.width, context.height, context.pix_fmt, context.options = WIDTH, HEIGHT, "yuv420p", options
    context.time_base, context.framerate = Fraction(1, 25), Fraction(25)
    packets = []
    for number in range(60):
        frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24").reformat(format="yuv420p")
        frame.pts, frame.time_base = number, Fraction(1, 25)
        packets += context.encode(frame)
    return packets + context.encode(None)


def write(path: Path, codec: str, packets: list[tuple[bytes, bool, int, int]]) -> None:
    """Put packets with times (pts, dts), 25 a second, into a file."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for data, key, pts, dts in packets:
            packet = av.Packet(data)
            packet.stream, packet.time_base, packet.pts, packet.dts = stream, Fraction(1, 25), pts, dts
            packet.is_keyframe = key
            container.mux(packet)


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
    # The decoder also drops frames that share their packet with a hidden one that is a reference.
    assert left_out(path) <= dropped(path)


def test_wanted_packets_are_looked_at_too_as_they_may_hold_the_sequence_header(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(mmaccel.codecs.groups, "disposable_test", lambda _: lambda data: seen.append(bytes(data)))
    path = av1_clip("plain.mkv", tmp_path)
    video = load_video(path, indices=[16, 21], threads=1)
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    assert seen == packets[16 : 16 + video.decoded]


def test_grain_is_laid_on_the_clip_that_is_named_after_it(tmp_path):
    path = av1_clip("grain.mp4", tmp_path)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.options = {"filmgrain": "0"}
        bare = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert all((one != other).any() for one, other in zip(bare, sequential(path), strict=True))


X264 = {
    "flat.mp4": "bframes=3:b-pyramid=none",
    "strict.mkv": "bframes=5:b-pyramid=strict",
    "pyramid.mp4": "bframes=7:b-pyramid=normal",
    "adaptive.mp4": "bframes=3:b-adapt=2:weightp=2:weightb=1",
    "one-reference.mp4": "bframes=3:ref=1",
    "many-references.mkv": "bframes=16:ref=16:direct=temporal",
    "slices.mp4": "bframes=3:slices=4",
    "annex-b.ts": "bframes=3:slices=4:aud=1",
    "open.ts": "bframes=3:open-gop=1:keyint=15",
}


@pytest.mark.parametrize("name", X264)
def test_h264(name, tmp_path):
    path = encode(Recipe(name, options={"x264-params": f"keyint=30:scenecut=0:b-adapt=0:{X264[name]}"}), tmp_path)
    assert skipped_in(path) > 0
    assert left_out(path) == dropped(path) != set()


def test_h264_without_b_frames_has_nothing_to_leave_out(tmp_path):
    path = encode(Recipe("p.mp4", options={"x264-params": "keyint=30:bframes=0"}), tmp_path)
    assert (skipped_in(path), left_out(path), dropped(path)) == (0, set(), set())


def test_h264_that_is_refreshed_bit_by_bit(tmp_path):
    path = encode(Recipe("refresh.mp4", options={"x264-params": "keyint=20:intra-refresh=1:bframes=2"}), tmp_path)
    # What FFmpeg takes for keyframes there, are none: it does not decode exactly from these on.
    assert skipped_in(path, ("groups", "sequential")) > 0
    assert left_out(path) == dropped(path)


INTERLACED = {
    "top-first.mp4": ("libx264", {"x264-params": "keyint=30:bframes=3:tff=1:b-adapt=0"}),
    "bottom-first.ts": ("libx264", {"x264-params": "keyint=30:bframes=3:bff=1:b-adapt=0:b-pyramid=none"}),
    "mpeg2.ts": ("mpeg2video", {"bf": "2", "g": "12", "q": "2", "flags": "+ildct+ilme"}),
    "mpeg4.mkv": ("mpeg4", {"bf": "2", "g": "12", "q": "2", "flags": "+ildct+ilme"}),
}


@pytest.mark.parametrize("name", INTERLACED)
def test_nothing_is_left_out_of_interlaced_video(name, tmp_path):
    codec, options = INTERLACED[name]
    path = encode(Recipe(name, codec, options=options, rate=25), tmp_path)
    assert skipped_in(path, ("groups", "sequential")) == 0
    assert left_out(path) != set()


X265 = {
    "open.mp4": "keyint=15:bframes=3:open-gop=1",
    "radl.mp4": "keyint=15:bframes=3:open-gop=0:radl=2",
    "flat.mkv": "bframes=3:b-pyramid=0",
    "pyramid.mp4": "bframes=7:b-pyramid=1",
    "slices.ts": "bframes=3:slices=2",
    "refresh.mp4": "keyint=20:intra-refresh=1:bframes=2",
    "layers-1.mp4": "bframes=7:temporal-layers=1",
    "layers-2.ts": "bframes=3:temporal-layers=2",
    "layers-3.mkv": "bframes=7:temporal-layers=3",
}


@pytest.mark.parametrize("name", X265)
def test_hevc(name, tmp_path):
    params = f"keyint=32:b-adapt=0:{X265[name]}:log-level=none"
    path = encode(Recipe(name, "libx265", options={"x265-params": params}), tmp_path)
    assert skipped_in(path) > 0
    # FFmpeg drops what is no reference in its own sub-layer, and does not ask whether a higher one refers to it.
    assert left_out(path) <= dropped(path)
    assert name.startswith("layers") or left_out(path) == dropped(path)


def test_hevc_pictures_of_lower_layers_may_be_referred_to_from_higher_ones():
    def unit(kind: int, layer: int) -> bytes:
        return b"\0\0\0\4" + bytes([kind << 1, layer + 1, 0x80, 0])

    context = av.CodecContext.create("hevc", "r")
    # A configuration record that announces three sub-layers and lengths of four bytes.
    context.extradata = bytes([1, *[0] * 20, 3 << 3 | 3, 0])
    test = disposable_test(context)
    assert test is not None
    for kind in (0, 2, 4, 6, 8):  # TRAIL_N, TSA_N, STSA_N, RADL_N, RASL_N
        assert [test(memoryview(unit(kind, layer))) for layer in range(3)] == [False, False, True]
        assert not test(memoryview(unit(kind + 1, 2)))
        assert not test(memoryview(unit(kind, 2) + unit(kind + 1, 2)))
        assert test(memoryview(unit(35, 0) + unit(kind, 2) + unit(kind, 2)))
    assert not any(test(memoryview(unit(kind, 2))) for kind in range(16, 64))


@pytest.mark.parametrize("layers", [4, 5])
def test_hevc_in_many_layers(layers, tmp_path):
    params = f"keyint=32:b-adapt=0:bframes=15:temporal-layers={layers}:log-level=none"
    packets = encoded("libx265", {"x265-params": params})
    path = tmp_path / "layers.mkv"
    # The encoder's own decoding times come too late for this many layers.
    rows = [(bytes(packet), packet.is_keyframe, packet.pts, place - 8) for place, packet in enumerate(packets)]
    write(path, "libx265", rows)
    assert skipped_in(path) > 0
    assert set() != left_out(path) <= dropped(path)


MPEG = {
    "mpeg1.ts": ("mpeg1video", {}),
    "mpeg2.ts": ("mpeg2video", {}),
    "mpeg2.mpg": ("mpeg2video", {}),
    "mpeg2.mkv": ("mpeg2video", {"intra_vlc": "1", "sc_threshold": "1000000000"}),
    "mpeg4.mp4": ("mpeg4", {}),
    "mpeg4.mkv": ("mpeg4", {"flags": "+qpel+mv4"}),
    "mpeg4.avi": ("mpeg4", {}),
}


@pytest.mark.parametrize("name", MPEG)
def test_mpeg(name, tmp_path):
    codec, options = MPEG[name]
    recipe = Recipe(name, codec, options={"bf": "2", "g": "12", "q": "2", **options}, rate=25)
    path = encode(recipe, tmp_path)
    assert skipped_in(path) > 0
    assert left_out(path) == dropped(path) != set()


@pytest.mark.parametrize("ending", ["avi", "mkv", "mp4"])
def test_packed_b_frames(ending, tmp_path):
    """As DivX stores them: a B-frame in the packet of the frame behind it, then a packet that holds next to nothing."""
    start, empty = b"\0\0\1\xb6", b"\0\0\1\xb6\x5f\x7f\x7f"
    packets = encoded("mpeg4", {"bf": "1", "g": "12", "q": "2"})
    first = bytes(packets[0])
    place = first.index(b"\0\0\1\xb3")
    data = [first[:place] + b"\0\0\1\xb2DivX503b1393p" + first[place:], *map(bytes, packets[1:])]
    rows: list[tuple[bytes, bool]] = []
    for packet, unit in zip(packets, data, strict=True):
        if unit[unit.index(start) + 4] >> 6 == 2:
            rows[-1:] = [(rows[-1][0] + unit, rows[-1][1]), (empty, False)]
        else:
            rows.append((unit, packet.is_keyframe))
    path = tmp_path / f"packed.{ending}"
    write(path, "mpeg4", [(*row, place, place) for place, row in enumerate(rows)])
    assert [number_in(image) for image in sequential(path)] == list(range(60))
    assert skipped_in(path, ("sequential", "survey")) == 0
