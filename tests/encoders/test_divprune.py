"""DivPrune against naive loops and exact enumeration."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from made import OF_50, cosine, noise, video

from mmaccel.encoders.divprune import DivPrune
from mmaccel.errors import MethodError, NonFiniteError


def farthest(x, k):
    """Max-min sampling by distance 1 - cosine, every distance anew in every step."""
    n = len(x)

    def away(i, others):
        return min((1 - cosine(x[i], x[j]) for j in others if j != i), default=2.0)

    chosen = [max(range(n), key=lambda i: (away(i, range(n)), -i))]
    while len(chosen) < k:
        left = [i for i in range(n) if i not in chosen]
        chosen.append(max(left, key=lambda i: (away(i, chosen), -i)))
    return sorted(chosen)


def kept(tokens, **knobs):
    reduction = DivPrune(**knobs).reduce(tokens)
    assert reduction.mix is None
    return reduction.index.tolist()


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_choice_is_that_of_a_naive_loop(seed, kind):
    frames = 3 if kind == "video" else 1
    x = noise(frames, 9, 5, seed=seed)
    for k in (1, 2, 5, 9 * frames):
        assert kept(video(x, kind=kind), keep=k) == farthest(x.flatten(0, 1).double(), k)


def test_the_closest_pair_kept_is_at_least_half_as_far_apart_as_the_best_choice_allows():
    # the greedy choice is a 2-approximation in a metric; angles are one, and order as 1 - cosine does
    for seed in range(4):
        x = noise(1, 10, 3, seed=seed).double()
        angle = torch.nn.functional.normalize(x[0], dim=-1)
        angle = torch.arccos((angle @ angle.T).clamp(-1, 1)).tolist()

        def apart(choice, angle=angle):
            return min(angle[i][j] for i, j in itertools.combinations(choice, 2))

        for k in (2, 4, 6):
            best = max(map(apart, itertools.combinations(range(10), k)))
            assert apart(kept(video(x.float()), keep=k)) >= best / 2 - 1e-6


def test_every_direction_is_seen_before_any_twice():
    x = torch.eye(4)[[0, 0, 1, 1, 1, 2, 3, 3]] * torch.linspace(1, 9, 8)[:, None]
    assert kept(video(x[None]), keep=4) == [0, 2, 5, 6]
    # then all are equally far, and the earliest goes first
    assert kept(video(x[None]), keep=6) == [0, 1, 2, 3, 5, 6]


def test_a_still_video_is_shown_once():
    frame = noise(1, 6, 8)
    assert kept(video(frame.expand(4, 6, 8)), keep=6) == list(range(6))


@pytest.mark.parametrize("keep", OF_50)
def test_counts_are_exact_and_indices_distinct(keep):
    index = kept(video(noise(5, 10, 3)), keep=keep)
    assert index == sorted(set(index))
    assert len(index) == OF_50[keep]


def test_bad_use_is_refused_in_one_line():
    tokens = video(noise(1, 5, 3))
    with pytest.raises(MethodError, match="nearest number is 5"):
        DivPrune(keep=6).reduce(tokens)
    broken = tokens.features.clone()
    broken[2, 1] = torch.inf
    with pytest.raises(NonFiniteError):
        DivPrune().reduce(replace(tokens, features=broken))
