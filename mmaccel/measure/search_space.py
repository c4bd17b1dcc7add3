"""Which settings of each method calibration tries: ladders of settings, in order of the work that they do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from mmaccel.method import Method

__all__ = ["Ladder", "first_fitting", "ladders"]

_THRESHOLDS = tuple(float(f"{0.001 * 1.1**rung:.3g}") for rung in range(130))


@dataclass(frozen=True)
class Ladder:
    """Settings of one method, those that do most work first. start: where the search begins."""

    settings: tuple[Method, ...]
    start: int = 0


def first_fitting(count: int, start: int, over: Callable[[int], bool], enough: Callable[[int], bool]) -> None:
    """Look for the first of `count` rungs that is not `over` the budget: gallop from `start`, then halve.

    `over` must be true up to some rung and false behind it; it is asked once a rung. `enough` ends the search at a rung
    within the budget that leaves too little of it to look further.
    """
    low, high, stride, at = -1, count, 1, start
    while high - low > 1:
        if over(at):
            low = at
        else:
            high = at
            if enough(at):
                return
        if high == count:
            at = min(low + stride, count - 1)
        elif low == -1:
            at = max(high - stride, 0)
        else:
            at = (low + high) // 2
        stride *= 2


def ladders(cls: Any, runtime: float, steps: int, ratios: Callable[[], tuple[float, ...]]) -> list[Ladder]:
    """The ladders of a method for a share `runtime` of the work in `steps` steps.

    Methods with a knob called runtime, cost, keep, threshold, ratio, interval or every need no entry here, and one with
    none of these is tried as it is. `ratios` measures what MagCache needs.
    """
    name = cls.info.name
    if name == "hsa":
        return [
            _shares(cls(order=order, staggered=turns), "runtime", runtime)
            for order in (1, 0)
            for turns in (False, True)
        ]
    if name == "fewer-steps":
        settings = tuple(cls(keep=_short(count, steps)) for count in range(steps, 0, -1))
        return [Ladder(settings, steps - max(1, math.floor(runtime * steps + 1e-9)))]
    if name == "taylorseer":
        return [
            _intervals(cls, order, warmup, runtime, steps) for order in (1, 2, 0) for warmup in _warmups(runtime, steps)
        ]
    if name == "pab":
        return list(_broadcasts(cls))
    if name == "magcache":
        return list(_magnitudes(cls, runtime, ratios()))
    if name == "seacache":
        skips = max(2, math.ceil(1 / runtime))
        return [_thresholds(cls(order=order, max_skip=skips)) for order in (1, 0)]
    return [_by_knob(cls, runtime)]


def _short(count: int, steps: int) -> float:
    """The shortest number that is rounded to `count` of `steps`."""
    return next(
        keep for digits in range(1, 17) if round((keep := round(count / steps, digits)) * steps) == count and keep > 0
    )


def _by_knob(cls: Any, runtime: float) -> Ladder:
    known = {entry.name for entry in fields(cls)}
    for share in ("runtime", "cost", "keep"):
        if share in known:
            return _shares(cls(), share, runtime)
    if "threshold" in known:
        return _thresholds(cls())
    if "ratio" in known:
        return Ladder(_with(cls(), "ratio", (rung / 20 for rung in range(20))), round(19 * (1 - runtime)))
    for turn in ("interval", "every"):
        if turn in known:
            return Ladder(_with(cls(), turn, range(2, 10)), 7)
    return Ladder((cls(),))


def _with(method: Method, knob: str, values: Iterable[Any]) -> tuple[Method, ...]:
    return tuple(replace(method, **{knob: value}) for value in values)


def _shares(method: Method, knob: str, runtime: float) -> Ladder:
    # such a knob counts tokens or blocks, and work is more or less than that: less where the prompt is computed once,
    # more where much is computed at every step
    below = tuple(runtime * (1 - less) for less in (0, *(0.005 * 1.4**rung for rung in range(14))))
    above = tuple(1 - (1 - runtime) * 0.94**rung for rung in range(20, 0, -1)) if runtime < 1 else ()
    return Ladder(_with(method, knob, (round(value, 4) for value in above + below)), len(above))


def _thresholds(method: Any) -> Ladder:
    start = next(
        rung for rung, value in enumerate(_THRESHOLDS) if value >= method.threshold or value == _THRESHOLDS[-1]
    )
    return Ladder(_with(method, "threshold", _THRESHOLDS), start)


def _warmups(runtime: float, steps: int) -> tuple[int, ...]:
    return (3,) if runtime * steps >= 8 else (3, 1)


def _intervals(cls: Any, order: int, warmup: int, runtime: float, steps: int) -> Ladder:
    settings = _with(cls(order=order, warmup=warmup), "interval", range(1, steps + 1))
    rest = runtime * steps - warmup
    return Ladder(settings, min(steps, math.ceil((steps - warmup) / rest)) - 1 if rest > 0 else steps - 1)


def _broadcasts(cls: Any) -> Iterable[Ladder]:
    # where guidance is a call of its own even ranges mix its branches up, and odd ones do not
    for ranges in (range(2, 10), range(3, 10, 2)):
        yield Ladder(_with(cls(), "every", ranges), len(ranges) - 1)
        wide = (cls(start=0, stop=1000, every=every, cross_every=every) for every in ranges)
        yield Ladder(tuple(wide), len(ranges) - 1)


def _magnitudes(cls: Any, runtime: float, ratios: tuple[float, ...]) -> Iterable[Ladder]:
    for warmup in (0.2, 0.1) if runtime > 0.2 else (0.1, runtime / 4):
        room = runtime - warmup
        skips = max(3, math.ceil((1 - warmup) / room)) if room > 0 else len(ratios)
        yield _thresholds(cls(warmup=warmup, max_skip=skips, ratios=ratios))
