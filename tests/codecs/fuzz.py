"""Mutated video files through every way of reading, in processes that are watched.

python tests/codecs/fuzz.py --count 10000 --seed 0 --seconds 4 --memory 2GiB [--first 0] [--keep FOLDER]

Each file must give frames, with a warning that counts what is lost, or a VideoError, the same for any number of threads
and for any way of reading. A crash, a hang, memory without bound and any other error are failures; the number of the
file reproduces it (--first NUMBER --count 1).
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
from av.logging import PANIC, set_level
from clips import RECIPES, encode
from mutations import mutated

from mmaccel.codecs import Video, VideoWarning, iter_video, load_video, load_videos
from mmaccel.codecs.index import look_up
from mmaccel.codecs.packets import scan
from mmaccel.codecs.source import Source
from mmaccel.errors import VideoError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

    from mmaccel.codecs.packets import PacketTable

__all__ = ["Verdict", "fuzz", "make_seeds"]

EXACT = {"fflags": "+bitexact"}
LONG = "long.mp4"
# What FFmpeg's decoders of these make of damage that they do not report differs from one call to the next, with one
# thread as with several.
UNSTABLE = ("lossless.mkv", "vp8.webm", "mjpeg.avi")
REQUESTS: tuple[dict[str, object], ...] = (
    {},
    {"frames": 5, "on_short": "repeat"},
    {"frames": 40, "on_short": "all", "size": 24},
    {"frames": 8},
    {"indices": [0, 7, -1, 3, 7]},
    {"indices": [-1]},
    {"indices": range(20)},
    {"seconds": [0.0, 0.4, 1.5]},
    {"fps": 3.0},
    {"fps": 2.0, "size": (20, 36)},
    {"frames": 4, "snap": "keyframe"},
    {"frames": 6, "skip_nonref": False},
)


@dataclass(frozen=True)
class Verdict:
    """What came of one file: `outcome` is "sound", "lost", "refused", or a failure, which `detail` explains."""

    number: int
    file: str
    outcome: str
    detail: str = ""

    @property
    def failed(self) -> bool:
        return self.outcome not in ("sound", "lost", "refused", "slow")


def make_seeds(folder: Path, count: int = 26) -> None:
    """Write short clips of all recipes, and one long enough for its index to be used instead of a scan."""
    for recipe in RECIPES.values():
        # Without checksums damaged FFV1 decodes to whatever was in the decoder before, and nobody can tell.
        options = {"level": "3", "slicecrc": "1"} if recipe.codec == "ffv1" else recipe.options
        encode(replace(recipe, count=count, options=options, container={**recipe.container, **EXACT}), folder)
    with (
        av.open(str(folder / "b-frames.mp4")) as given,
        av.open(str(folder / LONG), "w", container_options=EXACT) as out,
    ):
        stream = given.streams.video[0]
        copy = out.add_stream_from_template(stream)
        packets = [(bytes(p), p.pts, p.dts, p.duration, p.is_keyframe) for p in given.demux(stream) if p.size]
        for turn in range(2_050 // count + 1):
            for data, pts, dts, duration, key in packets:
                packet = av.Packet(data)
                packet.pts, packet.dts = (time + turn * count * duration for time in (pts, dts))
                packet.duration, packet.time_base, packet.is_keyframe = duration, stream.time_base, key
                packet.stream = copy
                out.mux(packet)


def make_file(seeds: Path, seed: int, number: int) -> tuple[bytes, str, np.random.Generator]:
    """The mutated file of this number, what it is, and the generator for what is then done with it."""
    rng = np.random.default_rng([seed, number])
    names = sorted(path.name for path in seeds.iterdir())
    name, other = names[number % len(names)], names[rng.integers(len(names))]
    data, done = mutated((seeds / name).read_bytes(), name.rpartition(".")[2], (seeds / other).read_bytes(), rng)
    return data, f"{name}: {done}", rng


Result = Video | VideoError


def read(source: object, request: dict[str, object], threads: int) -> Result:
    """Load a video, and check what comes out of that."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            video = load_video(source, threads=threads, **request)  # type: ignore[arg-type]
        except VideoError as error:
            video = error
    if isinstance(video, VideoError):
        assert len(str(video).splitlines()) == 1, f"not a message of one line: {video}"
        return video
    assert [warning.category for warning in caught] == [VideoWarning] * (video.lost > 0), [str(w) for w in caught]
    count = len(video)
    assert video.frames.shape[:2] == (count, 3)
    assert count
    assert video.frames.is_contiguous()
    assert video.indices.shape == video.pts.shape == (count,)
    indices, pts = video.indices.numpy(), video.pts.numpy()
    assert ((indices >= 0) & (indices < video.total)).all(), (indices, video.total)
    assert np.isfinite(pts).all()
    assert (np.diff(pts[np.argsort(indices, kind="stable")]) >= 0).all(), f"times are not in order: {pts}"
    assert np.isfinite([video.fps, video.duration]).all()
    assert video.fps > 0, video.fps
    assert video.duration >= 0, video.duration
    assert set(video.replaced) <= set(indices.tolist())
    assert video.lost >= len(video.replaced)
    if "size" not in request:
        assert video.frames.shape[2:] == (video.height, video.width)
    return video


