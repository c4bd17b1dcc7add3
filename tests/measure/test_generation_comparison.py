"""Comparisons at the same time, against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mmaccel.measure.generation_comparison import compared, pareto

TIMES = {"dense": 1.0, "hsa:runtime=0.5": 0.5, "pab:every=2": 0.8, "pab:every=4": 0.4, "pab:every=3": 0.9}
VALUES = {
    "dense": {"latents": [0.0, 0.0], "psnr": [100.0, 100.0]},
    "hsa:runtime=0.5": {"latents": [0.1, 0.2], "psnr": [40.0, 30.0]},
    "pab:every=2": {"latents": [0.1, 0.1], "psnr": [38.0, 38.0]},
    "pab:every=4": {"latents": [0.4, 0.9], "psnr": [20.0, 10.0]},
    # slower than every=2 and worse: no part of the curve
    "pab:every=3": {"latents": [0.3, 0.3], "psnr": [30.0, 30.0]},
}


def by_metric(rows):
    return {row["metric"]: row for row in rows}


def test_a_rival_is_read_between_its_two_best_settings_beside_that_time():
    rows = by_metric(compared(TIMES, VALUES, ["hsa"], samples=200))
    assert set(rows) == {"latents", "psnr"}
    latents, psnr = rows["latents"], rows["psnr"]
    assert latents["between"] == psnr["between"] == ["pab:every=4", "pab:every=2"]
    # a quarter of the way from 0.4 to 0.8
    theirs = np.mean([0.4**0.75 * 0.1**0.25, 0.9**0.75 * 0.1**0.25])
    assert latents["theirs"] == pytest.approx(theirs)
    assert latents["over"]["value"] == pytest.approx(0.15 - theirs)
    assert psnr["theirs"] == pytest.approx(np.mean([0.75 * 20 + 0.25 * 38, 0.75 * 10 + 0.25 * 38]))
    assert psnr["over"]["value"] == pytest.approx(35 - psnr["theirs"])


def test_behind_its_dearest_setting_a_rival_is_mixed_with_dense():
    rows = by_metric(compared(TIMES | {"hsa:runtime=0.5": 0.95}, VALUES, ["hsa"], samples=200))
    assert rows["latents"]["between"] == ["pab:every=2", "dense"]
    assert rows["latents"]["theirs"] == pytest.approx(0.1 * 0.25)


def test_a_rival_that_cannot_be_as_fast_is_said_to():
    rows = by_metric(compared(TIMES | {"hsa:runtime=0.5": 0.3}, VALUES, ["hsa"], samples=200))
    assert rows["latents"]["over"] is None
    assert rows["latents"]["theirs"] is None
    assert rows["latents"]["fastest"] == {"spec": "pab:every=4", "time": 0.4, "value": pytest.approx(0.65)}


def test_at_the_time_of_dense_a_rival_is_dense():
    rows = by_metric(compared(TIMES | {"hsa:runtime=0.5": 1.2}, VALUES, ["hsa"], samples=200))
    assert rows["latents"]["theirs"] == 0
    assert rows["psnr"]["theirs"] == 100


def test_the_front_holds_what_nothing_beats():
    times = {"a": 0.3, "b": 0.3, "c": 0.5, "d": 0.6, "e": 0.7}
    errors = {"a": 0.5, "b": 0.4, "c": 0.4, "d": 0.1, "e": 0.2}
    assert pareto(times, errors) == ["b", "d"]
