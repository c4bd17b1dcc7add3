from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, Qwen2Config, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from mmaccel.core.cache import Kept, Ledger, PrunedLayer, ledger_of, pruned_cache
from mmaccel.errors import NotApplicableError

CONFIG = Qwen2Config(num_hidden_layers=3, hidden_size=8, num_attention_heads=2, num_key_value_heads=2)


def states(tokens, batch=2, start=0):
    x = torch.arange(start, start + tokens).float()
    return x.view(1, 1, -1, 1).expand(batch, 2, tokens, 4).clone(), -x.view(1, 1, -1, 1).expand(
        batch, 2, tokens, 4
    ).clone()


def reduced():
    """A cache of two rows that has seen ten tokens: layer 0 holds six, layers 1 and 2 four; the last two are text."""
    cache = pruned_cache(None, CONFIG, 3)
    for number, layer in enumerate(cache.layers):
        held = 6 if number == 0 else 4
        layer.update(*states(held))
        layer.hidden = 10 - held
    source = torch.tensor([[0, 1, 4, 7, 8, 9], [0, 2, 4, 6, 8, 9]])
    columns = torch.tensor([[0, 1, 4, 5], [0, 2, 4, 5]])
    valid = torch.ones(2, 6, dtype=torch.bool)
    groups = {
        0: Kept(source, valid, None, True),
        1: Kept(source.gather(1, columns), valid[:, :4], columns, True),
    }
    ledger = Ledger(groups, seen=10, tail=2, moved=True, served=True)
    for layer in cache.layers:
        layer.ledger = ledger
    return cache


def test_lengths_seen_and_held():
    cache = reduced()
    assert [cache.get_seq_length(n) for n in range(3)] == [10, 10, 10]
    assert [cache.get_mask_sizes(1, n) for n in range(3)] == [(7, 4), (5, 6), (5, 6)]
    for number in range(3):
        cache.update(*states(3), number)
    assert [cache.get_seq_length(n) for n in range(3)] == [13, 13, 13]
    assert [layer.held for layer in cache.layers] == [9, 7, 7]


def test_the_right_group_of_layers():
    ledger = ledger_of(reduced())
    assert [ledger.at(n) is ledger.groups[first] for n, first in ((0, 0), (1, 1), (2, 1))] == [True] * 3


def test_batch_rows_are_moved_once_for_all_layers():
    cache = reduced()
    want = {first: kept.source.clone() for first, kept in ledger_of(cache).groups.items()}
    cache.reorder_cache(torch.tensor([1, 1]))
    for first, kept in ledger_of(cache).groups.items():
        assert torch.equal(kept.source, want[first][[1, 1]])
    cache = reduced()
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([5, 0, 2]))
    for first, kept in ledger_of(cache).groups.items():
        assert torch.equal(kept.source, want[first][[1, 0, 0]])
        assert len(kept.valid) == 3
    assert cache.layers[2].keys.shape[0] == 3


def test_crop_takes_later_tokens_then_the_text_at_the_end_and_no_more():
    cache = reduced()
    for number in range(3):
        cache.update(*states(3), number)
    cache.crop(-4)
    assert [cache.get_seq_length(n) for n in range(3)] == [9, 9, 9]
    assert [layer.held for layer in cache.layers] == [5, 3, 3]
    ledger = ledger_of(cache)
    assert ledger.groups[0].source.tolist() == [[0, 1, 4, 7, 8], [0, 2, 4, 6, 8]]
    assert ledger.groups[1].columns.tolist() == [[0, 1, 4], [0, 2, 4]]
    assert (ledger.seen, ledger.tail) == (9, 1)
    before = [layer.keys.clone() for layer in cache.layers]
    with pytest.raises(NotApplicableError, match="1 tokens into a prompt that was reduced"):
        cache.crop(-2)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))
    cache.crop(0)
    cache.crop(-1)
    assert cache.get_seq_length() == 8


def test_without_the_hooks_only_what_the_library_gets_right_goes_on():
    cache = reduced()
    cache.layers[0].ledger.served = False
    for number in range(3):
        cache.update(*states(1), number)
    with pytest.raises(NotApplicableError, match="removed or paused"):
        cache.update(*states(2), 1)
    ledger = ledger_of(cache)
    ledger.shift = torch.tensor([2, 0])
    with pytest.raises(NotApplicableError, match="removed or paused"):
        cache.update(*states(1), 0)
    ledger.shift = None
    kept = ledger.groups[0]
    ledger.groups = {0: Kept(kept.source, kept.valid, None, full=False)}
    with pytest.raises(NotApplicableError, match="removed or paused"):
        cache.update(*states(1), 0)


def test_a_copy_stands_for_itself():
    cache = reduced()
    other = copy.deepcopy(cache)
    assert other.layers[0].ledger is other.layers[2].ledger is not cache.layers[0].ledger
    other.reorder_cache(torch.tensor([1, 0]))
    other.crop(-1)
    assert cache.get_seq_length() == 10
    assert ledger_of(cache).groups[0].source[0].tolist() == [0, 1, 4, 7, 8, 9]


def test_reset_empties_everything():
    cache = reduced()
    cache.reset()
    assert cache.get_seq_length() == 0
    assert ledger_of(cache) is None


def test_what_a_cache_holds_stays_when_its_layers_change():
    cache = DynamicCache(config=CONFIG)
    for number in range(3):
        cache.update(*states(5), number)
    keys = [layer.keys for layer in cache.layers]
    assert pruned_cache(cache, CONFIG, 3) is cache
    assert all(type(layer) is PrunedLayer for layer in cache.layers)
    assert all(layer.keys is key for layer, key in zip(cache.layers, keys, strict=True))
    assert cache.get_seq_length() == 5
    layers = list(cache.layers)
    pruned_cache(cache, CONFIG, 3)
    assert cache.layers == layers
    assert ledger_of(cache) is ledger_of(None) is ledger_of(DynamicCache()) is None


def test_caches_that_cannot_shrink_are_refused_untouched():
    mixed = DynamicCache()
    mixed.layers = [DynamicLayer(), DynamicSlidingWindowLayer(sliding_window=4)]
    for cache, name in ((StaticCache(CONFIG, max_cache_len=8), "StaticLayer"), (mixed, "DynamicSlidingWindowLayer")):
        layers = list(cache.layers)
        with pytest.raises(NotApplicableError, match=name):
            pruned_cache(cache, CONFIG, 3)
        assert cache.layers == layers
    with pytest.raises(NotApplicableError, match="tuple"):
        pruned_cache(((torch.zeros(1), torch.zeros(1)),), CONFIG, 3)
