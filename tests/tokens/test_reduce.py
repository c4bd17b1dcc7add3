from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmaccel.errors import MethodError, NonFiniteError
from mmaccel.tokens.place import Reduction
from mmaccel.tokens.reduce import (
    absorb_nearest,
    bipartite,
    drop,
    joined,
    merge_as_weighted,
    merge_by_assignment,
    merge_dropped_into_kept,
    merge_to_centres,
    nearest_centre,
    side_by_side,
)


def features(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def near(got, expected):
    torch.testing.assert_close(got, expected.to(got.dtype), atol=1e-6, rtol=1e-6)


def test_drop():
    x = features(2, 4, 3, 2)
    got = drop(x, torch.tensor([[0, 3], [2, -1]]))
    assert torch.equal(got[0], x[0, [0, 3]])
    assert torch.equal(got[1, 0], x[1, 2])
    assert got[1, 1].eq(0).all()
    assert drop(x[..., 0, 0], torch.tensor([[1], [1]])).shape == (2, 1)
    assert drop(x, torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0, 3, 2)
    assert drop(x[:, :0], torch.tensor([[-1], [-1]])).eq(0).all()
    for indices in (torch.tensor([[0]]), torch.tensor([0, 1]), torch.tensor([[0.0], [1.0]])):
        with pytest.raises(MethodError):
            drop(x, indices)


@settings(deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(0, 7), st.integers(0, 4), st.booleans())
def test_merge_by_assignment(data, B, N, K, sized):
    numbers = st.lists(st.integers(-1, K - 1), min_size=N, max_size=N)
    assignment = torch.tensor([data.draw(numbers) for _ in range(B)], dtype=torch.int64).reshape(B, N)
    size = torch.arange(1, B * N + 1).reshape(B, N).float() if sized else None
    x = features(B, N, 3)
    merge = merge_by_assignment(assignment, K, size)
    merged = merge.merge(x)
    back = merge.unmerge(merged)
    assert merged.shape == (B, K, 3)
    assert back.shape == x.shape
    for b in range(B):
        for j in range(K):
            members = [n for n in range(N) if assignment[b, n] == j]
            weights = [float(size[b, n]) if sized else 1.0 for n in members]
            assert float(merge.sizes[b, j]) == sum(weights)
            assert int(merge.kept[b, j]) == (members[0] if members else -1)
            mean = sum((w * x[b, n] for w, n in zip(weights, members, strict=True)), torch.zeros(3)) / max(
                sum(weights), 1
            )
            near(merged[b, j], mean)
            for n in members:
                assert torch.equal(back[b, n], merged[b, j])
        assert back[b][assignment[b] < 0].eq(0).all()


def test_nearest_centre_equals_the_loops():
    x = features(2, 7, 3) + 3
    centres = torch.tensor([[1, 4, 6], [0, -1, -1]])
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 2] = False
    for metric in ("euclidean", "cosine"):
        got = nearest_centre(x, centres, mask=mask, metric=metric)
        for n in range(7):
            if metric == "cosine":
                worth = [cosine(x[0, n], x[0, c]) for c in centres[0]]
            else:
                worth = [-float((x[0, n] - x[0, c]).norm()) for c in centres[0]]
            assert got[0, n] == (-1 if n == 2 else worth.index(max(worth)))
        assert got[1].eq(0).all()


def test_a_centre_belongs_to_itself_even_among_equals():
    x = torch.ones(1, 4, 2)
    assert nearest_centre(x, torch.tensor([[1, 3]])).tolist() == [[0, 0, 0, 1]]
    assert nearest_centre(x, torch.empty(1, 0, dtype=torch.int64)).tolist() == [[-1] * 4]


def test_merge_to_centres_is_beta_centre_plus_the_mean_of_the_others():
    x = features(2, 8, 4)
    centres = torch.tensor([[0, 3, 7], [5, -1, -1]])
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 6:] = False
    merge = merge_to_centres(x, centres, beta=0.6, mask=mask)
    got = merge.merge(x)
    for b, found in enumerate(([0, 3, 7], [5])):
        members = {c: [] for c in found}
        for n in range(8):
            if n not in found and mask[b, n]:
                members[min(found, key=lambda c: float((x[b, n] - x[b, c]).norm()))].append(n)
        for j, c in enumerate(found):
            others = members[c]
            expected = 0.6 * x[b, c] + 0.4 * x[b, others].mean(0) if others else x[b, c]
            near(got[b, j], expected)
            assert merge.sizes[b, j] == 1 + len(others)
    assert got[1, 1:].eq(0).all()
    assert merge.sizes.sum(1).tolist() == [8, 6]
    sized = merge_to_centres(x, centres, mask=mask, size=torch.full((2, 8), 2.0))
    assert sized.sizes.sum(1).tolist() == [16, 12]


