"""Readers of sampled frames, each in a process of its own: `python -m mmaccel.measure.codec_peers`.

The process is told its reader, imports it once, and forks for each job, so that a job starts with a fresh heap and
without the price of imports. Messages are lines of JSON. A reader takes (path, frame numbers in rising order, (height,
width) or None for the video's own size, threads, 0 for the reader's own choice) and gives the frames, uint8 RGB
[N, H, W, 3] or [N, 3, H, W], in whatever array it has, and how many frames it decoded for them, None where it does not
tell. Every reader is used as a user would who wants the right frames, fast: nothing is approximate.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import json
import os
import sys
import time
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmaccel.measure.codec_marks import numbers_in

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["READERS", "main"]

Size = tuple[int, int] | None
# With B-frames as references H.264 holds back two pictures.
_REORDER = 2


def read_mmaccel(path: str, wanted: Sequence[int], size: Size, threads: int) -> tuple[Any, int | None]:
    """`load_video` as it stands."""
    from mmaccel.codecs import load_video

    video = load_video(path, indices=wanted, size=size, threads=threads or None)
    return video.frames, video.decoded


def read_pyav(path: str, wanted: Sequence[int], size: Size, threads: int) -> tuple[Any, int | None]:
    """PyAV by hand, for a constant frame rate: seek by presentation time, but only over more than a seek costs."""
    import av

    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "AUTO", threads
        keys = [number for number, entry in enumerate(stream.index_entries) if entry.is_keyframe]
        start, step = stream.start_time or 0, 1 / (stream.average_rate * stream.time_base)
        pays = _REORDER + (threads or os.cpu_count() or 1) - 1
        out, decoded, last = _Pictures(wanted, size), 0, -1
        frames = container.decode(stream)
        for target in wanted:
            key = keys[bisect_right(keys, target) - 1]
            if key - last > pays:
                container.seek(start + round(target * step), stream=stream)
                frames = container.decode(stream)
            for frame in frames:
                decoded += 1
                last = round((frame.pts - start) / step)
                if last >= target:
                    out.add(frame)
                    break
        return out.pictures, decoded


def read_pyav_sequential(path: str, wanted: Sequence[int], size: Size, threads: int) -> tuple[Any, int | None]:
    """PyAV from the first frame to the last wanted one."""
    import av

    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "AUTO", threads
        out, chosen = _Pictures(wanted, size), set(wanted)
        for number, frame in enumerate(container.decode(stream)):
            if number in chosen:
                out.add(frame)
            if number == wanted[-1]:
                break
        return out.pictures, wanted[-1] + 1


class _Pictures:
    """PyAV's frames as one array, converted and resized in one pass."""

    def __init__(self, wanted: Sequence[int], size: Size) -> None:
        self.pictures, self._count, self._size, self._place = np.empty(0), len(wanted), size, 0

    def add(self, frame: Any) -> None:
        height, width = self._size or (frame.height, frame.width)
        if not self._place:
            self.pictures = np.empty((self._count, height, width, 3), dtype=np.uint8)
        resized = frame.reformat(width, height, "rgb24", interpolation="BICUBIC")
        self.pictures[self._place] = resized.to_ndarray()
        self._place += 1


def read_decord(path: str, wanted: Sequence[int], size: Size, threads: int) -> tuple[Any, int | None]:
    """decord, which resizes while it decodes."""
    import decord

    height, width = size or (-1, -1)
    reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=threads, width=width, height=height)
    return reader.get_batch(wanted).asnumpy(), None


def read_opencv(path: str, wanted: Sequence[int], size: Size, threads: int) -> tuple[Any, int | None]:
    """OpenCV: grab every frame, retrieve the wanted ones; setting the position is not exact."""
    import cv2

    options = [cv2.CAP_PROP_N_THREADS, threads] if threads else []
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, options)
    pictures, chosen = [], set(wanted)
    for number in range(wanted[-1] + 1):
        if not capture.grab():
            break
        if number in chosen:
            _, picture = capture.retrieve()
            if size is not None:
                picture = cv2.resize(picture, (size[1], size[0]))
            pictures.append(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))
    capture.release()
    return np.stack(pictures), wanted[-1] + 1


def read_torchcodec(path: str, wanted: Sequence[int], size: Size, threads: int) -> tuple[Any, int | None]:
    """torchcodec in its exact mode, which resizes while it decodes."""
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    resize = [] if size is None else [Resize(size)]
    decoder = VideoDecoder(path, num_ffmpeg_threads=threads, seek_mode="exact", transforms=resize)
    return decoder.get_frames_at(list(wanted)).data, None


def read_pynvvideocodec(path: str, wanted: Sequence[int], size: Size, threads: int) -> tuple[Any, int | None]:  # noqa: ARG001
    """PyNvVideoCodec on the first GPU, resized there by torch; the frames stay on the GPU."""
    import PyNvVideoCodec
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("there is no GPU")
    decoder = PyNvVideoCodec.SimpleDecoder(
        path, gpu_id=0, use_device_memory=True, output_color_type=PyNvVideoCodec.OutputColorType.RGBP
    )
    pictures = []
    for picture in decoder.get_batch_frames_by_index(list(wanted)):
        tensor = torch.from_dlpack(picture)
        if size is not None:
            resized = torch.nn.functional.interpolate(tensor[None].float(), size, mode="bicubic", antialias=True)
            tensor = resized.round().clamp(0, 255).to(torch.uint8)[0]
        pictures.append(tensor)
    frames = torch.stack(pictures)
    torch.cuda.synchronize()
    return frames, None


