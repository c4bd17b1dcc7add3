"""Tables are what the result files say, and the documents hold the tables."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from mmaccel.measure import append_rows, load_scenario, options_of, read_rows

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "tables.py"
sys.path.insert(0, str(SCRIPT.parent))
spec = importlib.util.spec_from_file_location("benchmark_tables", SCRIPT)
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)

MACHINE = {
    "machine": {"cpu": "Test CPU", "cores": 2, "threads": 1, "load": 0.1, "memory_gb": 8, "gpu": None},
    "versions": {"torch": "2", "transformers": "5", "mmaccel": "0"},
    "time": "2026-01-01T00:00:00Z",
}


def interval(value):
    return {"value": value, "low": value - 0.02, "high": value + 0.02, "n": 300, "groups": 100, "level": 0.95}


def quality_row(name, accuracy, flops, seed="all"):
    rival = interval(0.25) if name.startswith("holitom") else None
    return {
        "benchmark": "video_lm/quality", "spec": name, "seed": seed, "n": 6000, "clips": 1200, "dtype": "float32",
        "accuracy": interval(accuracy), "ratio": interval(accuracy / 0.9), "over_random": rival, "agreement": 0.5,
        "tokens_in": 513.0, "tokens_out": 80.2, "tokens_last": 41.0, "flops": flops, "prefill_flops": flops / 8,
        "flops_own": 0.0,
        "options": {"seeds": [0, 1, 2], "source": "h264"}, **MACHINE,
    }  # fmt: skip


def speed_row(name, frames, seconds, ratio, **extra):
    stage = {"median": seconds / 2, "low": 1, "high": 1, "n": 5}
    return {
        "benchmark": "video_lm/speed", "key": f"k{frames}", "model": "m", "spec": name, "frames": frames,
        "device": "cpu", "layers": 4, "layers_total": 24, "vision_layers": 2, "vision_layers_total": 26,
        "shortened": True, "dtype": "bfloat16", "repeats": 5, "ttft_ratio": ratio, "overhead_of_dense": 0.004,
        "overhead_of_own": 0.03, "memory": {"growth": 1_234_000_000, "peak": 2e9, "method": "rss high-water mark"},
        "stage_ratio": {"encode": 1.01, "prefill": 0.08}, "tokens_in": 10, "tokens_out": 10, "tokens_last": 10,
        "flops_counted": {"total": 2.0 * ratio},
        "ttft": {"total": stage | {"median": seconds}, "stages": {"encode": stage, "prefill": stage}}, **MACHINE,
    } | extra  # fmt: skip


def kernel_row(contestant, ratio=None, size="full", device="cpu", **extra):
    spread = {"low": 0.1, "high": 0.3, "n": 9}
    path = [{"op": "scores", "backend": "torch", "reason": "no path for int8"}]
    figures = {
        "seconds": spread | {"median": 0.2}, "ratio": spread | {"median": ratio}, "of_limit": 0.456,
        "path": path if contestant == "mmaccel" else None,
    }  # fmt: skip
    return {
        "benchmark": "kernels/speed", "op": "scores", "size": size, "shape": f"{size} [4, 5]", "dtype": "bfloat16",
        "device": device, "repeats": 9, "limited_by": "memory", "contestant": contestant, "missing": None,
        **({} if ratio is None else figures), **MACHINE, **extra,
    }  # fmt: skip


def codec_row(contestant, seconds=None, cell="a", **extra):
    spread = {"low": 0.5, "high": 3.0, "n": 5}
    figures = {
        "seconds": spread | {"median": seconds}, "cpu": spread | {"median": 1.5}, "growth": 2_000_000, "decoded": 1234,
        "exact": True, "ratio": spread | {"median": 0.8}, "of_limit": 0.25, "threads": 0,
    }  # fmt: skip
    versions = {**MACHINE["versions"], "av": "18"}
    return {
        "benchmark": "codecs/decode", "key": "k", "cell": cell, "contestant": contestant, "missing": None,
        "version": "1.2", "videos": 1, "cores": 2, "repeats": 5, **({} if seconds is None else figures), **MACHINE,
        "versions": versions, **extra,
    }  # fmt: skip


@pytest.fixture
def place(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(
        "before\n<!-- table:video_lm/quality -->\nold\n<!-- /table -->\nbetween\n"
        "<!-- table:video_lm/speed -->\n<!-- /table -->\nafter\n"
    )
    (tmp_path / "docs" / "plain.md").write_text("no table\n")
    results = tmp_path / "results"
    append_rows(
        results / "video_lm" / "quality.jsonl",
        [
            quality_row("dense", 0.9, 4e9),
            quality_row("random:keep=0.1", 0.6, 1e9),
            quality_row("holitom:keep=0.15", 0.875, 1.2e9),
            quality_row("holitom:keep=0.15", 0.5, 1.2e9, seed=0),
            quality_row("dense", 0.9, 4e9, seed=0),
        ],
    )
    old = {"key": "old", "time": "2025-01-01T00:00:00Z"}
    append_rows(
        results / "video_lm" / "speed.jsonl",
        [
            speed_row("dense", 8, 2, 1),
            speed_row("dense", 32, 12.5, 1),
            speed_row("evs:keep=0.1", 32, 5, 0.4),
        ],
    )
    append_rows(
        results / "video_lm" / "speed-other.jsonl",
        [speed_row("dense", 32, 14, 1, **old), speed_row("fastv:keep=0.1", 32, 6, 0.6, **old)],
    )
    return tmp_path, results


def test_documents_are_filled_and_then_up_to_date(place, capsys):
    root, results = place
    assert tables.main(["--check"], root, results) == 1
    assert "README.md: out of date" in capsys.readouterr().out
    assert "old" in (root / "README.md").read_text()
    assert tables.main([], root, results) == 0
    text = (root / "README.md").read_text()
    assert "old" not in text
    assert text.startswith("before\n")
    assert "\nbetween\n" in text
    assert text.endswith("\nafter\n")
    assert tables.main(["--check"], root, results) == 0
    assert (root / "docs" / "plain.md").read_text() == "no table\n"


def cells(markdown):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line[:1] == "|"]


def test_the_quality_table(place):
    found = tables.table("video_lm/quality", place[1])
    heads, _, *lines = cells(found)
    assert heads[0] == "setting"
    assert [line[0] for line in lines] == ["`dense`", "`holitom:keep=0.15`", "`random:keep=0.1` *"]
    assert lines[1][1:] == [
        "87.5 % [85.5, 89.5]", "97.2 %", "+25.0 [23.0, 27.0]", "50.0 %", "513 → 80 → 41", "30.0 %", "30.0 %",
    ]  # fmt: skip
    assert "Embedded model" in found
    assert "1,200 held-out clips" in found
    assert "Test CPU" in found
    assert len(cells(tables.table("video_lm/quality/all", place[1]))) == 2 + 5


def test_the_speed_table_takes_the_newest_run_of_the_chosen_length(place):
    found = tables.table("video_lm/speed", place[1])
    heads, _, *lines = cells(found)
    assert heads[-3] == "peak memory"
    assert lines == [
        ["m, 32 frames, 4 of 24 + 2 of 26 layers", "`dense`", "12.50 s", "100.0 %", "6.25 s", "6.25 s", "", "1,234 MB",
         "10", "100.0 %"],
        ["m, 32 frames, 4 of 24 + 2 of 26 layers", "`evs:keep=0.1`", "5.00 s", "40.0 %", "101.0 %", "8.0 %",
         "0.40 % / 3.0 %", "1,234 MB", "10", "40.0 %"],
    ]  # fmt: skip
    assert "Random weights" in found
    assert "vision tower is cut harder" in found
    assert len(cells(tables.table("video_lm/speed/all", place[1]))) == 2 + 3


def test_the_kernel_table(tmp_path):
    out = tmp_path / "kernels" / "speed.jsonl"
    append_rows(
        out,
        [
            kernel_row("mmaccel", 1.0), kernel_row("eager", 0.125), kernel_row("sdpa", 1.5),
            kernel_row("compiled", missing="OSError: no compiler"),
            kernel_row("mmaccel", 1.0, size="tiny"), kernel_row("eager", 0.5, size="tiny"),
        ],
    )  # fmt: skip
    found = tables.table("kernels", tmp_path)
    heads, _, *lines = cells(found)
    assert heads == ["op", "time", "of eager", "of compiled", "of SDPA", "of the limit", "path"]
    assert lines == [
        ["`scores`, full [4, 5], bfloat16", "200.0 ms", "12.5 %", "missing", "150.0 %", "45.6 % (memory)",
         "torch (no path for int8)"],
    ]  # fmt: skip
    assert "No compiled `scores`: OSError: no compiler." in found
    assert "No GPU figure exists yet." in found
    assert "cpu, median of 9" in found
    _, _, *lines = cells(tables.table("kernels/all", tmp_path))
    assert [line[0] for line in lines] == ["`scores`, full [4, 5], bfloat16", "`scores`, tiny [4, 5], bfloat16"]
    assert lines[1][2:5] == ["50.0 %", "", ""]

    # a machine with a GPU, used or not: the device that did the work is named
    gpu = {**MACHINE["machine"], "gpu": "Test GPU"}
    append_rows(out.with_name("speed-other.jsonl"), [kernel_row("mmaccel", 1.0, device="cuda", machine=gpu)])
    append_rows(out.with_name("speed-other.jsonl"), [kernel_row("mmaccel", 1.0, size="small", machine=gpu)])
    found = tables.table("kernels", tmp_path)
    assert "No GPU" not in found
    parts = found.split("| op |")[1:]
    assert [("Test CPU" in part, "Test GPU" in part, len(cells(part))) for part in parts] == [
        (True, False, 3), (False, True, 2),
    ]  # fmt: skip


CODEC_ROWS = [
    codec_row("mmaccel", 1.0), codec_row("pyav", 2.0, ratio={"median": 0.55}), codec_row("late", 0.5, exact=False),
    codec_row("decord", 3.0, decoded=None), codec_row("opencv", missing="it would decode all 9 frames"),
    codec_row("torchcodec", missing="no package torchcodec here"),
    codec_row("limit", 0.5, of_limit=None, ratio=None, exact=None, growth=None),
    codec_row("mmaccel", missing="it broke", cell="b", repeats=3),
    codec_row("pyav", 2.0, cell="b", repeats=3, ratio=None),
]  # fmt: skip


def test_the_codec_table_compares_with_the_fastest_that_is_right(tmp_path):
    old = [codec_row("mmaccel", 9.0, key="old", time="2025-01-01T00:00:00Z")]
    append_rows(tmp_path / "codecs" / "decode.jsonl", [*CODEC_ROWS, *old])
    found = tables.table("codecs/decode", tmp_path)
    heads, _, *lines = cells(found)
    assert heads[:3] == ["request", "time", "of the fastest exact peer"]
    assert lines == [
        ["a", "1.00 s", "55.0 % (pyav)", "1.50 s", "2 MB", "1,234", "25.0 %"],
        ["b", "missing: it broke", "", "", "", "", ""],
    ]
    assert "median of 3 to 5" in found
    assert "No torchcodec: no package torchcodec here." in found
    assert "opencv" not in found
    assert "Test CPU, 2 cores; PyAV 18, mmaccel 0" in found
    heads, _, *lines = cells(tables.table("codecs/decode/all", tmp_path))
    assert heads[:6] == ["request", "reader", "time", "spread", "mmaccel's, of it", "exact"]
    assert [line[:6] for line in lines[:6]] == [
        ["a", "mmaccel", "1.00 s", "500.0 ms to 3.00 s", "", "yes"],
        ["a", "**pyav**", "2.00 s", "500.0 ms to 3.00 s", "55.0 %", "yes"],
        ["a", "late", "500.0 ms", "500.0 ms to 3.00 s", "80.0 %", "NO"],
        ["a", "decord", "3.00 s", "500.0 ms to 3.00 s", "80.0 %", "yes"],
        ["a", "opencv", "missing", "", "", ""],
        ["a", "torchcodec", "missing", "", "", ""],
    ]
    assert lines[3][-2] == ""
    assert [line[:5] for line in lines[6:]] == [
        ["b", "mmaccel", "missing", "", ""],
        ["b", "**pyav**", "2.00 s", "500.0 ms to 3.00 s", ""],
    ]


def test_many_videos_have_a_rate():
    found = tables.codecs([codec_row("mmaccel", 4.0, videos=24), codec_row("pyav", 6.0, videos=24)], False)
    assert cells(found)[2][:3] == ["24 times a", "4.00 s, 6.0 a second", "80.0 % (pyav)"]


def test_the_pool_table(tmp_path):
    engines = {"alone": 8.0, "groups": 3, "longest": 1.0, "version": None}
    rows = [
        codec_row("mmaccel", 1.5), codec_row("mmaccel-1", 3.0, threads=1), codec_row("mmaccel-2", 2.0, threads=2),
        codec_row("limit", 4.0), codec_row("engines", engines=1, makespan=8.0, **engines),
        codec_row("engines", engines=7, makespan=2.0, **engines),
    ]  # fmt: skip
    append_rows(tmp_path / "codecs" / "pool.jsonl", [{**row, "benchmark": "codecs/pool"} for row in rows])
    assert cells(tables.table("codecs/pool", tmp_path))[2:] == [
        ["a, default threads", "1.50 s", "2.00", "1.50 s"],
        ["a, 1 thread", "3.00 s", "1.00", "1.50 s"],
        ["a, 2 threads", "2.00 s", "1.50", "1.50 s"],
        ["a, 1 simulated decoder", "8.00 s", "1.00", ""],
        ["a, 7 simulated decoders", "2.00 s", "4.00", ""],
    ]


def test_times_have_three_units():
    assert [tables.seconds_text(value) for value in (2.5, 0.25, 2.5e-4)] == ["2.50 s", "250.0 ms", "250 µs"]


def speed_table(*rows):
    return tables.speed(list(rows), True)


def test_a_run_is_compared_with_its_own_dense_rows_only():
    half = {"key": "h", "dtype": "float16", "repeats": 3, "time": "2026-01-02T00:00:00Z"}
    found = speed_table(
        speed_row("dense", 32, 12, 1), speed_row("evs:keep=0.1", 32, 6, 0.5),
        speed_row("dense", 32, 4, 1, **half), speed_row("evs:keep=0.1", 32, 3, 0.75, **half),
    )  # fmt: skip
    first, second = found.split("**Random weights**")[1:]
    assert "bfloat16" in first.partition("\n")[0]
    assert "median of 5" in first.partition("\n")[0]
    assert "float16, SDPA, batch 1, median of 3" in second
    assert [line[2] for line in cells(found) if line[0].startswith("m,")] == ["12.00 s", "6.00 s", "4.00 s", "3.00 s"]


def test_a_newer_run_with_fewer_settings_hides_the_older_one_whole():
    newer = {"key": "n", "time": "2026-02-01T00:00:00Z"}
    found = speed_table(
        speed_row("dense", 32, 3, 1, **newer), speed_row("dense", 32, 12, 1), speed_row("evs:keep=0.1", 32, 6, 0.5)
    )
    assert [line[1:3] for line in cells(found)[2:]] == [["`dense`", "3.00 s"]]


def test_a_cpu_run_beside_a_gpu_is_no_gpu_run():
    machine = MACHINE["machine"] | {"gpu": "Test GPU"}
    found = speed_table(
        speed_row("dense", 32, 12, 1, machine=machine),
        speed_row("dense", 32, 1, 1, machine=machine, device="cuda:0", key="g"),
    )
    assert found.count("Test GPU") == 1
    assert found.index("Test CPU") < found.index("Test GPU")
    assert [line[2] for line in cells(found) if line[0].startswith("m,")] == ["12.00 s", "1.00 s"]


def test_whole_models_and_output_tokens():
    whole = {"shortened": False, "time_per_output_token": {"median": 0.05}}
    found = speed_table(speed_row("dense", 32, 12, 1, **whole))
    heads, _, line = cells(found)
    assert line[0] == "m, 32 frames"
    assert line[heads.index("output token")] == "50.0 ms"
    assert "cut harder" not in found


def test_the_quality_table_says_whether_own_work_is_counted(place):
    assert "FLOPs, own scoring included" in tables.table("video_lm/quality", place[1])
    old = {k: v for k, v in quality_row("dense", 0.9, 4e9).items() if k != "flops_own"}
    assert "own scoring" not in tables.quality([old], False)


def test_no_results_and_no_table(tmp_path):
    assert "mmaccel bench video_lm/speed" in tables.table("video_lm/speed", tmp_path)
    assert "mmaccel bench kernels/speed" in tables.table("kernels", tmp_path)
    with pytest.raises(KeyError):
        tables.table("video_lm/beauty", tmp_path)


def test_the_plots(place):
    paths = tables.plot_quality(place[1])
    assert [path.name for path in paths] == ["quality.png", "prefill.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in paths)
    assert paths[0].read_bytes() != paths[1].read_bytes()


RUNS = sorted((SCRIPT.parent / "results").rglob("*.jsonl"))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_committed_results_are_those_of_the_committed_scenarios(path):
    newest = {row["benchmark"]: row for row in sorted(read_rows(path), key=lambda row: row["time"])}
    for name, row in newest.items():
        scenario = SCRIPT.parent / f"{name}.toml"
        assert scenario.exists()
        if path != SCRIPT.parent / "results" / f"{name}.jsonl":
            continue  # of another machine, or with options replaced
        expected = json.loads(json.dumps(options_of(load_scenario(scenario))))
        if name.startswith(("kernels/", "codecs/")):
            continue  # its rows depend on nothing that they do not say
        stored = row["options"]
        # an option that came later is switched off in a scenario that has older results
        later = {option: expected[option] for option in expected.keys() - stored.keys()}
        assert not any(later.values())
        stored |= later
        # results do not depend on the number of processes
        assert stored | {"workers": None} == expected | {"workers": None}


def test_the_documents_of_the_repository_are_up_to_date():
    assert tables.main(["--check"]) == 0, "run python benchmarks/tables.py"