def test_a_lonely_centre_stays_bit_for_bit_and_no_centre_means_none_survive():
    x = torch.cat([features(1, 1, 3), features(1, 3, 3) + 100], 1).bfloat16()
    merged = merge_to_centres(x, torch.tensor([[0, 2]])).merge(x)
    assert torch.equal(merged[0, 0], x[0, 0])
    gone = merge_to_centres(x, torch.empty(1, 0, dtype=torch.int64))
    assert gone.merge(x).shape == (1, 0, 3)
    assert gone.assignment.eq(-1).all()
    for beta in (-0.1, 1.1):
        with pytest.raises(MethodError):
            merge_to_centres(x, torch.tensor([[0]]), beta=beta)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.6, 1.0])
def test_a_centre_that_counts_among_its_members_has_a_least_weight(beta):
    x, centres = features(1, 9, 4), [1, 4, 8]
    x[0, 8] = 50
    merge = merge_to_centres(x, torch.tensor([centres]), beta=beta, with_centre=True)
    got = merge.merge(x)[0]
    members = {c: [c] for c in centres}
    for n in range(9):
        if n not in centres:
            members[min(centres, key=lambda c: float((x[0, n] - x[0, c]).norm()))].append(n)
    assert len(members[8]) == 1 < len(members[1])
    assert torch.equal(got[2], x[0, 8])
    for j, c in enumerate(centres):
        own = max(beta, 1 / (len(members[c]) + 1))
        near(got[j], own * x[0, c] + (1 - own) * x[0, members[c]].mean(0))
        assert merge.sizes[0, j] == len(members[c])


def test_outputs_found_in_any_order_are_put_into_that_of_their_tokens():
    x = features(1, 6, 3)
    kept, assignment = torch.tensor([4, 0, 2]), torch.tensor([1, 0, 2, -1, 0, 1])
    weight = torch.tensor([0.25, 0.9, 1.0, 7.0, 0.1, 0.75])
    merge = merge_as_weighted(kept, assignment, weight)
    assert merge.kept.tolist() == [[0, 2, 4]]
    want = torch.stack([0.25 * x[0, 0] + 0.75 * x[0, 5], x[0, 2], 0.9 * x[0, 1] + 0.1 * x[0, 4]])
    near(merge.merge(x)[0], want)
    assert merge.sizes.tolist() == [[2, 1, 2]]
    reduction = merge.reduction(0)
    assert reduction.index.tolist() == [0, 2, 4]
    near(reduction.apply(x[0]), want)
    assert torch.equal(reduction.apply(x[0])[1], x[0, 2])


def test_merge_dropped_into_kept_is_one_mean():
    x = features(2, 6, 4)
    kept = torch.tensor([[1, 4], [0, -1]])
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, 0] = False
    size = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]] * 2)
    for sizes in (None, size):
        merge = merge_dropped_into_kept(x, kept, mask=mask, size=sizes)
        got = merge.merge(x)
        assert torch.equal(merge.kept, kept)
        weight = size if sizes is not None else torch.ones(2, 6)
        for b, found in enumerate(([1, 4], [0])):
            groups = {c: [c] for c in found}
            for n in range(6):
                if n not in found and mask[b, n]:
                    groups[max(found, key=lambda c: cosine(x[b, n], x[b, c]))].append(n)
            for j, c in enumerate(found):
                w = weight[b, groups[c]].double()
                near(got[b, j], (x[b, groups[c]] * w[:, None]).sum(0) / w.sum())
                assert merge.sizes[b, j] == w.sum()


