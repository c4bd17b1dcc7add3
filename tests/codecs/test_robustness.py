"""Files that change while they are read, consumers that leave or fail, and what many calls leave behind: nothing."""

from __future__ import annotations

import gc
import itertools
import os
import resource
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from clips import RECIPES

import mmaccel.codecs.reading as reading
from mmaccel.codecs import VideoWarning, iter_video, load_video, load_videos
from mmaccel.errors import VideoError

Clip = Callable[[str], Path]
Change = Callable[[Path, bytes], object]

CYCLES = int(os.environ.get("MMACCEL_CYCLES", "300"))
CHANGES: dict[str, Change] = {
    "deleted": lambda path, _: path.unlink(),
    "emptied": lambda path, _: os.truncate(path, 0),
    "cut": lambda path, data: os.truncate(path, len(data) // 2),
    "zeroed": lambda path, data: path.write_bytes(bytes(len(data))),
    "replaced": lambda path, data: path.write_bytes(data[::-1]),
}


def decoders() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("mmaccel")]


@pytest.fixture(autouse=True)
def _nobody_left() -> Iterator[None]:
    yield
    assert decoders() == []


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["intra.mp4", "b-frames.mkv", "b-frames.ts", "mpeg4.avi"])
def test_a_file_that_changes_while_it_is_read(clip: Clip, tmp_path: Path, name: str, change: str) -> None:
    data = clip(name).read_bytes()
    path = tmp_path / name
    path.write_bytes(data)
    sound = load_video(path, 60).frames
    rows = 0
    parts = iter_video(path, 60, threads=2)
    first = next(parts)
    CHANGES[change](path, data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VideoWarning)
        refusal = None
        try:
            for part in itertools.chain([first], parts):
                assert part.start == rows
                assert part.frames.shape[1:] == sound.shape[1:]
                rows += len(part)
        except VideoError as error:
            refusal = str(error)
    # Either all rows or a reason.
    assert (rows == 60) == (refusal is None)
    assert refusal is None or str(path) in refusal
    np.testing.assert_array_equal(first.frames.numpy(), sound[: len(first)].numpy())


@pytest.mark.parametrize("name", RECIPES)
def test_frames_past_the_end(clip: Clip, name: str) -> None:
    for request in ({"indices": [0, 60]}, {"indices": [-61]}, {"seconds": [1e6]}, {"frames": 61}):
        for threads in (1, 3):
            with pytest.raises(VideoError, match=r"60 frame|which lasts|60 were"):
                load_video(clip(name), threads=threads, **request)  # type: ignore[arg-type]


def test_an_exception_in_the_consumer(clip: Clip) -> None:
    def consume() -> None:
        for _ in iter_video(clip("intra.mp4"), 60, threads=3):
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        consume()
    gc.collect()
    assert decoders() == []


def test_an_interrupt_leaves_no_thread(clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, draw, numbers = [], reading.Canvas.draw, itertools.count(1)

    def interrupted(self: object, *arguments: object) -> None:
        draw(self, *arguments)  # type: ignore[arg-type]
        drawn.append(0)
        # Threads that pass the interpreter's lock to and fro without rest can keep the main one from it for a second.
        time.sleep(0.002)
        # Two threads draw: a length may be seen by both, or by none.
        if next(numbers) == 2:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    monkeypatch.setattr(reading.Canvas, "draw", interrupted)
    path = clip("intra.mp4")
    with pytest.raises(KeyboardInterrupt):
        load_videos([path] * 200, 60, threads=2)
    assert decoders() == []
    assert len(drawn) < 200 * 60 / 10


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("kind", ["loaded", "left early", "refused", "damaged"])
def test_many_cycles_leak_nothing(clip: Clip, tmp_path: Path, kind: str) -> None:
    """MMACCEL_CYCLES=10000 runs it at length; set MALLOC_ARENA_MAX=1 then, as glibc keeps memory for each thread."""
    path = clip("b-frames.mp4")
    data = path.read_bytes()
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(data[: len(data) // 2] if kind == "refused" else data[:-600] + bytes(600))
    if kind == "damaged":
        broken.write_bytes(clip("b-frames.ts").read_bytes()[: -188 * 20])

    def once() -> None:
        if kind == "left early":
            parts = iter_video(path, 20, threads=2)
            next(parts)
            parts.close()
        elif kind == "loaded":
            load_video(path, 3, threads=2)
        elif kind == "damaged":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", VideoWarning)
                load_video(broken, indices=[0, -1], threads=2)
        else:
            with pytest.raises(VideoError):
                load_video(broken, indices=[0, 10_000], threads=2)

    for _ in range(CYCLES // 3):
        once()
    gc.collect()
    open_before, before = descriptors(), resident()
    for _ in range(CYCLES):
        once()
    gc.collect()
    assert descriptors() <= open_before
    assert decoders() == []
    # What the allocator keeps varies by some megabytes; a decoder in each cycle would be ten times as much.
    assert resident() - before < (16 << 20) + 1024 * CYCLES


def test_pictures_that_memory_does_not_hold(clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    def paint(*_: object) -> None:
        raise MemoryError("Unable to allocate 164 MiB")

    monkeypatch.setattr("mmaccel.codecs.picture.Painter.paint", paint)
    path = clip("intra.mp4")
    for threads in (1, 2):
        with pytest.raises(VideoError, match=r"intra\.mp4: the memory does not hold .*164 MiB.*fewer threads"):
            load_video(path, 3, threads=threads)
    results = load_videos([path, path], 3, threads=2)
    assert [type(result) for result in results] == [VideoError, VideoError]
