"""Bootstrap intervals against loops and full enumeration; KL against its definition."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from mmaccel.errors import MMAccelError
from mmaccel.measure import bootstrap_difference, bootstrap_mean, bootstrap_ratio, kl_to_dense, quality

RNG = np.random.default_rng(5)
GROUPS = np.repeat(np.arange(7), [3, 1, 2, 4, 1, 2, 2])
A = RNG.random(len(GROUPS)) < 0.7
B = RNG.random(len(GROUPS)) < 0.8


def by_hand(columns, groups, statistic, samples, seed):
    """Draw whole groups with plain loops; the generator is the same, the arithmetic is not."""
    names = sorted(set(groups.tolist()))
    rng = np.random.default_rng(seed)
    found = []
    for draw in rng.integers(0, len(names), (samples, len(names))):
        members = [i for g in draw for i in range(len(groups)) if groups[i] == names[g]]
        found.append(statistic(*(sum(float(column[i]) for i in members) / len(members) for column in columns)))
    return np.quantile(found, (0.025, 0.975))


@pytest.mark.parametrize(
    ("function", "columns", "statistic"),
    [
        (bootstrap_mean, (A,), lambda a: a),
        (bootstrap_difference, (A, B), lambda a, b: a - b),
        (bootstrap_ratio, (A, B), lambda a, b: a / b),
    ],
)
def test_equals_a_loop(function, columns, statistic, monkeypatch):
    monkeypatch.setattr(quality, "_CHUNK", 100)  # several chunks draw what one would
    interval = function(*columns, GROUPS, samples=200, seed=3)
    assert interval.value == pytest.approx(statistic(*(column.mean() for column in columns)))
    np.testing.assert_allclose((interval.low, interval.high), by_hand(columns, GROUPS, statistic, 200, 3))
    assert (interval.n, interval.groups, interval.level) == (len(GROUPS), 7, 0.95)


def test_converges_to_the_exact_distribution():
    values = np.array([0.0, 1.0, 4.0, 2.0])
    exact = sorted(sum(draw) / 4 for draw in itertools.product(values, repeat=4))
    interval = bootstrap_mean(values, samples=200_000, level=0.8)
    share = lambda x: sum(v <= x + 1e-9 for v in exact) / len(exact)  # noqa: E731
    assert share(interval.low) >= 0.1 - 0.01 > share(interval.low - 0.26)
    assert share(interval.high) >= 0.9 - 0.01 > share(interval.high - 0.26)


def test_pairing_makes_equal_answers_certain():
    interval = bootstrap_difference(A, A, GROUPS)
    assert (interval.value, interval.low, interval.high) == (0, 0, 0)
    assert bootstrap_ratio(A, A, GROUPS).high == pytest.approx(1)


def test_clustering_widens_the_interval_of_repeated_answers():
    values = RNG.random(40) < 0.5
    repeated, groups = np.repeat(values, 6), np.repeat(np.arange(40), 6)
    loose, tight = bootstrap_mean(repeated, groups), bootstrap_mean(repeated)
    assert loose.high - loose.low > 2 * (tight.high - tight.low)


def test_seeded():
    values = RNG.random(20)
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


def test_group_names_do_not_matter():
    names = np.array(list("gfedcba"))[GROUPS]
    assert bootstrap_mean(A, names).n == len(A)
    assert bootstrap_mean(A, GROUPS * 10 + 3) == bootstrap_mean(A, GROUPS)


@pytest.mark.parametrize(
    "call",
    [
        lambda: bootstrap_mean([]),
        lambda: bootstrap_mean([1.0, float("nan")]),
        lambda: bootstrap_difference([1.0, 0.0], [1.0]),
        lambda: bootstrap_mean([1.0, 0.0], [1]),
        lambda: bootstrap_ratio([1.0, 1.0], [0.0, 0.0]),
        lambda: bootstrap_mean([1.0], samples=0),
        lambda: bootstrap_mean([1.0], level=1.0),
        lambda: kl_to_dense(torch.zeros(2, 3), torch.zeros(2, 4)),
    ],
)
def test_wrong_input(call):
    with pytest.raises(MMAccelError):
        call()


def test_kl_is_its_definition():
    dense, other = torch.randn(5, 9), torch.randn(5, 9)
    expected = []
    for p_logits, q_logits in zip(dense.tolist(), other.tolist(), strict=True):
        p = [math.exp(x) / sum(map(math.exp, p_logits)) for x in p_logits]
        q = [math.exp(x) / sum(map(math.exp, q_logits)) for x in q_logits]
        expected.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    np.testing.assert_allclose(kl_to_dense(dense, other), expected, rtol=1e-5)
    assert (kl_to_dense(dense, dense) == 0).all()


def test_tokens_that_are_ruled_out_count_nothing():
    dense, other = torch.randn(3, 6), torch.randn(3, 6)
    dense[:, 4:], other[:, 4:] = -torch.inf, -torch.inf
    np.testing.assert_allclose(kl_to_dense(dense, other), kl_to_dense(dense[:, :4], other[:, :4]))
    other[0, 4] = 1.0
    assert np.isfinite(kl_to_dense(dense, other)).all()
    other[1, 0] = -torch.inf
    assert kl_to_dense(dense, other)[1] == np.inf