def naive_bipartite(x, valid, protect, r):
    order = [n for n in range(len(x)) if valid[n]]
    sources = [n for i, n in enumerate(order) if i % 2 == 0 and not protect[n]]
    receivers = [n for i, n in enumerate(order) if i % 2 == 1 and not protect[n]]
    pairs = []
    for s in sources if receivers else []:
        partner = max(receivers, key=lambda d: cosine(x[s], x[d]))
        pairs.append((-cosine(x[s], x[partner]), s, partner))
    groups = {n: [n] for n in order}
    for _, s, d in sorted(pairs)[:r]:
        groups[d].append(s)
        del groups[s]
    return groups


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 11), st.integers(0, 10**6), st.data())
def test_bipartite_equals_the_loops(N, seed, data):
    x = features(1, N, 5, seed=seed)
    valid = torch.tensor([data.draw(st.lists(st.booleans(), min_size=N, max_size=N))])
    protect = torch.tensor([data.draw(st.lists(st.sampled_from([False, False, True]), min_size=N, max_size=N))])
    rank = valid.cumsum(1) - 1
    sources = int((valid & ~protect & (rank % 2 == 0)).sum())
    receivers = int((valid & ~protect & (rank % 2 == 1)).sum())
    r = data.draw(st.integers(0, sources if receivers else 0))
    size = torch.arange(1.0, N + 1)[None]
    merge = bipartite(x, r, protect=protect, mask=valid, size=size)
    groups = naive_bipartite(x[0], valid[0], protect[0], r)
    assert merge.kept.tolist() == [sorted(groups)]
    assert merge.kept.shape[1] == int(valid.sum()) - r
    got = merge.merge(x)
    for j, n in enumerate(sorted(groups)):
        w = size[0, groups[n]].double()
        near(got[0, j], (x[0, groups[n]] * w[:, None]).sum(0) / w.sum())
        assert merge.sizes[0, j] == w.sum()
    assert merge.sizes.sum() == (size * valid).sum()
    back = merge.unmerge(got)
    for j, n in enumerate(sorted(groups)):
        assert all(torch.equal(back[0, m], got[0, j]) for m in groups[n])
    with pytest.raises(MethodError):
        bipartite(x, sources + 1, protect=protect, mask=valid)


def test_bipartite_of_zero_is_the_identity_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = features(2, 7, 4).to(dtype)
        merge = bipartite(x, 0)
        assert torch.equal(merge.merge(x), x)
        assert torch.equal(merge.unmerge(x), x)
        assert merge.sizes.eq(1).all()


def test_bipartite_with_destinations_and_a_number_for_each_item():
    x = features(2, 6, 3)
    destinations = torch.tensor([[True, False, False, True, False, False]] * 2)
    protect = torch.tensor([[False, True, False, True, False, False]] * 2)
    merge = bipartite(x, torch.tensor([3, 1]), destinations=destinations, protect=protect)
    assert merge.sizes.sum(1).tolist() == [6, 6]
    assert merge.kept[0].tolist() == [0, 1, 3, -1, -1]
    kept = merge.kept[1].tolist()
    assert set(range(6)) - set(kept) <= {2, 4, 5}
    assert len(kept) == 5
    for b in range(2):
        for n in (2, 4, 5):
            slot = int(merge.assignment[b, n])
            if int(merge.kept[b, slot]) != n:
                assert int(merge.kept[b, slot]) == max((0, 3), key=lambda d: cosine(x[b, n], x[b, d]))


def test_bipartite_ties_go_to_the_lower_source():
    x = torch.ones(1, 8, 2)
    assert bipartite(x, 2).kept.tolist() == [[1, 3, 4, 5, 6, 7]]


def test_equal_vectors_stay_equal_under_every_merge():
    x = features(1, 1, 16).float().expand(2, 9, 16)
    kept = torch.tensor([[1, 4]] * 2)
    merges = [
        bipartite(x, 4),
        merge_to_centres(x, kept),
        merge_dropped_into_kept(x, kept),
        merge_by_assignment(torch.zeros(2, 9, dtype=torch.int64), 1),
    ]
    for merge in merges:
        torch.testing.assert_close(merge.merge(x), x[:, : merge.kept.shape[1]])
        torch.testing.assert_close(merge.unmerge(merge.merge(x)), x)
        assert merge.sizes.sum(1).tolist() == [9, 9]


@settings(deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(1, 7), st.integers(1, 5), st.integers(1, 4))
def test_two_merges_in_a_row_are_one(data, B, N, K, L):
    def drawn(n, k):
        numbers = st.lists(st.integers(-1, k - 1), min_size=n, max_size=n)
        return torch.tensor([data.draw(numbers) for _ in range(B)], dtype=torch.int64).reshape(B, n)

    first = merge_by_assignment(drawn(N, K), K, torch.arange(1, B * N + 1).reshape(B, N).float())
    # an output without tokens has size 0 and goes nowhere
    second = merge_by_assignment(drawn(K, L).masked_fill(first.sizes == 0, -1), L, first.sizes)
    both = first.then(second)
    x, y = features(B, N, 3), features(B, L, 3)
    near(both.merge(x), second.merge(first.merge(x)))
    assert torch.equal(both.unmerge(y), first.unmerge(second.unmerge(y)))
    assert torch.equal(both.sizes, second.sizes)
    for b in range(B):
        for k in range(L):
            kept = int(second.kept[b, k])
            assert int(both.kept[b, k]) == (-1 if kept < 0 else int(first.kept[b, kept]))


