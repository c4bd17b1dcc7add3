"""Scenarios: read strictly, run resumably, results as rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmaccel.errors import MMAccelError
from mmaccel.measure import append_rows, load_scenario, options_of, read_rows, run_quality, run_scenario, run_speed
from mmaccel.measure.outcome import unpack
from mmaccel.measure.run_quality import QualityOptions
from mmaccel.measure.run_speed import SpeedOptions
from mmaccel.tiny import families

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = {
    "methods": ["holitom", "random"], "keeps": [0.15], "overrides": [], "clips": 3, "batch": 2, "seeds": [0, 1],
    "questions": 2, "samples": 100, "workers": 1, "source": "render",
}  # fmt: skip


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*/*.toml")), ids=lambda path: path.stem)
def test_scenarios_of_the_repository(path):
    scenario = load_scenario(path)
    assert scenario.name == path.relative_to(BENCHMARKS).with_suffix("").as_posix()
    options = options_of(scenario)
    assert {name: options[name] for name in scenario.options} == {
        name: tuple(value) if isinstance(value, list) else value for name, value in scenario.options.items()
    }


HEAD = 'name = "n"\ntitle = "t"\nrunner = "quality"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "TOML"),
        ('name = "n"', "missing: runner, title"),
        (HEAD + "seed = 1", "unknown: seed"),
        (HEAD.replace("quality", "art"), "no benchmark runner"),
        (HEAD + "[options]", "needs the options methods"),
        (HEAD + '[options]\nmethods = ["evs"]\nclip = 3', "no option clip"),
        (HEAD + '[options]\nmethods = ["evs"]\nclips = "many"', "clips"),
        (HEAD + '[options]\nmethods = ["evs"]\nclips = 2.5', "must be int"),
        (HEAD + '[options]\nmethods = ["evs"]\nclips = true', "must be int"),
        (HEAD + "[options]\nmethods = [3]", "must be str"),
    ],
)
def test_wrong_scenarios(tmp_path, text, message):
    with pytest.raises(MMAccelError, match=message):
        load_scenario(write(tmp_path / "s.toml", text))


def test_missing_file(tmp_path):
    with pytest.raises(MMAccelError, match="cannot be read"):
        load_scenario(tmp_path / "none.toml")


def test_overrides_may_be_text(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(run_quality, "run", lambda name, options, out, progress: seen.append(options) or [])
    scenario = load_scenario(write(tmp_path / "s.toml", HEAD + '[options]\nmethods = ["evs"]'))
    run_scenario(
        scenario, tmp_path / "x", {"keeps": "[1, 0.5]", "clips": "7", "source": "h264", "methods": '["holitom"]'}
    )
    assert seen == [QualityOptions(methods=("holitom",), keeps=(1.0, 0.5), clips=7, source="h264")]


@pytest.fixture
def quality():
    return load_scenario(BENCHMARKS / "video_lm" / "quality.toml")


def test_quality_rows(quality, tmp_path):
    out, progress = tmp_path / "q.jsonl", []
    rows = run_scenario(quality, out, SMALL, lambda *step: progress.append(step))
    assert rows == read_rows(out)
    assert not list(tmp_path.glob("*.part"))
    assert progress == [("video_lm/quality", done, 4) for done in range(5)]
    assert [(row["seed"], row["spec"]) for row in rows] == [
        (seed, spec) for seed in (0, 1, "all") for spec in ("dense", "holitom:keep=0.15", "random:keep=0.15")
    ]
    for row in rows:
        assert row["weights"] == "trained"
        assert row["model"] == "embedded video-QA model"
        assert row["machine"]["threads"] == 1
        assert (row["n"], row["clips"]) == ((12, 6) if row["seed"] == "all" else (6, 3))
        if row["seed"] != "all":
            assert unpack(row["hits"], row["n"]).mean() == row["accuracy"]["value"]
    assert rows[0]["questions_per_clip"] == [2, 2, 2]
    assert rows[1]["over_random"]["n"] == 6
    assert rows[2]["over_random"] is None
    pooled = (rows[0]["accuracy"]["value"] + rows[3]["accuracy"]["value"]) / 2
    assert rows[6]["accuracy"]["value"] == pytest.approx(pooled)
    assert run_scenario(quality, out, SMALL) == rows
    with pytest.raises(MMAccelError, match="other options"):
        run_scenario(quality, out, {**SMALL, "clips": 2})


def test_an_interrupted_run_goes_on(quality, tmp_path, monkeypatch):
    out, real = tmp_path / "q.jsonl", run_quality._evaluate
    done = []

    def stop_after_two(job):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(job[1:])
        return real(job)

    monkeypatch.setattr(run_quality, "_evaluate", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        run_scenario(quality, out, SMALL)
    assert read_rows(out) == []
    assert len(read_rows(tmp_path / "q.jsonl.part")) == 2
    rest = []
    monkeypatch.setattr(run_quality, "_evaluate", lambda job: rest.append(job[1:]) or real(job))
    rows = run_scenario(quality, out, SMALL)
    assert sorted(done + rest) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    monkeypatch.undo()
    whole = run_scenario(quality, tmp_path / "other.jsonl", SMALL)
    figures = ("spec", "accuracy", "agreement", "tokens_per_layer")
    assert [[row[name] for name in figures] for row in rows] == [[row[name] for name in figures] for row in whole]


def test_files_and_frames_show_the_same_clip():
    drawn = run_quality._case(QualityOptions(methods=(), source="render"), 5)
    read = run_quality._case(QualityOptions(methods=(), source="h264"), 5)
    assert drawn.questions == read.questions
    assert read.frames.shape == drawn.frames.shape
    error = abs(read.frames.astype(int) - drawn.frames.astype(int)).mean()
    assert 0 < error < 8


def test_which_questions_are_asked_goes_round():
    kinds = [q[2] for n in range(40) for q in run_quality._case(QualityOptions(methods=(), questions=1), n).questions]
    assert len(kinds) == 40
    assert set(kinds) == {"color", "shape", "direction", "count", "order", "last"}


def test_seeds_are_no_part_of_a_name():
    named = QualityOptions(methods=("random", "fewer-frames:positions=original"), keeps=(0.25, 0.1)).specs(4)
    assert named == {
        "random:keep=0.25": "random:keep=0.25;seed=4",
        "random:keep=0.1": "random:keep=0.1;seed=4",
        "fewer-frames:positions=original;keep=0.25": "fewer-frames:positions=original;keep=0.25",
        "fewer-frames:positions=original;keep=0.1": "fewer-frames:positions=original;keep=0.1",
    }


def test_an_override_takes_the_place_of_its_method_at_its_keep(quality, tmp_path):
    options = QualityOptions(
        methods=("holitom", "random"), keeps=(0.25, 0.1), overrides=("holitom:tau=0.65;keep=0.10", "random:keep=0.25")
    )
    assert options.specs(1) == {
        "holitom:keep=0.25": "holitom:keep=0.25",
        "holitom:tau=0.65;keep=0.10": "holitom:tau=0.65;keep=0.10",
        "random:keep=0.25": "random:keep=0.25;seed=1",
        "random:keep=0.1": "random:keep=0.1;seed=1",
    }
    assert list(QualityOptions(methods=("evs",), keeps=(0.1,), overrides=options.overrides).specs(0)) == [
        "evs:keep=0.1"
    ]
    with pytest.raises(MMAccelError, match="no method"):
        run_scenario(quality, tmp_path / "q.jsonl", {**SMALL, "overrides": ["nothing:keep=0.15"]})
    small = {**SMALL, "clips": 1, "seeds": [0], "overrides": ["holitom:keep=0.15;tau=0.65"]}
    _, holitom, *_ = run_scenario(quality, tmp_path / "q.jsonl", small)
    assert holitom["spec"] == "holitom:keep=0.15;tau=0.65"
    assert holitom["over_random"]["n"] == 2  # compared with Random at its keep, whatever its other knobs


def test_the_quality_scenario_takes_the_papers_threshold_at_a_tenth(quality):
    specs = QualityOptions(**{k: tuple(v) if isinstance(v, list) else v for k, v in quality.options.items()}).specs(0)
    assert [spec for spec in specs if spec.startswith("holitom")] == [
        "holitom:keep=0.25", "holitom:keep=0.15", "holitom:keep=0.1;tau=0.65",
    ]  # fmt: skip


def test_every_clip_has_a_seed_that_no_batch_changes(quality, tmp_path):
    few = {**SMALL, "methods": ["random"], "keeps": [0.05], "seeds": [1]}
    rows = [run_scenario(quality, tmp_path / f"{batch}.jsonl", {**few, "batch": batch}) for batch in (1, 3)]
    for one, other in zip(*rows, strict=True):
        assert one["kl"] == pytest.approx(other["kl"], abs=1e-6)


@pytest.mark.parametrize(
    "wrong", [{"split": "none"}, {"source": "gif"}, {"clips": 0}, {"clips": 10**7}, {"workers": 0}]
)
def test_quality_options_out_of_range(quality, tmp_path, wrong):
    with pytest.raises(MMAccelError):
        run_scenario(quality, tmp_path / "q.jsonl", {**SMALL, **wrong})


def test_speed_rows(tmp_path, monkeypatch):
    scenario, out = load_scenario(BENCHMARKS / "video_lm" / "speed.toml"), tmp_path / "s.jsonl"
    small = {
        "models": ["llava-onevision-0.5b"], "frames": [2], "specs": ["fastv:keep=0.25;layer=1"], "layers": 2,
        "vision_layers": 1, "repeats": 2, "new_tokens": 2, "device": "cpu",
    }  # fmt: skip
    progress = []
    rows = run_scenario(scenario, out, small, lambda *step: progress.append(step))
    assert rows == read_rows(out)
    assert progress[-1] == ("llava-onevision-0.5b, 2 frames", 6, 6)
    dense, fastv = rows
    assert (dense["spec"], fastv["spec"]) == ("dense", "fastv:keep=0.25;layer=1")
    assert all(row["weights"] == "random" and row["shortened"] and row["attention"] == "sdpa" for row in rows)
    assert (dense["layers"], dense["vision_layers"], dense["dtype"]) == (2, 1, "bfloat16")
    assert dense["tokens_per_layer"] == [429, 429]  # 14 + 22 words, 2 x 196 cells and a newline
    assert fastv["tokens_per_layer"] == [429, 429 - 392 + 98]
    assert dense["ttft_ratio"] == 1
    assert dense["overhead_of_dense"] == 0 < fastv["overhead_of_dense"]
    assert fastv["ttft_ratio"] == fastv["ttft"]["total"]["median"] / dense["ttft"]["total"]["median"]
    assert fastv["flops_counted"]["prefill"] - fastv["flops_counted"]["overhead"] == fastv["flops_prefill"]
    d, m = 896, 4864
    assert fastv["paper_macs"] == sum(4 * n * d * d + 2 * n * n * d + 2 * n * d * m for n in (393, 99))
    assert dense["memory"]["growth"] > 0
    assert dense["time_per_output_token"]["n"] == 2
    assert (dense["layers_total"], dense["vision_layers_total"]) == (24, 26)
    assert {"load", "load_after"} <= dense["machine"].keys()
    expected = options_of(scenario) | small
    assert {name: expected[name] for name in small} == {name: dense["options"][name] for name in small}
    assert dense["options"].keys() == options_of(scenario).keys()
    assert dense["shapes"]["pixel_values_videos"] == [1, 2, 3, 384, 384]
    monkeypatch.setattr(run_speed, "_group", None)  # nothing is measured twice
    assert run_scenario(scenario, out, small) == rows


def test_the_place_is_a_part_of_the_key_of_a_speed_run(monkeypatch):
    options = SpeedOptions(models=("m",), frames=(8,), specs=())
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    keys = [options.key("m", 8, cpu)]
    for name in ("GPU A", "GPU B"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device, name=name: name)
        keys.append(options.key("m", 8, gpu))
    assert options.key("m", 8, cpu) == keys[0]
    monkeypatch.setattr(run_speed, "cpu_name", lambda: "another")
    keys.append(options.key("m", 8, cpu))
    assert len(set(keys)) == 4


def test_rows_of_another_place_are_not_taken_for_those_of_this_one(tmp_path, monkeypatch):
    scenario, out = load_scenario(BENCHMARKS / "video_lm" / "speed.toml"), tmp_path / "s.jsonl"
    options = SpeedOptions(models=("llava-onevision-0.5b",), frames=(2,), specs=())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "GPU")
    append_rows(
        out, [{"benchmark": scenario.name, "key": options.key("llava-onevision-0.5b", 2, torch.device("cuda"))}]
    )
    small = {"models": ["llava-onevision-0.5b"], "frames": [2], "specs": [], "vision_layers": 0, "repeats": 5}
    assert run_scenario(scenario, out, small) == read_rows(out)
    monkeypatch.undo()
    ran = []
    monkeypatch.setattr(run_speed, "_group", lambda *_: ran.append(1) or [])
    monkeypatch.setattr(families, "build_real", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_scenario(scenario, out, small) == []
    assert ran == [1]


@pytest.mark.parametrize("wrong", [{"dtype": "float7"}, {"repeats": 0}, {"models": ["gpt"]}])
def test_speed_options_out_of_range(tmp_path, wrong):
    scenario = load_scenario(BENCHMARKS / "video_lm" / "speed.toml")
    with pytest.raises(MMAccelError):
        run_scenario(scenario, tmp_path / "s.jsonl", wrong)
