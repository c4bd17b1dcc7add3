"""IDPruner against naive greedy loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from checks import call
from made import OF_50, cosine, noise, video

import mmaccel
from mmaccel.encoders.divprune import DivPrune
from mmaccel.encoders.idpruner import IDPruner
from mmaccel.encoders.visionzip import VisionZip
from mmaccel.errors import MethodError, NonFiniteError
from mmaccel.measure.replay import encoder_key
from mmaccel.targets import resolve
from mmaccel.tiny.families import FAMILIES


def importance(values):
    low, high = min(values), max(values)
    return [(v - low) / (high - low) if high > low else 0.0 for v in values]


def greedy(x, importance, k, balance):
    """Maximal marginal relevance, every cosine anew in every step."""
    chosen = [max(range(len(x)), key=lambda i: (importance[i], -i))]
    while len(chosen) < k:
        worth = {
            i: balance * importance[i] - (1 - balance) * max(cosine(x[i], x[j]) for j in chosen)
            for i in range(len(x))
            if i not in chosen
        }
        chosen.append(max(worth, key=lambda i: (worth[i], -i)))
    return chosen


def top(values, k):
    return sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:k])


def kept(tokens, **knobs):
    reduction = IDPruner(**knobs).reduce(tokens)
    assert reduction.mix is None
    return reduction.index.tolist()


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("balance", [0.0, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("source", ["attention", "norm"])
def test_the_choice_is_that_of_a_naive_loop(source, balance, kind):
    frames = 3 if kind == "video" else 1
    x = noise(frames, 8, 6, seed=1).double() * torch.linspace(0.5, 2, 8)[:, None]
    score = noise(frames, 8, seed=2).abs() * 1e-3
    tokens = video(x.float(), score, kind)
    flat = x.flatten(0, 1)
    values = importance([float(v) for v in (score.flatten() if source == "attention" else flat.norm(dim=-1))])
    for k in (1, 2, frames * 4, frames * 8):
        want = sorted(greedy(flat, values, k, balance))
        assert kept(tokens, keep=k, balance=balance, importance=source) == want


def test_importance_alone_is_top_k_and_so_is_one_round_for_all():
    score = noise(2, 20, seed=1).abs()
    tokens = video(noise(2, 20, 5), score)
    want = top(score.flatten().tolist(), 9)
    assert kept(tokens, keep=9, balance=1.0) == want
    for balance in (0.0, 0.3, 0.7):
        assert kept(tokens, keep=9, balance=balance, per_round=9) == want
        assert kept(tokens, keep=9, balance=balance, per_round=50) == want
    assert kept(tokens, keep=9, balance=0.3) != want


def test_several_a_round_are_the_best_of_the_round():
    x, score = noise(1, 15, 5), noise(1, 15, seed=1).abs()
    values = importance(score[0].tolist())
    chosen = top(values, 4)
    for _ in range(2):
        worth = [
            -math.inf if i in chosen else 0.5 * values[i] - 0.5 * max(cosine(x[0, i], x[0, j]) for j in chosen)
            for i in range(15)
        ]
        chosen += top(worth, 4)
    assert kept(video(x, score), keep=12, per_round=4) == sorted(chosen)


def test_diversity_alone_starts_at_the_most_important_token():
    x, score = noise(1, 12, 4), noise(1, 12, seed=1)
    assert kept(video(x, score), keep=1, balance=0.0) == [int(score.argmax())]
    assert kept(video(x), keep=1, balance=0.0, importance="constant") == [0]
    for k in (2, 5, 11):
        want = greedy(x[0], [0.0] * 12, k, 0.5)
        for balance in (0.0, 0.5):
            assert kept(video(x), keep=k, balance=balance, importance="constant") == sorted(want)


def test_constant_importance_chooses_as_divprune_after_the_first():
    # three directions, ten times each: both must take one of each, whichever they begin with
    x = torch.eye(3).repeat(10, 1)[None]
    by_distance = DivPrune(keep=3).reduce(video(x)).index % 3
    assert sorted(by_distance.tolist()) == [0, 1, 2]
    assert [i % 3 for i in kept(video(x), keep=3, importance="constant")] == [0, 1, 2]


def test_a_duplicate_is_taken_only_when_it_beats_the_others_at_a_penalty_of_one():
    # tokens 0 and 1 are equal, the others at right angles to them and to each other
    x = torch.eye(4)[[0, 0, 1, 2, 3]][None]
    score = torch.tensor([[1.0, 0.9, 0.2, 0.1, 0.0]])
    # for the duplicate 0.9 b - (1 - b), for the best other one 0.2 b: equal at b = 1 / 1.7
    assert kept(video(x, score), keep=2, balance=0.58) == [0, 2]
    assert kept(video(x, score), keep=2, balance=0.60) == [0, 1]
    for k in (2, 3, 4):
        assert kept(video(x, score), keep=k, balance=0.5) == [0, *range(2, k + 1)]


def test_equal_tokens_are_taken_in_order():
    same = noise(1, 1, 4).expand(2, 6, 4)
    assert kept(video(same, torch.ones(2, 6)), keep=5) == [0, 1, 2, 3, 4]


def test_the_scale_of_importance_does_not_matter():
    x, score = noise(2, 15, 5), noise(2, 15, seed=1).abs()
    want = kept(video(x, score), keep=10)
    for factor in (2.0**-30, 2.0**20):
        assert kept(video(x, score * factor), keep=10) == want


@pytest.mark.parametrize("keep", OF_50)
def test_counts_are_exact_and_indices_distinct(keep):
    index = kept(video(noise(5, 10, 3), noise(5, 10, seed=1)), keep=keep)
    assert index == sorted(set(index))
    assert len(index) == OF_50[keep]


def test_bad_use_is_refused_in_one_line():
    tokens = video(noise(1, 5, 3), noise(1, 5))
    with pytest.raises(MethodError, match="nearest number is 5"):
        IDPruner(keep=6).reduce(tokens)
    with pytest.raises(MethodError, match="balance"):
        IDPruner(balance=1.2)
    with pytest.raises(MethodError, match="per_round"):
        IDPruner(per_round=0)
    with pytest.raises(MethodError, match="'attention', 'norm', 'constant'"):
        IDPruner(importance="scorer")
    broken = tokens.features.clone()
    broken[2, 1] = torch.nan
    with pytest.raises(NonFiniteError):
        IDPruner(importance="norm").reduce(replace(tokens, features=broken))


def test_only_attention_touches_the_vision_tower(model):
    family = FAMILIES["llava-onevision"]
    net, inputs = model(family), family.inputs("video")
    target = resolve(net)
    for source in ("attention", "norm", "constant"):
        method = IDPruner(keep=0.3, importance=source)
        reads = source == "attention"
        assert any(touch.where.startswith("vision layer") for touch in method.plan(target)) == reads
        with mmaccel.accelerate(net, method) as handle:
            probed = target.site.score_attention().config._attn_implementation
            assert probed.startswith("mmaccel_probe_") == reads
            call(net, inputs)
            places = [place for place in family.places("video")[0] if place and place.x >= 0]
            gone = inputs["input_ids"].shape[1] - len(handle.report().kept("idpruner")[0])
            assert gone == len(places) - int(len(places) * 0.3 + 0.5)


def test_encoder_calls_are_replayed_only_where_the_same_was_read():
    attention, norm, constant = (encoder_key([IDPruner(importance=s)]) for s in ("attention", "norm", "constant"))
    assert attention == encoder_key([VisionZip()])
    assert norm == constant == encoder_key([DivPrune()])
    assert attention != norm
