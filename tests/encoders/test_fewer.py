"""FewerFrames and FewerPixels against models that are really given fewer frames or smaller ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mmaccel
from mmaccel.errors import NotApplicableError
from mmaccel.tiny.families import FAMILIES

BATCHED = ["llava-next-video", "llava-onevision"]
PACKED = ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"]


@torch.no_grad()
def last_logits(model, inputs):
    return model(**inputs).logits[:, -1]


def without(inputs, drop):
    keep = [i for i in range(inputs["input_ids"].shape[1]) if i not in drop]
    cut = dict(inputs)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if name in cut:
            cut[name] = cut[name][:, keep]
    return cut


@pytest.mark.parametrize("name", BATCHED)
def test_fewer_frames_is_the_model_that_was_given_fewer_frames(name):
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs("video")
    places = family.places("video")[0]
    kept = [0, 2, 5, 7]  # of 8, first and last included
    drop = {i for i, place in enumerate(places) if place is not None and place.t >= 0 and place.t not in kept}
    given = without(inputs, drop)
    given["pixel_values_videos"] = inputs["pixel_values_videos"][:, kept]
    expected = last_logits(model, given)
    with mmaccel.accelerate(model, "fewer-frames:keep=0.5") as handle:
        found = last_logits(model, inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert handle.report().as_dict()["tokens"][0]["kept"] == 0.5


@pytest.mark.parametrize("name", PACKED)
def test_fewer_frames_drops_whole_groups_and_the_encoder_never_sees_them(name):
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs("video")
    t, h, w = inputs["video_grid_thw"][0].tolist()
    groups = [0, t - 1]
    rows = torch.cat([torch.arange(g * h * w, (g + 1) * h * w) for g in groups])
    merger = model.model.visual.merger
    seen = []
    hook = merger.register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad(), mmaccel.accelerate(model, f"fewer-frames:keep={len(groups)};positions=original") as handle:
        model(**inputs)
    with torch.no_grad():
        grid = torch.tensor([[len(groups), h, w]])
        model.model.visual(inputs["pixel_values_videos"][rows], grid_thw=grid)
    hook.remove()
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=1e-6)
    places = family.places("video")[0]
    expected = [i for i, place in enumerate(places) if place is None or place.t in (groups[0], groups[1])]
    assert handle.report().kept("fewer-frames")[0] == expected


def test_scores_of_kept_frames_are_those_of_a_video_of_these_frames():
    family = FAMILIES["qwen2.5-vl"]
    model, inputs = family.build(), family.inputs("video")
    t, h, w = inputs["video_grid_thw"][0].tolist()
    cells = (h // 2) * (w // 2)
    rows = torch.cat([torch.arange(g * h * w, (g + 1) * h * w) for g in (0, t - 1)])

    def visual_kept(handle):
        ids = inputs["input_ids"][0]
        first = int((ids == family.visual_token_ids["video"]).nonzero()[0])
        return [i - first for i in handle.report().kept("visionzip")[0] if ids[i] == family.visual_token_ids["video"]]

    stack = "fewer-frames:keep=2+visionzip:keep=0.25;contextual=0.0"
    with torch.no_grad(), mmaccel.accelerate(model, stack) as handle:
        model(**inputs)
    both = visual_kept(handle)

    places = family.places("video")[0]
    dropped = {i for i, place in enumerate(places) if place is not None and place.t not in (0, t - 1)}
    given = without(inputs, dropped)
    given["pixel_values_videos"] = inputs["pixel_values_videos"][rows]
    given["video_grid_thw"] = torch.tensor([[2, h, w]])
    with torch.no_grad(), mmaccel.accelerate(model, "visionzip:keep=0.25;contextual=0.0") as handle:
        model(**given)
    ids = given["input_ids"][0]
    first = int((ids == family.visual_token_ids["video"]).nonzero()[0])
    alone = [i - first for i in handle.report().kept("visionzip")[0] if ids[i] == family.visual_token_ids["video"]]
    assert both == [i if i < cells else i + (t - 2) * cells for i in alone]


def naive_resize(patches, grid, merge, patch, depth, size):
    """Packed patches of one item -> pixels -> resized -> packed patches, by loops over the documented order."""
    t, h, w = grid
    channels = patches.shape[1] // (depth * patch * patch)
    image = torch.zeros(t * depth, channels, h * patch, w * patch)
    order = [
        (f, by * merge + dy, bx * merge + dx)
        for f in range(t) for by in range(h // merge) for bx in range(w // merge)
        for dy in range(merge) for dx in range(merge)
    ]  # fmt: skip
    for row, (f, y, x) in zip(patches, order, strict=True):
        block = row.view(channels, depth, patch, patch).transpose(0, 1)
        image[f * depth : (f + 1) * depth, :, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch] = block
    H, W = size
    image = F.interpolate(image, size=(H * patch, W * patch), mode="bicubic", antialias=True)
    out = []
    for f in range(t):
        for by in range(H // merge):
            for bx in range(W // merge):
                for dy in range(merge):
                    for dx in range(merge):
                        y, x = (by * merge + dy) * patch, (bx * merge + dx) * patch
                        block = image[f * depth : (f + 1) * depth, :, y : y + patch, x : x + patch]
                        out.append(block.transpose(0, 1).reshape(-1))
    return torch.stack(out)


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl"])
def test_fewer_pixels_is_the_model_that_was_given_smaller_frames(name):
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs("video")
    t, h, w = inputs["video_grid_thw"][0].tolist()
    rows, columns = round((h // 2) * 0.5), round((w // 2) * 0.5)
    vision = model.config.vision_config
    small = naive_resize(
        inputs["pixel_values_videos"], (t, h, w), 2, vision.patch_size, vision.temporal_patch_size,
        (rows * 2, columns * 2),
    )  # fmt: skip
    places = family.places("video")[0]
    drop = {i for i, p in enumerate(places) if p is not None and (p.y >= rows or p.x >= columns)}
    given = without(inputs, drop)
    given["pixel_values_videos"] = small
    given["video_grid_thw"] = torch.tensor([[t, rows * 2, columns * 2]])
    expected = last_logits(model, given)
    with mmaccel.accelerate(model, "fewer-pixels:keep=0.25"):
        found = last_logits(model, inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_fewer_pixels_on_a_tower_of_fixed_size_interpolates_its_position_table():
    family = FAMILIES["llava"]
    model, inputs = family.build(), family.inputs("image")
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size
    small = round(side * 0.5)
    pixels = F.interpolate(
        inputs["pixel_values"], size=(small * vision.patch_size,) * 2, mode="bicubic", antialias=True
    )
    seen = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad(), mmaccel.accelerate(model, "fewer-pixels:keep=0.25"):
        model(**inputs)
    hook.remove()
    with torch.no_grad():
        tower = model.model.vision_tower(pixels, interpolate_pos_encoding=True, output_hidden_states=True)
    expected = tower.hidden_states[model.config.vision_feature_layer][:, 1:].view(1, small, small, -1)
    found = seen[0].view(1, side, side, -1)
    torch.testing.assert_close(found[:, :small, :small], expected, rtol=0, atol=1e-5)
    assert not found[:, small:].any()
    assert not found[:, :, small:].any()


@pytest.mark.parametrize("name", ["llava-onevision", "qwen3-vl", "internvl"])
def test_frames_and_pixels_together_generate_and_leave_no_trace(name):
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs("video", batch=2)
    before = last_logits(model, inputs)
    specs = ["fewer-pixels:keep=0.3"] + (["fewer-frames:keep=0.5"] if name != "internvl" else [])
    with torch.no_grad(), mmaccel.accelerate(model, specs) as handle:
        first = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert torch.equal(first, model.generate(**inputs, max_new_tokens=4, do_sample=False))
    rows = handle.report().as_dict()["tokens"]
    assert all(0 < row["kept"] < 1 for row in rows)
    assert torch.equal(before, last_logits(model, inputs))


@pytest.mark.parametrize("name", BATCHED)
def test_a_video_of_one_frame(name):
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs("video")
    places = family.places("video")[0]
    given = without(inputs, {i for i, place in enumerate(places) if place is not None and place.t > 0})
    given["pixel_values_videos"] = inputs["pixel_values_videos"][:, :1]
    cells = sum(place is not None and place.t == 0 for place in places)
    for spec in ("holitom:keep=0.5;inner_keep=1.0", "evs:keep=0.5", "fewer-frames:keep=1"):
        with mmaccel.accelerate(model, spec) as handle:
            last_logits(model, given)
        row = handle.report().as_dict()["tokens"][-1]
        assert (row["tokens_in"], row["tokens_out"]) == (cells, cells if "holitom" not in spec else -(-cells // 2))


def test_families_that_cannot_tell_frames_are_refused():
    model = FAMILIES["internvl"].build()
    with pytest.raises(NotApplicableError, match="video encoder"):
        mmaccel.accelerate(model, "fewer-frames:keep=0.5")
    assert not any(isinstance(m, nn.Module) and m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("spec", ["fewer-frames:keep=1.0", "fewer-pixels:keep=1.0"])
@pytest.mark.parametrize("name", ["llava-onevision", "qwen2.5-vl"])
def test_neutral_is_bit_identical(name, spec):
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs("video")
    before = last_logits(model, inputs)
    with mmaccel.accelerate(model, spec):
        assert torch.equal(before, last_logits(model, inputs))


@pytest.mark.parametrize("keep", [0.7, 0.8, 0.9, 0.95, 0.99])
def test_hardly_fewer_pixels_than_an_odd_tower_has(keep):
    import transformers

    family = FAMILIES["llava-onevision"]
    config = family.config()
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    vision.image_size = vision.patch_size * (side - 1 + side % 2)
    net = getattr(transformers, family.model_class)(config).eval()
    side = vision.image_size // vision.patch_size
    assert side % 2 == 1
    frames = torch.randn(1, 2, 3, vision.image_size, vision.image_size)
    n = 2 * ((side + 1) // 2) ** 2 + 1
    ids = torch.cat([torch.tensor([5, 6]), torch.full((n,), config.video_token_id), torch.tensor([7, 8])])[None]
    with torch.no_grad(), mmaccel.accelerate(net, f"fewer-pixels:keep={keep}") as handle:
        net(input_ids=ids, pixel_values_videos=frames)
    counts = handle.report().as_dict()["tokens"][0]
    cells = (side + 1) // 2
    assert (counts["tokens_in"], counts["tokens_out"]) == (2 * cells**2, 2 * round(cells * keep**0.5) ** 2)
