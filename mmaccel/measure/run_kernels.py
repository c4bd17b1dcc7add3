"""Benchmark runner: each op of the kernel layer against plain torch, compiled torch, SDPA and the machine's limits."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmaccel import kernels
from mmaccel.errors import MMAccelError
from mmaccel.measure.devices import device_named, dtype_named
from mmaccel.measure.kernel_cases import OPS
from mmaccel.measure.memory import peak_memory
from mmaccel.measure.rows import append_rows, environment, read_rows
from mmaccel.measure.stages import Spread

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mmaccel.measure.kernel_cases import Case

__all__ = ["OURS", "KernelOptions", "run"]

OURS = "mmaccel"

# Larger than any cache; and a product that keeps the units busy, in a fraction of a second.
_COPIED_BYTES = 1 << 28
_BRIEF = 0.1  # seconds
_UNROLLED = 500  # steps of a loop that torch.compile takes minutes for
_MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class KernelOptions:
    """What is run.

    ops: names of `mmaccel.measure.kernel_cases.OPS`, none for all. sizes: names of theirs; an op that has no such size
    is left out. device: "cpu", "cuda" or "auto". repeats: timed rounds, in each of which every contestant runs once.
    compiled: whether `torch.compile` of the plain form is one of them.
    """

    ops: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ("small",)
    dtypes: tuple[str, ...] = ("float32",)
    device: str = "auto"
    threads: int = 1
    repeats: int = 9
    compiled: bool = True

    def key(self, op: str, size: str, dtype: str) -> str:
        """Tells apart groups of rows whose results may differ."""
        relevant = {**asdict(self), "ops": op, "sizes": size, "dtypes": dtype}
        return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:12]


def run(
    name: str, options: KernelOptions, out: Path, progress: Callable[[str, int, int], None]
) -> list[dict[str, Any]]:
    """Measure every op, size and dtype that `out` does not hold yet; rows of one such group are written together.

    A group has a row for each contestant: "mmaccel" (the op), "eager" (the same in plain torch), "compiled" (that under
    torch.compile) and "sdpa" (dense fused attention) where the op has to do with it. A contestant that cannot run here
    has `missing`, the reason, instead of figures.

    Raises:
        MMAccelError: an unknown op, size or dtype, a device that is not there, or an option out of range.
    """
    device = device_named(options.device)
    if options.threads < 1 or options.repeats < 1:
        raise MMAccelError("threads and repeats must be at least 1.")
    groups = _groups(options)
    held = {row["key"] for row in read_rows(out) if row.get("benchmark") == name}
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        for group in groups:
            if options.key(*group) not in held:
                append_rows(out, _measure(name, options, *group, device, progress))
    finally:
        torch.set_num_threads(before)
    keys = {options.key(*group) for group in groups}
    return [row for row in read_rows(out) if row.get("benchmark") == name and row["key"] in keys]


def _groups(options: KernelOptions) -> list[tuple[str, str, str]]:
    unknown = [op for op in options.ops if op not in OPS]
    if unknown:
        raise MMAccelError(f"no op is called {', '.join(unknown)}; known are {', '.join(OPS)}.")
    ops = options.ops or tuple(OPS)
    for size in options.sizes:
        known = {name for op in ops for name in OPS[op].sizes}
        if size not in known:
            raise MMAccelError(f"no chosen op has the size {size!r}; known are {', '.join(sorted(known))}.")
    for dtype in options.dtypes:
        if not dtype_named(dtype).is_floating_point:
            raise MMAccelError(f"dtypes must be floating dtypes, not {dtype!r}.")
    return [
        (op, size, dtype) for op in ops for size in options.sizes if size in OPS[op].sizes for dtype in options.dtypes
    ]


@torch.no_grad()
def _measure(
    name: str,
    options: KernelOptions,
    op: str,
    size: str,
    dtype_name: str,
    device: torch.device,
    progress: Callable[[str, int, int], None],
) -> list[dict[str, Any]]:
    what, dtype = f"{op}, {size}, {dtype_name}", dtype_named(dtype_name)
    case = OPS[op].case(*OPS[op].sizes[size], device=device, dtype=dtype)
    calls: dict[str, Callable[..., Any]] = {OURS: case.ours, "eager": case.eager}
    missing: dict[str, str] = {}
    if options.compiled:
        compiled = _compiled(case)
        if isinstance(compiled, str):
            missing["compiled"] = compiled
        else:
            calls["compiled"] = compiled
    if case.sdpa is not None:
        calls["sdpa"] = case.sdpa

    with kernels.recording() as events:
        case.ours(*case.inputs)
    path = [event._asdict() for event in dict.fromkeys(events)]
    memory, brief = {}, set()
    for contestant, call in calls.items():
        call(*case.inputs)  # what is kept for the next calls is not part of the peak
        with peak_memory(device) as peak:
            took = _seconds(lambda call=call: call(*case.inputs), device)
        if took < _BRIEF:
            brief.add(contestant)
        memory[contestant] = {"peak": peak.peak, "growth": peak.growth, "method": peak.method}

    machine = environment()
    source = torch.ones(_COPIED_BYTES // dtype.itemsize, device=device, dtype=dtype)
    # into memory that is there already: a fresh clone on a CPU waits for its pages, and the ceiling would be too low
    target = torch.empty_like(source).copy_(source)
    side = _MATMUL_SIDE[device.type]
    factor = torch.ones(side, side, device=device, dtype=dtype)
    ceilings = {"copy": lambda: target.copy_(source), "matmul": lambda: factor @ factor}
    ceilings["matmul"]()
    names = list(calls)
    seconds: dict[str, list[float]] = {contestant: [] for contestant in (*names, *ceilings)}
    for number in range(options.repeats):
        # in the same rounds, so that a busy or throttled machine lowers the ceilings too
        for ceiling, call in ceilings.items():
            seconds[ceiling].append(_seconds(call, device))
        # What ran before has emptied the caches. A long call fills them itself, if no one always goes first.
        first = number % len(names)
        for place, contestant in enumerate(names[first:] + names[:first]):
            timed = functools.partial(calls[contestant], *case.inputs)
            if place == 0 or contestant in brief:
                timed()
            seconds[contestant].append(_seconds(timed, device))
        progress(what, number + 1, options.repeats)

    bandwidth = 2 * source.nbytes / min(seconds["copy"])
    rate = 2 * side**3 / min(seconds["matmul"])
    by_memory, by_products = case.moved / bandwidth, case.flops / rate
    least = max(by_memory, by_products)
    common = {
        "benchmark": name, "key": options.key(op, size, dtype_name), "op": op, "size": size, "shape": case.shape,
        "dtype": dtype_name, "device": str(device), "threads": options.threads, "repeats": options.repeats,
        "bytes": case.moved, "flops": case.flops, "bandwidth": bandwidth, "rate": rate, "limit": least,
        "limited_by": "memory" if by_memory >= by_products else "products",
    }  # fmt: skip
    rows = []
    for contestant in (*calls, *missing):
        row = {**common, "contestant": contestant, "missing": missing.get(contestant)}
        if contestant in calls:
            spread = Spread.of(seconds[contestant])
            ratios = np.divide(seconds[OURS], seconds[contestant]).tolist()
            row |= {
                "seconds": spread.as_dict(),
                "ratio": Spread.of(ratios).as_dict(),
                # dense attention does other work than the op, so the op's limit is none for it
                "of_limit": None if contestant == "sdpa" else least / spread.median,
                "memory": memory[contestant],
                "path": path if contestant == OURS else None,
            }
        rows.append({**row, **machine})
    return rows


def _compiled(case: Case) -> Callable[..., Any] | str:
    """The plain form under torch.compile, ready to run; or why it cannot be compiled here."""
    if case.steps > _UNROLLED:
        return f"its loop of {case.steps} steps would be written out one behind the other"
    # an earlier case must not turn this one into a graph for many shapes
    torch.compiler.reset()
    compiled = torch.compile(case.eager, dynamic=False)
    try:
        compiled(*case.inputs)
    except Exception as error:  # a compiler fails in its own ways, and that it does is a result
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]
    return compiled


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record(torch.cuda.current_stream(device))
    call()
    end.record(torch.cuda.current_stream(device))
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3
