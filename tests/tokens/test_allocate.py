from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmaccel.errors import MethodError
from mmaccel.tokens.allocate import merged_per_block, per_frame, per_layer, per_segment, resolve_keep, split

groups = st.integers(1, 6).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 8), min_size=n, max_size=n),
        st.lists(st.integers(0, 3), min_size=n, max_size=n),
        st.lists(st.integers(0, 6), min_size=n, max_size=n),
        st.floats(0, 1),
    )
)


@given(groups)
def test_sums_exactly_within_the_bounds(case):
    weights, floor, room, share = case
    capacity = [lo + r for lo, r in zip(floor, room, strict=True)]
    budget = sum(floor) + round(share * sum(room))
    got = split(budget, torch.tensor(weights), floor=torch.tensor(floor), capacity=torch.tensor(capacity)).tolist()
    assert sum(got) == budget
    assert all(lo <= g <= hi for lo, g, hi in zip(floor, got, capacity, strict=True))


@given(groups)
def test_is_as_close_to_proportional_as_whole_numbers_can_be(case):
    """With positive weights, no unit can move to a group where it is missed more (exact enumeration of moves)."""
    weights, floor, room, share = case
    weights = [w + 1 for w in weights]
    capacity = [lo + r for lo, r in zip(floor, room, strict=True)]
    budget = sum(floor) + round(share * sum(room))
    got = split(budget, torch.tensor(weights), floor=torch.tensor(floor), capacity=torch.tensor(capacity)).tolist()
    for i, j in itertools.permutations(range(len(got)), 2):
        if got[i] > floor[i] and got[j] < capacity[j]:
            # Proportional shares differ from whole ones by less than one: taking one from i leaves it not above j's.
            assert Fraction(got[i] - 1, weights[i]) < Fraction(got[j] + 1, weights[j])


def largest_remainder(budget, weights):
    exact = [Fraction(budget * w, sum(weights)) for w in weights]
    shares = [int(e) for e in exact]
    order = sorted(range(len(weights)), key=lambda i: (shares[i] - exact[i], i))
    for i in order[: budget - sum(shares)]:
        shares[i] += 1
    return shares


