"""PruMerge against naive loops."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from made import OF_50, cosine, noise, video

from mmaccel.encoders.prumerge import PruMerge
from mmaccel.errors import MethodError, NotApplicableError


def top(values, k):
    return sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:k])


def absorbed(x, share, kept, neighbours):
    """[K, D]: each kept token and its nearest others, weighted by their share of the attention."""
    out = []
    for k in kept:
        others = sorted((j for j in range(len(x)) if j != k), key=lambda j, k=k: -cosine(x[k], x[j]))[:neighbours]
        weights = [1.0, *(share[j] for j in others)]
        out.append(sum(w * x[j] for w, j in zip(weights, [k, *others], strict=True)) / sum(weights))
    return out


def one_frame(x, score, kept, neighbours, rest):
    """(places, values) of one frame of which `kept` are chosen."""
    share = (score / score.sum()).tolist()
    places, values = list(kept), absorbed(x, share, kept, neighbours)
    if rest:
        dropped = [i for i in range(len(x)) if i not in kept]
        places.append(max(dropped, key=lambda i: share[i]))
        values.append(sum(share[i] * x[i] for i in dropped) / sum(share[i] for i in dropped))
    order = sorted(range(len(places)), key=places.__getitem__)
    return [places[i] for i in order], torch.stack([values[i] for i in order])


def compare(reduction, x, frames, S):
    out = reduction.apply(x.flatten(0, 1).float())
    assert reduction.index.tolist() == [p + t * S for t, (places, _) in enumerate(frames) for p in places]
    torch.testing.assert_close(out, torch.cat([values for _, values in frames]).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("rest", [True, False])
@pytest.mark.parametrize("neighbours", [0, 1, 5, 32])
def test_the_most_attended_tokens_take_in_those_most_like_them(neighbours, rest, kind):
    T, S, budget = (3, 16, 5) if kind == "video" else (1, 16, 5)
    x, score = noise(T, S, 6).double(), noise(T, S, seed=1).abs()
    reduction = PruMerge(keep=T * budget, neighbours=neighbours, rest=rest).reduce(video(x.float(), score, kind))
    frames = [
        one_frame(x[t], score[t].double(), top(score[t].tolist(), budget - rest), neighbours, rest) for t in range(T)
    ]
    compare(reduction, x, frames, S)
    assert (reduction.mix is None) == (neighbours == 0 and not rest)


def test_part_of_the_kept_tokens_is_evenly_spaced_among_the_others():
    S = 30
    x, score = noise(1, S, 6).double(), noise(1, S, seed=1).abs()
    kept = PruMerge(keep=12, spread=0.5, neighbours=0, rest=False).reduce(video(x.float(), score)).index.tolist()
    best = top(score[0].tolist(), 6)
    assert set(best) < set(kept)
    others = [i for i in range(S) if i not in best]
    gaps = [b - a for a, b in itertools.pairwise(others.index(i) for i in kept if i not in best)]
    assert len(gaps) == 5
    assert max(gaps) - min(gaps) <= 1
    whole = PruMerge(keep=12, spread=0.5, neighbours=4).reduce(video(x.float(), score))
    # one of the twelve is for the rest, and of the eleven half, 5.5, is rounded to even
    best = top(score[0].tolist(), 5)
    held = [i for i in whole.index.tolist() if i in best]
    assert held == best
    assert len(whole.index) == 12


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rest", [True, False])
def test_the_adaptive_number_is_that_of_the_upper_fence_in_each_frame(seed, rest):
    T, S = 4, 40
    x = noise(T, S, 6, seed=seed).double()
    score = noise(T, S, seed=seed + 9).pow(4)
    score[3] = 0.5  # nothing stands out: the first one is kept
    wanted = []
    for row in score.numpy():
        low, high = np.percentile(row, [25, 75])
        wanted.append(max(1, int((row > high + 1.5 * (high - low)).sum())))
    assert len(set(wanted)) > 1
    reduction = PruMerge(adaptive=True, neighbours=3, rest=rest, keep=0.9).reduce(video(x.float(), score))
    frames = [one_frame(x[t], score[t].double(), top(score[t].tolist(), wanted[t]), 3, rest) for t in range(T)]
    compare(reduction, x, frames, S)


def test_the_adaptive_plus_variant_spaces_three_tokens_for_each_that_stands_out():
    score = torch.full((1, 60), 0.01)
    score[0, [7, 30, 41]] = torch.tensor([0.5, 0.4, 0.3])
    plus = PruMerge.preset("llava plus", rest=False).reduce(video(noise(1, 60, 5), score)).index.tolist()
    assert {7, 30, 41} < set(plus)
    assert len(plus) == 12
    # more than there are is all there are
    score[0, :13] = torch.arange(13) + 1.0
    assert PruMerge(adaptive=True, spread=0.9).reduce(video(noise(1, 60, 5), score)).index.tolist() == list(range(60))


def test_keep_does_not_switch_off_what_is_adaptive():
    assert PruMerge(keep=1.0).neutral
    assert not PruMerge(keep=1.0, adaptive=True).neutral


@pytest.mark.parametrize("knobs", [{}, {"neighbours": 4, "spread": 0.5}, {"adaptive": True}, {"rest": False}])
def test_a_constant_field_stays_what_it_is(knobs):
    x = noise(1, 1, 8).expand(3, 16, 8)
    for score in (noise(3, 16, seed=1).abs(), torch.zeros(3, 16)):
        out = PruMerge(**knobs).reduce(video(x, score)).apply(x.reshape(48, 8))
        torch.testing.assert_close(out, x[0, :1].expand_as(out))


@pytest.mark.parametrize("spread", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("keep", OF_50)
def test_counts_are_exact_and_even_over_frames(keep, spread):
    reduction = PruMerge(keep=keep, spread=spread).reduce(video(noise(5, 10, 3), noise(5, 10, seed=1).abs()))
    index = reduction.index.tolist()
    assert index == sorted(set(index))
    assert len(index) == OF_50[keep]
    counts = torch.bincount(reduction.index // 10, minlength=5).tolist()
    assert max(counts) - min(counts) <= 1


def test_the_scale_of_attention_does_not_matter():
    x, score = noise(2, 15, 5), noise(2, 15, seed=1).abs()
    want = PruMerge(keep=0.4).reduce(video(x, score))
    for factor in (2.0**-30, 2.0**20):
        got = PruMerge(keep=0.4).reduce(video(x, score * factor))
        assert torch.equal(got.index, want.index)
        assert torch.equal(got.mix.weights, want.mix.weights)


def test_bad_use_is_refused_in_one_line():
    tokens = video(noise(2, 5, 4), noise(2, 5).abs())
    with pytest.raises(MethodError, match="nearest number is 10"):
        PruMerge(keep=11).reduce(tokens)
    with pytest.raises(MethodError, match="spread below 1"):
        PruMerge(adaptive=True, spread=1.0)
    for knobs in ({"neighbours": -1}, {"spread": 1.1}):
        with pytest.raises(MethodError, match=next(iter(knobs))):
            PruMerge(**knobs)
    cut = replace(tokens, features=tokens.features[:-1], cell=tokens.cell[:-1], score=tokens.score[:-1])
    with pytest.raises(NotApplicableError, match="before the one that drops"):
        PruMerge().reduce(cut)
