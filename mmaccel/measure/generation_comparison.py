"""Methods at the same measured time: a setting of ours against each rival's curve, read between its settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mmaccel.measure.generation_settings import method_name
from mmaccel.measure.pareto import Point, frontier
from mmaccel.measure.quality import bootstrap_difference
from mmaccel.measure.stages import DENSE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["compared", "pareto"]

Values = dict[str, list[float]]


def pareto(times: Mapping[str, float], errors: Mapping[str, float]) -> list[str]:
    """The settings that no other one beats in both time and mean error, by rising time; both are to be small."""
    return [point.method for point in frontier([Point(spec, times[spec], -errors[spec]) for spec in times])]


def compared(
    times: Mapping[str, float], values: Mapping[str, Values], ours: Sequence[str], *, samples: int = 10_000
) -> list[dict[str, Any]]:
    """Rows of comparisons of every setting of `ours` (method names) with every other method, in latents and PSNR.

    times: of each setting, a share of dense. values: of each setting, distances of the latents and PSNR, clip by clip.
    A rival at a time that it was not run at is its two settings beside that time, mixed clip by clip: of distances the
    geometric mean, which is never above what running each a share of the time would give; of PSNR the mean. Dense is
    the last setting of every rival, mixed with it by the arithmetic mean of distances. "over" is ours less the
    rival's, with its interval; None where the rival cannot be as fast, and "fastest" then says what it can.
    """
    rivals: dict[str, list[str]] = {}
    for spec in times:
        if spec != DENSE and method_name(spec) not in ours:
            rivals.setdefault(method_name(spec), []).append(spec)
    return [
        _against(spec, rival, settings, kind, times, values, samples)
        for spec in times
        if method_name(spec) in ours
        for rival, settings in rivals.items()
        for kind in ("latents", "psnr")
    ]


def _against(
    spec: str, rival: str, settings: Sequence[str], kind: str, times: Mapping[str, float],
    values: Mapping[str, Values], samples: int,
) -> dict[str, Any]:  # fmt: skip
    sign = 1.0 if kind == "latents" else -1.0
    chosen = [*settings, DENSE]
    mean = {name: sign * float(np.mean(values[name][kind])) for name in chosen}
    curve = pareto({name: times[name] for name in chosen}, mean)
    own = np.asarray(values[spec][kind])
    row = {
        "spec": spec, "rival": rival, "metric": kind, "time": times[spec], "ours": float(own.mean()),
        "theirs": None, "between": None, "over": None, "fastest": None,
    }  # fmt: skip
    if times[spec] < times[curve[0]]:
        fastest = curve[0]
        row["fastest"] = {"spec": fastest, "time": times[fastest], "value": float(np.mean(values[fastest][kind]))}
    else:
        above = next((place for place, name in enumerate(curve) if times[name] > times[spec]), None)
        if above is None:  # only dense itself takes the time of dense
            beside, theirs = [curve[-1]], np.asarray(values[curve[-1]][kind])
        else:
            beside = curve[above - 1 : above + 1]
            low, high = beside
            share = (times[spec] - times[low]) / (times[high] - times[low])
            theirs = _mixed(kind, np.asarray(values[low][kind]), np.asarray(values[high][kind]), share)
        row |= {"theirs": float(theirs.mean()), "between": beside}
        row["over"] = bootstrap_difference(own, theirs, samples=samples).as_dict()
    return row


def _mixed(kind: str, cheap: np.ndarray, dear: np.ndarray, share: float) -> np.ndarray:
    if kind == "latents" and cheap.all() and dear.all():
        return cheap ** (1 - share) * dear**share
    return (1 - share) * cheap + share * dear
