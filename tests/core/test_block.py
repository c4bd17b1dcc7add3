"""Blocks taken apart and put together again give what the library's own forward gives."""

from __future__ import annotations

import open_clip
import pytest
import timm
import torch
import transformers
from checks import ALL, call, ids

from mmaccel.adapters import video_lm
from mmaccel.adapters.blocks import take_apart
from mmaccel.adapters.vision import VisionModel, of_vision_tower
from mmaccel.core.block import tokens_of
from mmaccel.errors import AdapterError

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
PICTURES = {"image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def towers():
    torch.manual_seed(0)
    image = torch.randn(2, 3, 32, 32)
    clip = transformers.CLIPModel(transformers.CLIPConfig(vision_config=SMALL | PICTURES, text_config=TEXT))
    yield "CLIPModel", clip, lambda: clip.get_image_features(image)
    siglip = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SMALL, **PICTURES))
    yield "SiglipVisionModel", siglip, lambda: siglip(image)
    siglip2 = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**SMALL, patch_size=4, num_patches=16))
    mask, shapes = torch.ones(2, 16, dtype=torch.long), torch.tensor([[4, 4], [4, 4]])
    yield "Siglip2VisionModel", siglip2, lambda: siglip2(torch.randn(2, 16, 48), mask, shapes)
    config = transformers.InternVLVisionConfig(
        **SMALL, image_size=[32, 32], patch_size=[8, 8], use_qk_norm=True, layer_scale_init_value=0.3
    )
    internvit = transformers.InternVLVisionModel(config)
    yield "InternVLVisionModel", internvit, lambda: internvit(image)
    vit = timm.models.VisionTransformer(
        32, 8, embed_dim=32, depth=2, num_heads=2, init_values=0.3, qk_norm=True, reg_tokens=2
    )
    yield "timm", vit, lambda: vit(image)
    both = open_clip.CLIP(
        16,
        open_clip.CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=8, image_size=32, ls_init_value=0.3),
        open_clip.CLIPTextCfg(width=32, heads=2, layers=1),
    )
    yield "open_clip", both, lambda: both.encode_image(image)


TOWERS = {name: (model.eval(), run) for name, model, run in towers()}


def largest_error(encoder, run):
    """Compute every block of a forward from its parts; the largest difference from what the block returned."""
    errors, hooks = [], []
    for block in encoder.blocks:

        def compare(_module, args, kwargs, output, block=block):
            x = args[0] if args else kwargs.get("hidden_states", kwargs.get("q_x"))
            h = block.norm1(x)
            q, k, v = block.query(h), block.key(h), block.value(h)
            seen = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
            if block.rotate is not None:
                q, k = (block.rotate(t, kwargs["position_embeddings"]) for t in (q, k))
                cuts = kwargs["cu_seqlens"].long()
                image = torch.repeat_interleave(torch.arange(len(cuts) - 1), cuts.diff())
                seen = image[:, None] == image
            y = x + block.attend(q, k, v, seen)
            y = y + block.mlp(block.norm2(y))
            errors.append(float((y - (output[0] if isinstance(output, tuple) else output)).abs().max()))

        hooks.append(block.module.register_forward_hook(compare, with_kwargs=True))
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    assert len(errors) == len(encoder.blocks)
    return max(errors)


@pytest.mark.parametrize("name", TOWERS)
def test_parts_of_a_tower_make_its_blocks(name):
    model, run = TOWERS[name]
    encoder = VisionModel(model).encoder()
    assert len(encoder.blocks) == 2
    assert encoder.last == 1
    assert encoder.prefix == {"CLIPModel": 1, "InternVLVisionModel": 1, "timm": 3, "open_clip": 1}.get(name, 0)
    assert largest_error(encoder, run) < 2e-6


@pytest.mark.parametrize("family", ALL, ids=ids(ALL))
def test_parts_of_a_vision_language_model_make_its_blocks(model, family):
    net = model(family)
    encoder = of_vision_tower(video_lm(net))
    inputs = family.inputs(["video" if "video" in family.modalities else "image"])
    assert encoder.packed == family.name.startswith("qwen")
    assert net.get_submodule(encoder.path) is encoder.module
    assert largest_error(encoder, lambda: call(net, inputs)) < 5e-6


