"""FastVID against naive loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from made import cosine, noise, peaks, scene, video

from mmaccel.encoders.fastvid import FastVID
from mmaccel.errors import MethodError


def cut(x, least, tau):
    """Segments by loops, as lists of frames."""
    means = x.mean(1)
    like = [cosine(means[t], means[t + 1]) for t in range(len(x) - 1)]
    smallest = sorted(range(len(like)), key=lambda t: like[t])[: least - 1]
    found = [[0]]
    for t, value in enumerate(like):
        if t in smallest or value < tau:
            found.append([])
        found[-1].append(t + 1)
    return found


def even(total, parts):
    """`total` over `parts` equal shares, the first ones getting what is left over."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def naive(x, score, method, total):
    """{kept token: its value} when `total` are kept and the anchors fit at the method's stride."""
    T, S = score.shape
    flat, out = x.reshape(T * S, -1), {}
    budgets = even(total, T)
    context = [int(budget * method.contextual + 1e-9) for budget in budgets]
    for segment in cut(x, method.segments, method.tau):
        rest = []
        for t in segment:
            order = sorted(range(S), key=lambda p, t=t: -float(score[t, p]))
            salient = order[: budgets[t] - context[t]]
            out |= {t * S + p: flat[t * S + p] for p in salient}
            rest += [t * S + p for p in range(S) if p not in salient]
        holders = sorted(segment[::-1][:: method.stride])
        wanted = sum(context[t] for t in segment)
        anchors = []
        for t, number in zip(holders, even(wanted, len(holders)), strict=True):
            anchors += peaks(flat, [i for i in rest if i // S == t], number, 4)
        members = {anchor: [anchor] for anchor in anchors}
        for i in rest if anchors else []:
            if i not in anchors:
                members[max(anchors, key=lambda a, i=i: cosine(flat[i], flat[a]))].append(i)
        for anchor, mine in members.items():
            own = max(method.beta, 1 / (len(mine) + 1))
            out[anchor] = own * flat[anchor] + (1 - own) * flat[mine].mean(0)
    return out


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"segments": 1, "tau": -1.0},
        {"segments": 3, "tau": 0.0, "stride": 2},
        {"segments": 2, "tau": -1.0, "beta": 0.0, "contextual": 0.7},
        {"contextual": 0.0},
        {"segments": 4, "stride": 1, "contextual": 1.0, "tau": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", range(3))
def test_tokens_and_values_are_those_of_the_card(knobs, seed):
    T, S = 9, 24
    x, score = scene(T, S, still=0.7, cuts=(4,), seed=seed), noise(T, S, seed=seed + 20)
    method = FastVID(keep=0.2, **knobs)
    reduction = method.reduce(video(x, score))
    want = naive(x, score, method, int(0.2 * T * S + 0.5))
    assert reduction.index.tolist() == sorted(want)
    got = reduction.apply(x.view(T * S, -1))
    torch.testing.assert_close(got, torch.stack([want[i] for i in sorted(want)]))


def test_the_segments_of_these_tests_differ():
    found = {len(cut(scene(9, 24, still=0.7, cuts=(4,), seed=0), *knobs)) for knobs in ((1, -1), (3, 0), (4, 0.5))}
    assert len(found) > 1


@pytest.mark.parametrize("contextual", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("keep", [0.03, 0.1, 0.29, 0.5, 0.9, 0.99, 1, 7, 60])
@pytest.mark.parametrize("T", [1, 2, 5, 8])
def test_the_number_kept_is_exact_also_where_anchors_do_not_fit_at_the_stride(T, keep, contextual):
    S = 12
    x, score = scene(T, S, still=0.5, cuts=(3,), seed=T), noise(T, S, seed=1)
    tokens = video(x, score)
    keep = min(keep, T * S) if isinstance(keep, int) else keep
    for knobs in ({"segments": 1, "tau": -1.0}, {"segments": 3}, {"stride": 2}):
        reduction = FastVID(keep=keep, contextual=contextual, **knobs).reduce(tokens)
        index = reduction.index.tolist()
        assert len(index) == (keep if isinstance(keep, int) else max(1, int(keep * T * S + 0.5 + 1e-9)))
        assert index == sorted(set(index))
        salient = [sum(i // S == t for i in index) for t in range(T)]
        if contextual == 0:
            assert max(salient) - min(salient) <= 1


def test_a_constant_field_stays_what_it_is():
    x = noise(1, 1, 8).expand(6, 16, 8)
    for beta, segments in itertools.product((0.0, 0.6, 1.0), (1, 3)):
        tokens = video(x, noise(6, 16, seed=1))
        out = FastVID(keep=0.2, beta=beta, segments=segments).reduce(tokens).apply(tokens.features)
        torch.testing.assert_close(out, x[0, :1].expand_as(out))


def test_identical_frames_become_one_segment_with_the_anchors_at_its_end():
    x = noise(1, 20, 8).expand(4, 20, 8)
    score = noise(1, 20, seed=1).expand(4, 20)
    reduction = FastVID(keep=24, segments=1).reduce(video(x, score))
    salient = sorted(sorted(range(20), key=lambda p: -float(score[0, p]))[:4])
    assert [i for i in reduction.index.tolist() if i < 60] == [t * 20 + p for t in range(3) for p in salient]
    last = [i - 60 for i in reduction.index.tolist() if i >= 60]
    assert set(salient) < set(last)
    assert len(last) == 4 + 8
    assert sorted(set(last) - set(salient)) == peaks(x[3], [p for p in range(20) if p not in salient], 8, 4)


def test_without_anchors_tokens_are_only_dropped():
    assert FastVID(keep=0.3, contextual=0.0).reduce(video(noise(3, 9, 4), noise(3, 9))).mix is None


def test_an_image_is_one_segment():
    x, score = noise(1, 30, 6), noise(1, 30, seed=1)
    method = FastVID(keep=10)
    reduction = method.reduce(video(x, score, kind="image"))
    want = naive(x, score, method, 10)
    assert reduction.index.tolist() == sorted(want)
    torch.testing.assert_close(reduction.apply(x[0]), torch.stack([want[i] for i in sorted(want)]))


def test_positions_stay_by_default_and_more_than_there_are_names_the_nearest():
    assert FastVID().positions == "original"
    with pytest.raises(MethodError, match="nearest number is 18"):
        FastVID(keep=19).reduce(video(noise(2, 9, 4), noise(2, 9)))
