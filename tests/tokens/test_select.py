from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmaccel.errors import MethodError, NonFiniteError
from mmaccel.kernels.greedy_diverse import reference as greedy
from mmaccel.kernels.pairwise_match import cpu as matching
from mmaccel.tokens import select

INF = math.inf
# Few distinct values, so that ties are everywhere.
score_rows = st.integers(0, 9).flatmap(
    lambda n: st.lists(
        st.lists(st.sampled_from([-INF, -1.0, 0.0, 0.5, 2.0, INF]), min_size=n, max_size=n), min_size=1, max_size=3
    )
)


def features(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def as_scores(rows):
    return torch.tensor(rows, dtype=torch.float32).reshape(len(rows), -1)


def best(row, k, among=None):
    eligible = [i for i in (range(len(row)) if among is None else among) if row[i] > -INF]
    return sorted(sorted(eligible, key=lambda i: (-row[i], i))[:k])


def rows_of(indices):
    """Lists without the filling -1, after checking that it stands behind."""
    lists = []
    for row in indices.tolist():
        kept = [i for i in row if i >= 0]
        assert row == kept + [-1] * (len(row) - len(kept))
        lists.append(kept)
    assert indices.dtype == torch.int64
    return lists


@given(score_rows, st.data())
def test_top_k_is_sorting(rows, data):
    scores = as_scores(rows)
    counts = [data.draw(st.integers(0, sum(v > -INF for v in row))) for row in rows]
    got = select.top_k(scores, torch.tensor(counts))
    assert got.shape == (len(rows), max(counts))
    expected = [best(row, k) for row, k in zip(rows, counts, strict=True)]
    assert rows_of(got) == expected
    mask = select.top_k_mask(scores, torch.tensor(counts))
    assert [m.nonzero().flatten().tolist() for m in mask] == expected


def test_top_k_takes_one_number_for_all():
    scores = torch.tensor([[1.0, 3.0, 3.0, 0.0], [-INF, 1.0, -INF, 1.0]])
    assert select.top_k(scores, 2).tolist() == [[1, 2], [1, 3]]
    assert select.top_k(scores, 0).shape == (2, 0)
    assert select.top_k(torch.empty(0, 3), 0).shape == (0, 0)


@pytest.mark.parametrize(("k", "nearest"), [(3, 2), (-1, 0)])
def test_a_count_that_cannot_be_met_names_the_nearest(k, nearest):
    scores = torch.tensor([[1.0, 2.0, 3.0], [1.0, -INF, 1.0]])
    with pytest.raises(MethodError, match=f"nearest number is {nearest}$"):
        select.top_k(scores[1:], k)
    with pytest.raises(MethodError, match="item 1"):
        select.top_k(scores, 3)


def test_indices_and_masks_are_inverse():
    mask = torch.tensor([[True, False, True, True], [False, False, True, False], [False] * 4])
    indices = select.indices_of(mask)
    assert indices.tolist() == [[0, 2, 3], [2, -1, -1], [-1, -1, -1]]
    assert torch.equal(select.mask_of(indices, 4), mask)
    assert select.indices_of(mask[:, :0]).shape == (3, 0)


def naive_windows(row, windows, k):
    eligible = [i for i, v in enumerate(row) if v > -INF]
    start, kept = 0, []
    for w in range(windows):
        length = len(eligible) // windows + (w < len(eligible) % windows)
        kept += best(row, k, eligible[start : start + length])
        start += length
    return sorted(kept)


@given(score_rows, st.integers(1, 3), st.data())
def test_per_window_top_k(rows, k, data):
    windows = [data.draw(st.integers(0, sum(v > -INF for v in row) // k)) for row in rows]
    got = select.per_window_top_k(as_scores(rows), torch.tensor(windows), k)
    assert rows_of(got) == [naive_windows(row, w, k) for row, w in zip(rows, windows, strict=True)]
    assert [len(r) for r in rows_of(got)] == [w * k for w in windows]


def test_per_window_top_k_refuses_what_does_not_fit():
    with pytest.raises(MethodError, match="nearest number is 3"):
        select.per_window_top_k(torch.zeros(1, 3), 2, 2)
    with pytest.raises(MethodError):
        select.per_window_top_k(torch.zeros(1, 3), 2, 0)


def test_threshold():
    scores = torch.tensor([[0.5, 0.6, -INF, INF], [0.1, 0.2, 0.2, 0.0]])
    assert select.threshold(scores, 0.5).tolist() == [[False, True, False, True], [False] * 4]
    kept = select.threshold(scores, 0.5, minimum=2)
    assert kept.tolist() == [[False, True, False, True], [False, True, True, False]]
    assert select.threshold(scores, -INF)[0].tolist() == [True, True, False, True]


@given(st.integers(0, 60), st.data())
def test_evenly_spaced(n, data):
    k = data.draw(st.integers(0, n))
    got = select.evenly_spaced(n, k).tolist()
    assert got == [math.floor((i + 0.5) * n / k) for i in range(k)]
    assert len(set(got)) == k
    assert select.evenly_spaced(n, n).tolist() == list(range(n))
    with pytest.raises(MethodError):
        select.evenly_spaced(n, n + 1)


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("block", [1, 10, 1 << 24])
def test_best_partner(monkeypatch, metric, block):
    monkeypatch.setattr(matching, "_BLOCK", block)
    a, b = features(2, 5, 3) + 4, features(2, 4, 3, seed=1) + 4
    mask = torch.tensor([[True, False, True, True], [False] * 4])
    index, value = select.best_partner(a, b, mask=mask, metric=metric)
    alike = cosine if metric == "cosine" else lambda u, v: -float((u - v).norm())
    for n in range(5):
        found = [alike(a[0, n], b[0, m]) if mask[0, m] else -INF for m in range(4)]
        assert index[0, n] == found.index(max(found))
        assert value[0, n].item() == pytest.approx(max(found), abs=1e-6)
    assert index[1].eq(-1).all()
    assert value[1].eq(-INF).all()
    own, _ = select.best_partner(a, a, metric=metric)
    other, _ = select.best_partner(a, a, metric=metric, exclude_self=True)
    assert own.tolist() == [list(range(5))] * 2
    assert (other != torch.arange(5)).all()
    with pytest.raises(MethodError):
        select.best_partner(a, b, metric="manhattan")


def test_best_partner_of_equal_rows_is_the_first():
    b = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
    for metric in ("cosine", "euclidean"):
        assert select.best_partner(b, b, metric=metric)[0].tolist() == [[0, 1, 1]]


def naive_greedy(first, value, eligible, k):
    picked = []
    for _ in range(k):
        rest = [i for i in eligible if i not in picked]
        worth = [first[i] if not picked else value(i, picked) for i in rest]
        picked.append(rest[worth.index(max(worth))])
    return sorted(picked)


MASK = torch.tensor([[True] * 8, [True, False, True, True, False, True, True, False]])
COUNTS = torch.tensor([6, 3])


@pytest.mark.parametrize("block", [1, 1 << 24])
def test_farthest_point(monkeypatch, block):
    monkeypatch.setattr(greedy, "_BLOCK", block)
    x = features(2, 8, 3)
    expected = []
    for b, k in enumerate(COUNTS.tolist()):
        eligible = MASK[b].nonzero().flatten().tolist()

        def distance(i, others, b=b):
            return min(1 - cosine(x[b, i], x[b, j]) for j in others if j != i)

        first = {i: distance(i, eligible) for i in eligible}
        expected.append(naive_greedy(first, distance, eligible, k))
    assert rows_of(select.farthest_point(x, COUNTS, mask=MASK)) == expected


@pytest.mark.parametrize("block", [1, 1 << 24])
@pytest.mark.parametrize("balance", [0.0, 0.3, 0.5, 1.0])
def test_mmr(monkeypatch, balance, block):
    monkeypatch.setattr(greedy, "_BLOCK", block)
    x, scores = features(2, 8, 3), torch.rand(2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scores = scores.masked_fill(~MASK, -INF)
    expected = []
    for b, k in enumerate(COUNTS.tolist()):
        eligible = MASK[b].nonzero().flatten().tolist()

        def worth(i, picked, b=b):
            return balance * scores[b, i] - (1 - balance) * max(cosine(x[b, i], x[b, j]) for j in picked)

        expected.append(naive_greedy(scores[b].tolist(), worth, eligible, k))
    assert rows_of(select.mmr(scores, x, COUNTS, balance=balance)) == expected
    if balance == 1:
        assert torch.equal(select.mmr(scores, x, COUNTS, balance=1), select.top_k(scores, COUNTS))


def test_mmr_in_one_round_is_top_k():
    scores, x = torch.rand(2, 9, generator=torch.Generator().manual_seed(2)), features(2, 9, 4)
    for per_round in (5, 7):
        for balance in (0.0, 0.5):
            got = select.mmr(scores, x, 5, balance=balance, per_round=per_round)
            assert torch.equal(got, select.top_k(scores, 5))
    assert [len(r) for r in rows_of(select.mmr(scores, x, torch.tensor([5, 4]), per_round=2))] == [5, 4]


def test_mmr_takes_a_duplicate_only_when_its_score_pays_the_penalty():
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    assert select.mmr(torch.tensor([[1.0, 0.9, 0.0]]), x, 2).tolist() == [[0, 2]]
    assert select.mmr(torch.tensor([[1.0, 0.9, 0.0]]), x, 2, balance=0.6).tolist() == [[0, 1]]


def greedy_determinant(kernel, eligible, k):
    picked = []
    for _ in range(k):
        rest = [i for i in eligible if i not in picked]
        volume = [float(torch.linalg.det(kernel[[*picked, i]][:, [*picked, i]])) for i in rest]
        picked.append(rest[volume.index(max(volume))])
    return sorted(picked)


@pytest.mark.parametrize("block", [1, 1 << 24])
@pytest.mark.parametrize("weighted", [False, True])
def test_dpp_is_greedy_in_the_determinant(monkeypatch, weighted, block):
    monkeypatch.setattr(greedy, "_BLOCK", block)
    x = features(2, 8, 10)
    quality = torch.rand(2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.2
    unit = x / x.norm(dim=-1, keepdim=True) * (quality[..., None] if weighted else 1)
    kernel = unit @ unit.mT
    kernel.diagonal(0, 1, 2).copy_(quality**2 if weighted else torch.ones_like(quality))
    expected = [
        greedy_determinant(kernel[b], MASK[b].nonzero().flatten().tolist(), k) for b, k in enumerate(COUNTS.tolist())
    ]
    assert rows_of(select.dpp(x, COUNTS, scores=quality if weighted else None, mask=MASK)) == expected


def test_dpp_beyond_the_rank_takes_the_lowest_positions():
    x = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 3.0]]])
    assert select.dpp(x, 2).tolist() == [[0, 2]]
    assert select.dpp(x, 4).tolist() == [[0, 1, 2, 3]]
    assert select.dpp(torch.zeros(1, 3, 2), 2).tolist() == [[0, 1]]
    assert select.dpp(x, 2, scores=torch.tensor([[0.0, 0.0, -INF, 0.0, 0.0]])).tolist() == [[0, 1]]
    with pytest.raises(MethodError, match="not negative"):
        select.dpp(x, 2, scores=torch.tensor([[0.0, -0.1, 0.0, 0.0, 0.0]]))


def naive_density_peaks(x, eligible, c, neighbours):
    """The card's formula with Python numbers; equal densities fall with the position."""
    d = {(i, j): float((x[i] - x[j]).norm()) / math.sqrt(x.shape[1]) for i in eligible for j in eligible}
    density = {}
    for i in eligible:
        near = sorted(d[i, j] ** 2 for j in eligible)[: min(neighbours, c)]
        density[i] = math.exp(-sum(near) / len(near))
    score = {}
    for i in eligible:
        above = [d[i, j] for j in eligible if (density[j], -j) > (density[i], -i)]
        score[i] = density[i] * (min(above) if above else max(d.values()))
    return sorted(sorted(eligible, key=lambda i: (-score[i], i))[:c])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("neighbours", [2, 7])
def test_density_peaks(seed, neighbours):
    x = features(3, 12, 5, seed=seed) * 2 + 5
    mask = torch.rand(3, 12, generator=torch.Generator().manual_seed(seed)) > 0.3
    mask[0], mask[2] = True, torch.arange(12) == 4
    counts = torch.tensor([9, 4, 1])
    got = rows_of(select.density_peaks(x, counts, mask=mask, neighbours=neighbours))
    for b, c in enumerate(counts.tolist()):
        assert got[b] == naive_density_peaks(x[b], mask[b].nonzero().flatten().tolist(), c, neighbours)


def test_density_peaks_finds_the_middle_of_each_cluster():
    blob = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    x = torch.cat([blob + 30, blob - 30, blob]).float()[None]
    assert select.density_peaks(x, 3, neighbours=5).tolist() == [[0, 5, 10]]


def test_density_peaks_of_equal_or_far_tokens_fall_back_to_the_position():
    equal = features(1, 1, 64).float().expand(2, 6, 64) * 100
    assert select.density_peaks(equal, 3).tolist() == [[0, 1, 2]] * 2
    # Distances at which every exp() underflows must still be told apart: 3 and 4 are close, 4 comes second.
    far = torch.tensor([[[0.0], [1000.0], [3000.0], [7000.0], [7001.0]]])
    got = select.density_peaks(far, 4, neighbours=2)
    assert got.tolist() == [[0, 1, 2, 3]]
    assert select.density_peaks(far, 0).shape == (1, 0)
    assert select.density_peaks(far[:, :1], 1).tolist() == [[0]]
    with pytest.raises(MethodError):
        select.density_peaks(far, 1, neighbours=0)


def mmr_by_length(x, k, mask=None):
    scores = x.nan_to_num().norm(dim=-1)
    return select.mmr(scores if mask is None else scores.masked_fill(~mask, -INF), x, k)


SELECTORS = [select.farthest_point, select.dpp, select.density_peaks, mmr_by_length]


@pytest.mark.parametrize("choose", SELECTORS)
@settings(max_examples=10, deadline=None)
@given(n=st.integers(1, 9), seed=st.integers(0, 99), data=st.data())
def test_a_padded_batch_equals_single_items(choose, n, seed, data):
    k = data.draw(st.integers(0, n))
    x = features(1, n, 4, seed=seed)
    alone = choose(x, k)
    mask = torch.tensor([[False] * 2 + [True] * n + [False], [True] * (n + 3)])
    batch = torch.cat([features(1, n + 3, 4, seed=seed + 1), features(1, n + 3, 4, seed=seed + 2)])
    batch[0, 2 : 2 + n] = x[0]
    got = choose(batch, torch.tensor([k, n]), mask=mask)
    assert [i - 2 for i in rows_of(got)[0]] == rows_of(alone)[0]
    assert len(rows_of(got)[1]) == n


@pytest.mark.parametrize("choose", SELECTORS)
def test_nan_is_an_error_unless_it_is_padding(choose):
    x = features(2, 4, 3)
    mask = torch.tensor([[True, True, False, True]] * 2)
    expected = choose(x, 2, mask=mask)
    x[1, 2] = torch.nan
    with pytest.raises(NonFiniteError):
        choose(x, 2)
    assert torch.equal(choose(x, 2, mask=mask), expected)
    x[0, 0, 0] = torch.inf
    with pytest.raises(NonFiniteError):
        choose(x, 2, mask=mask)


def test_wrong_arguments():
    scores, x = torch.zeros(2, 3), features(2, 3, 4)
    with pytest.raises(NonFiniteError):
        select.top_k(torch.tensor([[0.0, torch.nan]]), 1)
    with pytest.raises(NonFiniteError):
        select.mmr(torch.tensor([[0.0, torch.inf, 0.0]] * 2), x, 1)
    wrong = [
        lambda: select.top_k(scores[0], 1),
        lambda: select.top_k(scores, torch.tensor([1, 1, 1])),
        lambda: select.top_k(scores, torch.tensor([1.0, 1.0])),
        lambda: select.top_k(scores, 1.5),
        lambda: select.mmr(scores, x, 1, balance=1.5),
        lambda: select.mmr(scores, x, 1, per_round=0),
        lambda: select.farthest_point(x[0], 1),
        lambda: select.dpp(x, 1, mask=torch.ones(2, 4, dtype=torch.bool)),
        lambda: select.density_peaks(x, 1, mask=torch.ones(2, 3)),
        lambda: select.farthest_point(x, 4),
    ]
    for call in wrong:
        with pytest.raises(MethodError):
            call()


def test_exhaustive_small_top_k():
    for values in itertools.product([0.0, 1.0, -INF], repeat=4):
        for k in range(sum(v > -INF for v in values) + 1):
            assert select.top_k(torch.tensor([values]), k).tolist() == [best(values, k)]


@given(st.integers(1, 30), st.integers(0, 50), st.sampled_from([0.0, 0.5, 1.5]), st.booleans())
def test_outliers_lie_above_the_upper_fence(n, seed, factor, some):
    generator = np.random.default_rng(seed)
    rows = generator.standard_cauchy((3, n)).round(1)
    there = generator.random((3, n)) < 0.7 if some else np.ones((3, n), dtype=bool)
    there[:, 0] = True
    scores = torch.tensor(rows).masked_fill(~torch.tensor(there), -INF)
    got, kept = (select.outliers(scores, factor=factor, minimum=m).numpy() for m in (0, 2 if n > 1 and not some else 1))
    for row, valid, found, more in zip(rows, there, got, kept, strict=True):
        low, high = np.percentile(row[valid], [25, 75])
        fence = high + factor * (high - low)
        clear = np.abs(row - fence) > 1e-9  # on the fence, rounding decides
        assert np.array_equal(found[clear], ((row > fence) & valid)[clear])
        assert (more >= found).all()
        assert more.sum() == max(found.sum(), 2 if n > 1 and not some else 1)
        assert not more.any() or row[more].min() >= row[valid & ~more].max(initial=-INF)


def test_outliers_of_nothing_and_of_what_has_no_quartiles():
    assert select.outliers(torch.full((2, 3), 0.5)).sum() == 0
    assert select.outliers(torch.full((2, 3), 0.5), minimum=1).tolist() == [[True, False, False]] * 2
    assert select.outliers(torch.full((1, 3), -INF)).sum() == 0
    assert select.outliers(torch.empty(2, 0)).shape == (2, 0)
    with pytest.raises(NonFiniteError, match="got inf"):
        select.outliers(torch.tensor([[0.0, INF]]))
    with pytest.raises(NonFiniteError, match="NaN"):
        select.outliers(torch.tensor([[0.0, math.nan]]))
    with pytest.raises(MethodError, match="nearest number is 0"):
        select.outliers(torch.full((1, 3), -INF), minimum=1)
