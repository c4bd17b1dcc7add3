"""What a method is told about each visual token, against attention maps that a test-owned attention function keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from checks import ALL, call, ids
from transformers import AttentionInterface

import mmaccel
from mmaccel.method import Info, Stage
from mmaccel.reducer import GridReducer
from mmaccel.tiny.families import KINDS

MAPS: list[tuple[Any, torch.Tensor]] = []


def keep_the_map(module, query, key, value, attention_mask, **kwargs):
    assert attention_mask is None
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    weights = torch.softmax(query @ key.transpose(2, 3) * scale, -1)
    MAPS.append((module, weights))
    return (weights @ value).transpose(1, 2), weights


AttentionInterface.register("kept_map", keep_the_map)


@dataclass(frozen=True)
class Look(GridReducer):
    """Drops nothing and keeps what it is shown."""

    info: ClassVar[Info] = Info("look", "drop", Stage.BEFORE_LLM, "", "", 2026, ("video-lm",))
    needs_scores: ClassVar[bool] = True
    shown: ClassVar[list[Any]] = []

    def reduce(self, tokens):
        self.shown.append(tokens)


def maps_by_layer(net, inputs):
    """[layers][calls] of the vision tower's attention maps, each [images or 1, heads, queries, keys]."""
    MAPS.clear()
    net.set_attn_implementation({"vision_config": "kept_map"})
    try:
        call(net, inputs)
    finally:
        net.set_attn_implementation({"vision_config": "sdpa"})
    modules = list(dict.fromkeys(module for module, _ in MAPS))
    return [[weights for module, weights in MAPS if module is one] for one in modules]


def from_class_token(weights):
    """[images, patches]: attention of the class token, mean over heads."""
    return weights[:, :, 0, 1:].mean(1)


def received(weights):
    """[images, patches]: mean over heads and queries."""
    return weights.mean((1, 2))


def bilinear(grid, y, x, size):
    """Value of output cell (y, x) when a square `grid` is resized to size x size, half-pixel centres."""
    n = grid.shape[0]

    def taps(i):
        at = max(0.0, (i + 0.5) * n / size - 0.5)
        low = min(int(at), n - 1)
        return [(low, 1 - (at - low)), (min(low + 1, n - 1), at - low)]

    return sum(wy * wx * float(grid[r, c]) for r, wy in taps(y) for c, wx in taps(x))


