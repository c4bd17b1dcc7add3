"""The comparison that runs on a GPU machine, with decoders in software."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from mmaccel.measure import read_rows

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
spec = importlib.util.spec_from_file_location("benchmark_gpu", SCRIPT)
gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)


@pytest.mark.parametrize("name", ["h264.mp4", "hevc.mp4"])
def test_frames_equal_those_of_software(tmp_path, name):
    path = tmp_path / name
    gpu.write_clip(path, gpu._CLIPS[name], (96, 160), 45)
    row = gpu.decode_row(path, "cuda", "cpu", (42, 70), step=5)
    assert (row["drawn"], row["differing"], row["largest"]) == (9, 0.0, 0)
    assert 9 <= row["decoded"] <= 45
    assert row["seconds"] > 0


def test_a_difference_is_seen(tmp_path, monkeypatch):
    path = tmp_path / "h264.mp4"
    gpu.write_clip(path, "libx264", (96, 160), 12)
    honest = gpu.by_software

    def brighter(*arguments):
        return {pts: frame.clamp_max(250) + 5 for pts, frame in honest(*arguments).items()}

    monkeypatch.setattr(gpu, "by_software", brighter)
    row = gpu.decode_row(path, "cuda", "cpu", (42, 70), step=5)
    assert row["largest"] == 5
    assert row["differing"] > 0.9


def test_a_missing_gpu_is_written_down(tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr(gpu, "write_clip", lambda *arguments: None)
    assert gpu.decode(tmp_path, quick=True) == 0
    rows = read_rows(tmp_path / "decode.jsonl")
    assert [(row["clip"], row["backend"]) for row in rows] == [("h264.mp4", "cuda"), ("h264.mp4", "pynvvideocodec")]
    assert all("torch sees no GPU" in row["missing"] for row in rows)
