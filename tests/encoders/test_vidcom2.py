"""VidCom2 against naive loops."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
import torch
from made import OF_50, noise, scene, video

from mmaccel.encoders.vidcom2 import VidCom2
from mmaccel.errors import MethodError, NotApplicableError

ALPHAS = (1 / 8, 1 / 4, 1 / 2, 1, 2)


def similarities(x):
    """[T][S] pairs: similarity to the video's mean and to the frame's, by the card, in loops over floats."""
    T, S, D = x.shape
    rows = x.double().reshape(T * S, D).tolist()
    variance = [statistics.pvariance([row[d] for row in rows]) for d in range(D)]
    low = sorted(sorted(range(D), key=lambda d: variance[d])[: max(1, D // 2)])
    unit = []
    for row in rows:
        length = math.sqrt(sum(row[d] ** 2 for d in low))
        unit.append([row[d] / length for d in low])

    def mean(group):
        return [sum(column) / len(group) for column in zip(*group, strict=True)]

    def like(u, anchor):
        square = sum((a - b) ** 2 for a, b in zip(u, anchor, strict=True))
        return sum(math.exp(-square / (2 * a)) for a in ALPHAS)

    whole = mean(unit)
    frames = [unit[t * S : (t + 1) * S] for t in range(T)]
    return [[(like(u, whole), like(u, mean(frame))) for u in frame] for frame in frames]


def scales(pairs, keep, temperature):
    """The card's share of each frame, before any clamp."""
    means = [-sum(v for v, _ in frame) / len(frame) / temperature for frame in pairs]
    top = max(means)
    parts = [math.exp(m - top) for m in means]
    return [keep * (1 + p / sum(parts) - 1 / len(parts)) for p in parts]


def kept_of(tokens, **knobs):
    reduction = VidCom2(**knobs).reduce(tokens)
    assert reduction.mix is None
    index = reduction.index.tolist()
    assert index == sorted(set(index))
    T, S = tokens.frames()
    return [[i - t * S for i in index if i // S == t] for t in range(T)]


@pytest.mark.parametrize(("T", "S", "keep", "temperature"), [
    (6, 20, 0.25, 0.01), (6, 20, 0.4, 0.2), (5, 17, 0.3, 5.0), (2, 30, 0.1, 0.05),
])  # fmt: skip
def test_each_frame_keeps_what_is_least_like_it_and_the_video(T, S, keep, temperature):
    x = scene(T, S, 12, still=0.6, cuts=(3,), seed=T) + 1
    pairs = similarities(x)
    kept = kept_of(video(x), keep=keep, temperature=temperature)
    wanted = scales(pairs, keep, temperature)
    assert max(wanted) < 1
    assert sum(map(len, kept)) == int(keep * T * S + 0.5)
    for frame, chosen, share in zip(pairs, kept, wanted, strict=True):
        assert abs(len(chosen) - share * S) < 1
        assert chosen == sorted(sorted(range(S), key=lambda p, f=frame: sum(f[p]))[: len(chosen)])


@pytest.mark.parametrize("keep", [0.25, 0.5, 24, 33, 4])
def test_equal_frames_have_equal_budgets_and_keep_equal_places(keep):
    kept = kept_of(video(noise(1, 16, 10, seed=3).expand(6, 16, 10).contiguous()), keep=keep)
    counts = [len(frame) for frame in kept]
    assert sum(counts) == (keep if isinstance(keep, int) else int(keep * 96))
    assert max(counts) - min(counts) <= (0 if sum(counts) % 6 == 0 else 1)
    longest = max(kept, key=len)
    assert all(len(frame) < len(longest) or frame == longest for frame in kept)


@pytest.mark.parametrize(("keep", "counts"), [
    (0.25, [4, 4, 4, 9, 4]),  # softmax at this temperature is one for frame 3: (1 + 1 - 1/5) * 5 and (1 - 1/5) * 5
    (0.88, [17, 17, 17, 20, 17]),  # 1.8 * 17.6 is more than the frame holds: the others share what is left
    (5, [1, 1, 1, 1, 1]),  # 1.8 and 0.8 of a token, and each frame keeps one
    (4, [1, 1, 1, 1, 0]),  # 1.44 and 0.64, rounded by largest remainder
])  # fmt: skip
def test_the_frame_that_stands_out_keeps_more_than_the_others(keep, counts):
    x = noise(1, 20, 8, seed=1).expand(5, 20, 8).clone() + 2
    x[3] = -x[3]
    assert [len(frame) for frame in kept_of(video(x), keep=keep)] == counts


@pytest.mark.parametrize("kind", ["image", "video"])
def test_one_frame_is_compared_with_itself_alone(kind):
    x = noise(1, 15, 8)
    pairs = similarities(x)[0]
    want = sorted(sorted(range(15), key=lambda p: sum(pairs[p]))[:6])
    assert kept_of(video(x, kind=kind), keep=6) == [want]


@pytest.mark.parametrize("keep", OF_50)
@pytest.mark.parametrize("cut", [None, 2])
def test_counts_are_exact_and_every_frame_keeps_a_token_where_it_can(keep, cut):
    kept = kept_of(video(scene(5, 10, cuts=() if cut is None else (cut,))), keep=keep)
    number = sum(map(len, kept))
    assert number == OF_50[keep]
    assert number < 5 or min(map(len, kept)) >= 1


def test_channels_that_vary_much_do_not_matter():
    x = noise(3, 10, 8, seed=2)
    loud = torch.cat([x, 1e3 * noise(3, 10, 8, seed=3)], -1)
    assert kept_of(video(loud), keep=0.4) == kept_of(video(x), keep=0.4, channels=1.0)
    assert kept_of(video(loud), keep=0.4, channels=1.0) != kept_of(video(x), keep=0.4, channels=1.0)


def test_bad_use_is_refused_in_one_line():
    tokens = video(noise(2, 5, 4))
    with pytest.raises(MethodError, match="nearest number is 10"):
        VidCom2(keep=11).reduce(tokens)
    for knobs in ({"channels": 0.0}, {"channels": 1.1}, {"temperature": 0.0}):
        with pytest.raises(MethodError, match=next(iter(knobs))):
            VidCom2(**knobs)
    with pytest.raises(NotApplicableError, match="before the one that drops"):
        VidCom2().reduce(replace(tokens, features=tokens.features[:-1], cell=tokens.cell[:-1]))
