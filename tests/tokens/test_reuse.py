from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmaccel.errors import MethodError
from mmaccel.tokens.reuse import RowCache, reference_frames, row_similarity, rows_to_renew


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 3), st.data())
def test_rows_are_the_last_ones_computed(B, N, dim, data):
    shape = [2, 3, 4]
    shape[0] = B
    shape.insert(dim, N)
    cache, counter = RowCache(dim), 0.0
    model = torch.zeros(shape)
    cache.store("a", model)
    for _ in range(data.draw(st.integers(1, 5))):
        m = data.draw(st.integers(0, N))
        rows = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(b))[:m] for b in range(B)])
        counter += 1
        values = torch.full([m if i == dim else n for i, n in enumerate(shape)], counter)
        got = cache.update("a", rows, values)
        for b in range(B):
            for row in rows[b].tolist():
                model[b].select(dim - 1, row).fill_(counter)
        assert torch.equal(got, model)
        assert torch.equal(cache.full("a"), model)


def test_values_land_in_their_own_rows():
    cache = RowCache()
    cache.store(("layer", 3), torch.zeros(2, 4, 2))
    rows = torch.tensor([[3, 0], [1, 2]])
    values = torch.arange(8.0).reshape(2, 2, 2)
    got = cache.update(("layer", 3), rows, values)
    assert torch.equal(got[0, 3], values[0, 0])
    assert torch.equal(got[0, 0], values[0, 1])
    assert torch.equal(got[1, 2], values[1, 1])
    shared = cache.update(("layer", 3), torch.tensor([1]), torch.ones(2, 1, 2))
    assert shared[:, 1].eq(1).all()


def test_all_rows_fresh_equals_no_cache():
    cache = RowCache(2)
    cache.store("k", torch.randn(1, 2, 5, 3))
    fresh = torch.randn(1, 2, 5, 3)
    assert torch.equal(cache.update("k", torch.arange(5), fresh), fresh)


def test_the_cache_owns_its_memory_and_keys_do_not_mix():
    cache = RowCache()
    mine = torch.zeros(1, 3, 2, requires_grad=True)
    cache.store("a", mine)
    cache.store("b", mine)
    cache.update("a", torch.tensor([[1]]), torch.ones(1, 1, 2))
    assert mine.eq(0).all()
    assert cache.full("b").eq(0).all()
    assert not cache.full("a").requires_grad


def test_a_refresh_reuses_the_memory_unless_the_shape_changes():
    cache = RowCache()
    first = cache.store("a", torch.zeros(1, 4, 2))
    assert cache.store("a", torch.ones(1, 4, 2)).data_ptr() == first.data_ptr()
    assert cache.full("a").eq(1).all()
    assert cache.store("a", torch.zeros(1, 6, 2)).shape == (1, 6, 2)
    assert cache.store("a", torch.zeros(1, 6, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_expanded_tensors_are_stored_as_separate_rows():
    cache = RowCache()
    cache.store("a", torch.zeros(1, 1, 2).expand(2, 3, 2))
    got = cache.update("a", torch.tensor([[0], [2]]), torch.ones(2, 1, 2))
    assert got.sum(-1).tolist() == [[2, 0, 0], [0, 0, 2]]


def test_what_is_held():
    cache = RowCache()
    cache.store("a", torch.zeros(1, 4, 2))
    cache.store("b", torch.zeros(1, 4, 2, dtype=torch.bfloat16))
    assert (len(cache), list(cache), cache.nbytes, "a" in cache) == (2, ["a", "b"], 32 + 16, True)
    cache.discard("a")
    cache.discard("a")
    assert "a" not in cache
    cache.clear()
    assert (len(cache), cache.nbytes) == (0, 0)


def test_wrong_use():
    cache = RowCache()
    with pytest.raises(MethodError, match="nothing is cached for 'a'"):
        cache.full("a")
    with pytest.raises(MethodError, match="store them first"):
        cache.update("a", torch.tensor([[0]]), torch.zeros(1, 1, 2))
    with pytest.raises(MethodError, match="dimension 1"):
        cache.store("a", torch.zeros(3))
    with pytest.raises(MethodError, match="dim=0"):
        RowCache(0)
    cache.store("a", torch.zeros(2, 4, 3))
    rows, values = torch.tensor([[0], [1]]), torch.ones(2, 1, 3)
    wrong = [
        (rows, values[..., :2]),
        (rows, values.expand(2, 2, 3)),
        (rows, values.double()),
        (rows[:1], values),
        (rows.int(), values),
        (rows[None], values),
        (rows + 3, values),
        (rows - 1, values),
    ]
    for arguments in wrong:
        with pytest.raises(MethodError):
            cache.update("a", *arguments)
    assert cache.full("a").eq(0).all()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.booleans(), max_size=12),
    st.one_of(st.none(), st.integers(1, 5)),
    st.one_of(st.none(), st.integers(0, 4)),
    st.integers(0, 2**12 - 1),
)
def test_references_are_the_last_whole_frame(first, interval, held, cuts):
    def like(frame, reference):
        assert reference < frame
        return not cuts >> frame & 1

    for asked in (None, like):
        got = reference_frames(first, interval, held=held, like=asked)
        # frame -1 - held is the held one, in the same count of frames
        last, want = None if held is None else -1 - held, []
        for frame, begins in enumerate(first):
            whole = last is None or begins or (interval is not None and frame - last >= interval)
            if whole or (asked is not None and cuts >> frame & 1):
                last = frame
            want.append(last if last >= 0 else -1)
        assert got == want


