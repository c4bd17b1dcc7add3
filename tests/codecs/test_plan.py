"""Which groups of pictures are decoded for which frames, by how many threads: the frames are always the same."""

from __future__ import annotations

import random
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from clips import JITTER, Recipe, encode, number_in, resized, sequential

from mmaccel.codecs import Part, Video, iter_video, load_video, load_videos, reading
from mmaccel.codecs.groups import Group, GroupReader
from mmaccel.codecs.index import look_up
from mmaccel.codecs.packets import scan
from mmaccel.codecs.reading import Reading
from mmaccel.codecs.source import Source
from mmaccel.errors import VideoError

Clip = Callable[[str], Path]

GROUPED = [
    "b-frames.mp4",
    "open-gop.mp4",
    "b-frames.ts",
    "jitter.mkv",
    "hevc-open.mkv",
    "vp9.webm",
    "av1.mkv",
    "mpeg4.avi",
]
LONG = {
    "b-frames": Recipe("long.mp4", count=2400, options={"bf": "3", "g": "20", "preset": "ultrafast"}),
    "open": Recipe(
        "open.mp4", count=2400, options={"bf": "3", "g": "20", "preset": "ultrafast", "x264-params": "open-gop=1"}
    ),
    "plain": Recipe("plain.mp4", count=2400, options={"bf": "0", "g": "20", "preset": "ultrafast"}),
}


def numbers(video: Video | Part) -> list[int]:
    return [number_in(image) for image in video.frames.permute(0, 2, 3, 1).numpy()]


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("long")

    def path(name: str) -> Path:
        found = folder / LONG[name].name
        return found if found.exists() else encode(LONG[name], folder)

    return path


@pytest.fixture
def read_groups(monkeypatch: pytest.MonkeyPatch) -> list[Group]:
    """All groups that are decoded from now on."""
    seen: list[Group] = []
    read = GroupReader.read

    def spy(self: GroupReader, group: Group) -> Iterator[Any]:
        seen.append(group)
        return read(self, group)

    monkeypatch.setattr(GroupReader, "read", spy)
    return seen


