"""The kernel benchmark: rows for every contestant, and limits that follow from sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmaccel.errors import MMAccelError
from mmaccel.measure import load_scenario, read_rows, run_kernels, run_scenario
from mmaccel.measure.kernel_cases import OPS

SCENARIO = Path(__file__).parents[2] / "benchmarks" / "kernels" / "speed.toml"
TINY = {"sizes": ["tiny"], "dtypes": ["float32"], "repeats": 3, "device": "cpu", "compiled": False}


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    monkeypatch.setattr(run_kernels, "_COPIED_BYTES", 1 << 20)
    monkeypatch.setattr(run_kernels, "_MATMUL_SIDE", {"cpu": 64})


@pytest.fixture
def scenario():
    return load_scenario(SCENARIO)


def test_rows(scenario, tmp_path, monkeypatch):
    monkeypatch.delenv("MMACCEL_KERNELS", raising=False)
    out, progress = tmp_path / "k.jsonl", []
    threads = torch.get_num_threads()
    rows = run_scenario(scenario, out, {**TINY, "dtypes": ["float32", "bfloat16"]}, lambda *step: progress.append(step))
    assert rows == read_rows(out)
    assert torch.get_num_threads() == threads
    assert progress[:3] == [("attention_received, tiny, float32", done, 3) for done in (1, 2, 3)]
    assert [(row["op"], row["dtype"], row["contestant"]) for row in rows] == [
        (op, dtype, contestant)
        for op in OPS
        for dtype in ("float32", "bfloat16")
        for contestant in (("mmaccel", "eager", "sdpa") if "attention" in op else ("mmaccel", "eager"))
    ]
    for row in rows:
        assert row["benchmark"] == "kernels/speed"
        assert (row["size"], row["device"], row["threads"], row["repeats"]) == ("tiny", "cpu", 1, 3)
        assert row["machine"]["threads"] == 1
        assert {"versions", "time"} <= row.keys()
        assert row["missing"] is None
        assert 0 < row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
        assert row["seconds"]["n"] == row["ratio"]["n"] == 3
        assert row["memory"]["growth"] >= 0
        assert row["limit"] == max(row["bytes"] / row["bandwidth"], row["flops"] / row["rate"])
        assert (row["limited_by"] == "memory") == (row["bytes"] / row["bandwidth"] >= row["flops"] / row["rate"])
        if row["contestant"] == "sdpa":
            assert row["of_limit"] is None
        else:
            assert row["of_limit"] == pytest.approx(row["limit"] / row["seconds"]["median"])
        if row["contestant"] == "mmaccel":
            assert row["ratio"]["median"] == 1
            assert row["path"] == [{"op": row["op"], "backend": "torch", "reason": None}]
        else:
            assert row["path"] is None
    monkeypatch.setattr(run_kernels, "_measure", None)  # nothing is measured twice
    assert run_scenario(scenario, out, TINY) == [row for row in rows if row["dtype"] == "float32"]


def test_ceilings_are_those_of_the_best_round(scenario, tmp_path, monkeypatch):
    clock = iter([1.0, 1.0, 1.0, 0.5, 0.25, *[2.0, 4.0, 8.0], 0.125, 1.0, *[16.0, 1.0, 3.0]])
    monkeypatch.setattr(run_kernels, "_seconds", lambda call, device: next(clock))
    options = {**TINY, "ops": ["attention_received"], "repeats": 2}
    ours, eager, sdpa = run_scenario(scenario, tmp_path / "k.jsonl", options)
    assert ours["bandwidth"] == 2 * 2**20 / 0.125
    assert ours["rate"] == 2 * 64**3 / 0.25
    # the second round begins with the second contestant: eager 16, sdpa 1, mmaccel 3
    assert ours["seconds"]["median"] == 2.5
    assert eager["seconds"]["median"] == 10
    assert eager["ratio"]["median"] == (2 / 4 + 3 / 16) / 2
    assert sdpa["ratio"]["median"] == (2 / 8 + 3 / 1) / 2


@pytest.mark.parametrize("width", [2, 4])
def test_bytes_and_flops_follow_from_the_sizes(width):
    dtype = {2: torch.bfloat16, 4: torch.float32}[width]
    received = OPS["attention_received"].case(2, 3, 50, 8, device=torch.device("cpu"), dtype=dtype)
    assert received.moved == width * (2 * 3 * 50 * 8) * 2 + 4 * 2 * 50
    assert received.flops == sum(2 * 8 for _ in range(2 * 3) for _ in range(50 * 50))
    partial = OPS["partial_row_attention"].case(2, 3, 50, 8, 7, device=torch.device("cpu"), dtype=dtype)
    read = 7 * 3 + 50 * 2  # rows of q, fresh k and v, and of both caches
    written = 7 * 3  # fresh rows into both caches, and the output
    assert partial.moved == width * 2 * 3 * 8 * (read + written) + 8 * 2 * 7
    assert partial.flops == 2 * 3 * 7 * 50 * (2 * 8 + 2 * 8)


@pytest.mark.parametrize("op", OPS)
def test_every_contestant_does_the_same(op):
    """The op equals its plain form, twice in a row; every op has a size for tests."""
    case = OPS[op].case(*OPS[op].sizes["tiny"], device=torch.device("cpu"), dtype=torch.float32)
    for _ in range(2):
        torch.testing.assert_close(case.ours(*case.inputs), case.eager(*case.inputs), check_stride=False)


@pytest.mark.parametrize("sound", [True, False])
def test_a_compiler_that_fails_is_reported(scenario, tmp_path, monkeypatch, sound):
    def broken(*_):
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda call, **_: call if sound else broken)
    options = {**TINY, "compiled": True, "ops": ["partial_row_attention"]}
    rows = {row["contestant"]: row for row in run_scenario(scenario, tmp_path / "k.jsonl", options)}
    assert set(rows) == {"mmaccel", "eager", "compiled", "sdpa"}
    assert rows["compiled"]["missing"] == (None if sound else "RuntimeError: no C++ compiler")
    assert ("seconds" in rows["compiled"]) == sound
    assert "seconds" in rows["eager"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ops": ["sort"]}, "no op is called sort"),
        ({"sizes": ["huge"]}, "no chosen op has the size 'huge'"),
        ({"ops": ["attention_received"], "sizes": ["video"]}, "no chosen op has the size 'video'"),
        ({"dtypes": ["float7"]}, "float7"),
        ({"dtypes": ["int32"]}, "int32"),
        ({"repeats": 0}, "repeats"),
        ({"threads": 0}, "threads"),
    ],
)
def test_options_out_of_range(scenario, tmp_path, wrong, message):
    with pytest.raises(MMAccelError, match=message):
        run_scenario(scenario, tmp_path / "k.jsonl", {**TINY, **wrong})
    assert not (tmp_path / "k.jsonl").exists()


def test_a_missing_gpu(scenario, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(MMAccelError, match="no GPU"):
        run_scenario(scenario, tmp_path / "k.jsonl", {**TINY, "device": "cuda"})
