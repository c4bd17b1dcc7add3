"""Tables and pictures of generation, from rows with known figures."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(FOLDER))
spec = importlib.util.spec_from_file_location("diffusion_tables", FOLDER / "diffusion_tables.py")
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)

COMMON = {
    "model": "text-to-video", "dtype": "float32", "steps": 40, "scheduler": "UniPC", "batch": 8, "seed": "all",
    "options": {"seeds": [0, 1]}, "machine": {"cpu": "Test CPU", "cores": 2, "threads": 1, "gpu": None},
    "versions": {"torch": "1", "transformers": "2", "mmaccel": "3"},
}  # fmt: skip


def interval(value, low=None, high=None):
    return {"value": value, "low": value if low is None else low, "high": value if high is None else high}


def setting(name, time, psnr, **more):
    return {
        **COMMON, "kind": "setting", "spec": name, "method": name.partition(":")[0], "missing": None, "time": time,
        "work": time, "latents": interval(0.02), "latents_median": 0.01, "psnr": interval(psnr), "clips": 16,
        "features": interval(0.001), "read_back": interval(0.87), "read_back_over_dense": interval(-0.01, -0.03, 0.01),
        "memory": {"growth": 1.2e8}, **more,
    }  # fmt: skip


def comparison(name, rival, latents, psnr, **more):
    rows = []
    for metric, over in (("latents", latents), ("psnr", psnr)):
        rows.append(
            {
                **COMMON, "kind": "comparison", "spec": name, "rival": rival, "metric": metric, "time": 0.5,
                "ours": 0.02, "theirs": 0.03, "between": ["a", "b"], "over": over, "fastest": None, **more,
            }
        )  # fmt: skip
    return rows


ROWS = [
    setting("dense", 1.0, 100.0),
    setting("hsa:runtime=0.5", 0.5, 50.0),
    setting("fewer-steps:keep=0.5", 0.49, 48.0),
    {**COMMON, "kind": "setting", "spec": "tomesd", "method": "tomesd", "missing": "does not fit."},
    *comparison("hsa:runtime=0.5", "pab", interval(-0.01, -0.02, -0.005), interval(2, 1, 3)),
    *comparison("hsa:runtime=0.35", "pab", interval(0.01, 0.005, 0.02), interval(-2, -3, 1)),
]


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_settings_by_falling_time_with_what_is_missing_below():
    text = tables.generation_quality(ROWS, False)
    names = [line[0] for line in cells(text) if line[0].startswith("`")]
    assert names[:3] == ["`dense`", "`hsa:runtime=0.5`", "`fewer-steps:keep=0.5` *"]
    assert "No `tomesd`: does not fit." in text
    line = next(line for line in cells(text) if line[0] == "`hsa:runtime=0.5`")
    assert line[1:] == [
        "50.0 %", "50.0 %", "0.0200", "0.0100", "50.0 dB", "0.0010", "87.0 %", "-1.0 [-3.0, 1.0]", "120 MB"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "verdict"), [("hsa:runtime=0.5", "ours / ours"), ("hsa:runtime=0.35", "rival / open")]
)
def test_who_is_nearer_is_read_off_the_intervals(name, verdict):
    lines = [line for line in cells(tables.equal_time(ROWS, True)) if line[0] == f"`{name}`"]
    assert [line[-1] for line in lines] == [verdict]


def test_the_short_table_holds_halves_and_quarters():
    text = tables.equal_time(ROWS, False)
    assert "hsa:runtime=0.5" in text
    assert "hsa:runtime=0.35" not in text


def test_a_rival_that_cannot_be_as_fast_is_told():
    fastest = {"spec": "pab:every=9", "time": 0.4, "value": 0.3}
    rows = comparison("hsa:runtime=0.25", "pab", None, None, fastest=fastest, theirs=None, between=None)
    assert "not that fast: `pab:every=9` takes 40.0 %" in tables.equal_time(rows, False)


def test_speed_rows():
    base = {**COMMON, "key": "k", "device": "cpu", "model": "wan", "repeats": 2, "guided": False,
            "layers": {"num_layers": 3}, "layers_total": {"num_layers": 30}, "size": {"height": 160, "width": 128},
            "memory": {"growth": 5e7, "method": "rss high-water mark"}, "missing": None}  # fmt: skip
    rows = [
        {**base, "spec": "dense", "work": 1.0, "transformer": {"median": 12.0},
         "transformer_ratio": {"median": 1.0}, "time_ratio": {"median": 1.0}},
        {**base, "spec": "hsa:runtime=0.5", "work": 0.49, "transformer": {"median": 6.0},
         "transformer_ratio": {"median": 0.5}, "time_ratio": {"median": 0.51}},
        {**base, "spec": "seacache", "missing": "does not fit."},
    ]  # fmt: skip
    text = tables.generation_speed(rows, False)
    dense, fast = cells(text)[2:]
    assert dense == ["wan, 3 of 30 layers, 160 x 128", "`dense`", "12.00 s", "", "", "50 MB"]
    assert fast[2:] == ["50.0 %", "51.0 %", "49.0 %", "50 MB"]
    assert "wan, no `seacache`: does not fit." in text


def test_the_plots(tmp_path):
    paths = tables.plot_generation(ROWS, tmp_path / "video")
    assert [path.name for path in paths] == ["video_psnr.png", "video_read_back.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in paths)
