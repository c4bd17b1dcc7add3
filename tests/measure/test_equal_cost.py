"""Methods at equal cost: hand-made curves, and an interval that is compared with enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mmaccel.errors import MMAccelError
from mmaccel.measure.equal_cost import Curve, at_equal_cost

LOW, HIGH = np.array([1, 0, 0, 1.0]), np.array([1, 1, 1, 1.0])


def test_between_two_settings_their_answers_are_mixed():
    curve = Curve([10, 20], [LOW, HIGH])
    np.testing.assert_allclose(curve.at(10), LOW)
    np.testing.assert_allclose(curve.at(15), [1, 0.5, 0.5, 1])
    np.testing.assert_allclose(curve.at(17.5), [1, 0.75, 0.75, 1])
    np.testing.assert_allclose(curve.at(99), HIGH)
    assert curve.at(9.99) is None


def test_settings_of_one_cost_are_no_division_by_zero():
    np.testing.assert_allclose(Curve([10, 10, 20], [LOW, HIGH, HIGH]).at(10), HIGH)


def test_the_difference_is_paired_and_draws_clips():
    curve = Curve([10, 20], [LOW, HIGH])
    hits, clips = np.array([1, 1, 0, 1.0]), np.array([0, 0, 1, 1])
    found = at_equal_cost(15, hits, curve, clips)
    each = (hits - np.array([1, 0.5, 0.5, 1])).reshape(2, 2).sum(1)
    drawn = [sum(each[i] for i in pick) / 4 for pick in itertools.product(range(2), repeat=2)]
    assert found.value == pytest.approx(0.0)
    assert (found.low, found.high) == (min(drawn), max(drawn))
    assert at_equal_cost(5, hits, curve, clips) is None


@pytest.mark.parametrize(
    ("costs", "hits"), [([], []), ([2, 1], [LOW, HIGH]), ([1], [LOW, HIGH]), ([1, 2], [LOW, HIGH[:2]])]
)
def test_what_is_no_curve(costs, hits):
    with pytest.raises(MMAccelError, match="rising costs"):
        Curve(costs, hits)
