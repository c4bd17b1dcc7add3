"""Rows of a transformer, computed alone over stored keys and values, are those of the whole: every family."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from mmaccel.adapters.diffusion import Diffusion
from mmaccel.core.patching import Patcher
from mmaccel.core.row_attention import KeysValues
from mmaccel.core.token_rows import TokenRows, latent_tokens, token_mask
from tests.diffusion.families import ltx2_transformer

library: Any = diffusers
torch.set_num_threads(1)


TIMES = torch.tensor([500, 500])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wan():
    model = library.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
        ffn_dim=32, num_layers=3, rope_max_seq_len=16,
    )  # fmt: skip
    return model, {"hidden_states": normal(2, 4, 3, 4, 6), "timestep": TIMES, "encoder_hidden_states": normal(2, 5, 8)}


def wan_token_times():
    model, given = wan()
    times = torch.full((2, 18), 500.0)
    times[:, :6] = 0
    return model, {**given, "timestep": times}


def ltx():
    model = library.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=3, caption_channels=8,
    )  # fmt: skip
    return model, {
        "hidden_states": normal(2, 12, 4), "encoder_hidden_states": normal(2, 5, 8), "timestep": TIMES,
        "encoder_attention_mask": torch.ones(2, 5), "num_frames": 2, "height": 2, "width": 3,
    }  # fmt: skip


def ltx2(**kind):
    """The model of the pipelines, whose audio is another stream; the video comes first in what it returns."""
    return ltx2_transformer(**kind), {
        "hidden_states": normal(2, 12, 4), "audio_hidden_states": normal(2, 7, 4, seed=1),
        "encoder_hidden_states": normal(2, 5, 8), "audio_encoder_hidden_states": normal(2, 5, 8, seed=2),
        "timestep": TIMES, "sigma": TIMES, "encoder_attention_mask": torch.ones(2, 5),
        "audio_encoder_attention_mask": torch.ones(2, 5), "num_frames": 2, "height": 2, "width": 3,
        "audio_num_frames": 7,
    }  # fmt: skip


def ltx2_token_times():
    model, given = ltx2(split=False, newer=False)
    times = torch.full((2, 12), 500.0)
    times[:, :6] = 0
    return model, {**given, "timestep": times, "audio_timestep": TIMES}


def hunyuan():
    model = library.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2, num_single_layers=2,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True, text_embed_dim=8,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 4, 4),
    )  # fmt: skip
    mask = torch.ones(2, 5)
    mask[1, 3:] = 0
    return model, {
        "hidden_states": normal(2, 4, 3, 4, 6), "timestep": TIMES,
        "encoder_hidden_states": normal(2, 5, 8), "encoder_attention_mask": mask, "pooled_projections": normal(2, 8),
        "guidance": torch.tensor([6000.0, 6000.0]),
    }  # fmt: skip


def cogvideox():
    model = library.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=8,
        num_layers=3, sample_width=6, sample_height=4, sample_frames=9, patch_size=2, max_text_seq_length=5,
        use_rotary_positional_embeddings=True,
    )  # fmt: skip
    rotary = library.models.embeddings.get_3d_rotary_pos_embed(16, ((0, 0), (2, 3)), (2, 3), 3)
    return model, {
        "hidden_states": normal(2, 3, 4, 4, 6), "timestep": TIMES,
        "encoder_hidden_states": normal(2, 5, 8), "image_rotary_emb": rotary,
    }  # fmt: skip


def flux():
    model = library.FluxTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    ids = torch.zeros(12, 3)
    ids[:, 1], ids[:, 2] = torch.arange(12) // 4, torch.arange(12) % 4
    return model, {
        "hidden_states": normal(2, 12, 4), "timestep": TIMES / 1000, "encoder_hidden_states": normal(2, 5, 8),
        "pooled_projections": normal(2, 8), "img_ids": ids, "txt_ids": torch.zeros(5, 3), "guidance": None,
    }  # fmt: skip


def sd3():
    model = library.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4, pos_embed_max_size=8,
        dual_attention_layers=(0,),
    )  # fmt: skip
    return model, {
        "hidden_states": normal(2, 4, 8, 8), "timestep": TIMES, "encoder_hidden_states": normal(2, 5, 8),
        "pooled_projections": normal(2, 8),
    }  # fmt: skip


def pixart():
    model = library.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3,
        cross_attention_dim=16, sample_size=8, patch_size=2, caption_channels=8,
        norm_type="ada_norm_single", use_additional_conditions=False,
    )  # fmt: skip
    return model, {
        "hidden_states": normal(2, 4, 8, 8), "timestep": TIMES, "encoder_hidden_states": normal(2, 5, 8),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip


def dit():
    model = library.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3, sample_size=8,
        patch_size=2, norm_num_groups=2,
    )  # fmt: skip
    return model, {
        "hidden_states": normal(2, 4, 8, 8), "timestep": TIMES, "class_labels": torch.tensor([1, 2]),
    }  # fmt: skip


FAMILIES = {
    f.__name__: f
    for f in (wan, wan_token_times, ltx, ltx2, ltx2_token_times, hunyuan, cogvideox, flux, sd3, pixart, dit)
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rows_over_stored_keys_are_those_of_the_whole(family):
    torch.manual_seed(0)
    model, given = FAMILIES[family]()
    model.eval()
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.2)
    site = Diffusion(model)
    dense = model(**given)[0]
    latents = given["hidden_states"]
    first = site.layout.frames_first
    patch = site.patch(model, latents)
    tokens = latent_tokens(latents, patch, first).shape[1]
    patcher, rows = Patcher(), TokenRows(site.layout)
    blocks = site.blocks(model)
    rows.install(patcher, blocks)
    names = [
        f"{name}.{kind}"
        for name, block in blocks.items()
        for kind in site.layout.keeping
        if getattr(block, kind, None) is not None
    ]
    kept = {name: KeysValues() for name in names}
    with rows:
        rows.tokens, rows.kept = tokens, kept
        assert torch.equal(model(**given)[0], dense)
    companion = model(**given)[1] if site.layout.companion else None
    assert all(len(entry) == 2 for entry in kept.values())
    one = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))[: tokens // 2].sort().values
    other = torch.randperm(tokens, generator=torch.Generator().manual_seed(2))[: tokens // 2].sort().values
    for chosen in (one[None], torch.stack([one, other])):
        with rows:
            rows.tokens, rows.kept, rows.rows = tokens, kept, chosen
            partial, *others = model(**given, return_dict=False)
        if companion is not None:
            assert torch.allclose(others[0], companion, atol=1e-4)
        mask = torch.zeros(chosen.shape[0], tokens, dtype=torch.bool).scatter_(1, chosen, value=True)
        where = token_mask(mask, dense, patch, first).expand(dense.shape)
        assert torch.allclose(partial[where], dense[where], atol=1e-4)
        assert not torch.allclose(partial[~where], dense[~where], atol=1e-4)
    patcher.undo()
    assert torch.equal(model(**given)[0], dense)


@pytest.mark.parametrize("first", [False, True])
def test_tokens_and_masks_follow_the_order_of_patches(first):
    latents = torch.arange(2 * 3 * 2 * 4 * 6).view(2, 3, 2, 4, 6)  # [B, C, T, H, W]
    tokens = latent_tokens(latents.transpose(1, 2) if first else latents, (1, 2, 3), first)
    expected = [
        latents[:, :, t : t + 1, y : y + 2, x : x + 3].flatten(1)
        for t in range(2) for y in range(0, 4, 2) for x in range(0, 6, 3)
    ]  # fmt: skip
    assert torch.equal(tokens, torch.stack(expected, 1))
    chosen = torch.arange(8)[None] == 5
    mask = token_mask(chosen, latents.transpose(1, 2) if first else latents, (1, 2, 3), first)
    spots = mask.squeeze(2 if first else 1).nonzero()
    assert {tuple(spot[1:]) for spot in spots.tolist()} == {(1, y, x) for y in (0, 1) for x in (3, 4, 5)}
