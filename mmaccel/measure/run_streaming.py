"""Benchmark runner: a stream that does not end, at a fixed budget of tokens: do latency and memory stay flat?"""

from __future__ import annotations

import gc
import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmaccel.errors import MMAccelError
from mmaccel.measure.memory import resident_memory
from mmaccel.measure.quality import Interval
from mmaccel.measure.rows import append_rows, cpu_name, environment, load, read_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["StreamingOptions", "run", "slope"]

_BINS = 50
_BLOCK = 20  # neighbouring frames are not independent


@dataclass(frozen=True)
class StreamingOptions:
    """What is run, with the embedded model on the CPU.

    specs: methods on the stream, "" for none. modes: what happens at an eviction, as `mmaccel.stream` takes it. frames:
    how many are pushed. max_tokens: the budget. slack: share of it that is free after an eviction. settle: frames at
    the start that do not count, until the budget is full and memory warm.
    """

    specs: tuple[str, ...]
    modes: tuple[str, ...] = ("rotate", "rebuild")
    frames: int = 2000
    max_tokens: int = 512
    slack: float = 0.1
    settle: int = 100
    threads: int = 1
    samples: int = 2000

    def key(self, spec: str, mode: str) -> str:
        """Tells apart rows whose results may differ."""
        relevant = {**asdict(self), "specs": spec, "modes": mode, "cpu": cpu_name()}
        return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:12]


def run(
    name: str, options: StreamingOptions, out: Path, progress: Callable[[str, int, int], None]
) -> list[dict[str, Any]]:
    """Push the frames under every spec and mode that `out` does not hold yet.

    Raises:
        MMAccelError: an option out of range, or what `mmaccel.stream` refuses.
    """
    if options.threads < 1 or options.settle < 0 or options.frames < options.settle + 2 * _BLOCK:
        raise MMAccelError(f"threads must be at least 1, and frames at least {2 * _BLOCK} more than settle.")
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        for spec in options.specs:
            for mode in options.modes:
                held = {row["key"] for row in read_rows(out) if row.get("benchmark") == name}
                if options.key(spec, mode) not in held:
                    append_rows(out, [_row(name, options, spec, mode, progress)])
    finally:
        torch.set_num_threads(before)
    keys = {options.key(spec, mode) for spec in options.specs for mode in options.modes}
    return [row for row in read_rows(out) if row.get("benchmark") == name and row["key"] in keys]


def slope(values: Any, *, samples: int = 2000, seed: int = 0, level: float = 0.95) -> Interval:
    """Least-squares slope of evenly spaced values, a step, with its interval from draws of blocks of 20 neighbours.

    Raises:
        MMAccelError: fewer than two blocks.
    """
    y = np.asarray(values, dtype=np.float64)
    blocks = len(y) // _BLOCK
    if blocks < 2:
        raise MMAccelError(f"a slope takes at least {2 * _BLOCK} values, not {len(y)}.")
    x = np.arange(len(y), dtype=np.float64)
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(samples):
        chosen = (rng.integers(0, blocks, blocks)[:, None] * _BLOCK + np.arange(_BLOCK)).ravel()
        drawn.append(_fit(x[chosen], y[chosen]))
    low, high = np.quantile(drawn, ((1 - level) / 2, (1 + level) / 2)).tolist()
    return Interval(_fit(x, y), low, high, len(y), blocks, level)


def _fit(x: np.ndarray, y: np.ndarray) -> float:
    centred = x - x.mean()
    return float((centred @ (y - y.mean())) / max(centred @ centred, 1e-300))


def _frames(count: int) -> Iterator[torch.Tensor]:
    """Frames of the rendered world, clip after clip, uint8 [3, H, W]."""
    from mmaccel.tiny.world import render, sample_clip

    number, left = 0, count
    while left > 0:
        for frame in render(sample_clip(500_000 + number, "held-out"))[:left]:
            yield torch.as_tensor(np.ascontiguousarray(frame)).permute(2, 0, 1)
            left -= 1
        number += 1


def _row(
    name: str, options: StreamingOptions, spec: str, mode: str, progress: Callable[[str, int, int], None]
) -> dict[str, Any]:
    from mmaccel.session import stream
    from mmaccel.tiny import video_qa

    model, processor = video_qa()
    machine, what = environment(), f"{spec or 'no method'}, {mode}"
    seconds, resident = [], []
    with stream(
        model, *([spec] if spec else []), processor=processor, max_tokens=options.max_tokens,
        on_evict=mode,  # type: ignore[arg-type]
        slack=options.slack,
    ) as session:  # fmt: skip
        for number, frame in enumerate(_frames(options.frames)):
            start = time.perf_counter()
            session.push(frame)
            seconds.append(time.perf_counter() - start)
            resident.append(resident_memory())
            if number % 50 == 0:
                progress(what, number, options.frames)
        stats = session.stats()
    gc.collect()
    machine["machine"]["load_after"] = load()
    late, held = np.array(seconds[options.settle :]), np.array(resident[options.settle :])
    median = float(np.median(late))
    return {
        "benchmark": name, "key": options.key(spec, mode), "model": "embedded video-QA model", "weights": "trained",
        "dtype": "float32", "attention": "sdpa", "device": "cpu", "spec": spec, "mode": mode,
        "push": {
            "median": median, "p99": float(np.quantile(late, 0.99)), "max": float(late.max()),
            "p99_over_median": float(np.quantile(late, 0.99)) / median,
        },
        "push_slope": slope(late, samples=options.samples).as_dict(),
        "memory": {"first": int(held[0]), "last": int(held[-1]), "most": int(held.max())},
        "memory_slope": slope(held, samples=options.samples).as_dict(),
        "curve": [
            {"frame": int(part[0]), "median": float(np.median(times)), "p99": float(np.quantile(times, 0.99)),
             "memory": int(np.median(bytes_))}
            for part, times, bytes_ in zip(
                *(np.array_split(values, _BINS) for values in (np.arange(len(seconds)), seconds, resident)),
                strict=True,
            )
        ],
        "stats": {"frames": stats.frames, "made": stats.made, "reduced": stats.reduced, "evicted": stats.evicted,
                  "evictions": stats.evictions, "held": stats.held, "cache_bytes": stats.cache_bytes},
        "options": asdict(options), **machine,
    }  # fmt: skip