def same(a: Result, b: Result, stable: bool = True) -> str:
    """What two results differ in; "" if in nothing, or if the decoder is not `stable`."""
    if not stable:
        return ""
    if isinstance(a, VideoError) or isinstance(b, VideoError):
        return "" if str(a) == str(b) else f"{a} / {b}"
    if not np.array_equal(a.frames.numpy(), b.frames.numpy()):
        rows = [row for row in range(min(len(a), len(b))) if not np.array_equal(a.frames[row], b.frames[row])]
        return f"rows {rows} of the frames; {a.work} / {b.work}; {a} / {b}"
    fields = ("total", "fps", "duration", "rotation", "height", "width", "lost", "replaced")
    differing = [name for name in fields if getattr(a, name) != getattr(b, name)]
    differing += [name for name in ("pts", "indices") if not np.array_equal(getattr(a, name), getattr(b, name))]
    return "; ".join(f"{name} {getattr(a, name)} / {getattr(b, name)}" for name in differing)


def in_parts(source: object, request: dict[str, object], stable: bool) -> str:
    """Compare `iter_video` with `load_video`; "" if they agree."""
    whole = read(source, request, 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VideoWarning)
            parts = list(iter_video(source, threads=2, **request))  # type: ignore[arg-type]
    except VideoError as error:
        return same(whole, error, stable)
    if not stable:
        return ""
    if isinstance(whole, VideoError):
        return f"{whole} / {len(parts)} parts"
    frames = np.concatenate([part.frames.numpy() for part in parts])
    return "" if np.array_equal(frames, whole.frames.numpy()) else f"the parts have other frames; {whole}"


def _look_up(container: InputContainer, stream: VideoStream) -> PacketTable | None:
    return look_up(container, stream, lambda total: np.array([0, total // 2, total - 1]))


def examine(data: bytes, path: Path, sound: Path, rng: np.random.Generator, stable: bool) -> tuple[str, str, int]:
    """All checks of one file; outcome, detail, and how many bytes of frames it has asked for and got."""
    path.write_bytes(data)
    request = REQUESTS[rng.integers(len(REQUESTS))]
    first, second = read(path, request, 1), read(path, request, 3)
    # Both, and what is being made.
    got = 0 if isinstance(first, VideoError) else 3 * first.frames.nbytes
    short = ("of memory", "Cannot allocate memory")
    if any(isinstance(result, VideoError) and any(word in str(result) for word in short) for result in (first, second)):
        return "refused", "more frames than memory is left here", got
    if difference := same(first, second, stable):
        return "unequal", f"{request} with 1 and 3 threads: {difference}", got
    choice = rng.integers(3)
    if choice == 0 and (difference := in_parts(path, request, stable)):
        return "unequal", f"{request} at once and in parts: {difference}", got
    if choice == 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VideoWarning)
            one, other = load_videos([path, sound], threads=2, **request)  # type: ignore[arg-type]
        if difference := same(first, one, stable):
            return "unequal", f"{request} alone and among others: {difference}", got
        assert isinstance(other, Video) or request.get("frames") == 40 or "seconds" in request, other
    if choice == 2:
        for ask in (scan, _look_up):
            try:
                with Source(path).open() as (container, stream):
                    ask(container, stream)
            except VideoError:
                assert isinstance(first, VideoError) or isinstance(read(data, {}, 1), Video)
    if isinstance(first, VideoError):
        return "refused", str(first), got
    return ("lost" if first.lost else "sound"), "", got


def work(arguments: argparse.Namespace) -> None:
    """Be a worker: examine files, and report each on standard output."""
    room = arguments.memory
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 2 * room, held + 2 * room))
    # Any level at all makes FFmpeg's threads wait for Python's lock, as for all who import torchvision.io.
    set_level(PANIC)
    seeds, folder = Path(arguments.work), Path(arguments.folder)
    for number in range(arguments.first, arguments.first + arguments.count):
        data, what, rng = make_file(seeds, arguments.seed, number)
        print(json.dumps([number, what, "start", ""]), flush=True)
        path = folder / f"case.{what.partition(':')[0].rpartition('.')[2]}"
        before = _peak(reset=True)
        try:
            stable = what.partition(":")[0] not in UNSTABLE
            outcome, detail, got = examine(data, path, seeds / "b-frames.mkv", rng, stable)
        except Exception:
            outcome, detail, got = "error", traceback.format_exc(), 0
        grown = _peak() - before - got
        if grown > room:
            outcome, detail = "memory", f"{grown / 2**30:.2f} GiB"
        print(json.dumps([number, what, outcome, detail]), flush=True)


