"""Keys that were turned are the keys of the new positions, as the library itself makes them."""

from __future__ import annotations

import importlib

import pytest
import torch

from mmaccel.core.rotation import check_rotary, turn, turn_angles
from mmaccel.errors import NotApplicableError
from mmaccel.tiny.families import FAMILIES
from mmaccel.tiny.pipelines import tiny_text_lm

NAMES = ["llava-onevision", "llava-next-video", "qwen2-vl", "qwen2.5-vl", "qwen3-vl", "internvl"]


def rotated(language_model, raw, position):
    """The library's own: raw keys [1, h, N, d] at `position` [axes, N]."""
    module = importlib.import_module(type(language_model.layers[0].self_attn).__module__)
    ids = position if len(position) == 1 else position[:, None]
    cos, sin = language_model.rotary_emb(raw, ids)
    return module.apply_rotary_pos_emb(raw, raw, cos, sin)[1]


@pytest.mark.parametrize("name", NAMES)
def test_turning_is_moving(name):
    language_model = FAMILIES[name].build().model.language_model
    axes = 3 if "qwen" in name else 1
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(1, 2, 50, 16, generator=generator)
    old, new = torch.randint(0, 300, (2, axes, 50), generator=generator)
    angles = turn_angles(language_model.rotary_emb, new - old)
    got = turn(rotated(language_model, raw, old), *angles)
    torch.testing.assert_close(got, rotated(language_model, raw, new), atol=1e-4, rtol=0)
    torch.testing.assert_close(turn(got, *turn_angles(language_model.rotary_emb, old - new)),
                               rotated(language_model, raw, old), atol=1e-4, rtol=0)  # fmt: skip
    if axes == 3:  # an axis that was left alone is told apart from one that was moved
        wrong = turn_angles(language_model.rotary_emb, (new - old)[:1].expand(3, -1))
        assert (turn(rotated(language_model, raw, old), *wrong) - got).abs().max() > 0.1


SCALED = {
    "yarn": {"factor": 4.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_embeddings_turn_too(kind):
    from transformers import LlamaConfig, LlamaModel

    given = {"rope_type": kind, "rope_theta": 10000.0, **SCALED[kind]}
    model = LlamaModel(LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1, vocab_size=8,
                                   intermediate_size=8, rope_parameters=given))  # fmt: skip
    raw = torch.randn(1, 2, 20, 16, generator=torch.Generator().manual_seed(0))
    old, new = torch.arange(20)[None] * 7, torch.arange(20)[None]
    check_rotary(model.rotary_emb)
    got = turn(rotated(model, raw, old), *turn_angles(model.rotary_emb, new - old))
    torch.testing.assert_close(got, rotated(model, raw, new), atol=1e-4, rtol=0)


def test_channels_that_are_not_rotary_stay():
    language_model = tiny_text_lm()[0].model
    keys = torch.randn(1, 2, 5, 20)
    angles = turn_angles(language_model.rotary_emb, torch.arange(5)[None])
    got = turn(keys, *angles)
    assert torch.equal(got[..., 16:], keys[..., 16:])
    assert torch.equal(got[..., :16], turn(keys[..., :16], *angles))


def test_low_precision_keys_keep_their_type():
    language_model = tiny_text_lm()[0].model
    keys = torch.randn(1, 2, 40, 16).bfloat16()
    angles = turn_angles(language_model.rotary_emb, torch.arange(40)[None] * 9)
    got = turn(keys, *angles)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), turn(keys.float(), *angles), atol=0, rtol=2**-8)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_embeddings_that_change_with_the_length_are_refused(kind):
    language_model = tiny_text_lm()[0].model
    language_model.rotary_emb.rope_type = kind
    with pytest.raises(NotApplicableError, match=f"{kind}.*rebuild"):
        check_rotary(language_model.rotary_emb)
    with pytest.raises(NotApplicableError, match=r"no rotary embeddings.*rebuild"):
        check_rotary(None)


def test_embeddings_that_pair_neighbours_are_refused():
    from transformers import CohereConfig
    from transformers.models.cohere.modeling_cohere import CohereRotaryEmbedding

    rotary = CohereRotaryEmbedding(CohereConfig(hidden_size=64, num_attention_heads=4))
    with pytest.raises(NotApplicableError, match="neighbouring channels"):
        check_rotary(rotary)