def picture(tiles, side, place, item):
    """Cell of the large picture of a tiled image: it lies in the middle of a canvas of tiles, in reading order."""
    tall = item.height > item.width
    columns = 1 if tall else 2
    rows = 2 if tall else 1
    used_rows = side * rows if not tall else round(side * item.height / item.width)
    used_columns = side * columns if tall else round(side * item.width / item.height)
    y = place.y + (side * rows - used_rows) // 2
    x = place.x + (side * columns - used_columns) // 2
    tile = tiles[1 + (y // side) * columns + x // side].view(side, side)
    return float(tile[y % side, x % side])


def llava(family, layers, place, item, first):
    scores = from_class_token(layers[-2][0])
    return float(scores[first].view(6, 6)[place.y, place.x])


def llava_next_video(family, layers, place, item, first):
    scores = from_class_token(layers[-2][0])
    if place.modality == "video":
        return float(
            scores[first + place.t].view(6, 6)[2 * place.y : 2 * place.y + 2, 2 * place.x : 2 * place.x + 2].mean()
        )
    if place.t == 0:
        return float(scores[first].view(6, 6)[place.y, place.x])
    return picture(scores[first:], 6, place, item)


def llava_onevision(family, layers, place, item, first):
    scores = received(layers[-1][0])
    if place.modality == "video":
        return bilinear(scores[first + place.t].view(5, 5), place.y, place.x, 3)
    if place.t == 0:
        return float(scores[first].view(5, 5)[place.y, place.x])
    return picture(scores[first:], 5, place, item)


def internvl(family, layers, place, item, first):
    scores = from_class_token(layers[-1][0])[first + place.t].view(6, 6)
    return float(scores[2 * place.y : 2 * place.y + 2, 2 * place.x : 2 * place.x + 2].mean())


def qwen(family, layers, place, item, first, layer=-1, order=None):
    rows, columns = item.height // 8, item.width // 8
    # one map a group of frames; patches stand in blocks of 2 x 2, blocks in reading order
    scores = received(layers[layer][first + place.t])[0].view(rows * columns, 4)
    cells = order or [(y, x) for y in range(rows) for x in range(columns)]
    return float(scores[cells.index((place.y, place.x))].mean())


def qwen2_5(family, layers, place, item, first):
    rows, columns = item.height // 8, item.width // 8
    order = []
    for top in range(0, rows, 2):
        for left in range(0, columns, 2):
            order += [(y, x) for y in range(top, min(top + 2, rows)) for x in range(left, min(left + 2, columns))]
    return qwen(family, layers, place, item, first, layer=3, order=order)


NAIVE = {
    "llava": llava,
    "llava-next-video": llava_next_video,
    "llava-onevision": llava_onevision,
    "internvl": internvl,
    "qwen2-vl": qwen,
    "qwen2.5-vl": qwen2_5,
    "qwen3-vl": qwen,
}
MAPS_OF_AN_ITEM = {  # how many images (or, for Qwen, groups of frames) of the tower an item takes
    "llava": lambda item, alone: 1,
    "llava-next-video": lambda item, alone: item.frames if item.modality == "video" else 3,
    "llava-onevision": lambda item, alone: item.frames if item.modality == "video" else (3 if alone else 1),
    "internvl": lambda item, alone: item.frames if item.modality == "video" else 3,
    "qwen2-vl": lambda item, alone: max(1, item.frames // 2),
    "qwen2.5-vl": lambda item, alone: max(1, item.frames // 2),
    "qwen3-vl": lambda item, alone: max(1, item.frames // 2),
}


@pytest.mark.parametrize("kind", ["image", "video", "images", "videos"])
@pytest.mark.parametrize("family", ALL, ids=ids(ALL))
def test_scores_are_the_attention_of_the_right_layer_at_the_right_token(model, family, kind):
    if kind not in family.kinds:
        pytest.skip("not a kind of this family")
    net, inputs = model(family), family.inputs(kind)
    layers = maps_by_layer(net, inputs)
    Look.shown.clear()
    with mmaccel.accelerate(net, Look(keep=0.5)):
        call(net, inputs)
    items, places = family._items(kind), [place for place in family.places(kind)[0] if place and place.x >= 0]
    firsts, first = [], 0
    for item in items:
        firsts.append(first)
        first += MAPS_OF_AN_ITEM[family.name](item, alone=len(items) == 1)
    # a picture's overview and large part, and InternVL's tiles, are grids of their own
    parts = {}
    for place in places:
        parts.setdefault((place.item, place.t if place.modality == "image" else 0), []).append(place)
    assert len(Look.shown) == len(parts)
    for number, ((item, _), cells) in enumerate(parts.items()):
        shown = Look.shown[number]
        assert (shown.kind, shown.number, len(shown)) == (KINDS[kind][item], number, len(cells))
        want = [NAIVE[family.name](family, layers, place, items[item], firsts[item]) for place in cells]
        torch.testing.assert_close(shown.score, torch.tensor(want), atol=1e-6, rtol=1e-5)
        assert shown.score.std() > 1e-5
        _, H, W = shown.shape
        t0 = min(place.t for place in cells)
        assert math.prod(shown.shape) == len(cells)
        assert shown.cell.tolist() == [((place.t - t0) * H + place.y) * W + place.x for place in cells]


@pytest.mark.parametrize("family", ALL, ids=ids(ALL))
def test_features_are_those_that_stand_in_the_prompt(model, family):
    net, kind = model(family), "image+video" if "video" in family.modalities else "images"
    inputs, seen = family.inputs(kind), []
    hook = net.model.language_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    call(net, inputs)
    hook.remove()
    Look.shown.clear()
    with mmaccel.accelerate(net, Look(keep=0.5)):
        call(net, inputs)
    where = [i for i, place in enumerate(family.places(kind)[0]) if place and place.x >= 0]
    assert torch.equal(torch.cat([shown.features for shown in Look.shown]), seen[0][0, where])
