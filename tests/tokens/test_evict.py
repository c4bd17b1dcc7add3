"""What goes when a budget is full, against counting it out."""

from __future__ import annotations

import pytest
import torch

from mmaccel.tokens import evict


@pytest.mark.parametrize("budget", [1, 7, 10, 64])
@pytest.mark.parametrize("slack", [0.0, 0.1, 0.5, 0.99])
def test_excess(budget, slack):
    for held in range(budget + 1):
        for new in range(1, budget + 1):
            gone = evict.excess(held, new, budget, slack)
            if held + new <= budget:
                assert gone == 0
                continue
            left = held - gone + new
            assert 0 < gone <= held
            assert left <= budget
            # no more than the slack asks for, unless nothing else is there to go
            assert left == int(budget * (1 - slack)) or gone == held


def test_oldest_takes_whole_groups():
    sizes = [3, 0, 5, 2, 4]
    for excess in range(15):
        number = evict.oldest(sizes, excess)
        assert sum(sizes[:number]) >= min(excess, 14)
        assert number == 0 or sum(sizes[: number - 1]) < excess
    assert evict.oldest([], 3) == 0


def test_least_takes_the_lowest_and_of_equals_the_first():
    generator = torch.Generator().manual_seed(0)
    for n in (1, 5, 30):
        scores = torch.randint(0, 6, (n,), generator=generator).float()
        for excess in range(n + 1):
            ranked = sorted(range(n), key=lambda i: (float(scores[i]), i))
            keep = evict.least(scores, excess)
            assert set((~keep).nonzero().squeeze(1).tolist()) == set(ranked[:excess])


def test_unlike_mean():
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    got = evict.unlike_mean(x.bfloat16(), torch.tensor([5.0, 0.0]))
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx([0.0, 1.0, 2.0])