def test_frames_decoded_are_those_up_to_the_last_wanted_one_of_each_group(
    tmp_path: Path, read_groups: list[Group]
) -> None:
    path = encode(
        Recipe("900.mp4", count=900, rate=30, options={"bf": "3", "g": "60", "preset": "ultrafast"}), tmp_path
    )
    for count, expected in ((32, 704), (8, 244), (15, None)):
        read_groups.clear()
        playing = load_video(path, count, skip_nonref=False)
        keys = [number // 60 for number in playing.indices.tolist()]
        by_hand = sum(max(n for n in playing.indices.tolist() if n // 60 == key) % 60 + 1 for key in set(keys))
        assert playing.decoded == by_hand
        assert expected is None or by_hand == expected
        assert len({group.key for group in read_groups}) == len(read_groups) == playing.work.groups == len(set(keys))
        skipping = load_video(path, count)
        assert torch.equal(skipping.frames, playing.frames)
        assert skipping.decoded < playing.decoded
        assert skipping.work.skipped > 0
    snapped = load_video(path, 15, snap="keyframe")
    assert snapped.decoded == len(set(snapped.indices.tolist()))
    assert (snapped.indices % 60 == 0).all()
    assert numbers(snapped) == [n % 256 for n in snapped.indices.tolist()]
    assert snapped.work.approximate


@pytest.mark.parametrize("name", GROUPED)
def test_threads_and_the_order_of_the_groups_change_nothing(
    clip: Clip, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    wanted = [41, 3, 3, -1, 17, 18, 0, 55, 12, 11, 24, 35, 36]
    reference = sequential(clip(name))
    plan = Reading._plan
    for threads in (1, 2, 5):
        for seed in range(3):
            generator = random.Random(seed)

            def shuffled(self: Reading, *opened: Any, generator: random.Random = generator) -> None:
                plan(self, *opened)
                groups = list(self._groups)
                generator.shuffle(groups)
                self._groups = deque(groups)

            monkeypatch.setattr(Reading, "_plan", shuffled)
            monkeypatch.setattr(reading, "_WORTH_OPENING", 0)
            video = load_video(clip(name), indices=wanted, threads=threads)
            assert video.work.way == "groups"
            for index, image in zip(wanted, video.numpy(), strict=True):
                np.testing.assert_array_equal(image, reference[index])


@pytest.mark.parametrize("name", [*GROUPED, "mpeg2.mpg", "fragments.mp4", "one-gop.mp4"])
def test_every_single_frame_alone(clip: Clip, name: str) -> None:
    reference = sequential(clip(name))
    for index in range(60):
        video = load_video(clip(name), indices=[index], threads=1)
        np.testing.assert_array_equal(video.numpy()[0], reference[index], err_msg=f"frame {index}")
        assert video.decoded <= index + 60


@pytest.mark.parametrize(
    ("width", "height"), [(854, 48), (1080, 32), (406, 34), (131, 67), (130, 66), (34, 34), (16, 16)]
)
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p", "yuv420p10le"])
def test_pictures_of_any_width(tmp_path: Path, width: int, height: int, pix_fmt: str) -> None:
    if pix_fmt != "yuv444p":
        width, height = width + width % 2, height + height % 2
    noise = np.random.default_rng(0).integers(0, 256, (3, height, width, 3), dtype=np.uint8)
    path = tmp_path / "odd.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        for image in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pix_fmt)))
        container.mux(stream.encode(None))
    reference = sequential(path)
    for image, expected in zip(load_video(path, 3).numpy(), reference, strict=True):
        np.testing.assert_array_equal(image, expected)
    for image, expected in zip(load_video(path, 3, size=(20, 30)).numpy(), reference, strict=True):
        np.testing.assert_array_equal(image, resized(expected, 20, 30))


class TestIndex:
    """Long MP4 files are numbered by their index; the whole file is read for nothing else."""

    @pytest.mark.parametrize("name", LONG)
    def test_the_same_as_a_scan(self, long: Callable[[str], Path], name: str) -> None:
        for wanted in ([0], [2399], [19, 20, 21], [1000, 1001, 1018, 1019, 1020], [7, 1199, 2380]):
            with Source(long(name)).open() as opened:
                found = look_up(*opened, lambda _, wanted=wanted: np.array(wanted))
            with Source(long(name)).open() as opened:
                table = scan(*opened)
            assert found is not None
            assert not found.whole
            assert len(found.slots) < 500
            rows = found.slots
            for field in ("pts", "dts", "rank", "sizes", "keys"):
                np.testing.assert_array_equal(getattr(found, field), getattr(table, field)[rows], err_msg=field)
            assert (found.total, found.ends, found.rate, found.tick) == (2400, table.ends, table.rate, table.tick)
            assert np.isin(wanted, rows).all()

    @pytest.mark.parametrize("name", LONG)
    def test_the_same_frames(self, long: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        found = [load_video(long(name), 5), load_video(long(name), indices=[1018, 1019, 1020, 1021])]
        assert not any(video.work.scanned for video in found)
        assert numbers(found[0]) == [n % 256 for n in found[0].indices.tolist()]
        monkeypatch.setattr(reading, "look_up", lambda *_: None)
        scanned = [load_video(long(name), 5), load_video(long(name), indices=[1018, 1019, 1020, 1021])]
        for one, other in zip(found, scanned, strict=True):
            assert other.work.scanned
            assert torch.equal(one.frames, other.frames)
            assert torch.equal(one.pts, other.pts)
            assert (one.total, one.fps, one.duration) == (other.total, other.fps, other.duration)

    def test_a_file_that_is_cut_off_is_scanned(self, long: Callable[[str], Path], tmp_path: Path) -> None:
        fast = tmp_path / "fast.mp4"
        with (
            av.open(str(long("plain"))) as given,
            av.open(str(fast), "w", container_options={"movflags": "faststart"}) as copy,
        ):
            out = copy.add_stream_from_template(given.streams.video[0])
            for packet in given.demux(video=0):
                if packet.size:
                    packet.stream = out
                    copy.mux(packet)
        assert not load_video(fast, 3).work.scanned
        data = fast.read_bytes()
        fast.write_bytes(data[: len(data) * 3 // 4])
        with pytest.warns(UserWarning, match="lost, damaged or cut off"):
            video = load_video(fast, 3)
        assert video.work.scanned
        assert 1000 < video.total < 2400


class TestTimes:
    """Requests by time, on frames that last as long as they like."""

    @pytest.mark.parametrize("name", ["jitter.mp4", "jitter.mkv", "b-frames.mp4", "b-frames.ts"])
    @pytest.mark.parametrize("rate", [0.5, 2, 3.7, 8, 40])
    def test_fps_is_what_is_shown_at_each_time(self, clip: Clip, name: str, rate: float) -> None:
        starts = (np.array(JITTER) - JITTER[0]) / 1000 if "jitter" in name else np.arange(60) / 8
        video = load_video(clip(name), fps=rate)
        expected, k = [], 0
        while k / rate < video.duration - 1e-6:
            expected.append(max(n for n in range(60) if starts[n] <= k / rate + 6e-4))
            k += 1
        assert video.indices.tolist() == expected
        assert numbers(video) == expected

    def test_seconds_keep_their_order_and_repetitions(self, clip: Clip) -> None:
        video = load_video(clip("b-frames.mp4"), seconds=[7.4, 0.0, 3.3, 3.3, 0.124, 0.125])
        assert video.indices.tolist() == [59, 0, 26, 26, 0, 1]
        assert numbers(video) == [59, 0, 26, 26, 0, 1]

    @pytest.mark.parametrize(
        ("request_", "message"),
        [
            ({"seconds": [-0.1]}, "second -0.1 is outside .* from 0 to 7.5 s"),
            ({"seconds": [7.6]}, "second 7.6 is outside"),
            ({"seconds": [float("nan")]}, "finite"),
            ({"seconds": []}, "seconds is empty"),
            ({"seconds": 3.0}, "sequence of numbers"),
            ({"seconds": ["1"], "fps": 2}, "give one of"),
            ({"fps": 0}, "above 0"),
            ({"fps": -1}, "above 0"),
            ({"fps": "fast"}, "must be a number"),
            ({"fps": float("inf")}, "finite"),
            ({"fps": 1e9}, "at most 1000000 frames"),
            ({"frames": 4, "fps": 2}, "give one of"),
            ({"snap": "nearest"}, "snap must be"),
            ({"normalize": 0.5}, "normalize must be"),
            ({"normalize": (0.5, 0.0)}, "std above 0"),
            ({"normalize": ((0.5, 0.5), 1)}, "normalize must be"),
            ({"device": "nowhere"}, "cannot be put on device 'nowhere'"),
        ],
    )
    def test_what_cannot_be_is_an_error(self, clip: Clip, request_: dict[str, Any], message: str) -> None:
        with pytest.raises(VideoError, match=message):
            load_video(clip("b-frames.mp4"), **request_)


def test_normalised_frames(clip: Clip) -> None:
    mean, std = (0.48, 0.45, 0.4), (0.27, 0.26, 0.28)
    plain = load_video(clip("b-frames.mp4"), 3).frames
    video = load_video(clip("b-frames.mp4"), 3, normalize=(mean, std), device="cpu")
    expected = (plain.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert video.frames.dtype == torch.float32
    torch.testing.assert_close(video.frames.double(), expected, atol=1e-6, rtol=0)


class TestParts:
    """`iter_video` gives the rows of `load_video` before all are decoded."""

    @pytest.mark.parametrize(
        "request_", [{"frames": 20}, {"fps": 3}, {"indices": [30, 5, 5, 59, 0, 31]}, {"frames": 60}]
    )
    @pytest.mark.parametrize("threads", [1, 3])
    def test_all_rows_in_order(self, clip: Clip, request_: dict[str, Any], threads: int) -> None:
        whole = load_video(clip("b-frames.mp4"), **request_)
        parts = list(iter_video(clip("b-frames.mp4"), **request_, threads=threads))
        assert [part.start for part in parts] == np.cumsum([0, *[len(part) for part in parts]])[:-1].tolist()
        for field in ("frames", "pts", "indices"):
            assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(whole, field))

    def test_the_first_part_comes_while_the_rest_is_not_decoded(
        self, clip: Clip, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        taken = threading.Event()
        read = GroupReader.read

        def waiting(self: GroupReader, group: Group) -> Iterator[Any]:
            assert group.key == 0 or taken.wait(30), "the first part was not taken"
            return read(self, group)

        monkeypatch.setattr(GroupReader, "read", waiting)
        parts = iter_video(clip("b-frames.mp4"), 30, threads=1)
        assert next(parts).indices.tolist() == [0, 2, 4, 6, 8, 10]
        taken.set()
        assert sum(len(part) for part in parts) == 24

    def test_leaving_early_ends_the_threads(self, clip: Clip) -> None:
        before = threading.active_count()
        parts = iter_video(clip("b-frames.mp4"), 60, threads=3)
        next(parts)
        parts.close()  # type: ignore[attr-defined]
        assert threading.active_count() == before

    def test_damage_comes_at_the_end_and_warns(self, clip: Clip, tmp_path: Path) -> None:
        data = bytearray(clip("intra.mp4").read_bytes())
        with av.open(str(clip("intra.mp4"))) as container:
            packet = [packet for packet in container.demux(video=0) if packet.size][31]
            assert packet.pos is not None
            data[packet.pos + 8 : packet.pos + packet.size] = bytes(packet.size - 8)
        path = tmp_path / "damaged.mp4"
        path.write_bytes(data)
        with pytest.warns(UserWarning, match="lost, damaged or cut off"):
            whole = load_video(path, 60)
        with pytest.warns(UserWarning, match="lost, damaged or cut off"):
            parts = list(iter_video(path, 60, threads=1))
        assert len(parts) > 1
        assert torch.equal(torch.cat([part.frames for part in parts]), whole.frames)

    def test_errors(self, tmp_path: Path, clip: Clip) -> None:
        with pytest.raises(VideoError, match="at least 1"):
            iter_video(clip("b-frames.mp4"), 0)
        with pytest.raises(VideoError, match="does not exist"):
            next(iter_video(tmp_path / "none.mp4", 3))
        with pytest.raises(VideoError, match="60 frame"):
            next(iter_video(clip("b-frames.mp4"), 61))


class TestMany:
    """`load_videos`: one set of threads, the order kept, a bad video alone in its trouble."""

    @pytest.mark.parametrize("threads", [1, 2, 7])
    def test_each_is_what_it_is_alone(self, clip: Clip, tmp_path: Path, threads: int) -> None:
        (tmp_path / "noise.mp4").write_bytes(b"noise" * 500)
        names = ["b-frames.mp4", "hevc-open.mkv", "one-gop.mp4", "vp8.webm", "animation.gif", "b-frames.ts"]
        sources: list[Any] = [clip(name) for name in names]
        sources[2:2] = [tmp_path / "missing.mp4", tmp_path / "noise.mp4", 5]
        found = load_videos(iter(sources), 7, size=(20, 40), threads=threads)
        assert len(found) == len(sources)
        for src, video in zip(sources, found, strict=True):
            if isinstance(video, VideoError):
                with pytest.raises(VideoError, match=re.escape(str(video))):
                    load_video(src, 7, size=(20, 40))
                continue
            alone = load_video(src, 7, size=(20, 40))
            assert torch.equal(video.frames, alone.frames)
            assert torch.equal(video.pts, alone.pts)
        assert [isinstance(video, VideoError) for video in found] == [False] * 2 + [True] * 3 + [False] * 4

    def test_raising_and_wrong_use(self, clip: Clip, tmp_path: Path) -> None:
        before = threading.active_count()
        with pytest.raises(VideoError, match="does not exist"):
            load_videos([clip("b-frames.mp4"), tmp_path / "missing.mp4"], 3, on_error="raise")
        with pytest.raises(VideoError, match="takes a list"):
            load_videos(str(clip("b-frames.mp4")), 3)  # type: ignore[arg-type]
        with pytest.raises(VideoError, match="on_error"):
            load_videos([], 3, on_error="skip")  # type: ignore[arg-type]
        assert load_videos([], 3) == []
        assert threading.active_count() == before
