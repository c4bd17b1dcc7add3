"""HoliTom against brute force and naive loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from made import cosine, noise, scene, video

from mmaccel.encoders.holitom import HoliTom
from mmaccel.errors import MethodError, NotApplicableError
from mmaccel.kernels.frame_dp import frame_dp, windows


def segment(static, longest=1024):
    cut = frame_dp(static[None], longest)
    return windows(cut.starts)[0], int(cut.saved)


def saving(static, start, stop):
    """Tokens saved when the positions static on all steps of frames start..stop-1 are kept once."""
    still = sum(all(static[t][p] for t in range(start, stop - 1)) for p in range(static.shape[1]))
    return (stop - 1 - start) * still if stop - start > 1 else 0


def best_by_force(static, longest):
    T, best = static.shape[0] + 1, 0
    for cuts in itertools.product([False, True], repeat=T - 1):
        edges = [0, *(t + 1 for t, cut in enumerate(cuts) if cut), T]
        if all(stop - start <= longest for start, stop in itertools.pairwise(edges)):
            best = max(best, sum(saving(static, start, stop) for start, stop in itertools.pairwise(edges)))
    return best


@pytest.mark.parametrize("longest", [1, 3, 1024])
@pytest.mark.parametrize("T", range(1, 11))
def test_segmentation_saves_as_much_as_brute_force(T, longest):
    for seed in range(6):
        static = torch.rand(T - 1, 7, generator=torch.Generator().manual_seed(seed)) < 0.55 + 0.07 * seed
        parts, saved = segment(static, longest)
        assert [t for start, stop in parts for t in range(start, stop)] == list(range(T))
        assert all(stop - start <= longest for start, stop in parts)
        assert saved == sum(saving(static, *window) for window in parts) == best_by_force(static, longest)


def test_identical_frames_become_one():
    x = noise(1, 12, 8).expand(6, 12, 8)
    tokens = video(x, noise(6, 12, seed=1))
    reduction = HoliTom(keep=0.5, temporal_only=True).reduce(tokens)
    assert reduction.index.tolist() == list(range(12))
    torch.testing.assert_close(reduction.apply(tokens.features), x[0])
    # 12 of 72 are left, less than the 36 asked for: the ratio is cut at 1
    assert HoliTom(keep=0.5).reduce(tokens).index.tolist() == list(range(12))
    assert len(HoliTom(keep=0.1).reduce(tokens).index) == round(12 * 0.1 * 6)


def test_unrelated_frames_are_only_selected_by_score():
    T, S = 5, 13
    tokens = video(noise(T, S, 64), noise(T, S, seed=1))
    reduction = HoliTom(keep=0.3).reduce(tokens)
    assert reduction.mix is None
    want = []
    for t in range(T):
        row = tokens.score.view(T, S)[t].tolist()
        best = sorted(range(S), key=lambda p, row=row: -row[p])[: math.ceil(S * 0.3)]
        want += [t * S + p for p in sorted(best)]
    assert reduction.index.tolist() == want


def test_at_full_ratio_without_static_tokens_nothing_changes():
    tokens = video(noise(4, 9, 32), noise(4, 9, seed=1))
    reduction = HoliTom(keep=0.5, temporal_only=True, tau=1.0).reduce(tokens)
    assert torch.equal(reduction.apply(tokens.features), tokens.features)


@pytest.mark.parametrize("contextual", [0.0, 0.4])
@pytest.mark.parametrize("keep", [0.25, 0.15, 0.1, 17])
@pytest.mark.parametrize("tau", [0.8, 0.3])
def test_the_number_kept_is_within_the_bound_of_the_card(keep, tau, contextual):
    for seed, still in itertools.product(range(3), (0.2, 0.6, 0.95)):
        T, S = 8, 36
        x = scene(T, S, still=still, cuts=(3, 5), seed=seed)
        tokens = video(x, noise(T, S, seed=seed + 10))
        static = torch.tensor([[cosine(x[t, p], x[t + 1, p]) > tau for p in range(S)] for t in range(T - 1)])
        parts, saved = segment(static)
        n = len(HoliTom(keep=keep, tau=tau, contextual=contextual).reduce(tokens).index)
        wanted = keep if isinstance(keep, int) else keep * T * S
        if wanted / (T * S - saved) >= 1:
            assert n == T * S - saved
        else:
            assert abs(n - wanted) <= T + len(parts) / 2


def test_a_constant_field_stays_what_it_is():
    x = noise(1, 1, 8).expand(6, 16, 8)
    tokens = video(x, noise(6, 16, seed=1))
    for method in (HoliTom(keep=0.1), HoliTom(keep=0.1, tau=1.0, contextual=0.5), HoliTom(temporal_only=True)):
        out = method.reduce(tokens).apply(tokens.features)
        torch.testing.assert_close(out, x[0, :1].expand_as(out))
    inner = HoliTom().reduce_inside(tokens)
    out = inner.apply(tokens.features)
    torch.testing.assert_close(out, x[0, :1].expand_as(out))


def merged(x, centres, beta):
    """Cluster merge by loops: members go to the nearest centre, centre' = beta * centre + (1 - beta) * mean."""
    members = {c: [] for c in centres}
    for i in range(len(x)):
        if i not in members:
            members[min(centres, key=lambda c, i=i: float((x[i] - x[c]).norm()))].append(i)
    return torch.stack([
        x[c] if not members[c] else beta * x[c] + (1 - beta) * torch.stack([x[i] for i in members[c]]).mean(0)
        for c in centres
    ])  # fmt: skip


