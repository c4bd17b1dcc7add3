from __future__ import annotations

import pytest
import torch

from mmaccel.measure import memory, peak_memory
from mmaccel.measure.stages import time

MB = 1 << 20


def fill(megabytes):
    return torch.ones(megabytes * MB // 4)


def test_a_block_is_charged_with_its_own_peak_only():
    with peak_memory() as large:
        fill(96)
    with peak_memory() as small:
        fill(24)
    assert 90 * MB < large.growth < 110 * MB
    assert 20 * MB < small.growth < 40 * MB
    assert large.peak == large.start + large.growth


def test_what_stays_is_counted_too():
    with peak_memory() as peak:
        kept = fill(32)
    assert kept.sum() > 0
    assert 28 * MB < peak.growth < 48 * MB


def test_sampling_sees_what_lasts(monkeypatch):
    monkeypatch.setattr(memory, "_reset", lambda: False)
    with peak_memory() as peak:
        block = fill(64)
        time.sleep(0.05)
        del block
    assert peak.method == "rss samples"
    assert 58 * MB < peak.growth < 80 * MB


def test_a_block_that_raises_ends_the_measurement(monkeypatch):
    monkeypatch.setattr(memory, "_reset", lambda: False)
    with pytest.raises(ZeroDivisionError), peak_memory() as peak:
        1 / 0  # noqa: B018
    assert peak.peak >= peak.start
