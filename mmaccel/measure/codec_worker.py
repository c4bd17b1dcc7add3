"""The process of one contestant: `python -m mmaccel.measure.codec_worker`, asked by lines of JSON on standard input.

It is told its reader, imports it once, and forks for each job, so that a job starts with a fresh heap and without the
price of imports.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import json
import os
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmaccel.measure.codec_marks import numbers_in
from mmaccel.measure.codec_peers import READERS

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["main"]


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
        from mmaccel.codecs import Video, load_videos
        from mmaccel.errors import VideoError

        def read_all() -> list[tuple[Any, int | None]]:
            videos = load_videos(paths, frames=len(wanted), size=size, threads=threads or None)
            for video in videos:
                if isinstance(video, VideoError):
                    raise video
            return [(video.frames, video.decoded) for video in videos if isinstance(video, Video)]

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
    used, start = _used(), time.perf_counter()
    found = call()
    seconds, cpu = time.perf_counter() - start, _used() - used
    growth = None if before is None else max(0, _memory("VmHWM") - before)
    numbers = []
    for frames in found.pop("frames"):
        array = np.asarray(frames.cpu() if hasattr(frames, "cpu") else frames)
        sides = array.shape[2:] if array.shape[1] == 3 else array.shape[1:3]
        if job["size"] and list(sides) != job["size"]:
            raise ValueError(f"the frames are {sides[0]} x {sides[1]}, not {job['size'][0]} x {job['size'][1]}")
        numbers.append(numbers_in(array))
    return {"seconds": seconds, "cpu": cpu, "growth": growth, "numbers": numbers, **found}


def _used() -> float:
    """Processor seconds of this process and of the children that it has waited for, by the user and by the system."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


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
