"""Random and Uniform."""

from __future__ import annotations

import itertools

import pytest
from made import noise, video

from mmaccel.encoders.random import Random
from mmaccel.encoders.uniform import Uniform


@pytest.mark.parametrize("keep", [0.01, 0.3, 5, 40])
def test_random_is_exact_repeatable_and_depends_on_the_seed(keep):
    tokens = video(noise(4, 10, 3))
    first = Random(keep=keep).reduce(tokens).index.tolist()
    assert first == sorted(set(first)) == Random(keep=keep).reduce(tokens).index.tolist()
    assert len(first) == (keep if isinstance(keep, int) else max(1, int(keep * 40 + 0.5)))
    if keep != 40:
        assert len({tuple(Random(keep=keep, seed=seed).reduce(tokens).index.tolist()) for seed in range(8)}) > 1


def test_random_chooses_every_token_about_as_often():
    tokens, counts = video(noise(1, 10, 3)), [0] * 10
    for seed in range(400):
        for index in Random(keep=3, seed=seed).reduce(tokens).index.tolist():
            counts[index] += 1
    # 120 expected, standard deviation 9.2
    assert all(abs(count - 120) < 5 * 9.2 for count in counts)


@pytest.mark.parametrize("keep", [1, 3, 7, 10, 39, 40])
def test_uniform_gaps_differ_by_at_most_one(keep):
    kept = Uniform(keep=keep).reduce(video(noise(4, 10, 3))).index.tolist()
    gaps = [b - a for a, b in itertools.pairwise(kept)]
    assert len(kept) == keep
    assert not gaps or max(gaps) - min(gaps) <= 1