READERS: dict[str, tuple[str, str, Callable[..., tuple[Any, int | None]]]] = {
    # what is imported, the distribution that says the version, the reader
    "mmaccel": ("mmaccel.codecs.reader", "mmaccel", read_mmaccel),
    "pyav": ("av", "av", read_pyav),
    "pyav-sequential": ("av", "av", read_pyav_sequential),
    "decord": ("decord", "decord", read_decord),
    "opencv": ("cv2", "opencv-python-headless", read_opencv),
    "torchcodec": ("torchcodec.decoders", "torchcodec", read_torchcodec),
    "pynvvideocodec": ("PyNvVideoCodec", "PyNvVideoCodec", read_pynvvideocodec),
    "limit": ("mmaccel.measure.codec_limit", "av", lambda *_: (None, None)),
}


def _prepared(reader: str, job: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """What is to be timed: it gives {"frames": [array of each file], "decoded": sum or None} and more facts."""
    paths, wanted, threads = job["paths"], job["wanted"], job["threads"]
    size = tuple(job["size"]) if job["size"] else None
    if reader == "limit":
        from mmaccel.measure.codec_limit import Limit

        limit = Limit(paths[0], wanted)
        return lambda: {"frames": [], **limit.run()}
    read = READERS[reader][2]
    if job["how"] == "list":
        import mmaccel.codecs

        load_videos = getattr(mmaccel.codecs, "load_videos", None)
        if load_videos is None:
            raise NotImplementedError("this mmaccel has no load_videos")

        def read_all() -> list[tuple[Any, int | None]]:
            videos = load_videos(paths, frames=len(wanted), size=size, threads=threads or None)
            for video in videos:
                if isinstance(video, Exception):
                    raise video
            return [(video.frames, video.decoded) for video in videos]

    elif job["how"] == "pool":

        def read_all() -> list[tuple[Any, int | None]]:
            with ThreadPoolExecutor(job["workers"]) as pool:
                return list(pool.map(lambda path: read(path, wanted, size, threads), paths))

    else:

        def read_all() -> list[tuple[Any, int | None]]:
            return [read(path, wanted, size, threads) for path in paths]

    def call() -> dict[str, Any]:
        found = read_all()
        counts = [decoded for _, decoded in found if decoded is not None]
        return {
            "frames": [frames for frames, _ in found],
            "decoded": sum(counts) if len(counts) == len(found) else None,
        }

    return call


def _timed(call: Callable[[], dict[str, Any]], job: dict[str, Any]) -> dict[str, Any]:
    """Run once: seconds of the clock and of all threads of the process, growth of memory in bytes, and what came."""
    gc.collect()
    before = _memory("VmRSS") if _reset_mark() else None
    used, start = sum(os.times()[:4]), time.perf_counter()
    found = call()
    seconds, cpu = time.perf_counter() - start, sum(os.times()[:4]) - used
    growth = None if before is None else max(0, _memory("VmHWM") - before)
    numbers = []
    for frames in found.pop("frames"):
        array = np.asarray(frames.cpu() if hasattr(frames, "cpu") else frames)
        shape = [3, *(job["size"] or array.shape[1:][-2:])]
        sides = array.shape[1:] if array.shape[1] == 3 else (3, *array.shape[1:3])
        if job["size"] and list(sides) != shape:
            raise ValueError(f"frames are {array.shape}, not of the size {job['size']}")
        numbers.append(numbers_in(array))
    return {"seconds": seconds, "cpu": cpu, "growth": growth, "numbers": numbers, **found}


def _reset_mark() -> bool:
    """Set the high-water mark of this process's memory back to what it holds; False where that cannot be done."""
    # rusage would not do: there a new process starts with the mark of the one that started it.
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _memory(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _serve(reader: str, job: dict[str, Any], receive: Callable[[], dict[str, Any]], send: Callable[..., None]) -> None:
    """One job: made ready, then run as often as asked."""
    try:
        call = _prepared(reader, job)
        send(ready=True)
        while receive().get("do") == "run":
            send(**_timed(call, job))
    except Exception as error:  # that a library fails is a result of the benchmark
        send(error=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300])


def main() -> None:
    """Answer the messages on standard input until it ends."""
    commands = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115 - it lasts as long as the process
    answers = os.dup(1)
    # What libraries print must not come between the answers.
    os.dup2(2, 1)

    def receive() -> dict[str, Any]:
        line = commands.readline()
        return json.loads(line) if line else {"do": "quit"}

    def send(**answer: Any) -> None:
        os.write(answers, json.dumps(answer).encode() + b"\n")

    reader = receive()["reader"]
    module, distribution, _ = READERS[reader]
    try:
        importlib.import_module(module)
        send(version=importlib.metadata.version(distribution))
    except Exception as error:  # so is that it cannot be loaded
        send(error=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300])
        return
    while (job := receive())["do"] != "quit":
        if job["do"] != "job":
            continue  # the rest of a job that has failed
        child = os.fork()
        if not child:
            _serve(reader, job, receive, send)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            send(error=f"its process ended with {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    sys.exit(main())
