"""Other attention implementations of the language model than SDPA: what they are handed must fit them."""

from __future__ import annotations

import contextlib

import pytest
import torch
from checks import call, close, generate, mixture
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

import mmaccel
from mmaccel.tiny.families import FAMILIES

SPECS = [
    "random:keep=0.3;positions=original",
    "fastv:keep=0.4",
    "holitom:keep=0.4;tau=0.3",
    "evs:keep=0.3+fastv:keep=0.5",
    "prunevid:keep=0.4;tau=0.3",
]
FAMILIES_HERE = [FAMILIES[name] for name in ("llava-onevision", "qwen2.5-vl", "qwen3-vl")]


def like_flash(module, query, key, value, attention_mask, position_ids=None, **kwargs):
    """Takes what flash attention takes: no mask or a 2-D one over the keys; positions with gaps mean packing."""
    B, H, q, _ = query.shape
    k = key.shape[2]
    if position_ids is not None and B == 1 and q > 1 and attention_mask is None:
        assert bool((position_ids.diff() == 1).all()), "would be taken for packed sequences"
    allowed = torch.ones(q, k, dtype=torch.bool).tril(k - q)
    if attention_mask is not None:
        assert attention_mask.shape == (B, k)
        allowed = allowed & attention_mask.bool()[:, None, None]
    groups = H // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * kwargs["scaling"]
    return (scores.masked_fill(~allowed, -1e9).softmax(-1) @ value).transpose(1, 2), None


AttentionInterface.register("like_flash", like_flash)
AttentionMaskInterface.register("like_flash", flash_attention_mask)


@contextlib.contextmanager
def attention(net, name):
    net.set_attn_implementation({"text_config": name})
    try:
        yield
    finally:
        net.set_attn_implementation({"text_config": "sdpa"})


@pytest.mark.parametrize("batch", ["alone", "padded"])
@pytest.mark.parametrize("name", ["eager", "like_flash"])
@pytest.mark.parametrize("spec", SPECS, ids=["random", "fastv", "holitom", "evs+fastv", "prunevid"])
@pytest.mark.parametrize("family", FAMILIES_HERE, ids=lambda family: family.name)
def test_other_implementations_give_what_sdpa_gives(model, family, spec, name, batch):
    net, kinds = model(family), mixture(family)
    inputs = family.inputs(kinds if batch == "padded" else kinds[0])
    with mmaccel.accelerate(net, spec):
        tokens, want = generate(net, inputs, steps=4)
    with attention(net, name), mmaccel.accelerate(net, spec):
        again, got = generate(net, inputs, steps=4)
    assert torch.equal(tokens, again)
    for one, other in zip(got, want, strict=True):
        close(one, other)


def test_the_implementation_may_change_under_a_method(model):
    family = FAMILIES["llava-onevision"]
    net, inputs = model(family), family.inputs(mixture(family))
    with mmaccel.accelerate(net, "holitom:keep=0.4"):
        want = call(net, inputs).logits
        with attention(net, "eager"):
            valid = call(net, inputs).logits
            close(valid[:, -1], want[:, -1])
        assert torch.equal(call(net, inputs).logits, want)
