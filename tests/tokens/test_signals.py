from __future__ import annotations

import math
import statistics
from fractions import Fraction

import pytest
import torch

from mmaccel.errors import MethodError
from mmaccel.tokens import signals


def cos(a, b):
    a, b = a.tolist(), b.tolist()
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def features(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def near(got, expected):
    torch.testing.assert_close(got.double(), torch.as_tensor(expected, dtype=torch.float64), atol=1e-6, rtol=1e-6)
    assert got.dtype == torch.float32


def test_attention_received_is_minus_infinity_where_not_eligible():
    q, k = features(2, 4, 5, 3).float(), features(2, 2, 5, 3, seed=1).float()
    there = torch.tensor([[True] * 5, [False, True, True, True, True]])
    visual = torch.tensor([[True, True, False, False, True]] * 2)
    everything = signals.attention_received(q, k, key_padding=there, query_padding=there)
    assert everything[1, 0] == -torch.inf
    near(everything.masked_fill(~there, 0).sum(1), [1, 1])
    some = signals.attention_received(q, k, key_padding=there, query_padding=there, mask=visual)
    assert torch.equal(some == -torch.inf, ~(there & visual))
    assert torch.equal(some[some > -torch.inf], everything[there & visual])


@pytest.mark.parametrize("side", ["left", "right"])
def test_last_token_attention_is_the_last_row_of_the_causal_map(side):
    lengths, longest = (2, 5, 4), 5
    q, k = torch.full((3, 4, longest, 3), torch.nan), torch.full((3, 2, longest, 3), torch.nan)
    ok = torch.zeros(3, longest, dtype=torch.bool)
    expected, last = [], torch.empty(3, 4, 1, 3)
    for b, n in enumerate(lengths):
        qi, ki = features(4, n, 3, seed=b).float(), features(2, n, 3, seed=b + 9).float()
        at = slice(longest - n, longest) if side == "left" else slice(0, n)
        q[b, :, at], k[b, :, at], ok[b, at] = qi, ki, True
        last[b] = qi[:, -1:]
        row = torch.zeros(n, dtype=torch.float64)
        for h in range(4):
            logits = [sum(qi[h, -1, d].item() * ki[h // 2, j, d].item() for d in range(3)) / 3**0.5 for j in range(n)]
            total = sum(math.exp(s) for s in logits)
            row += torch.tensor([math.exp(s) / total / 4 for s in logits])
        expected.append(row)
    for queries in (q, last):
        got = signals.last_token_attention(queries, k, key_padding=ok)
        assert torch.equal(got == -torch.inf, ~ok)
        for b in range(3):
            near(got[b][ok[b]], expected[b])
    with pytest.raises(MethodError, match="last token alone"):
        signals.last_token_attention(q[:, :, :2], k, key_padding=ok)


def test_cosine_to_previous_frame():
    x = features(2, 4, 3, 5)
    mask = torch.ones(2, 4, 3, dtype=torch.bool)
    mask[1, 2, 0] = False
    got = signals.cosine_to_previous_frame(x, mask)
    assert got.shape == (2, 3, 3)
    for b in range(2):
        for t in range(3):
            for p in range(3):
                valid = (b, p) != (1, 0) or t not in (1, 2)
                near(got[b, t, p], cos(x[b, t, p], x[b, t + 1, p]) if valid else -math.inf)
    assert signals.cosine_to_previous_frame(x[:, :1]).shape == (2, 0, 3)


def test_temporal_change_keeps_the_first_frame_first():
    x = features(1, 3, 2, 4)
    x[0, 2, 1] = 2 * x[0, 1, 1]
    got = signals.temporal_change(x)
    assert (got[:, 0] == torch.inf).all()
    near(got[0, 1, 0], 1 - cos(x[0, 0, 0], x[0, 1, 0]))
    near(got[0, 2, 1], 0)
    assert (signals.temporal_change(x, first=2)[:, 0] == 2).all()
    near(signals.temporal_change(x, measure="l2")[0, 2, 1], 1)


def test_a_token_whose_predecessor_is_padding_counts_as_new():
    x = features(1, 3, 2, 4)
    mask = torch.ones(1, 3, 2, dtype=torch.bool)
    mask[0, 1, 0] = False
    got = signals.temporal_change(x, mask)
    assert got[0, 1, 0] == -torch.inf
    assert got[0, 2, 0] == torch.inf
    assert got[0, 2, 1] < 2.01


@pytest.mark.parametrize(("measure", "power"), [("l1", 1), ("l2", 2)])
def test_relative_change(measure, power):
    now, before = features(2, 3, 4), features(2, 3, 4, seed=1)
    got = signals.change(now, before, measure=measure)
    for b in range(2):
        for n in range(3):
            moved = sum(abs(float(v)) ** power for v in now[b, n] - before[b, n]) ** (1 / power)
            near(got[b, n], moved / sum(abs(float(v)) ** power for v in before[b, n]) ** (1 / power))
    assert signals.change(now, now, measure=measure).eq(0).all()
    assert signals.change(now, torch.zeros_like(now), measure=measure).isfinite().all()
    masked = signals.change(now, before, mask=torch.tensor([[True, False, True]] * 2))
    assert (masked[:, 1] == -torch.inf).all()


@pytest.mark.parametrize("grid", [(3, 4), (1, 3), (1, 1), (2, 1)])
def test_cosine_to_neighbours(grid):
    H, W = grid
    x = features(2, 2, H, W, 5)
    mask = torch.rand(2, 2, H, W, generator=torch.Generator().manual_seed(2)) > 0.25
    for m in (None, mask):
        got = signals.cosine_to_neighbours(x, m)
        for b, t, y, c in torch.cartesian_prod(*(torch.arange(n) for n in (2, 2, H, W))).tolist():
            if m is not None and not m[b, t, y, c]:
                assert got[b, t, y, c] == -torch.inf
                continue
            around = [(y - 1, c), (y + 1, c), (y, c - 1), (y, c + 1)]
            found = [
                cos(x[b, t, y, c], x[b, t, i, j])
                for i, j in around
                if 0 <= i < H and 0 <= j < W and (m is None or m[b, t, i, j])
            ]
            near(got[b, t, y, c], sum(found) / len(found) if found else 0)


def test_cosine_to_text():
    x, text = features(2, 4, 3), features(2, 3, 3, seed=1)
    text_mask = torch.tensor([[True, False, True], [False, False, False]])
    mask = torch.tensor([[True, True, True, False]] * 2)
    best = signals.cosine_to_text(x, text, mask, text_mask)
    mean = signals.cosine_to_text(x, text, mask, text_mask, reduce="mean")
    for n in range(3):
        cosines = [cos(x[0, n], text[0, m]) for m in (0, 2)]
        near(best[0, n], max(cosines))
        near(mean[0, n], sum(cosines) / 2)
    assert best[1, :3].eq(0).all()
    assert mean[1, :3].eq(0).all()
    assert (best[:, 3] == -torch.inf).all()
    near(signals.cosine_to_text(x[:1], text[:1])[0, 0], max(cos(x[0, 0], text[0, m]) for m in range(3)))
    assert signals.cosine_to_text(x, text[:, :0]).eq(0).all()


def test_unlike_reverses_the_order_and_leaves_the_ineligible_out():
    s = torch.tensor([[0.5, -torch.inf, -1.0, 1.0]])
    assert torch.equal(signals.unlike(s), torch.tensor([[0.5, -torch.inf, 2.0, 0.0]]))


def test_norm():
    x = features(2, 3, 4)
    near(signals.norm(x)[1, 2], math.sqrt(sum(float(v) ** 2 for v in x[1, 2])))
    near(signals.norm(x, p=1)[0, 1], sum(abs(float(v)) for v in x[0, 1]))
    assert signals.norm(x, torch.zeros(2, 3, dtype=torch.bool)).eq(-torch.inf).all()


@pytest.mark.parametrize("signal", [signals.random, signals.uniform])
def test_preferences_do_not_depend_on_padding_or_on_the_batch(signal):
    alone = signal((1, 5))[0]
    mask = torch.tensor([[False, False, True, True, True, True, True], [True, False, True, True, False, True, True]])
    batch = signal((2, 7), mask)
    assert torch.equal(batch == -torch.inf, ~mask)
    for b in range(2):
        assert torch.equal(batch[b][mask[b]], alone)


def test_random_is_reproducible_and_fair():
    assert torch.equal(signals.random((2, 9), seed=4), signals.random((2, 9), seed=4))
    assert not torch.equal(signals.random((1, 9), seed=4), signals.random((1, 9), seed=5))
    g = torch.Generator().manual_seed(0)
    assert not torch.equal(signals.random((1, 9), generator=g), signals.random((1, 9), generator=g))
    draws = signals.random((1, 20_000))
    assert 0 <= draws.min() < draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.01


@pytest.mark.parametrize("n", [1, 2, 7, 64, 100])
def test_uniform_is_spread_for_every_number_kept(n):
    order = signals.uniform((1, n))[0].argsort(descending=True, stable=True).tolist()
    assert sorted(order) == list(range(n))
    for k in range(1, n + 1):
        kept = sorted(order[:k])
        gaps = [b - a for a, b in zip(kept, [*kept[1:], n], strict=True)]
        widest = 2 ** math.ceil(math.log2(n / k)) if k < n else 1
        assert kept[0] == 0
        assert max(gaps) <= 2 * widest
    assert sorted(signals.uniform((1, 64))[0].argsort(descending=True)[:16].tolist()) == list(range(0, 64, 4))


def test_low_precision_features_are_scored_in_float32():
    x = features(1, 3, 4, 8).bfloat16()
    torch.testing.assert_close(signals.temporal_change(x), signals.temporal_change(x.float()))
    torch.testing.assert_close(signals.cosine_to_neighbours(x[None]), signals.cosine_to_neighbours(x[None].float()))


def test_nan_is_passed_on_and_padding_is_not():
    x = features(1, 3, 2, 4)
    x[0, 1, 0] = torch.nan
    assert torch.equal(signals.cosine_to_previous_frame(x).isnan(), torch.tensor([[[True, False], [True, False]]]))
    mask = ~x.isnan().any(-1)
    assert not signals.cosine_to_previous_frame(x, mask).isnan().any()
    assert not signals.temporal_change(x, mask).isnan().any()
    assert not signals.cosine_to_neighbours(x[None], mask[None]).isnan().any()
    assert not signals.norm(x, mask).isnan().any()


def test_zero_vectors_have_no_direction():
    assert signals.cosine_to_previous_frame(torch.zeros(1, 2, 1, 3)).eq(0).all()


def test_wrong_arguments():
    x = features(2, 3, 4, 5)
    wrong = [
        lambda: signals.cosine_to_previous_frame(x[0]),
        lambda: signals.temporal_change(x, torch.ones(2, 3, dtype=torch.bool)),
        lambda: signals.cosine_to_neighbours(x),
        lambda: signals.cosine_to_text(x, x),
        lambda: signals.cosine_to_text(x[0], x[0], reduce="sum"),
        lambda: signals.change(x, x[:1]),
        lambda: signals.change(x, x, measure="l3"),
        lambda: signals.norm(x, torch.ones(2, 3, 4)),
    ]
    for call in wrong:
        with pytest.raises(MethodError):
            call()


@pytest.mark.parametrize("share", [0.05, 0.29, 0.5, 1.0])
def test_low_variance_channels_are_those_that_vary_least(share):
    x = features(3, 12, 10) * (torch.arange(10) * 7 % 10 + 1) + 100
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1, 4:] = False
    mask[2, ::2] = False
    x[~mask] = 1e9
    got = signals.low_variance_channels(x, share, mask)
    for b in range(3):
        variance = [statistics.pvariance(x[b, mask[b], d].tolist()) for d in range(10)]
        count = max(1, math.floor(Fraction(str(share)) * 10))
        assert got[b].tolist() == sorted(sorted(range(10), key=lambda d, v=variance: v[d])[:count])
    assert torch.equal(signals.low_variance_channels(x[:1], share), got[:1])


def test_low_variance_channels_that_are_alike_are_taken_from_the_front():
    assert signals.low_variance_channels(torch.ones(1, 4, 6)).tolist() == [[0, 1, 2]]
    for share in (0.0, -0.5, 1.1, math.nan):
        with pytest.raises(MethodError, match="must be in"):
            signals.low_variance_channels(torch.ones(1, 4, 6), share)


def test_gaussian_similarity_is_a_sum_of_bells_around_the_anchor():
    x, anchors = features(2, 3, 4, 5), features(2, 1, 1, 5, seed=1)
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[1, 2, 3] = False
    got = signals.gaussian_similarity(x, anchors, mask, widths=(0.5, 3.0))
    for b in range(2):
        for t in range(3):
            for p in range(4):
                square = sum((float(u) - float(v)) ** 2 for u, v in zip(x[b, t, p], anchors[b, 0, 0], strict=True))
                want = math.exp(-square) + math.exp(-square / 6) if mask[b, t, p] else -math.inf
                near(got[b, t, p], want)
    near(signals.gaussian_similarity(x, x), torch.full((2, 3, 4), 5.0))
    assert torch.equal(signals.gaussian_similarity(x, x[0, 0, 0]), signals.gaussian_similarity(x, x[:1, :1, :1]))


def test_gaussian_similarity_refuses_what_does_not_fit():
    x = features(2, 3, 5)
    for anchor in (features(4), features(2, 2, 3, 5), features(1), features(3, 1, 5)):
        with pytest.raises(MethodError, match="must broadcast"):
            signals.gaussian_similarity(x, anchor)
    for widths in ((), (0.5, 0.0)):
        with pytest.raises(MethodError, match="above 0"):
            signals.gaussian_similarity(x, x, widths=widths)


def test_min_max_brings_each_item_to_the_unit_interval():
    scores = torch.tensor([[3.0, 1.0, 2.0, 100.0], [5.0, 5.0, 5.0, 0.0], [-1e-9, 1e-9, 0.0, 7.0], [0.0] * 4])
    mask = torch.tensor([[True, True, True, False]] * 3 + [[False] * 4])
    got = signals.min_max(scores, mask)
    none = -math.inf
    near(got, [[1, 0, 0.5, none], [0, 0, 0, none], [0, 1, 0.5, none], [none] * 4])
    near(signals.min_max(scores.masked_fill(~mask, none)), got)
    assert signals.min_max(scores[:, :3]).isfinite().all()
    assert signals.min_max(torch.tensor([[0.0, math.nan, 1.0]])).isnan().all()
