from __future__ import annotations

import pytest
import torch
from checks import call, snapshot
from torch import nn
from transformers import AttentionInterface

from mmaccel.core.patching import Patcher
from mmaccel.core.probe import probe_attention
from mmaccel.errors import AdapterError
from mmaccel.tiny.families import FAMILIES


def attention_of(net):
    return net.model.language_model.layers[1].self_attn


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_shows_queries_and_keys_of_one_layer_and_changes_nothing(implementation):
    family = FAMILIES["qwen2.5-vl"]
    net, inputs, seen = family.build(), family.inputs("image", batch=2), []
    net.set_attn_implementation(implementation)
    want, before = call(net, inputs).logits, snapshot(net)
    patchers = [Patcher(), Patcher(), Patcher()]
    for number, patcher in enumerate(patchers):
        probe_attention(patcher, attention_of(net), lambda *given, n=number: seen.append((n, *given)))
    assert attention_of(net).config._attn_implementation.endswith(implementation)
    assert net.model.language_model.layers[0].self_attn.config._attn_implementation == implementation
    assert torch.equal(call(net, inputs).logits, want)
    assert [number for number, *_ in seen] == [0, 1, 2]
    _, query, key, mask, more = seen[0]
    B, S = inputs["input_ids"].shape
    assert (query.shape, key.shape) == ((B, 4, S, 16), (B, 2, S, 16))
    assert mask.shape[-2:] == (S, S)
    assert more["scaling"] == 0.25
    for patcher in (patchers[1], patchers[0], patchers[2]):
        seen.clear()
        patcher.undo()
        assert torch.equal(call(net, inputs).logits, want)
        assert len(seen) == sum(map(len, patchers)) // 2
    assert snapshot(net) == before


def test_the_shown_attention_is_that_of_the_model():
    family = FAMILIES["llava"]
    net, inputs, shown = family.build(), family.inputs("image"), []
    net.set_attn_implementation("eager")
    with torch.no_grad():
        want = net(**inputs, output_attentions=True).attentions[1]
    patcher = Patcher()
    probe_attention(patcher, attention_of(net), lambda query, key, mask, more: shown.append((query, key, mask, more)))
    call(net, inputs)
    patcher.undo()
    ((query, key, mask, more),) = shown
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) * more["scaling"] + mask
    torch.testing.assert_close(scores.softmax(-1), want)


def test_modules_without_a_config_are_refused():
    with pytest.raises(AdapterError, match="Linear does not choose"):
        probe_attention(Patcher(), nn.Linear(2, 2), lambda *_: None)


def test_only_names_of_ours_are_added_to_the_library():
    names = {name for name in AttentionInterface._global_mapping if "mmaccel" in name}
    assert all(name.startswith("mmaccel_probe_") for name in names)
