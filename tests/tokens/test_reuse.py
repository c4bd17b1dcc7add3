from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmaccel.errors import MethodError
from mmaccel.tokens.reuse import RowCache


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
