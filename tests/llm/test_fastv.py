"""FastV keeps the tokens that an attention map kept by the test ranks first."""

from __future__ import annotations

import pytest
import torch
from checks import ALL, call, ids, mixture
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import mmaccel
from mmaccel.errors import NotApplicableError
from mmaccel.tiny.families import FAMILIES

MAPS = {}


def keep_the_map(module, query, key, value, attention_mask, **kwargs):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (kwargs.get("scaling") or query.shape[-1] ** -0.5)
    if attention_mask is None:
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
    weights = torch.softmax(scores.masked_fill(~attention_mask, -1e9), -1)
    MAPS[module.layer_idx] = weights
    return (weights @ value).transpose(1, 2), weights


AttentionInterface.register("kept_text_map", keep_the_map)
AttentionMaskInterface.register("kept_text_map", sdpa_mask)


@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("family", ALL, ids=ids(ALL))
def test_kept_tokens_are_those_the_last_prompt_token_attends_to_most(model, family, layer):
    net, kinds = model(family), mixture(family)
    inputs = family.inputs(kinds)
    net.set_attn_implementation({"text_config": "kept_text_map"})
    try:
        call(net, inputs)
    finally:
        net.set_attn_implementation({"text_config": "sdpa"})
    scores = MAPS[layer - 1].mean(1)[:, -1]
    with mmaccel.accelerate(net, f"fastv:keep=0.4;layer={layer}") as handle:
        call(net, inputs)
        kept = handle.report().kept("fastv")
    for row, (places, left) in enumerate(zip(family.places(kinds), kept, strict=True)):
        visual = [i for i, place in enumerate(places) if place is not None and place.x >= 0]
        best = set(sorted(visual, key=lambda i, row=row: -float(scores[row, i]))[: int(0.4 * len(visual) + 0.5)])
        start = int((inputs["attention_mask"][row] == 0).sum())
        assert left == [i for i in range(start, len(places)) if i not in visual or i in best]


@pytest.mark.parametrize("layer", [4, 99])
def test_a_layer_that_is_not_there_is_an_error_and_leaves_the_model(model, layer):
    net = model(FAMILIES["llava"])
    with pytest.raises(NotApplicableError, match=rf"1\.\.3 .* not {layer}"):
        mmaccel.accelerate(net, f"fastv:layer={layer}")
    assert not net.model._forward_pre_hooks
