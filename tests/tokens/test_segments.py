"""Segments against loops over frames."""

from __future__ import annotations

import itertools

import pytest
import torch

from mmaccel.errors import MethodError
from mmaccel.tokens.segments import contiguous, cut_where_unlike, mean_pairwise_cosine


def frames_of(segments):
    return [list(range(start, stop)) for start, stop in segments]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("least", [1, 2, 4, 9, 50])
@pytest.mark.parametrize("below", [-1.0, 0.3, 2.0])
def test_cuts_are_the_smallest_similarities_and_those_below(seed, least, below):
    values = torch.rand(8, generator=torch.Generator().manual_seed(seed))
    found = frames_of(cut_where_unlike(values, least, below))
    smallest = sorted(range(8), key=lambda t: float(values[t]))[: least - 1]
    want = [[0]]
    for t in range(8):
        if t in smallest or float(values[t]) < below:
            want.append([])
        want[-1].append(t + 1)
    assert found == want
    assert len(found) >= min(least, 9)


def test_equal_similarities_are_cut_at_the_earlier_frame_and_equal_ones_are_not_below():
    assert cut_where_unlike(torch.full((4,), 0.5), 3, 0.5) == [(0, 1), (1, 2), (2, 5)]
    assert cut_where_unlike(torch.empty(0), 8, 0.9) == [(0, 1)]


def naive_contiguous(labels):
    T, kept = len(labels), {}
    for label in set(labels):
        runs = [
            (start, stop)
            for start, stop in itertools.combinations(range(T + 1), 2)
            if all(labels[t] == label for t in range(start, stop))
        ]
        best = max(runs, key=lambda run: (run[1] - run[0], -run[0]))
        kept[label] = range(*best)
    owner = []
    for t in range(T):
        away = {label: min(abs(t - u) for u in run) for label, run in kept.items()}
        owner.append(min(kept, key=lambda label: (away[label], kept[label].start)))
    return [list(frames) for _, frames in itertools.groupby(range(T), key=lambda t: owner[t])]


def test_clusters_become_contiguous_for_every_labelling_of_six_frames():
    for labels in itertools.product(range(3), repeat=6):
        found = frames_of(contiguous(torch.tensor(labels)))
        assert found == naive_contiguous(labels), labels
        assert len(found) == len(set(labels))
        assert list(itertools.chain(*found)) == list(range(6))


def test_mean_pairwise_cosine_is_the_mean_over_all_pairs():
    x = torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(1))
    x[:, 2] = x[0, 2]
    x[1, 3] = 0
    got = mean_pairwise_cosine(x)
    for p in range(7):
        pairs = [
            float(x[a, p] @ x[b, p] / (x[a, p].norm() * x[b, p].norm()).clamp_min(1e-9))
            for a, b in itertools.combinations(range(5), 2)
        ]
        assert float(got[p]) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    assert float(got[2]) == pytest.approx(1, abs=1e-6)


def test_wrong_shapes_are_errors():
    for wrong in (
        lambda: cut_where_unlike(torch.zeros(2, 2), 1, 0.0),
        lambda: cut_where_unlike(torch.zeros(2), 0, 0.0),
        lambda: contiguous(torch.zeros(2, 2)),
        lambda: mean_pairwise_cosine(torch.zeros(1, 4, 4)),
        lambda: mean_pairwise_cosine(torch.zeros(4, 4)),
    ):
        with pytest.raises(MethodError):
            wrong()
    assert contiguous(torch.empty(0, dtype=torch.int64)) == []