def test_references_of_a_fixed_interval():
    assert reference_frames([True, False, False, False, True, False], 2) == [0, 0, 2, 2, 4, 4]
    assert reference_frames([False, False, False], 2, held=0) == [-1, 1, 1]
    assert reference_frames([False, False], None, held=7) == [-1, -1]
    assert reference_frames([False, False], None) == [0, 0]
    assert reference_frames([], 2) == []


def test_similarity_is_the_cosine_of_each_row():
    x, y = torch.randn(2, 5, 7), torch.randn(1, 5, 7)
    x[1, 2] = 0
    x[0, 1] = y[0, 1] * 3
    got = row_similarity(x, y)
    for b in range(2):
        for n in range(5):
            want = torch.nn.functional.cosine_similarity(x[b, n], y[0, n], dim=0)
            assert abs(float(got[b, n] - want)) < 1e-6
    assert got[1, 2] == 0
    assert got.max() <= 1
    assert row_similarity(x.half(), y.half()).dtype == torch.float32
    with pytest.raises(MethodError, match="equal in N and C"):
        row_similarity(x, torch.randn(1, 4, 7))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 3), st.data())
def test_rows_that_are_renewed_are_the_least_similar(B, groups, unit, data):
    levels = st.sampled_from([-1.0, -0.25, 0.0, 0.5, 0.75, 1.0])
    similarity = torch.tensor(data.draw(st.lists(levels, min_size=B * groups * unit, max_size=B * groups * unit)))
    similarity = similarity.view(B, groups * unit)
    share = data.draw(st.sampled_from([0.01, 0.25, 0.29, 0.5, 1.0]))
    got = rows_to_renew(similarity, share=share, unit=unit)
    above = rows_to_renew(similarity, at_most=0.5, unit=unit)
    for b, row in enumerate(similarity.tolist()):
        means = [sum(row[g * unit : (g + 1) * unit]) / unit for g in range(groups)]
        order = sorted(range(groups), key=lambda g: (round(means[g] * 2**16), g))
        chosen = order[: max(1, int(groups * share + 1e-9))]
        assert got[b].tolist() == [g in chosen for g in range(groups) for _ in range(unit)]
        assert above[b].tolist() == [means[g] <= 0.5 for g in range(groups) for _ in range(unit)]


def test_a_share_is_taken_as_it_is_written_and_noise_chooses_nothing():
    assert rows_to_renew(torch.zeros(1, 100), share=0.29).sum() == 29
    noisy = 1 - 1e-7 * torch.rand(1, 50)
    noisy[0, 40] = 0.9
    assert rows_to_renew(noisy, share=0.1).nonzero()[:, 1].tolist() == [0, 1, 2, 3, 40]


def test_rows_that_are_not_a_number_are_renewed():
    similarity = torch.tensor([[1.0, torch.nan, 0.9, 1.0]])
    assert rows_to_renew(similarity, at_most=0.5).tolist() == [[False, True, False, False]]
    assert rows_to_renew(similarity, share=0.25).tolist() == [[False, True, False, False]]


def test_what_cannot_be_chosen_is_refused():
    with pytest.raises(MethodError, match="multiple of 3"):
        rows_to_renew(torch.zeros(1, 4), share=0.5, unit=3)
    with pytest.raises(MethodError, match=r"in \(0, 1\]"):
        rows_to_renew(torch.zeros(1, 4), share=0.0)