@given(st.integers(0, 200), st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_without_bounds_is_largest_remainder(budget, weights):
    assert split(budget, torch.tensor(weights)).tolist() == largest_remainder(budget, weights)


def test_ties_go_to_the_lower_position():
    assert split(5, torch.ones(3)).tolist() == [2, 2, 1]
    assert split(2, torch.tensor([1.0, 4.0, 1.0])).tolist() == [1, 1, 0]
    assert split(1, torch.full((4,), 0.1)).tolist() == [1, 0, 0, 0]


def test_bounds_pass_what_they_hold_back_to_the_others():
    assert split(10, torch.tensor([8.0, 1.0, 1.0]), capacity=4).tolist() == [4, 3, 3]
    assert split(10, torch.tensor([8.0, 1.0, 1.0]), floor=2).tolist() == [6, 2, 2]
    assert split(10, torch.tensor([0.0, 1.0, 0.0]), capacity=4).tolist() == [3, 4, 3]
    assert split(10, torch.tensor([0.0, 1.0, 0.0]), capacity=12).tolist() == [0, 10, 0]
    assert split(5, torch.zeros(2)).tolist() == [3, 2]


def test_every_item_has_its_own_budget():
    weights = torch.tensor([[1.0, 1.0], [1.0, 3.0]])
    assert split(4, weights).tolist() == [[2, 2], [1, 3]]
    assert split([4, 8], weights).tolist() == [[2, 2], [2, 6]]
    assert split(torch.tensor([0, 1]), weights).tolist() == [[0, 0], [0, 1]]
    assert split(3, weights, capacity=torch.tensor([[1, 2], [2, 1]])).tolist() == [[1, 2], [2, 1]]


def test_frames_segments_and_layers():
    assert per_frame(6, torch.tensor([1.0, 2.0, 9.0]), 3, floor=1).tolist() == [1, 2, 3]
    assert per_segment(6, torch.tensor([4, 8])).tolist() == [2, 4]
    assert per_segment(6, torch.tensor([4, 8]), torch.tensor([1.0, 1.0])).tolist() == [3, 3]
    assert per_layer(4, torch.tensor([3.0, 2.0, 1.0]), 8).tolist() == [6, 4, 2]
    assert per_layer(0.5, torch.tensor([1.0, 1.0, 1.0]), 5).tolist() == [3, 3, 2]


@pytest.mark.parametrize(("budget", "nearest"), [(2, 3), (13, 12), (-1, 3)])
def test_an_infeasible_budget_names_the_nearest(budget, nearest):
    with pytest.raises(MethodError, match=f"nearest one that can is {nearest}$"):
        split(budget, torch.ones(3), floor=1, capacity=4)


def test_wrong_arguments():
    wrong = [
        lambda: split(3, torch.tensor([1.0, -1.0])),
        lambda: split(3, torch.tensor([1.0, torch.nan])),
        lambda: split(3, torch.ones(1, 2, 3)),
        lambda: split([1, 2, 3], torch.ones(2, 2)),
        lambda: split(torch.tensor([1.5]), torch.ones(2)),
        lambda: split(3, torch.ones(2), floor=3, capacity=2),
        lambda: split(3, torch.ones(2), floor=-1),
    ]
    for call in wrong:
        with pytest.raises(MethodError):
            call()


@given(st.integers(1, 1000), st.integers(1, 9000))
def test_fractions_round_half_up_in_decimal(thousandths, n):
    exact = Fraction(thousandths * n, 1000)
    expected = max(1, int(exact + Fraction(1, 2)))
    assert resolve_keep(thousandths / 1000, n) == expected


def test_keep_as_a_number():
    assert resolve_keep(0.29, 50) == 15
    assert resolve_keep(1.0, 7) == 7
    assert resolve_keep(1, 7) == 1
    assert resolve_keep(7, 7) == 7
    assert resolve_keep(0.001, 7) == 1
    assert resolve_keep(0.5, 0) == resolve_keep(64, 0) == 0


@pytest.mark.parametrize(("keep", "nearest"), [(0, 1), (-3, 1), (8, 7)])
def test_a_number_that_cannot_be_kept_names_the_nearest(keep, nearest):
    with pytest.raises(MethodError, match=f"nearest number is {nearest}$"):
        resolve_keep(keep, 7)


@pytest.mark.parametrize("keep", [0.0, 1.01, -0.5, float("nan"), float("inf"), True, "0.5", None])
def test_what_is_no_budget(keep):
    with pytest.raises(MethodError):
        resolve_keep(keep, 7)


def test_no_groups_huge_weights_and_bounds_that_are_no_whole_numbers():
    assert split(0, torch.ones(0)).tolist() == []
    assert split([0, 0], torch.ones(2, 0)).shape == (2, 0)
    assert split(5, torch.tensor([1e308, 1e308, 1e-308], dtype=torch.float64)).tolist() == [3, 2, 0]
    for bound in ({"floor": torch.tensor([0, 1.7])}, {"capacity": 1.9}):
        with pytest.raises(MethodError, match="whole numbers"):
            split(2, torch.ones(2), **bound)


@given(st.integers(0, 40), st.integers(0, 40), st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_blocks_merge_the_total_wherever_halving_reaches_it(tokens, total, weights):
    total = min(total, tokens)
    counts = merged_per_block(total, tokens, torch.tensor(weights))
    fewest, left = tokens, tokens
    for count in counts:
        assert 0 <= count <= left // 2
        left -= count
        fewest -= fewest // 2
    assert left == max(tokens - total, fewest)


def test_blocks_merge_in_proportion_where_they_can():
    assert merged_per_block(12, 64, torch.ones(4)) == [3, 3, 3, 3]
    assert merged_per_block(12, 64, torch.tensor([3, 2, 1, 0])) == [6, 4, 2, 0]
    # the last block would have 3, of which it may merge 1: the second takes one more
    assert merged_per_block(8, 9, torch.ones(4)) == [2, 3, 2, 1]
    assert merged_per_block(8, 9, torch.ones(4), exact=False) == [2, 2, 2, 1]
    assert merged_per_block(24, 10, torch.ones(4), exact=False) == [5, 2, 1, 1]
    assert merged_per_block(24, 10, torch.tensor([3, 2, 1, 0]), exact=False) == [5, 2, 1, 0]
    assert merged_per_block(5, 0, torch.ones(2), exact=False) == [0, 0]