def test_a_merge_of_other_tokens_does_not_follow():
    first = merge_by_assignment(torch.tensor([[0, 1, 1]]), 2)
    with pytest.raises(MethodError, match="further"):
        first.then(merge_by_assignment(torch.tensor([[0, 0, 0]]), 1))
    nothing = merge_by_assignment(torch.tensor([[-1, -1]]), 0)
    none = nothing.then(merge_by_assignment(torch.empty(1, 0, dtype=torch.int64), 0))
    assert none.assignment.tolist() == [[-1, -1]]
    with_outputs = nothing.then(merge_by_assignment(torch.empty(1, 0, dtype=torch.int64), 2))
    assert with_outputs.kept.tolist() == [[-1, -1]]
    assert with_outputs.unmerge(torch.ones(1, 2, 3)).eq(0).all()


def test_one_merge_applies_to_tensors_of_any_rank():
    x = features(2, 6, 4)
    merge = bipartite(x, 2)
    heads = features(2, 6, 3, 5)
    near(merge.merge(heads)[:, :, 1, 2], merge.merge(heads[:, :, 1, 2]))
    assert merge.unmerge(merge.merge(heads)).shape == heads.shape
    with pytest.raises(MethodError):
        merge.merge(x[:, :5])
    with pytest.raises(MethodError):
        merge.unmerge(x)
    with pytest.raises(MethodError, match="floating-point"):
        merge.merge(torch.zeros(2, 6, dtype=torch.int64))


def test_empty_and_single_tokens():
    for N in (0, 1):
        x = features(2, N, 3)
        merge = bipartite(x, 0)
        assert torch.equal(merge.merge(x), x)
        assert merge_by_assignment(torch.zeros(2, N, dtype=torch.int64), 1).merge(x).shape == (2, 1, 3)
        with pytest.raises(MethodError, match="nearest number is 0"):
            bipartite(x, 1)


def test_the_form_that_is_placed_gives_the_same_tokens():
    x = features(2, 9, 4).float()
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :3] = False
    merges = [
        bipartite(x, torch.tensor([3, 1]), mask=mask),
        merge_to_centres(x, torch.tensor([[0, 5], [4, -1]]), mask=mask),
        bipartite(x, 0, mask=mask),
    ]
    for merge in merges:
        for b in range(2):
            slots = merge.kept[b] >= 0
            torch.testing.assert_close(merge.reduction(b).apply(x[b]), merge.merge(x)[b, slots])
    assert merges[2].reduction(0).mix is None


def test_nan_is_an_error_unless_it_is_padding():
    x = features(1, 6, 3)
    x[0, 2] = torch.nan
    mask = ~x.isnan().any(-1)
    kept = torch.tensor([[0, 3]])
    for call in (
        lambda **m: bipartite(x, 1, **m),
        lambda **m: merge_to_centres(x, kept, **m),
        lambda **m: merge_dropped_into_kept(x, kept, **m),
    ):
        with pytest.raises(NonFiniteError):
            call()
        assert call(mask=mask).merge(x).isfinite().all()


def test_wrong_assignments():
    wrong = [
        (torch.tensor([[0, 2]]), 2, None),
        (torch.tensor([[0, -2]]), 2, None),
        (torch.tensor([[0.0, 1.0]]), 2, None),
        (torch.tensor([0, 1]), 2, None),
        (torch.tensor([[0, 1]]), 2, torch.ones(1, 3)),
    ]
    for arguments in wrong:
        with pytest.raises(MethodError):
            merge_by_assignment(*arguments)


def test_features_whose_distances_overflow_are_refused():
    x = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0)) * 1e30
    with pytest.raises(NonFiniteError, match="overflow"):
        nearest_centre(x, torch.tensor([[0, 1]]))
    assert nearest_centre(x * 1e-30, torch.tensor([[0, 1]])).min() >= 0


