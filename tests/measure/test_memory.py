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


def test_a_block_inside_does_not_lower_the_peak_of_the_one_around():
    with peak_memory() as outer:
        fill(96)
        with peak_memory() as middle:
            fill(48)
            with peak_memory() as inner:
                fill(24)
    assert 90 * MB < outer.growth < 120 * MB
    assert 42 * MB < middle.growth < 72 * MB
    assert 18 * MB < inner.growth < 48 * MB


def test_a_block_around_has_what_happened_inside_and_behind():
    with peak_memory() as outer:
        with peak_memory() as inner:
            fill(64)
        assert inner.growth > 58 * MB
    assert outer.growth > 58 * MB
    with peak_memory() as outer:
        with peak_memory():
            fill(16)
        fill(64)
    assert outer.growth > 58 * MB


def test_a_block_that_raises_has_a_peak_all_the_same():
    with pytest.raises(ZeroDivisionError), peak_memory() as peak:
        fill(48).fill_(1 / 0)
    assert peak.growth > 42 * MB
    with peak_memory() as behind:
        fill(24)
    assert behind.growth < 44 * MB
    assert not any(memory._running.values())


class Allocator:
    """torch.cuda as far as it counts bytes."""

    def __init__(self):
        self.held = self.highest = 0

    def take(self, size):
        self.highest = max(self.highest, self.held + size)
        return 0

    def install(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda _place: None)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _place: self.held)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _place: self.highest)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _place: setattr(self, "highest", self.held))


def test_blocks_inside_one_another_on_a_gpu(monkeypatch):
    gpu = Allocator()
    gpu.install(monkeypatch)
    gpu.held = 5
    with peak_memory("cuda") as outer:
        gpu.take(200)
        with peak_memory("cuda:0") as inner:
            gpu.take(40)
        gpu.take(100)
    assert (outer.method, outer.growth, inner.growth) == ("cuda allocator", 200, 40)
    with pytest.raises(ZeroDivisionError), peak_memory("cuda") as peak:
        1 / gpu.take(30)
    assert peak.growth == 30