def test_values_of_static_and_contextual_tokens_follow_the_card():
    T, S, beta = 4, 24, 0.6
    x = scene(T, S, still=0.5, seed=3)
    score = noise(T, S, seed=4)
    reduction = HoliTom(keep=0.3, tau=0.9, contextual=0.5, beta=beta).reduce(video(x, score))
    out = reduction.apply(x.view(T * S, -1))
    static = torch.tensor([[cosine(x[t, p], x[t + 1, p]) > 0.9 for p in range(S)] for t in range(T - 1)])
    parts, saved = segment(static)
    ratio = min(0.3 / ((T * S - saved) / (T * S)), 1)
    assert any(stop - start > 1 for start, stop in parts)
    kept, done = reduction.index.tolist(), 0
    for start, stop in parts:
        still = [p for p in range(S) if stop - start > 1 and static[start : stop - 1, p].all()]
        count = round(len(still) * ratio)
        mean = x[start:stop, still].mean(0)
        centres = [still.index(k - start * S) for k in kept[done : done + count]]
        torch.testing.assert_close(out[done : done + count], merged(mean, centres, beta))
        done += count
        for t in range(start, stop):
            free = [p for p in range(S) if p not in still]
            number = math.ceil(len(free) * ratio)
            dominant = round(number * 0.5)
            best = sorted(sorted(free, key=lambda p, t=t: -float(score[t, p]))[:dominant])
            assert kept[done : done + dominant] == [t * S + p for p in best]
            assert torch.equal(out[done : done + dominant], x[t, best])
            rest = [p for p in free if p not in best]
            centres = [rest.index(k - t * S) for k in kept[done + dominant : done + number]]
            torch.testing.assert_close(out[done + dominant : done + number], merged(x[t, rest], centres, beta))
            done += number
    assert done == len(kept)


def test_text_between_frames_keeps_every_survivor_in_its_frame():
    x, score = scene(4, 20, still=0.6, seed=2), noise(4, 20, seed=3)
    together, apart = (HoliTom(keep=0.4, tau=0.6).reduce(video(x, score, contiguous=c)) for c in (True, False))
    assert apart.index.tolist() == sorted(together.index.tolist())
    order = together.index.argsort()
    flat = x.view(80, -1)
    torch.testing.assert_close(apart.apply(flat), together.apply(flat)[order])


def test_the_inner_part_averages_dropped_tokens_into_the_kept_one_most_like_them():
    x, score = noise(1, 21, 6), noise(1, 21, seed=1)
    reduction = HoliTom(inner_keep=0.4).reduce_inside(video(x, score))
    kept = sorted(sorted(range(21), key=lambda i: -float(score[0, i]))[: round(21 * 0.4)])
    assert reduction.index.tolist() == kept
    groups = {k: [x[0, k]] for k in kept}
    for i in range(21):
        if i not in groups:
            groups[max(kept, key=lambda k, i=i: cosine(x[0, i], x[0, k]))].append(x[0, i])
    want = torch.stack([torch.stack(groups[k]).mean(0) for k in kept])
    torch.testing.assert_close(reduction.apply(x[0]), want)
    assert HoliTom(inner_keep=1.0).reduce_inside(video(x, score)) is None


def test_something_is_left_of_a_still_video_at_any_budget():
    tokens = video(noise(1, 9, 8).expand(2, 9, 8), noise(2, 9, seed=1))
    reduction = HoliTom(keep=0.01).reduce(tokens)
    assert reduction.index.tolist() == [int(tokens.score.argmax())]


def test_frames_of_different_sizes_are_refused():
    tokens = video(noise(2, 5, 4), noise(2, 5))
    from dataclasses import replace

    cut = replace(tokens, features=tokens.features[:-1], cell=tokens.cell[:-1], score=tokens.score[:-1])
    with pytest.raises(NotApplicableError, match="before the one that drops"):
        HoliTom().reduce(cut)
    with pytest.raises(MethodError, match="nearest number is 10"):
        HoliTom(keep=11).reduce(tokens)