def shown_and_computed(encoder, run):
    """The largest difference between what a block's taps show in its own forward and what its parts give."""
    errors, hooks = [], []
    for block in encoder.blocks:
        shown, given = {}, {}
        for name, (module, shape) in block.taps.items():
            hook = module.register_forward_hook(
                lambda _m, _a, made, name=name, shape=shape, shown=shown: shown.__setitem__(name, shape(made))
            )
            hooks.append(hook)

        def before(_module, args, kwargs, given=given):
            given["x"] = args[0] if args else kwargs.get("hidden_states", kwargs.get("q_x"))

        def after(_module, _args, output, block=block, shown=dict, given=given):
            seen = dict(shown)  # the parts call the same modules
            x, out = given["x"], output[0] if isinstance(output, tuple) else output
            assert {"attention", "mlp"} <= set(seen)
            errors.append(float((x + seen["attention"] + seen["mlp"] - out).abs().max()))
            errors.append(float((block.mlp(block.norm2(x + seen["attention"])) - seen["mlp"]).abs().max()))
            h = block.norm1(x)
            for name, part in (("key", block.key), ("value", block.value)):
                if name in seen:
                    errors.append(float((tokens_of(part(h)) - seen[name]).abs().max()))

        hooks.append(block.module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(
            block.module.register_forward_hook(lambda m, a, o, after=after, shown=shown: after(m, a, o, shown=shown))
        )
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return max(errors)


@pytest.mark.parametrize("name", TOWERS)
def test_a_block_shows_its_parts_in_its_own_forward(name):
    model, run = TOWERS[name]
    encoder = VisionModel(model).encoder()
    assert shown_and_computed(encoder, run) < 2e-6
    assert ("key" in encoder.blocks[0].taps) == (name != "open_clip")


@pytest.mark.parametrize("family", ALL, ids=ids(ALL))
def test_a_vision_language_model_shows_the_parts_of_its_blocks(model, family):
    net = model(family)
    inputs = family.inputs(["video" if "video" in family.modalities else "image"])
    assert shown_and_computed(of_vision_tower(video_lm(net)), lambda: call(net, inputs)) < 5e-6


def test_a_joined_projection_that_is_not_a_plain_layer_is_asked_itself():
    class Wrapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) * 1.5

    vit = timm.models.VisionTransformer(32, 8, embed_dim=32, depth=2, num_heads=2).eval()
    vit.blocks[0].attn.qkv = Wrapped(vit.blocks[0].attn.qkv)
    assert largest_error(VisionModel(vit).encoder(), lambda: vit(torch.randn(2, 3, 32, 32))) < 2e-6


def test_what_cannot_be_taken_apart_is_refused():
    with pytest.raises(AdapterError, match="Linear is no block"):
        take_apart(torch.nn.Linear(2, 2))
    vit = timm.models.VisionTransformer(32, 8, embed_dim=32, depth=1, num_heads=2)
    vit.blocks = torch.nn.Sequential()
    with pytest.raises(AdapterError, match="no blocks"):
        VisionModel(vit).encoder()


def with_attention(**more):
    block = open_clip.transformer.ResidualAttentionBlock(32, 2)
    block.attn = open_clip.transformer.Attention(32, 2, **more)
    return block


@pytest.mark.parametrize(
    ("block", "names"),
    [
        (timm.models.vision_transformer.Block(32, 2, attn_layer="diff"), "lambda_q1"),
        (with_attention(qk_norm=True), "ln_k, ln_q"),
        (with_attention(scaled_cosine=True), "logit_scale"),
        (open_clip.transformer.CustomResidualAttentionBlock(32, 2, scale_attn=True), "ln_attn"),
        (torch.nn.ModuleDict(), "ModuleDict"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_attention_with_more_parts_than_are_known_is_refused(block, names):
    with pytest.raises(AdapterError, match=names):
        take_apart(block)


def test_a_cross_attending_or_wrapped_block_is_refused():
    class Scaled(timm.models.vision_transformer.Block):
        def __init__(self):
            super().__init__(32, 2)
            self.ls0 = torch.nn.Parameter(torch.ones(32))

    with pytest.raises(AdapterError, match="Scaled holds ls0"):
        take_apart(Scaled())
    cross = open_clip.transformer.ResidualAttentionBlock(32, 2, is_cross_attention=True)
    with pytest.raises(AdapterError, match="ln_1_kv"):
        take_apart(cross)
