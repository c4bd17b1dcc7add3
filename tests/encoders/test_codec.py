"""Methods that take the codec's change: EVS and HoliTom against naive loops, CodecFrames against fewer frames."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from made import noise, scene, video

import mmaccel
from mmaccel.codecs import select_frames, using_signals
from mmaccel.encoders.evs import EVS
from mmaccel.encoders.holitom import HoliTom
from mmaccel.errors import NotApplicableError
from mmaccel.tiny.families import FAMILIES
from mmaccel.tokens.signals import cosine_to_previous_frame

BATCHED = ["llava-next-video", "llava-onevision"]
PACKED = ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"]


def changes(frames, rows, columns, seed=0):
    return torch.rand(frames, rows, columns, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def last_logits(model, inputs):
    return model(**inputs).logits[:, -1]


@pytest.mark.parametrize("keep", [0.3, 0.4, 0.75, 30])
def test_evs_keeps_the_first_frame_and_what_the_codec_says_has_changed_most(keep):
    T, H, W = 5, 3, 4
    x = noise(T, H, W, 8)
    given = changes(T, H, W)
    with using_signals(given):
        kept = EVS(keep=keep, temporal="codec").reduce(video(x)).index.tolist()
    number = max(H * W, keep if isinstance(keep, int) else int(T * H * W * keep))
    score = {i: round(float(given.flatten()[i]) * 4096) for i in range(H * W, T * H * W)}
    best = sorted(score, key=lambda i: (-score[i], i))[: number - H * W]
    assert kept == sorted([*range(H * W), *best])
    assert kept != EVS(keep=keep).reduce(video(x)).index.tolist()


def test_changes_on_another_grid_are_pooled_by_area():
    x = noise(3, 2, 2, 8)
    fine = changes(3, 6, 4)
    coarse = fine.view(3, 2, 3, 2, 2).mean((2, 4))
    kept = []
    for given in (fine, coarse):
        with using_signals(given):
            kept.append(EVS(keep=0.5, temporal="codec").reduce(video(x)).index.tolist())
    assert kept[0] == kept[1]


def test_changes_add_up_over_frames_that_are_gone():
    T, S = 6, 5
    tokens = video(noise(T, S, 8))
    given = changes(T, 1, S) * 0.4
    living = [0, 3, 5]
    cells = torch.cat([torch.arange(S) + t * S for t in living])
    left = replace(tokens, features=tokens.features[cells], cell=cells)
    with using_signals(given):
        kept = EVS(keep=9, temporal="codec").reduce(left).index.tolist()
    score = {}
    for place, (before, now) in enumerate([(0, 3), (3, 5)], start=1):
        for s in range(S):
            score[place * S + s] = round(min(1.0, float(given[before + 1 : now + 1, 0, s].sum())) * 4096)
    best = sorted(score, key=lambda i: (-score[i], i))[: 9 - S]
    assert kept == sorted([*range(S), *best])


def test_holitom_takes_one_minus_the_change_in_the_place_of_the_cosine():
    T, H, W = 8, 3, 3
    x = scene(T, H * W, still=0.6, cuts=(4,), seed=3).view(T, H, W, -1)
    score = torch.rand(T, H * W, generator=torch.Generator().manual_seed(1))
    cosine = cosine_to_previous_frame(x.view(1, T, H * W, -1))[0]
    given = torch.cat([torch.ones(1, H * W), (1 - cosine).clamp(0, 1)]).view(T, H, W)
    tokens = video(x, score)
    want = HoliTom(keep=0.3, tau=0.7).reduce(tokens)
    with using_signals(given):
        got = HoliTom(keep=0.3, tau=0.7, temporal="codec").reduce(tokens)
    assert torch.equal(got.index, want.index)
    assert torch.equal(got.mix.rows, want.mix.rows)
    with using_signals(torch.ones(T, H, W)):
        other = HoliTom(keep=0.3, tau=0.7, temporal="codec").reduce(tokens)
    assert other.mix is None


@pytest.mark.parametrize("name", BATCHED)
def test_the_model_is_given_the_chosen_frames_and_no_others(name):
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs("video")
    places = family.places("video")[0]
    given = changes(8, 2, 2) ** 3
    kept = select_frames(given, 3)
    drop = {i for i, place in enumerate(places) if place is not None and place.t >= 0 and place.t not in kept}
    keep = [i for i in range(inputs["input_ids"].shape[1]) if i not in drop]
    shorter = {
        k: v[:, keep] if k in ("input_ids", "attention_mask", "mm_token_type_ids") else v for k, v in inputs.items()
    }
    shorter["pixel_values_videos"] = inputs["pixel_values_videos"][:, kept]
    expected = last_logits(model, shorter)
    with mmaccel.accelerate(model, "codec-frames:keep=3"), using_signals(given):
        found = last_logits(model, inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [*BATCHED, *PACKED])
def test_each_video_of_a_batch_has_its_own_signals(name):
    family = FAMILIES[name]
    model = family.build()
    kinds = ["video", "text", "videos"]
    inputs = family.inputs(kinds)
    videos = [place.item for row in family.places(kinds) for place in row if place is not None]
    assert set(videos) == {0, 1}
    given = [changes(8, 3, 2, seed) ** 3 for seed in range(3)]
    if name in PACKED:
        given = [changes(2 * int(t), 2, 2, seed) ** 3 for seed, t in enumerate(inputs["video_grid_thw"][:, 0].tolist())]
    seen = {}
    for spec in ("codec-frames:keep=2", "evs:keep=0.5;temporal=codec"):
        with mmaccel.accelerate(model, spec) as handle, using_signals(*given), torch.no_grad():
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
            seen[spec] = handle.report().kept(spec.partition(":")[0])
    places = family.places(kinds)
    number = 0
    for row, kept in zip(places, seen["codec-frames:keep=2"], strict=True):
        for item in sorted({place.item for place in row if place is not None}):
            mine = given[number]
            groups = max(place.t for place in row if place is not None and place.item == item) + 1
            size = len(mine) // groups
            expected = select_frames(mine.view(groups, size, *mine.shape[1:]).sum(1).clamp_max(1), 2)
            frames = {row[i].t for i in kept if row[i] is not None and row[i].item == item and row[i].t >= 0}
            assert sorted(frames) == expected
            number += 1
    assert number == 3
    alone = {}
    with mmaccel.accelerate(model, "evs:keep=0.5;temporal=codec") as handle, using_signals(given[0]), torch.no_grad():
        model(**family.inputs(kinds, row=0))
        alone = handle.report().kept("evs")[0]
    pad = len(places[0]) - family.inputs(kinds, row=0)["input_ids"].shape[1]
    assert [i + pad for i in alone] == seen["evs:keep=0.5;temporal=codec"][0]


@pytest.mark.parametrize("spec", ["evs:keep=0.5;temporal=codec", "holitom:keep=0.5;temporal=codec", "codec-frames"])
def test_without_signals_the_error_says_how_to_give_them(spec):
    family = FAMILIES["llava-onevision"]
    model, inputs = family.build(), family.inputs("video")
    before = last_logits(model, inputs)
    with mmaccel.accelerate(model, spec):
        with pytest.raises(NotApplicableError, match=r"with mmaccel\.codecs\.using_signals"):
            last_logits(model, inputs)
        with pytest.raises(NotApplicableError, match="of 3 frames"), using_signals(changes(3, 2, 2)):
            last_logits(model, inputs)
    assert torch.equal(before, last_logits(model, inputs))


@pytest.mark.parametrize(
    "spec", ["evs:keep=1.0;temporal=codec", "holitom:keep=1.0;temporal=codec", "codec-frames:keep=1.0"]
)
def test_neutral_is_bit_identical_and_needs_no_signals(spec):
    family = FAMILIES["llava-onevision"]
    model, inputs = family.build(), family.inputs("video")
    before = last_logits(model, inputs)
    with mmaccel.accelerate(model, spec):
        assert torch.equal(before, last_logits(model, inputs))


def test_images_need_no_signals():
    family = FAMILIES["llava-onevision"]
    model, inputs = family.build(), family.inputs("images")
    before = last_logits(model, inputs)
    for spec in ("evs:keep=0.5;temporal=codec", "codec-frames:keep=0.5"):
        with mmaccel.accelerate(model, spec):
            assert torch.equal(before, last_logits(model, inputs))
    with mmaccel.accelerate(model, "holitom:keep=0.5"):
        want = last_logits(model, inputs)
    with mmaccel.accelerate(model, "holitom:keep=0.5;temporal=codec"):
        assert torch.equal(last_logits(model, inputs), want)


def test_frames_and_tokens_by_the_codec_together():
    family = FAMILIES["qwen2.5-vl"]
    model, inputs = family.build(), family.inputs("video")
    t = int(inputs["video_grid_thw"][0, 0])
    given = changes(t, 2, 2) ** 2
    with mmaccel.accelerate(model, "codec-frames:keep=0.5+evs:keep=0.7;temporal=codec") as handle, using_signals(given):
        last_logits(model, inputs)
    rows = handle.report().as_dict()["tokens"]
    assert [row["method"] for row in rows] == ["codec-frames", "evs"]
    assert rows[0]["tokens_out"] == rows[1]["tokens_in"]