def test_sizes_are_above_zero():
    assignment = torch.tensor([[0, 0, -1]])
    merge_by_assignment(assignment, 1, torch.tensor([[1.0, 2.0, 0.0]]))
    with pytest.raises(MethodError, match="above 0"):
        merge_by_assignment(assignment, 1, torch.tensor([[1.0, 0.0, 1.0]]))


@pytest.mark.parametrize("neighbours", [0, 1, 4, 11, 50])
def test_absorb_nearest_takes_in_the_tokens_most_alike(neighbours):
    x, weight = features(12, 5), torch.rand(12, generator=torch.Generator().manual_seed(1)).double()
    kept = torch.tensor([1, 2, 7])
    reduction = absorb_nearest(x, kept, weight, neighbours)
    assert reduction.index.tolist() == [1, 2, 7]
    want = []
    for k in kept.tolist():
        others = sorted((j for j in range(12) if j != k), key=lambda j, k=k: -cosine(x[k], x[j]))[:neighbours]
        total = x[k].clone()
        for j in others:
            total += weight[j] * x[j]
        want.append(total / (1 + sum(float(weight[j]) for j in others)))
    near(reduction.apply(x), torch.stack(want))
    assert (reduction.mix is None) == (neighbours == 0)


def test_absorb_nearest_keeps_a_field_of_equal_tokens_and_breaks_ties_by_position():
    x = features(1, 4).expand(6, 4)
    reduction = absorb_nearest(x, torch.tensor([2, 3]), torch.full((6,), 0.3), 2)
    near(reduction.apply(x), x[:2])
    assert reduction.mix.cols.view(2, 3).tolist() == [[2, 0, 1], [3, 0, 1]]
    unweighted = absorb_nearest(features(6, 4), torch.tensor([5]), torch.zeros(6), 3)
    assert torch.equal(unweighted.apply(features(6, 4)), features(6, 4)[5:])


def test_absorb_nearest_refuses_what_cannot_be_weighed_or_compared():
    x, kept = features(4, 3), torch.tensor([0])
    for weight in (torch.ones(3), torch.tensor([1.0, -0.1, 0, 0]), torch.tensor([1.0, torch.nan, 0, 0])):
        with pytest.raises(MethodError, match="one a token"):
            absorb_nearest(x, kept, weight, 2)
    x[2, 1] = torch.nan
    with pytest.raises(NonFiniteError):
        absorb_nearest(x, kept, torch.ones(4), 2)


def test_joined_reductions_act_on_each_group_by_itself():
    sizes = [4, 3, 5, 2]
    x = features(sum(sizes), 3)
    groups = x.split(sizes)
    parts = [
        Reduction(torch.tensor([3, 1])),
        merge_by_assignment(torch.tensor([[0, 1, 0]]), 2).reduction(0),
        Reduction(torch.empty(0, dtype=torch.int64)),
        merge_by_assignment(torch.tensor([[0, 0]]), 1).reduction(0),
    ]
    whole = joined(parts, sizes)
    near(whole.apply(x), torch.cat([part.apply(group) for part, group in zip(parts, groups, strict=True)]))
    assert whole.index.tolist() == [3, 1, 4, 5, 12]
    assert joined(parts[:1], sizes[:1]).mix is None
    with pytest.raises(MethodError, match="one for each group"):
        joined(parts, sizes[:3])


@pytest.mark.parametrize("masked", [False, True])
def test_merges_of_groups_side_by_side_are_those_of_each_group(masked):
    items, groups, n = 2, 3, 5
    x = features(items, groups * n, 4)
    mask = torch.ones(items * groups, n, dtype=torch.bool)
    mask[1, 3:] = not masked
    inside = x.unflatten(1, (groups, n)).flatten(0, 1)
    merge = bipartite(inside, 1, mask=mask)
    whole = side_by_side(merge, groups)
    K = merge.kept.shape[1]
    merged, back = whole.merge(x), whole.unmerge(whole.merge(x))
    for item in range(items):
        for group in range(groups):
            part = merge.merge(inside)[item * groups + group]
            assert torch.equal(merged[item, group * K : (group + 1) * K], part)
            alone = merge.unmerge(merge.merge(inside))[item * groups + group]
            assert torch.equal(back[item, group * n : (group + 1) * n], alone)
            for slot, token in enumerate(whole.kept[item, group * K : (group + 1) * K].tolist()):
                own = int(merge.kept[item * groups + group, slot])
                assert token == (own + group * n if own >= 0 else -1)
    assert side_by_side(merge, 1) is merge
