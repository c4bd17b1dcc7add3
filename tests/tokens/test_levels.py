"""Levels against enumeration of all choices: the least loss, an exact total, forced rows, what cannot be reached."""

from __future__ import annotations

import itertools

import pytest
import torch

from mmaccel.errors import MethodError
from mmaccel.tokens.levels import cheapest_levels, rows_of_level


def enumerate_all(losses, weights, forced):
    """Least loss of every total that can be reached, over all choices."""
    best = {}
    for choice in itertools.product(range(losses.shape[1]), repeat=losses.shape[0]):
        if any(f not in (-1, c) for f, c in zip(forced, choice, strict=True)):
            continue
        work = sum(int(weights[row, level]) for row, level in enumerate(choice))
        loss = sum(float(losses[row, level]) for row, level in enumerate(choice))
        best[work] = min(loss, best.get(work, float("inf")))
    return best


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("own_weights", [False, True])
def test_every_total_agrees_with_enumeration(seed, own_weights):
    generator = torch.Generator().manual_seed(seed)
    rows = 3 + seed % 4
    losses = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    weights = torch.arange(5)
    if own_weights:
        weights = torch.randint(0, 9, (rows, 5), generator=generator)
    forced = torch.full((rows,), -1)
    if seed % 2:
        forced[seed % rows] = 3
    table = weights.expand(rows, 5)
    best = enumerate_all(losses, table, forced.tolist())
    for total in range(int(table.max(1).values.sum()) + 1):
        if total not in best:
            nearest = min(best, key=lambda reached: (abs(reached - total), reached))
            with pytest.raises(MethodError, match=rf"sums to {total}; the nearest total that one does is {nearest}$"):
                cheapest_levels(losses, weights, total, forced)
            continue
        levels = cheapest_levels(losses, weights, total, forced)
        at = torch.arange(rows)
        assert int(table[at, levels].sum()) == total
        assert float(losses[at, levels].sum()) == pytest.approx(best[total])
        assert all(f in (-1, level) for f, level in zip(forced.tolist(), levels.tolist(), strict=True))


def test_eight_rows_of_five_levels_agree_with_enumeration():
    losses = torch.rand(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    best = enumerate_all(losses, torch.arange(5).expand(8, 5), [4, *[-1] * 7])
    forced = torch.tensor([4, *[-1] * 7])
    for total in (4, 15, 32):
        levels = cheapest_levels(losses, torch.arange(5), total, forced)
        assert int(levels.sum()) == total
        assert float(losses[torch.arange(8), levels].sum()) == pytest.approx(best[total])


def test_a_budget_beyond_every_choice_and_bad_tables_are_refused():
    losses = torch.zeros(3, 5)
    with pytest.raises(MethodError, match="nearest total that one does is 12"):
        cheapest_levels(losses, torch.arange(5), 13)
    with pytest.raises(MethodError, match="nearest total that one does is 0"):
        cheapest_levels(losses, torch.arange(5), -1)
    with pytest.raises(MethodError, match="finite"):
        cheapest_levels(losses.fill_(float("nan")), torch.arange(5), 3)
    with pytest.raises(MethodError, match="not negative"):
        cheapest_levels(torch.zeros(3, 5), torch.arange(5) - 1, 3)
    with pytest.raises(MethodError, match="forced"):
        cheapest_levels(torch.zeros(3, 5), torch.arange(5), 3, torch.tensor([5, -1, -1]))
    with pytest.raises(MethodError, match=r"losses must be \(R, S\)"):
        cheapest_levels(torch.zeros(3, 5), torch.arange(4), 3)


def test_a_large_table_sums_exactly_and_takes_no_time():
    losses = torch.rand(50 * 28, 5, generator=torch.Generator().manual_seed(1))
    levels = cheapest_levels(losses, torch.arange(5), 2576)
    assert int(levels.sum()) == 2576


def test_rows_of_a_level_are_rounded_half_up_and_reach_both_ends():
    assert [rows_of_level(units, 4, 256) for units in range(5)] == [0, 64, 128, 192, 256]
    assert [rows_of_level(units, 4, 10) for units in range(5)] == [0, 3, 5, 8, 10]
    assert rows_of_level(1, 4, 2) == 1
    assert rows_of_level(1, 4, 1) == 0
