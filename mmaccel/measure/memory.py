"""Peak memory of a block of code."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mmaccel.errors import MMAccelError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Peak", "peak_memory", "resident_memory"]

_STATUS, _STATM, _RESET = Path("/proc/self/status"), Path("/proc/self/statm"), Path("/proc/self/clear_refs")
_INTERVAL = 0.002


@dataclass
class Peak:
    """What a block took at most, in bytes, filled in when the block ends.

    peak: largest amount held at one time. growth: the same above what was held when the block began. method: how it
    was measured: "cuda allocator", "rss high-water mark" (reset at the start, exact) or "rss samples" (every 2 ms, may
    miss a shorter peak). On a CPU it is the memory of the whole process.
    """

    method: str
    start: int
    peak: int = 0

    @property
    def growth(self) -> int:
        """Bytes above what was held at the start."""
        return max(0, self.peak - self.start)


@contextmanager
def peak_memory(device: str | torch.device = "cpu") -> Iterator[Peak]:
    """Measure the peak memory of a block: `with peak_memory(model.device) as peak: ...; peak.growth`.

    Blocks may stand inside of one another, each with a peak of its own, and a block that raises has one too.

    Raises:
        MMAccelError: neither CUDA nor a system with /proc, so there is nothing to read.
    """
    place = torch.device(device)
    if place.type == "cuda":
        measured = _carried(_CudaMark(place))
    elif not _STATM.exists():
        raise MMAccelError("peak memory is read from /proc or from CUDA, and this system has neither.")
    else:
        mark = _ProcessMark()
        measured = _carried(mark) if mark.resets() else _sampled()
    with measured as peak:
        yield peak


class _ProcessMark:
    """The kernel's high-water mark of this process."""

    name, method = "process", "rss high-water mark"

    def resets(self) -> bool:
        """Whether the kernel lets us start anew; blocks around are told first, because the trial does it."""
        _carry_out(self)
        _trim()
        return _reset()

    def start(self) -> int:
        return resident_memory()

    def highest(self) -> int:
        return _high_water()


class _CudaMark:
    """The high-water mark of torch's allocator on one device."""

    method = "cuda allocator"

    def __init__(self, place: torch.device) -> None:
        self.place = place
        self.name = f"cuda:{torch.cuda.current_device() if place.index is None else place.index}"

    def start(self) -> int:
        torch.cuda.synchronize(self.place)
        _carry_out(self)
        torch.cuda.reset_peak_memory_stats(self.place)
        return torch.cuda.memory_allocated(self.place)

    def highest(self) -> int:
        torch.cuda.synchronize(self.place)
        return torch.cuda.max_memory_allocated(self.place)


# blocks that are running, by mark: there is one mark for all of them, and the start of a block takes it down
_running: dict[str, list[Peak]] = defaultdict(list)


def _carry_out(mark: _ProcessMark | _CudaMark) -> None:
    if _running[mark.name]:
        highest = mark.highest()
        for peak in _running[mark.name]:
            peak.peak = max(peak.peak, highest)


@contextmanager
def _carried(mark: _ProcessMark | _CudaMark) -> Iterator[Peak]:
    peak = Peak(mark.method, mark.start())
    running = _running[mark.name]
    running.append(peak)
    try:
        yield peak
    finally:
        # by identity: two blocks may have begun at the same size
        running[:] = [other for other in running if other is not peak]
        peak.peak = max(peak.peak, mark.highest())


def _trim() -> None:
    """Give freed memory back to the system, or what an earlier block left behind would hide the growth of this one."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if trim is not None:
        trim(0)


def resident_memory() -> int:
    """Bytes of this process that are in memory now."""
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _high_water() -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _reset() -> bool:
    """Set the kernel's high-water mark back to what is held now; False where the kernel does not let us."""
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return any(line.startswith("VmHWM") for line in _STATUS.read_text().splitlines())


@contextmanager
def _sampled() -> Iterator[Peak]:
    peak = Peak("rss samples", resident_memory())
    peak.peak = peak.start
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(_INTERVAL):
            peak.peak = max(peak.peak, resident_memory())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
        peak.peak = max(peak.peak, resident_memory())
