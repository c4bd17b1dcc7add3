"""mmaccel bench: names, a small run, and requests that will not do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mmaccel

FOLDER = Path(mmaccel.__file__).parents[1] / "benchmarks"
NAMES = sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.glob("*/*.toml"))


def test_lists_the_scenarios(document, cli):
    assert sorted(document("bench")["scenarios"]) == NAMES
    code, out, _ = cli("bench")
    assert code == 0
    assert [line.partition(":")[0] for line in out.splitlines()] == NAMES


def test_runs_one_with_other_options(document, tmp_path):
    out = tmp_path / "rows.jsonl"
    found = document(
        "bench", "video_lm/quality", "--out", out, "--set", "clips=2", "--set", "seeds=[0]", "--set", "keeps=[0.25]",
        "--set", 'methods=["uniform"]', "--set", "source=render", "--set", "workers=1", "--set", "questions=1",
    )  # fmt: skip
    assert found["scenario"] == "video_lm/quality"
    assert found["out"] == str(out)
    assert found["rows"] == [json.loads(line) for line in out.read_text().splitlines()]
    assert "uniform:keep=0.25" in {row["spec"] for row in found["rows"]}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["video_lm/nothing"], "video_lm/quality"),
        (["video_lm/quality", "--set", "clips"], "option=value"),
        (["video_lm/quality", "--set", "clip=3"], "clip"),
        (["video_lm/quality", "--set", "clips=many"], "write a number"),
        (["video_lm/quality", "--set", "clips=1.5"], "must be int"),
    ],
)
def test_requests_that_will_not_do(refused, tmp_path, words, reason):
    assert reason in refused(1, "bench", *words, "--out", tmp_path / "rows.jsonl")
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.parametrize("place", ["folder", "file/rows.jsonl", "locked.jsonl"])
def test_rows_without_a_place_are_found_out_first(refused, monkeypatch, tmp_path, place):
    import mmaccel.measure

    def work(*_):
        pytest.fail("the work began")

    monkeypatch.setattr(mmaccel.measure, "run_scenario", work)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    locked = tmp_path / "locked.jsonl"
    locked.symlink_to(tmp_path / "nowhere" / "rows.jsonl")
    line = refused(1, "bench", "video_lm/quality", "--out", tmp_path / place)
    assert f"{tmp_path / place} cannot be written" in line
    assert "--out" in line


def test_rows_that_are_there_already_stay(document, monkeypatch, tmp_path):
    import mmaccel.measure

    monkeypatch.setattr(mmaccel.measure, "run_scenario", lambda *_: [])
    out = tmp_path / "rows.jsonl"
    out.write_text("{}\n")
    document("bench", "video_lm/quality", "--out", out)
    assert out.read_text() == "{}\n"
    document("bench", "video_lm/quality", "--out", tmp_path / "new" / "rows.jsonl")
    assert not (tmp_path / "new" / "rows.jsonl").exists()


def test_without_a_checkout(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(mmaccel, "__file__", str(tmp_path / "site-packages" / "mmaccel" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    assert "checkout" in refused(1, "bench")
