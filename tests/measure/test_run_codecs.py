"""The codec benchmark: rows for every contestant, right frames told from wrong ones, requests that will not do."""

from __future__ import annotations

import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmaccel.errors import MMAccelError
from mmaccel.measure import load_scenario, read_rows, run_codecs, run_scenario
from mmaccel.measure.codec_clips import make_clip
from mmaccel.measure.codec_contest import Outcome

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "codecs"
CELL = {"name": "tiny", "codec": "h264", "rows": 96, "gop": 12, "made": 2, "seconds": 4, "frames": 5, "size": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("clips")


@pytest.fixture
def bench(tmp_path, folder):
    def run(scenario, progress=None, **options):
        chosen = {"cells": [CELL], "rounds": 2, "clips": str(folder), **options}
        return run_scenario(load_scenario(BENCHMARKS / f"{scenario}.toml"), tmp_path / "rows.jsonl", chosen, progress)

    return run


def test_decode(bench, tmp_path, monkeypatch):
    steps = []
    cells = [CELL, {**CELL, "name": "own size", "size": 0, "rounds": 1}, {**CELL, "name": "other"}]
    options = {"cells": cells, "only": ["tiny", "own size"], "contestants": ["pyav", "pyav-sequential"]}
    rows = bench("decode", lambda *step: steps.append(step), **options)
    assert rows == read_rows(tmp_path / "rows.jsonl")
    assert steps == [("clips", 1, 2), ("clips", 2, 2), ("tiny", 1, 2), ("tiny", 2, 2), ("own size", 1, 1)]
    names = ["mmaccel", "pyav", "pyav-sequential", "limit"]
    assert [(row["cell"], row["contestant"]) for row in rows] == [
        (cell, name) for cell in ("tiny", "own size") for name in names
    ]
    for row in rows:
        assert (row["benchmark"], row["mode"], row["total"], row["frames"]) == ("codecs/decode", "decode", 120, 5)
        assert (row["height"], row["width"]) == ((64, 113) if row["cell"] == "tiny" else (96, 170))
        assert row["repeats"] == row["seconds"]["n"] == row["cpu"]["n"] == (2 if row["cell"] == "tiny" else 1)
        assert {"machine", "versions", "time"} <= row.keys()
        assert row["missing"] is None
        assert row["version"]
        assert 0 < row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
        if row["contestant"] == "limit":
            assert row["exact"] is row["ratio"] is row["of_limit"] is row["growth"] is None
            assert row["limit"] == pytest.approx(row["seconds"]["median"] / row["cores"])
        else:
            assert row["exact"] is True
            assert row["of_limit"] == pytest.approx(row["limit"] / row["seconds"]["median"])
            assert row["decoded"] == 120 if row["contestant"] == "pyav-sequential" else 5 <= row["decoded"] <= 120
    assert all(row["ratio"]["median"] == 1 for row in rows if row["contestant"] == "mmaccel")
    monkeypatch.setattr(run_codecs, "_measure", None)  # nothing is measured twice
    assert bench("decode", **{**options, "only": ["tiny"]}) == rows[:4]


def test_who_takes_part(bench, monkeypatch):
    met = []

    def contest(crew, entries, job, rounds, progress):
        met.append((list(entries), job))
        return {name: Outcome(missing="not today") for name in entries}

    monkeypatch.setattr(run_codecs, "contest", contest)
    cells = [CELL, {**CELL, "name": "all", "everyone": True}, {**CELL, "name": "long", "seconds": 6, "everyone": True}]
    rows = bench("decode", cells=cells, contestants=["decord"], sequential_frames=120)
    everyone = ["pyav", "pyav-sequential", "decord", "opencv", "torchcodec", "torchcodec-1", "pynvvideocodec"]
    assert met[0][0] == ["mmaccel", "decord", "limit"]
    assert met[1][0] == ["mmaccel", *everyone, "limit"]
    assert set(met[1][0]) - set(met[2][0]) == {"pyav-sequential", "opencv"}
    assert met[0][1]["wanted"] == [0, 30, 60, 89, 119]
    assert met[2][1]["wanted"] == [0, 45, 90, 134, 179]
    reasons = {(row["cell"], row["contestant"]): row["missing"] for row in rows}
    assert reasons.pop(("long", "opencv")) == reasons.pop(("long", "pyav-sequential"))
    assert set(reasons.values()) == {"not today"}


def test_wrong_frames_and_ratios_by_round():
    def outcome(seconds, numbers):
        answers = [{"seconds": s, "cpu": 2 * s, "growth": 7, "decoded": 9, "numbers": [numbers]} for s in seconds]
        return Outcome(None, "1", answers[0], answers[1:])

    outcomes = {"mmaccel": outcome([9, 1, 2, 3], [0, 4]), "late": outcome([9, 4, 4, 4], [0, 5])}
    late = run_codecs._figures("late", outcomes, [[0, 4]], 0.5)
    assert late["exact"] is False
    assert late["ratio"]["median"] == 0.5
    assert late["of_limit"] == 0.125
    assert late["cpu"]["median"] == 8
    assert run_codecs._figures("mmaccel", outcomes, [[0, 4]], 0.5)["exact"] is True
    outcomes["late"] = outcome([9, 4, 4, 4], [0, 4])
    outcomes["late"].rounds[1] = {**outcomes["late"].rounds[1], "numbers": [[0, 5]]}
    assert run_codecs._figures("late", outcomes, [[0, 4]], 0.5)["exact"] is False  # wrong once is wrong
    outcomes["mmaccel"] = Outcome("no such codec")
    assert run_codecs._figures("late", outcomes, [[0, 4]], None)["ratio"] is None


def test_many(bench, folder):
    rows = bench("many", videos=3, rounds=1, contestants=["pyav-loop", "pyav-pool"])
    assert [row["contestant"] for row in rows] == ["mmaccel", "pyav-loop", "pyav-pool"]
    for row in rows:
        assert (row["videos"], row["mode"]) == (3, "many")
        assert row["missing"] is None
        assert row["exact"] is True
        assert row["decoded"] >= 15
    recipe = run_codecs._Cell(**CELL).recipe
    first, second = (make_clip(folder, recipe, 4, order) for order in range(2))
    assert first.path != second.path
    assert sorted(first.numbers) == sorted(second.numbers)
    assert (first.numbers != second.numbers).any()


@pytest.fixture
def simulation(monkeypatch):
    """A stand-in for the simulation: an equal share for each engine, and what it was asked."""
    asked = []

    def simulate(costs, engines, *, gpus):
        asked.append((costs, engines, gpus))
        return types.SimpleNamespace(makespan=sum(costs) / engines / gpus)

    monkeypatch.setattr(run_codecs, "simulate", simulate)
    return asked


def test_pool(bench, simulation):
    rows = bench("pool", thread_counts=[2], engines=[1, 7, 14])
    assert [row["contestant"] for row in rows] == ["mmaccel", "mmaccel-2", "limit", "engines", "engines", "engines"]
    assert [row["threads"] for row in rows[:3]] == [0, 2, 0]
    assert rows[0]["exact"]
    assert rows[1]["exact"]
    assert [(engines, gpus) for _, engines, gpus in simulation] == [(1, 1), (7, 1), (7, 2)]
    limit, engines = rows[2], rows[3:]
    # frames 0, 30, 60, 89 and 119 lie in five groups of 12
    assert [row["groups"] for row in engines] == [5, 5, 5]
    assert [row["makespan"] * row["engines"] for row in engines] == pytest.approx([engines[0]["alone"]] * 3)
    assert all(len(costs) == 5 and min(costs) > 0 for costs, _, _ in simulation)
    assert (engines[0]["longest"], engines[0]["alone"]) == (max(simulation[0][0]), sum(simulation[0][0]))
    assert limit["exact"] is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "encode"}, "mode is"),
        ({"only": ["huge"]}, "no cell is called huge"),
        ({"contestants": ["vlc"]}, "no contestant is called vlc"),
        ({"rounds": 0}, "at least 1"),
        ({"engines": [8]}, "multiple"),
        ({"peers_python": "no/python"}, "no such interpreter"),
        ({"patience": 0.0}, "at least 1"),
        ({"cells": [{**CELL, "colour": "red"}]}, "no field 'colour'"),
        ({"cells": [{**CELL, "gop": "all"}]}, "field gop of a cell is a int"),
        ({"cells": [{"name": "n", "codec": "h264"}]}, "lacks frames, gop, rows, seconds"),
        ({"cells": [CELL, CELL]}, "same name"),
        ({"cells": [{**CELL, "frames": 0}]}, "at least one frame"),
        ({"cells": [{**CELL, "frames": 121}]}, "wants 121 frames of 120"),
        ({"cells": [{**CELL, "seconds": 5}]}, "multiple"),
        ({"cells": [{**CELL, "codec": "mpeg1"}]}, "'mpeg1'"),
    ],
)
def test_requests_that_will_not_do(bench, tmp_path, wrong, message):
    with pytest.raises(MMAccelError, match=message):
        bench("decode", **wrong)
    assert not (tmp_path / "rows.jsonl").exists()


def test_places_do_not_change_the_key():
    options = run_codecs.CodecOptions(cells=(CELL,))
    (cell,) = run_codecs._cells(options)
    same = replace(options, clips="elsewhere", only=("tiny",))
    assert options.key(cell) == same.key(cell)
    assert options.key(cell) != replace(options, rounds=7).key(cell)
    assert options.key(cell) != options.key(replace(cell, frames=6))
    assert options.key(cell) != replace(options, peers_python="python").key(cell)


OURS = [path for path in sorted(BENCHMARKS.glob("*.toml")) if load_scenario(path).runner == "codecs"]


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_cells_of_the_repository(path):
    options = run_codecs.CodecOptions(**load_scenario(path).options)
    cells = run_codecs._cells(options)
    assert len({cell.recipe for cell in cells}) >= 1
    for cell in cells:
        assert cell.seconds % cell.made == 0
        assert cell.frames <= 30 * cell.seconds
        assert np.gcd(cell.seconds, 30) == 30
