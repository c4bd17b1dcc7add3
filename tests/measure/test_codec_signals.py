"""The runner of the codec signals' benchmark: rank correlation against loops, rows of a small run, resumption."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from mmaccel.errors import MMAccelError
from mmaccel.measure import load_scenario, read_rows, run_scenario
from mmaccel.measure.run_codec_signals import rank_correlation

SCENARIO = Path(__file__).parents[2] / "benchmarks" / "codecs" / "signals.toml"
SMALL = {
    "methods": ["evs", "random"], "informed": ["evs:temporal=codec", "codec-frames"], "keeps": [0.25], "clips": 3,
    "batch": 2, "real": False, "samples": 50,
}  # fmt: skip


def naive_ranks(values):
    return [sum(other < value for other in values) + sum(other == value for other in values) / 2 for value in values]


@pytest.mark.parametrize("seed", range(4))
def test_rank_correlation_is_the_correlation_of_ranks(seed):
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 8, 40)
    b = a + rng.normal(size=40) * 3
    x, y = np.array(naive_ranks(a.tolist())), np.array(naive_ranks(b.tolist()))
    assert rank_correlation(a, b) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert rank_correlation(b, np.exp(b)) == pytest.approx(1)
    assert rank_correlation(b, -b) == pytest.approx(-1)
    assert math.isnan(rank_correlation(np.zeros(40), b))


def test_a_small_run_and_its_resumption(tmp_path):
    scenario, out = load_scenario(SCENARIO), tmp_path / "rows.jsonl"

    class StopError(Exception):
        pass

    def stop(_what, done, _total):
        if done == 1:
            raise StopError

    with pytest.raises(StopError):
        run_scenario(scenario, out, SMALL, stop)
    assert not out.exists()
    assert len(read_rows(out.with_name("rows.jsonl.part"))) == 1
    seen = []
    rows = run_scenario(scenario, out, SMALL, lambda _what, done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    assert not out.with_name("rows.jsonl.part").exists()
    quality = {(row["spec"], row["signals"]): row for row in rows if row["kind"] == "quality"}
    informed = ["evs:temporal=codec;keep=0.25", "codec-frames:keep=0.25"]
    assert set(quality) == {
        *((spec, "none") for spec in ("dense", "evs:keep=0.25", "random:keep=0.25")),
        *((spec, which) for spec in informed for which in ("codec", "pixels", "noise")),
    }
    dense = quality["dense", "none"]
    for key, row in quality.items():
        assert row["clips"] == 3
        assert row["tokens_out"] < dense["tokens_out"] or key[0] == "dense"
        for rival, over in row["over"].items():
            other = quality[f"{rival}:keep=0.25", "none"]
            assert over["value"] == pytest.approx(row["accuracy"]["value"] - other["accuracy"]["value"])
    (ranks,) = [row for row in rows if row["kind"] == "correlation"]
    assert ranks["n"] == 3
    assert ranks["change, pixels"]["value"] > 0.5
    assert run_scenario(scenario, out, SMALL) == rows
    with pytest.raises(MMAccelError, match="other options"):
        run_scenario(scenario, out, {**SMALL, "clips": 2})


@pytest.mark.parametrize(
    ("options", "message"),
    [({"clips": 0}, "at least 1"), ({"split": "x"}, "split"), ({"informed": ["evs:x=1"]}, "knob")],
)
def test_wrong_options(tmp_path, options, message):
    with pytest.raises(MMAccelError, match=message):
        run_scenario(load_scenario(SCENARIO), tmp_path / "rows.jsonl", {**SMALL, **options})