def _peak(reset: bool = False) -> int:
    """The most bytes that the process has held, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


class Worker:
    """A watched process that works through a range of numbers."""

    def __init__(self, seeds: Path, folder: Path, seed: int, first: int, count: int, memory: int) -> None:
        command = [sys.executable, "-X", "faulthandler", __file__, "--work", str(seeds), "--folder", str(folder)]
        command += [f"--seed={seed}", f"--first={first}", f"--count={count}", f"--memory={memory}"]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        root = str(Path(__file__).parents[2])
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._errors, text=True, env={**os.environ, "PYTHONPATH": root}
        )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def line(self, seconds: float) -> list | None:
        """The next report; None if the process has ended. Raises queue.Empty after so many seconds."""
        line = self._lines.get(timeout=seconds)
        return None if line is None else json.loads(line)

    def end(self) -> str:
        """Stop the process if it runs; what it says about where it was."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGABRT)
        code = self._process.wait()
        self._errors.seek(0)
        text = self._errors.read()
        self._errors.close()
        return f"exit status {code}\n{text[-6000:]}"


def fuzz(seeds: Path, folder: Path, seed: int, first: int, count: int, seconds: float, memory: int) -> list[Verdict]:
    """Examine files `first` to `first + count - 1`; a file that takes longer than `seconds` gets five times that."""
    verdicts: list[Verdict] = []
    stop, patience = first + count, seconds
    while first < stop:
        again = patience > seconds
        worker = Worker(seeds, folder, seed, first, 1 if again else stop - first, memory)
        current, ended, failure = [first, "?"], "", ""
        # Starting, it imports torch.
        wait = 120.0
        try:
            while (line := worker.line(wait)) is not None:
                if line[2] == "start":
                    current, wait = line, patience
                    continue
                passed = line[2] in ("sound", "lost", "refused")
                verdicts.append(Verdict(line[0], line[1], "slow" if again and passed else line[2], line[3]))
                first, current, wait = line[0] + 1, [line[0] + 1, "?"], 120.0
            failure = "crash"
        except queue.Empty:
            failure = "hang"
        ended = worker.end()
        if failure == "hang" and not again:
            patience = 5 * seconds
            continue
        patience = seconds
        if failure == "hang" or (first == current[0] and len(current) > 2):
            verdicts.append(Verdict(current[0], current[1], failure, ended))
            first = current[0] + 1
        elif first == current[0] and not again and first < stop:
            raise RuntimeError(f"the worker ended before file {first}: {ended}")
    return verdicts


def _bytes(text: str) -> int:
    number = text.rstrip("GMKiB")
    return int(float(number) * {"G": 2**30, "M": 2**20, "K": 2**10}.get(text[len(number) :][:1], 1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--memory", type=_bytes, default=2 * 2**30)
    parser.add_argument("--keep", type=Path, help="a folder for the files that fail")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments)
        return 0
    with tempfile.TemporaryDirectory() as name:
        seeds, folder = Path(name) / "seeds", Path(name) / "cases"
        seeds.mkdir()
        folder.mkdir()
        make_seeds(seeds)
        verdicts = fuzz(
            seeds, folder, arguments.seed, arguments.first, arguments.count, arguments.seconds, arguments.memory
        )
        for verdict in verdicts:
            if verdict.failed:
                print(f"{verdict.number} {verdict.outcome} ({verdict.file})\n{verdict.detail}\n")
                if arguments.keep:
                    arguments.keep.mkdir(parents=True, exist_ok=True)
                    data, what, _ = make_file(seeds, arguments.seed, verdict.number)
                    suffix = what.partition(":")[0].replace("/", "_")
                    (arguments.keep / f"{arguments.seed}-{verdict.number}-{suffix}").write_bytes(data)
    print(", ".join(f"{outcome}: {count}" for outcome, count in sorted(Counter(v.outcome for v in verdicts).items())))
    return int(any(verdict.failed for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
