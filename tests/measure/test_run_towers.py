"""The runners of vision encoders by themselves and of streams, on small models."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers

from mmaccel.errors import MMAccelError, NotApplicableError
from mmaccel.measure import Scenario, run_scenario
from mmaccel.measure.run_streaming import slope
from mmaccel.tiny.families import real_towers

OPTIONS = {"towers": ["siglip-so400m-384"], "specs": ["stc:interval=none", "tome:keep=0.5"], "frames": 3, "repeats": 2}


@pytest.fixture
def small(monkeypatch):
    width = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    size = {"image_size": 48, "patch_size": 8, "vision_use_head": False}
    monkeypatch.setitem(real_towers._CONFIGS, "siglip-so400m-384", ("Siglip", {**width, **size}))


def test_rows_of_a_stream_have_the_cost_of_each_call(small, tmp_path):
    scenario = Scenario("encoders/x", "t", "towers", {**OPTIONS, "specs": ["stc:interval=none"], "chunk": 1})
    rows = run_scenario(scenario, tmp_path / "rows.jsonl")
    dense, stc = rows
    N, C, inner, renewed = 36, 32, 64, 9
    patches = 2 * N * C * 3 * 8 * 8
    whole = 2 * N * (4 * C * C + 2 * C * inner) + 4 * N * N * C
    reusing = 2 * N * C * C + 2 * renewed * (3 * C * C + 2 * C * inner) + 4 * renewed * N * C
    assert dense["flops"] == 3 * (patches + 2 * whole)
    assert [call["flops_ratio"] for call in stc["calls"]] == pytest.approx(
        [1.0, *[(patches + 2 * reusing) / (patches + 2 * whole)] * 2]
    )
    assert stc["events"]["stc frames reusing another"] == 2
    assert dense["difference"] == 0 < stc["difference"] < 1
    assert all(row["seconds"]["n"] == 2 and row["ratio"]["median"] > 0 for row in rows)
    assert json.loads(json.dumps(rows)) == rows


def test_all_frames_in_one_call(small, tmp_path):
    out = tmp_path / "rows.jsonl"
    rows = run_scenario(Scenario("encoders/x", "t", "towers", OPTIONS), out)
    assert [len(row["calls"]) for row in rows] == [1, 1, 1]
    assert rows[2]["flops"] < rows[0]["flops"]
    assert run_scenario(Scenario("encoders/x", "t", "towers", OPTIONS), out) == rows  # nothing runs again


@pytest.mark.parametrize("wrong", [{"towers": ["what"]}, {"clips": ["what"]}, {"layers": 99}, {"repeats": 0}])
def test_options_out_of_range(small, tmp_path, wrong):
    with pytest.raises(MMAccelError):
        run_scenario(Scenario("encoders/x", "t", "towers", {**OPTIONS, **wrong}), tmp_path / "rows.jsonl")


@pytest.mark.parametrize("kind", real_towers.CLIPS)
def test_clips_are_what_they_are_called(kind):
    clip = real_towers.tower_clip(kind, "clip-large-336", 4)
    assert clip.shape == (4, 3, 336, 336)
    assert torch.equal(clip, real_towers.tower_clip(kind, "clip-large-336", 4))
    change = (clip[1:] - clip[:-1]).abs()
    if kind == "still":
        assert 0.9 < float((change < 0.06).float().mean()) < 1.0
    elif kind == "pan":
        assert torch.equal(clip[1, :, :, :-6], clip[0, :, :, 6:])
    else:
        assert float(change.mean()) > 0.3
    with pytest.raises(NotApplicableError):
        real_towers.tower_clip("what", "clip-large-336", 4)


def test_towers_are_those_of_their_libraries():
    model = real_towers.build_tower("clip-large-336", 1, torch.bfloat16)
    assert isinstance(model, transformers.CLIPVisionModel)
    assert model.config.hidden_size == 1024
    timm_model = real_towers.build_tower("vit-base-384", 2)
    assert len(timm_model.blocks) == 2
    assert timm_model(torch.zeros(1, 3, 384, 384)).shape == (1, 768)


def test_a_slope_is_that_of_the_line_and_its_interval_holds_it():
    noise = np.random.default_rng(0).normal(size=1000)
    flat, rising = slope(noise), slope(noise + 0.01 * np.arange(1000))
    assert flat.low < 0 < flat.high
    assert rising.low < 0.01 < rising.high
    assert rising.low > 0
    assert slope(3 * np.arange(100.0)).value == pytest.approx(3)
    assert flat.value == pytest.approx(np.polyfit(np.arange(1000), noise, 1)[0])
    with pytest.raises(MMAccelError, match="at least 40"):
        slope(noise[:39])


def test_rows_of_a_stream(tmp_path):
    options = {"specs": ["stc:keep=0.25"], "modes": ["rotate"], "frames": 60, "settle": 20, "max_tokens": 128}
    (row,) = run_scenario(Scenario("encoders/y", "t", "streaming", options), tmp_path / "rows.jsonl")
    assert row["stats"]["frames"] == 60
    assert row["stats"]["held"] <= 128
    assert row["stats"]["evictions"] > 0
    assert row["push"]["median"] <= row["push"]["p99"] <= row["push"]["max"]
    assert row["memory"]["most"] > 1e8
    assert [point["frame"] for point in row["curve"]] == sorted({point["frame"] for point in row["curve"]})
    with pytest.raises(MMAccelError, match="more than settle"):
        run_scenario(Scenario("encoders/y", "t", "streaming", {**options, "settle": 40}), tmp_path / "rows.jsonl")
