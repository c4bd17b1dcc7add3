"""How long a node's hardware decoders take for the groups of pictures of some videos, by discrete-event simulation.

Each NVDEC engine decodes one unit at a time: a group of pictures, up to its last wanted frame, which cannot be split.
"Enabling Disaggregated Multi-Stage MLLM Inference via GPU-Internal Scheduling and Resource Sharing" (2025) lets all
engines of a node take units of one video from a shared queue (FlashCodec). The simulation says what that gives for
measured or assumed costs, and what a split beforehand would give, without such a node.

result = simulate([0.21, 0.08, 0.35, 0.3], engines=7, gpus=8, copy=0.002)
result.makespan, result.first_unit[0], sum(result.idle)
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from mmaccel.errors import MMAccelError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Order", "Run", "Simulation", "lower_bound", "simulate"]

Order = Literal["longest", "arrival", "static"]


@dataclass(frozen=True)
class Run:
    """One unit on one engine: `start` and `end` of the engine's work, `delivered` when its frames are where they go.

    All in seconds after time 0; `start` is when the engine takes the unit, a session that it opens for it included.
    """

    unit: int
    engine: int
    start: float
    end: float
    delivered: float


@dataclass(frozen=True)
class Simulation:
    """What `simulate` returns; seconds throughout.

    makespan: from time 0 to the last delivery. runs: one a unit, in the order in which they started. busy, idle: of
    each engine; busy is decoding and opening sessions, idle the rest of the makespan. first_unit: of each request, from
    its arrival until its first unit in presentation order has been delivered whole, an upper bound of the time of the
    first frame. latency: of each request, from its arrival to its last delivery. Requests without units have 0 in both.
    """

    makespan: float
    runs: tuple[Run, ...]
    busy: tuple[float, ...]
    idle: tuple[float, ...]
    first_unit: tuple[float, ...]
    latency: tuple[float, ...]


def lower_bound(costs: Sequence[float], engines: int) -> float:
    """Seconds below which no schedule of units that all wait at time 0 can end: an equal share, or the longest unit."""
    _check(costs, engines, 1)
    return max(math.fsum(costs) / engines, max(costs, default=0.0))


def simulate(
    costs: Sequence[float],
    engines: int = 7,
    *,
    gpus: int = 1,
    order: Order = "longest",
    requests: Sequence[int] | None = None,
    arrivals: Sequence[float] = (0.0,),
    homes: Sequence[int] | None = None,
    session: float = 0.0,
    reuse: bool = True,
    copy: float | Sequence[float] = 0.0,
) -> Simulation:
    """Decode units of the given costs (seconds each, [U], in presentation order) on `engines` of each of `gpus` GPUs.

    order: which waiting unit an idle engine takes. "arrival": requests in the order of their arrival, their units in
    presentation order. "longest": requests in the order of their arrival, the longest unit first among those of the
    same time (Graham, "Bounds on Multiprocessing Timing Anomalies", 1969). "static": no shared queue: each request is
    cut beforehand into one run of units an engine, of equal numbers, and no engine helps another.
    requests: [U], the request of each unit, all 0 by default. arrivals: [R], when each request's units may start.
    homes: [R], the GPU on which each request's frames are wanted, 0 by default. A shared queue gives work to idle
    engines there first, and to engines with a session before those without.
    session: what opening a decoder costs an engine, once, or for every unit without `reuse`.
    copy: what bringing a unit's frames to another GPU costs, one number or [U]; an engine goes on meanwhile, and the
    copies out of one GPU follow each other.

    Raises MMAccelError for counts below 1, times that are negative or not finite, and lists that do not fit together.
    """
    U, owner, home, copies = _checked(costs, engines, gpus, order, requests, arrivals, homes, session, copy)
    E = engines * gpus
    queues: list[list[tuple[float, float, int, int]]] = [[] for _ in range(E if order == "static" else 1)]
    share = _split(owner, E, home, engines) if order == "static" else [0] * U

    # ends come before arrivals of the same time, so that an engine that falls idle sees what arrives
    events = [(float(time), 1, request) for request, time in enumerate(arrivals)]
    heapq.heapify(events)
    units: list[list[int]] = [[] for _ in arrivals]
    for unit in range(U):
        units[owner[unit]].append(unit)
    idle, opened, link = set(range(E)), [False] * E, [0.0] * gpus
    busy, running, runs = [0.0] * E, {}, {}
    while events:
        now = events[0][0]
        while events and events[0][0] == now:
            _, arrived, who = heapq.heappop(events)
            if arrived:
                for unit in units[who]:
                    rank = -costs[unit] if order == "longest" else 0.0
                    heapq.heappush(queues[share[unit]], (now, rank, who, unit))
                continue
            unit, start = running.pop(who)
            idle.add(who)
            delivered, gpu = now, who // engines
            if gpu != home[owner[unit]]:
                delivered = link[gpu] = max(now, link[gpu]) + copies[unit]
            runs[unit] = Run(unit, who, start, now, delivered)
        for place, queue in enumerate(queues):
            while queue and (idle if order != "static" else place in idle):
                unit = heapq.heappop(queue)[3]
                engine = place
                if order != "static":
                    there = home[owner[unit]]
                    engine = min(idle, key=lambda e: (e // engines != there, not opened[e], e))
                spent = costs[unit] + (0.0 if reuse and opened[engine] else session)
                opened[engine] = True
                busy[engine] += spent
                idle.discard(engine)
                running[engine] = (unit, now)
                heapq.heappush(events, (now + spent, 0, engine))

    makespan = max((run.delivered for run in runs.values()), default=0.0)
    return Simulation(
        makespan=makespan,
        runs=tuple(sorted(runs.values(), key=lambda run: (run.start, run.engine))),
        busy=tuple(busy),
        idle=tuple(makespan - spent for spent in busy),
        first_unit=tuple(
            runs[mine[0]].delivered - time if mine else 0.0 for mine, time in zip(units, arrivals, strict=True)
        ),
        latency=tuple(
            max((runs[unit].delivered for unit in mine), default=time) - time
            for mine, time in zip(units, arrivals, strict=True)
        ),
    )


def _split(owner: list[int], E: int, home: list[int], engines: int) -> list[int]:
    """The engine of each unit: those of a request in runs as equal as can be, its home's engines first."""
    count: dict[int, int] = {}
    for request in owner:
        count[request] = count.get(request, 0) + 1
    seen: dict[int, int] = {}
    share = []
    for request in owner:
        place = seen.get(request, 0)
        seen[request] = place + 1
        share.append((place * E // count[request] if count[request] > E else place) + home[request] * engines)
    return [engine % E for engine in share]


def _check(costs: Sequence[float], engines: int, gpus: int) -> None:
    if engines < 1 or gpus < 1:
        raise MMAccelError(f"a simulation needs at least one engine and one GPU, not {engines} and {gpus}.")
    _times(costs, "costs")


def _times(values: Sequence[float], what: str) -> None:
    for value in values:
        if not (math.isfinite(value) and value >= 0):
            raise MMAccelError(f"{what} are seconds, finite and not negative; got {value}.")


def _checked(
    costs: Sequence[float],
    engines: int,
    gpus: int,
    order: str,
    requests: Sequence[int] | None,
    arrivals: Sequence[float],
    homes: Sequence[int] | None,
    session: float,
    copy: float | Sequence[float],
) -> tuple[int, list[int], list[int], list[float]]:
    _check(costs, engines, gpus)
    if order not in get_args(Order):
        raise MMAccelError(f"order must be one of {', '.join(get_args(Order))}, not {order!r}.")
    U, R = len(costs), len(arrivals)
    owner = [0] * U if requests is None else list(requests)
    home = [0] * R if homes is None else list(homes)
    copies = [float(copy)] * U if isinstance(copy, (int, float)) else [float(each) for each in copy]
    for values, what, length in ((owner, "requests", U), (home, "homes", R), (copies, "copy", U)):
        if len(values) != length:
            raise MMAccelError(f"{what} must have {length} entries, one for each, not {len(values)}.")
    if any(not 0 <= request < R for request in owner):
        raise MMAccelError(f"requests must lie in 0 to {R - 1}, as there are {R} arrivals.")
    if any(not 0 <= gpu < gpus for gpu in home):
        raise MMAccelError(f"homes must lie in 0 to {gpus - 1}, as there are {gpus} GPUs.")
    for values, what in ((arrivals, "arrivals"), ([session], "session"), (copies, "copy")):
        _times(values, what)
    return U, owner, home, copies
