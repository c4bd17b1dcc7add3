"""A cache gives what decoding gives, notices every change of the video or the request, and heals itself."""

from __future__ import annotations

import dataclasses
import io
import multiprocessing
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clips import Recipe, encode, number_in

from mmaccel.codecs import CacheWarning, FrameCache, Video, VideoWarning, cache, content, entry, load_video
from mmaccel.errors import VideoError

Clip = Callable[[str], Path]


def assert_same(found: Video, wanted: Video) -> None:
    assert type(found) is type(wanted)
    for field in dataclasses.fields(wanted):
        one, other = getattr(found, field.name), getattr(wanted, field.name)
        assert type(one) is type(other), field.name
        if isinstance(other, torch.Tensor):
            assert one.dtype == other.dtype
            assert torch.equal(one, other), field.name
        elif field.name == "work":
            # Which thread takes which group is chance, and so are jumps in the file.
            assert dataclasses.replace(one, seeks=0, opened=0, threads=0) == dataclasses.replace(
                other, seeks=0, opened=0, threads=0
            )
        else:
            assert one == other, field.name


@pytest.fixture
def frames(tmp_path: Path) -> FrameCache:
    return FrameCache(tmp_path / "cache")


@pytest.fixture
def old(clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a clip that has rested as long as it must, which is less than usual here."""
    monkeypatch.setattr(content, "_SETTLED", 0.05)
    path = Path(shutil.copy(clip("b-frames.mp4"), tmp_path / "copy.mp4"))
    while time.time() - path.stat().st_ctime < 0.1:
        time.sleep(0.02)
    return path


def done(frames: FrameCache) -> tuple[int, int, int]:
    stats = frames.stats()
    return stats.hits, stats.misses, stats.bypassed


REQUESTS: list[dict[str, Any]] = [
    {},
    {"frames": 5},
    {"frames": 99, "on_short": "repeat"},
    {"indices": [7, -1, 7, 0]},
    {"frames": 3, "size": 32},
    {"frames": 3, "size": (20, 30), "interpolation": "AREA"},
]


@pytest.mark.parametrize("name", ["b-frames.mp4", "jitter.mkv", "vp8.webm"])
def test_a_hit_is_what_decoding_gives(clip: Clip, frames: FrameCache, name: str) -> None:
    for number, request in enumerate(REQUESTS, 1):
        wanted = load_video(clip(name), **request)
        assert_same(frames.load(clip(name), **request), wanted)
        assert_same(frames.load(clip(name), **request), wanted)
        assert done(frames) == (number, number, 0)
    assert frames.stats().entries == len(REQUESTS)


def test_forms_of_one_request(clip: Clip, frames: FrameCache) -> None:
    path = clip("b-frames.mp4")
    frames.load(path, indices=[0, 1, 2], size=(32, 48))
    for indices in (range(3), np.arange(3), torch.arange(3), (n for n in range(3)), (np.int64(0), 1, torch.tensor(2))):
        frames.load(path, size=[32, 48], indices=indices, threads=2)
    frames.load(str(path), size=np.array([32, 48]), indices=[0, 1, 2], frames=None, interpolation="BICUBIC")
    assert done(frames) == (6, 1, 0)
    frames.load(path, 4)
    frames.load(path, frames=np.int64(4))
    assert done(frames) == (7, 2, 0)


def test_requests_that_differ_do_not_meet(clip: Clip, frames: FrameCache) -> None:
    path = clip("b-frames.mp4")
    requests: list[dict[str, Any]] = [
        {"indices": [1, 2]},
        {"indices": [2, 1]},
        {"indices": [12]},
        {"frames": 2},
        {"frames": 2, "size": 16},
        {"frames": 2, "size": (16, 32)},
        {"frames": 2, "size": (32, 16)},
        {"frames": 2, "size": 16, "interpolation": "POINT"},
    ]
    for _ in range(2):
        for request in requests:
            assert_same(frames.load(path, **request), load_video(path, **request))
    assert done(frames) == (len(requests), len(requests), 0)


def test_the_content_counts_and_not_the_name(clip: Clip, frames: FrameCache, tmp_path: Path) -> None:
    path = clip("b-frames.mp4")
    data = path.read_bytes()
    frames.load(path, frames=3)
    for source in (shutil.copy(path, tmp_path / "other.MP4"), path.open("rb"), str(path)):
        frames.load(source, frames=3)
    assert done(frames) == (3, 1, 0)
    # Without a suffix FFmpeg may take the same bytes for another format.
    for source in (data, bytearray(data), memoryview(data), io.BytesIO(data)):
        frames.load(source, frames=3)
    assert done(frames) == (6, 2, 0)
    assert_same(frames.load(clip("jitter.mp4"), frames=3), load_video(clip("jitter.mp4"), frames=3))
    assert done(frames) == (6, 3, 0)


def test_a_file_object_is_read_from_its_start_and_left_open(clip: Clip, frames: FrameCache) -> None:
    with clip("b-frames.mp4").open("rb") as file:
        for _ in range(2):
            file.seek(1000)
            assert [number_in(image) for image in frames.load(file, indices=[59]).numpy()] == [59]
            assert not file.closed
    assert done(frames) == (1, 1, 0)


def test_a_pipe(clip: Clip, frames: FrameCache) -> None:
    data = clip("b-frames.mp4").read_bytes()
    for _ in range(2):
        reading, writing = os.pipe()

        def feed(end: int = writing) -> None:
            with os.fdopen(end, "wb") as file:
                file.write(data)

        threading.Thread(target=feed, daemon=True).start()
        with os.fdopen(reading, "rb") as pipe:
            assert [number_in(image) for image in frames.load(pipe, indices=[59, 3]).numpy()] == [59, 3]
    assert done(frames) == (1, 1, 0)


def test_a_file_at_rest_is_hashed_once(old: Path, frames: FrameCache, monkeypatch: pytest.MonkeyPatch) -> None:
    frames.load(old, frames=3)
    hashed = []
    whole = content._hash
    monkeypatch.setattr(content, "_hash", lambda file, name: hashed.append(name) or whole(file, name))
    frames.load(old, frames=3)
    assert (hashed, done(frames)) == ([], (1, 1, 0))
    os.utime(old)
    frames.load(old, frames=3)
    assert (hashed, done(frames)) == ([str(old)], (2, 1, 0))


def test_a_young_file_is_not_remembered(clip: Clip, frames: FrameCache, tmp_path: Path) -> None:
    path = Path(shutil.copy(clip("b-frames.mp4"), tmp_path / "young.mp4"))
    frames.load(path, frames=3)
    assert list((frames.folder / "hashes").iterdir()) == []


def other_clip(length: int, folder: Path) -> bytes:
    """A different video of exactly the same number of bytes."""
    recipe = Recipe("other.mp4", count=20, options={"g": "1"})
    data = encode(recipe, folder).read_bytes()
    assert len(data) + 8 <= length
    filler = length - len(data)
    return data + filler.to_bytes(4, "big") + b"free" + bytes(filler - 8)


@pytest.mark.parametrize("way", ["in place", "replaced"])
def test_a_change_with_the_old_size_and_time(old: Path, frames: FrameCache, tmp_path: Path, way: str) -> None:
    before = old.stat()
    assert frames.load(old, indices=[19]).total == 60
    assert len(list((frames.folder / "hashes").iterdir())) == 1
    target = old if way == "in place" else tmp_path / "new.mp4"
    target.write_bytes(other_clip(before.st_size, tmp_path))
    target.replace(old)
    os.utime(old, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = old.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert frames.load(old, indices=[19]).total == 20
    assert done(frames) == (0, 2, 0)


def test_a_file_that_changes_while_it_is_decoded(
    clip: Clip, frames: FrameCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copy(clip("b-frames.mp4"), tmp_path / "copy.mp4"))

    def load_late(src: Path, *args: Any, **kwargs: Any) -> Video:
        shutil.copy(clip("jitter.mp4"), src)
        return load_video(src, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "load_video", load_late)
        frames.load(path, frames=3)
    assert frames.stats().entries == 0
    shutil.copy(clip("b-frames.mp4"), path)
    assert_same(frames.load(path, frames=3), load_video(clip("b-frames.mp4"), frames=3))


@pytest.mark.parametrize("how", ["flipped pixel", "flipped fact", "cut", "emptied", "no checksum", "garbage"])
def test_a_damaged_entry_is_decoded_again(clip: Clip, frames: FrameCache, how: str) -> None:
    path, wanted = clip("b-frames.mp4"), load_video(clip("b-frames.mp4"), frames=3)
    frames.load(path, frames=3)
    (kept,) = (frames.folder / "entries").iterdir()
    data = bytearray(kept.read_bytes())
    if how == "flipped pixel":
        data[-5000] ^= 1
    elif how == "flipped fact":
        place = data.index(b'\\"total\\": 60')
        data[place : place + 13] = b'\\"total\\": 61'
    elif how == "no checksum":
        data = data.replace(b'"sum":', b'"mus":', 1)
    kept.write_bytes({"cut": data[:-1], "emptied": b"", "garbage": b"x" * len(data)}.get(how, data))
    with pytest.warns(CacheWarning, match="decoded again"):
        assert_same(frames.load(path, frames=3), wanted)
    assert_same(frames.load(path, frames=3), wanted)
    assert (done(frames), frames.stats().damaged) == ((1, 2, 0), 1)


def test_a_damaged_note_of_a_hash(old: Path, frames: FrameCache) -> None:
    wanted = load_video(old, frames=3)
    for damage in (b"", b"[]", b"{}", b'{"seen": 1', b"\xff"):
        frames.load(old, frames=3)
        (note,) = (frames.folder / "hashes").iterdir()
        note.write_bytes(damage)
        assert_same(frames.load(old, frames=3), wanted)


def test_writing_to_what_was_given_leaves_the_cache_alone(clip: Clip, frames: FrameCache) -> None:
    wanted = load_video(clip("b-frames.mp4"), frames=3)
    for _ in range(3):
        video = frames.load(clip("b-frames.mp4"), frames=3)
        assert_same(video, wanted)
        video.frames.zero_()
        video.indices.add_(1)
    assert frames.stats().damaged == 0


def test_the_longest_unused_go_first(clip: Clip, tmp_path: Path) -> None:
    path = clip("b-frames.mp4")
    room = FrameCache(tmp_path / "cache")
    room.load(path, indices=[0])
    one = room.stats().size
    small = FrameCache(tmp_path / "cache", limit_bytes=int(3.5 * one))
    for number in (1, 2, 0, 3):  # 0 is used once more, so that 1 is the oldest when 3 comes
        small.load(path, indices=[number])
    assert (small.stats().entries, small.stats().evicted) == (3, 1)
    assert small.stats().size <= small.limit_bytes
    for number in (0, 2, 3):
        small.load(path, indices=[number])
    assert done(small) == (4, 3, 0)
    small.load(path, indices=[1])
    assert done(small) == (4, 4, 0)


def test_what_is_larger_than_the_limit_is_not_kept(clip: Clip, tmp_path: Path) -> None:
    small = FrameCache(tmp_path / "cache", limit_bytes=30_000)
    for _ in range(2):
        assert len(small.load(clip("b-frames.mp4"), frames=2)) == 2
    assert (done(small), small.stats().entries, small.stats().evicted) == ((0, 2, 0), 0, 0)


def test_what_a_dead_process_left_is_removed(clip: Clip, frames: FrameCache) -> None:
    dead, alive = (frames.folder / "parts" / name for name in ("dead.part", "alive.part"))
    dead.touch()
    alive.touch()
    os.utime(dead, (0, 0))
    frames.load(clip("b-frames.mp4"), frames=1)
    assert (dead.exists(), alive.exists()) == (False, True)


def test_clear_removes_what_is_ours(old: Path, frames: FrameCache) -> None:
    (frames.folder / "notes.txt").write_text("mine")
    frames.load(old, frames=2)
    frames.clear()
    assert [path.name for path in frames.folder.rglob("*") if path.is_file()] == ["notes.txt"]
    assert (frames.stats().entries, frames.stats().size) == (0, 0)
    frames.load(old, frames=2)
    assert done(frames) == (0, 2, 0)


def test_a_damaged_video_warns_each_time(clip: Clip, frames: FrameCache, tmp_path: Path) -> None:
    data = clip("b-frames.mp4").read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.warns(VideoWarning):
        wanted = load_video(path, frames=4)
    for _ in range(2):
        with pytest.warns(VideoWarning, match=rf"cut\.mp4: {wanted.lost} .*lost"):
            assert_same(frames.load(path, frames=4), wanted)
    assert done(frames) == (1, 1, 0)


def test_failures_are_not_kept(clip: Clip, frames: FrameCache, tmp_path: Path) -> None:
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "text.mp4").write_text("text")
    (tmp_path / "empty.mp4").touch()
    closed = io.BytesIO(b"x")
    closed.close()
    wrong = [tmp_path / name for name in ("noise.mp4", "text.mp4", "empty.mp4", "missing.mp4", ".")]
    for source in (*wrong, b"", b"\0noise", "", 7, "a\0b", closed, io.StringIO("text")):
        for _ in range(2):
            with pytest.raises(VideoError):
                frames.load(source, frames=2)  # type: ignore[arg-type]
    for request in ({"frames": 61}, {"indices": [60]}, {"indices": []}, {"indices": 3}, {"frames": 2.0}, {"size": -1}):
        for _ in range(2):
            with pytest.raises(VideoError):
                frames.load(clip("b-frames.mp4"), **request)
    frames.load(clip("b-frames.mp4"), frames=1)
    with pytest.raises(VideoError):
        frames.load(clip("b-frames.mp4"), frames=True)
    with pytest.raises(VideoError):
        frames.load(clip("b-frames.mp4"), frames=1.0)
    with pytest.raises(VideoError, match="cannot be cached"):
        frames.load(clip("b-frames.mp4"), frames=1, size=object())
    with pytest.raises(TypeError, match="colour"):
        frames.load(clip("b-frames.mp4"), colour="red")
    assert frames.stats().entries == 1


def test_what_is_not_cached(clip: Clip, frames: FrameCache, tmp_path: Path) -> None:
    path = clip("b-frames.mp4")
    playlist = tmp_path / "list.ffconcat"
    playlist.write_text(f"ffconcat version 1.0\nfile {path.name}\n")
    shutil.copy(path, tmp_path)
    for source in (path.as_uri(), f"file:{path}"):
        assert len(frames.load(source, frames=2)) == 2
    assert done(frames) == (0, 0, 2)
    assert len(frames.load(playlist, frames=2)) == 2
    shutil.copy(clip("jitter.mp4"), tmp_path / path.name)
    assert_same(frames.load(playlist, frames=2), load_video(playlist, frames=2))
    assert (done(frames), frames.stats().entries) == ((0, 0, 4), 0)


def test_another_decoder_does_not_get_old_frames(
    clip: Clip, frames: FrameCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames.load(clip("b-frames.mp4"), frames=2)
    cache._decoder.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(cache.av.library_versions, "libswscale", (99, 0, 0))
        frames.load(clip("b-frames.mp4"), frames=2)
    assert done(frames) == (0, 2, 0)
    cache._decoder.cache_clear()
    frames.load(clip("b-frames.mp4"), frames=2)
    assert done(frames) == (1, 2, 0)


def test_a_disk_that_is_full_is_a_warning(clip: Clip, frames: FrameCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "write_entry", full)
    with pytest.warns(CacheWarning, match="No space left"):
        assert len(frames.load(clip("b-frames.mp4"), frames=2)) == 2
    assert frames.stats().entries == 0
    assert list((frames.folder / "parts").iterdir()) == []


def test_folders_and_limits_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(VideoError, match="cannot be written to"):
        FrameCache(tmp_path / "file")
    for limit in (0, -1, True, 1.5):
        with pytest.raises(VideoError, match="limit_bytes"):
            FrameCache(tmp_path / "cache", limit_bytes=limit)  # type: ignore[arg-type]


def test_every_kind_of_field_comes_back(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(2, 3, 4)
    values = {
        "frames": whole[:, 1],
        "pts": torch.tensor(3.5, dtype=torch.bfloat16),
        "indices": torch.empty(0, 3, dtype=torch.int64),
        "total": {"a": (1, [2.5, None]), 3: np.arange(4, dtype=np.int16)},
        "fps": float("inf"),
        "replaced": ((1, True), "x", ()),
        "lost": cache.CacheStats(1, 2, 3, 4, 5, 6, 7, 8),
        "duration": whole.transpose(0, 2),
    }
    blank = dict.fromkeys((field.name for field in dataclasses.fields(Video)), None)
    entry.write_entry(tmp_path / "one", Video(**{**blank, **values}))  # type: ignore[arg-type]
    found = entry.read_entry(tmp_path / "one")
    for name in ("frames", "pts", "indices", "duration"):
        assert getattr(found, name).dtype == values[name].dtype
        assert torch.equal(getattr(found, name), values[name])
    array = found.total[3]
    assert (array.dtype, array.tolist()) == (np.int16, [0, 1, 2, 3])
    assert {**found.total, 3: None} == {"a": (1, [2.5, None]), 3: None}
    assert (found.fps, found.replaced, found.lost) == (values["fps"], values["replaced"], values["lost"])
    with pytest.raises(TypeError, match="set"):
        entry.write_entry(tmp_path / "two", Video(**{**blank, "fps": {1}}))  # type: ignore[arg-type]


def _work(folder: Path, path: Path, start: Any, results: Any) -> None:
    warnings.simplefilter("error")
    frames = FrameCache(folder, limit_bytes=200_000)  # seven of the twelve requests have room
    start.wait(120)
    right = 0
    for turn in range(60):
        number = (turn * 7 + os.getpid()) % 12
        video = frames.load(path, indices=[number])
        right += number_in(video.numpy()[0]) == number == int(video.indices[0])
    results.put((right, frames.stats().damaged, frames.stats().hits + frames.stats().misses))


def test_two_processes_at_once(clip: Clip, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(2), context.Queue()
    workers = [
        context.Process(target=_work, args=(tmp_path / "cache", clip("b-frames.mp4"), start, results)) for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert found == [(60, 0, 60)] * 2
    assert list((tmp_path / "cache" / "parts").iterdir()) == []
    assert FrameCache(tmp_path / "cache").stats().size <= 200_000


def test_many_threads(clip: Clip, tmp_path: Path) -> None:
    frames = FrameCache(tmp_path / "cache", limit_bytes=200_000)
    right = []

    def work(seed: int) -> None:
        for turn in range(20):
            number = (turn * 7 + seed) % 12
            right.append(number_in(frames.load(clip("b-frames.mp4"), indices=[number], threads=1).numpy()[0]) == number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 80
    assert sum(done(frames)) == 80
    assert frames.stats().damaged == 0
