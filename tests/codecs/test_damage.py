"""Clips that lack pictures: one numbering whatever is asked for, and nothing lost that can be shown."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from clips import Recipe, encode, number_in, picture, sequential

from mmaccel.codecs import Video, VideoWarning, load_video
from mmaccel.codecs.decode import _held
from mmaccel.codecs.packets import scan
from mmaccel.codecs.source import Source

Clip = Callable[[str], Path]

LAYERS = "keyint=12:bframes=3:open-gop=1:log-level=none"
CODECS = {
    "h264": Recipe("h264.mkv", count=32, options={"bf": "3", "g": "12"}),
    "h264-open": Recipe("h264-open.mkv", count=32, options={"bf": "3", "g": "12", "x264-params": "open-gop=1"}),
    "hevc": Recipe("hevc.mkv", "libx265", count=32, options={"x265-params": LAYERS}),
    "mpeg2": Recipe("mpeg2.mkv", "mpeg2video", count=32, options={"bf": "3", "g": "12", "q": "2"}, rate=25),
    "mpeg4": Recipe("mpeg4.mkv", "mpeg4", count=32, options={"bf": "3", "g": "12", "q": "2"}),
    "vp9": Recipe("vp9.mkv", "libvpx-vp9", count=32, options={"g": "12", "deadline": "realtime", "cpu-used": "8"}),
    "av1": Recipe("av1.mkv", "libsvtav1", count=32, options={"g": "12", "preset": "12", "svtav1-params": "lp=1"}),
}
LOSSES: dict[str, Callable[[int, av.Packet], bool]] = {
    "head": lambda number, _: number < 5,
    "middle key": lambda number, packet: number > 3 and packet.is_keyframe,
    "second key": lambda number, packet: 3 < number < 20 and packet.is_keyframe,
    "one": lambda number, _: number == 15,
}


def without(source: Path, target: Path, drop: Callable[[int, av.Packet], bool]) -> Path:
    """A stream copy that leaves packets out, counted in decoding order."""
    with av.open(str(source)) as given, av.open(str(target), "w") as copy:
        stream = given.streams.video[0]
        out = copy.add_stream_from_template(stream, opaque=True)
        for number, packet in enumerate(given.demux(stream)):
            if packet.size and not drop(number, packet):
                packet.stream = out
                copy.mux(packet)
    return target


def quietly(src: object, **request: object) -> Video:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VideoWarning)
        return load_video(src, **request)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def short(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("short")

    def path(name: str) -> Path:
        found = folder / CODECS[name].name
        return found if found.exists() else encode(CODECS[name], folder)

    return path


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", CODECS)
def test_one_numbering_whatever_is_asked_for(
    short: Callable[[str], Path], tmp_path: Path, name: str, loss: str, suffix: str
) -> None:
    path = without(short(name), tmp_path / f"cut.{suffix}", LOSSES[loss])
    total = quietly(path, frames=1).total
    everything = quietly(path, indices=range(total))
    assert everything.total == total
    for index in range(total):
        alone = quietly(path, indices=[index])
        assert alone.total == total
        np.testing.assert_array_equal(alone.numpy()[0], everything.numpy()[index])


@pytest.mark.parametrize("name", ["h264", "hevc", "mpeg2", "mpeg4", "vp9"])
def test_a_clip_that_starts_inside_a_group_of_pictures(short: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    path = without(short(name), tmp_path / "cut.mkv", LOSSES["head"])
    with Source(path).open() as opened:
        table = scan(*opened)
    assert table.exact
    first = int(np.flatnonzero(table.keys)[0])
    with pytest.warns(VideoWarning, match=f"{first} of {len(table.pts)} frames are lost"):
        video = load_video(path, len(table.pts))
    assert video.replaced == tuple(range(first))
    reference = sequential(short(name))
    offset = 32 - video.total
    for index, image in enumerate(video.numpy()):
        np.testing.assert_array_equal(image, reference[offset + max(index, first)])


def test_a_stand_in_of_the_decoder_is_no_frame(short: Callable[[str], Path], tmp_path: Path) -> None:
    path = without(short("mpeg4"), tmp_path / "cut.mp4", LOSSES["head"])
    assert number_in(quietly(path, indices=[0]).numpy()[0]) == 12
    assert [number_in(image) for image in quietly(path, indices=[-20, -1]).numpy()] == [12, 31]


@pytest.mark.parametrize("start", [40, 20, 0])
def test_joined_transport_streams_lose_nothing(tmp_path: Path, start: int) -> None:
    parts = []
    for number, first in enumerate((0, start)):
        path = tmp_path / f"{number}.ts"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=8, options={"bf": "2", "g": "12"})
            stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
            for index in range(40):
                frame = av.VideoFrame.from_ndarray(picture(index + 100 * number), format="rgb24")
                frame = frame.reformat(format="yuv420p")
                frame.pts, frame.time_base = first + index, 1 / stream.codec_context.framerate
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        parts.append(path.read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        video = load_video(b"".join(parts), 80)
    assert [number_in(image) for image in video.numpy()] == [*range(40), *range(100, 140)]
    assert (video.total, video.lost) == (80, 0)


def test_a_torn_packet_spoils_one_frame_and_moves_no_other(clip: Clip, tmp_path: Path) -> None:
    """Twice the same MPEG-2 stream, so that all times occur twice, and the seam counts as a loss."""
    path = tmp_path / "part.ts"
    with av.open(str(clip("mpeg2.mpg"))) as given, av.open(str(path), "w") as copy:
        out = copy.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(video=0):
            if packet.size:
                packet.stream = out
                copy.mux(packet)
    data = path.read_bytes() * 2
    with av.open(io.BytesIO(data)) as container:
        assert sum(packet.is_corrupt for packet in container.demux(video=0)) == 1
    with pytest.warns(VideoWarning, match="1 of 120 frames are lost"):
        video = load_video(data, 120)
    (spoilt,) = video.replaced
    assert spoilt < 60
    numbers = [number_in(image) for image in video.numpy()]
    assert (
        numbers[:spoilt] + numbers[spoilt + 1 :]
        == [*range(60), *range(60)][:spoilt] + [*range(60), *range(60)][spoilt + 1 :]
    )


def test_alternate_references_in_packets_of_their_own_are_no_frames(clip: Clip, tmp_path: Path) -> None:
    # Written by hand: FFmpeg's muxers put a hidden frame into the packet of the next one.
    path, hidden = tmp_path / "hidden.ivf", 0
    with av.open(str(clip("vp9.webm"))) as source, path.open("wb") as target:
        target.write(struct.pack("<4sHH4sHHIIII", b"DKIF", 0, 32, b"VP90", 128, 64, 1000, 1, 63, 0))
        for number, packet in enumerate(p for p in source.demux(video=0) if p.size):
            data = bytes(packet)
            if number and packet.is_keyframe:  # the header of other frames changes its length with the bit that hides
                assert data[0] & 0xFA == 0x82  # profile 0, shown
                hidden += 1
                target.write(struct.pack("<IQ", len(data), packet.pts - 1) + bytes([data[0] & 0xFD]) + data[1:])
            target.write(struct.pack("<IQ", len(data), packet.pts) + data)
    assert hidden == 3
    reference = sequential(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        video = load_video(path, indices=range(60))
        late = load_video(path, indices=[47])
    assert video.total == late.total == len(reference) == 60
    np.testing.assert_array_equal(video.numpy(), np.stack(reference))
    np.testing.assert_array_equal(late.numpy()[0], reference[47])


@pytest.mark.parametrize("extra", ["open-gop=0", "open-gop=1:b-adapt=0:b-pyramid=0"])
def test_a_container_without_presentation_times(tmp_path: Path, extra: str) -> None:
    options = {"bf": "3", "g": "12", "x264-params": extra}
    path = encode(Recipe("guessed.avi", count=40, options=options), tmp_path)
    reference = np.stack(sequential(path))
    assert len(reference) == 40
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(load_video(path, 40).numpy(), reference)
        for index in range(40):
            np.testing.assert_array_equal(load_video(path, indices=[index]).numpy()[0], reference[index])


def test_the_same_picture_again_is_not_lost(tmp_path: Path) -> None:
    """An MPEG-4 packet may say that nothing has changed; the frame keeps its number and shows the one before."""
    source = encode(Recipe("plain.mp4", "mpeg4", count=24, options={"bf": "0", "g": "12", "q": "2"}), tmp_path)
    path = tmp_path / "again.mp4"
    with av.open(str(source)) as given, av.open(str(path), "w") as copy:
        stream = given.streams.video[0]
        out = copy.add_stream_from_template(stream)
        for number, packet in enumerate(p for p in given.demux(stream) if p.size):
            if number == 7:
                head = "".join(f"{byte:08b}" for byte in bytes(packet)[4:12])
                seconds = head.index("0", 2) + 1
                # Marker, three bits of time at 8 frames a second, marker, and "not coded", then stuffing.
                bits = head[: seconds + 5] + "0"
                bits += "0" + "1" * (-len(bits) - 1 & 7)
                again = av.Packet(bytes(packet)[:4] + int(bits, 2).to_bytes(len(bits) // 8, "big"))
                again.pts, again.dts, again.time_base, again.duration = (
                    packet.pts, packet.dts, packet.time_base, packet.duration,
                )  # fmt: skip
                packet = again
            packet.stream = out
            copy.mux(packet)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        video = load_video(path, 24)
    assert [number_in(image) for image in video.numpy()] == [*range(7), 6, *range(8, 24)]
    assert (video.total, video.lost, video.replaced) == (24, 0, ())


def interlaced(folder: Path) -> Path:
    options = {"bf": "0", "g": "12", "flags": "+ildct+ilme", "x264-params": "tff=1"}
    return encode(Recipe("interlaced.mkv", count=24, options=options), folder)


def test_a_gap_in_interlaced_video_is_a_loss(tmp_path: Path) -> None:
    source, path = interlaced(tmp_path), tmp_path / "gap.mkv"
    with av.open(str(source)) as given, av.open(str(path), "w") as copy:
        out = copy.add_stream_from_template(given.streams.video[0])
        for number, packet in enumerate(p for p in given.demux(video=0) if p.size):
            if number == 23:  # an access unit of nothing but a filler
                empty = av.Packet(bytes([0, 0, 0, 3, 12, 255, 128]))
                empty.pts, empty.dts, empty.time_base = packet.pts, packet.dts, packet.time_base
                packet = empty
            packet.stream = out
            copy.mux(packet)
    with pytest.warns(VideoWarning, match="1 of 24 frames are lost"):
        video = load_video(path, 24)
    assert [number_in(image) for image in video.numpy()] == [*range(23), 22]


def test_the_second_field_of_a_frame_is_not_lost(tmp_path: Path) -> None:
    with Source(interlaced(tmp_path)).open() as opened:
        table = scan(*opened)
    times = set(table.pts.tolist())
    frames = {slot: slot // 2 for slot in range(0, 24, 2)}
    assert _held(table, frames, times) == frozenset(range(1, 24, 2))
    assert _held(table, frames, set()) == frozenset()
    assert _held(table, {slot: slot for slot in range(20)}, times) == frozenset()


def test_a_frame_behind_the_cut_is_named_as_such(clip: Clip) -> None:
    data = clip("b-frames.mp4").read_bytes()
    with pytest.raises(Exception, match=r"frame 50 is outside .*ends early: \d+ more are announced"):
        load_video(data[: int(len(data) * 0.6)], indices=[50])


def test_half_a_jpeg_picture_is_lost(clip: Clip, tmp_path: Path) -> None:
    """FFmpeg would show what happens to be in memory below, and not say so."""
    path = tmp_path / "half.mkv"
    with av.open(str(clip("mjpeg.avi"))) as given, av.open(str(path), "w") as copy:
        out = copy.add_stream_from_template(given.streams.video[0])
        for number, packet in enumerate(p for p in given.demux(video=0) if p.size):
            if number == 7:
                half = av.Packet(bytes(packet)[: packet.size // 2])
                half.pts, half.dts, half.time_base = packet.pts, packet.dts, packet.time_base
                packet = half
            packet.stream = out
            copy.mux(packet)
    with pytest.warns(VideoWarning, match="1 of 60 frames are lost"):
        video = load_video(path, 60)
    assert [number_in(image) for image in video.numpy()] == [*range(7), 6, *range(8, 60)]
