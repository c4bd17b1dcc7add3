"""PruneVid against naive loops, and its inner part against an attention map kept by the test."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from checks import ALL, call, close, generate, ids, mixture
from made import cosine, noise, peaks, scene, video
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import mmaccel
from mmaccel.encoders.prunevid import PruneVid
from mmaccel.errors import MethodError
from mmaccel.tiny.families import FAMILIES


def nearest(x, centres):
    """For each row of x the number of the row of `centres` nearest to it; a centre is its own."""
    found = []
    for i in range(len(x)):
        away = [-1.0 if c == i else float((x[i] - x[c]).norm()) for c in centres]
        found.append(away.index(min(away)))
    return found


def scenes(x, ratio):
    """Segments by loops, as lists of frames: clusters of frames, each cut down to its longest run."""
    T, means = len(x), x.mean(1)
    number = max(1, int(T * ratio + 0.5))
    labels = nearest(means, peaks(means, range(T), number, min(7, number)))
    runs = {}
    for start, stop in itertools.combinations(range(T + 1), 2):
        if len(set(labels[start:stop])) == 1 and stop - start > len(runs.get(labels[start], ())):
            runs[labels[start]] = range(start, stop)
    owner = [min(runs, key=lambda c, t=t: (min(abs(t - u) for u in runs[c]), runs[c].start)) for t in range(T)]
    return [list(frames) for _, frames in itertools.groupby(range(T), key=lambda t: owner[t])]


def groups_of(x, method):
    """Lists of lists: the tokens that are clustered together, each with its copies over time."""
    S, groups = x.shape[1], []
    for frames in scenes(x, method.temporal):
        pairs = list(itertools.combinations(frames, 2))
        mean = {p: sum(cosine(x[a, p], x[b, p]) for a, b in pairs) / len(pairs) if pairs else -1 for p in range(S)}
        still = [p for p in range(S) if mean[p] > method.tau]
        groups.append([[t * S + p for t in frames] for p in still])
        groups += [[[t * S + p] for p in range(S) if p not in still] for t in frames]
    return groups


def shared(total, sizes):
    """`total` in proportion to `sizes`, by largest remainder, ties to the first."""
    exact = [total * size / sum(sizes) for size in sizes]
    whole = [math.floor(e + 1e-9) for e in exact]
    order = sorted(range(len(sizes)), key=lambda g: (-round(exact[g] - whole[g], 9), g))
    for g in order[: total - sum(whole)]:
        whole[g] += 1
    return whole


def naive(x, method, total):
    """{kept token: its value}, when `total` are kept."""
    flat, out = x.reshape(-1, x.shape[-1]), {}
    groups = groups_of(x, method)
    for group, number in zip(groups, shared(total, [len(group) for group in groups]), strict=True):
        if number:
            mean = torch.stack([flat[copies].mean(0) for copies in group])
            centres = peaks(mean, range(len(group)), number, min(7, number))
            cluster = nearest(mean, centres)
            for c, centre in enumerate(centres):
                out[group[centre][0]] = mean[[i for i in range(len(group)) if cluster[i] == c]].mean(0)
    return out


@pytest.mark.parametrize(
    "knobs", [{}, {"tau": 0.5, "temporal": 0.5}, {"tau": 1.0}, {"tau": 0.3, "temporal": 0.1}], ids=str
)
@pytest.mark.parametrize("seed", range(3))
def test_tokens_and_values_are_those_of_the_card(knobs, seed):
    T, S = 8, 18
    x = scene(T, S, still=0.8, cuts=(3,), seed=seed)
    method = PruneVid(keep=0.2, **knobs)
    groups = groups_of(x, method)
    assert any(len(group) and len(group[0]) > 1 for group in groups) == (method.tau < 1)
    want = naive(x, method, int(0.2 * T * S + 0.5))
    reduction = method.reduce(video(x))
    assert reduction.index.tolist() == sorted(want)
    got = reduction.apply(x.view(T * S, -1))
    torch.testing.assert_close(got, torch.stack([want[i] for i in sorted(want)]))


@pytest.mark.parametrize("keep", [0.03, 0.25, 0.6, 0.95, 1, 9, 50])
@pytest.mark.parametrize("T", [1, 2, 3, 7, 8])
def test_the_number_kept_is_exact_unless_averaging_leaves_fewer(T, keep):
    S, notes = 14, []
    x = scene(T, S, still=0.8, cuts=(4,), seed=T)
    tokens = replace(video(x), note=lambda text, *_: notes.append(text))
    keep = min(keep, T * S) if isinstance(keep, int) else keep
    for temporal in (0.1, 0.25, 1.0):
        notes.clear()
        method = PruneVid(keep=keep, temporal=temporal, tau=0.5)
        left = sum(len(group) for group in groups_of(x, method))
        wanted = keep if isinstance(keep, int) else max(1, int(keep * T * S + 0.5 + 1e-9))
        index = method.reduce(tokens).index.tolist()
        assert len(index) == min(left, wanted)
        assert index == sorted(set(index))
        assert any(f"leaves {left}" in text for text in notes) == (wanted > left)


@pytest.mark.parametrize("spatial", [0.25, 0.5, 1.0])
def test_the_ratio_of_the_paper_counts_what_averaging_leaves(spatial):
    x = scene(8, 18, still=0.8, cuts=(3,), seed=1)
    left = sum(len(group) for group in groups_of(x, PruneVid()))
    assert left < 8 * 18
    for keep in (0.1, 1.0):
        method = PruneVid(keep=keep, spatial=spatial)
        assert not method.neutral
        assert len(method.reduce(video(x)).index) == int(spatial * left + 0.5)


@pytest.mark.parametrize(("temporal", "segments"), [(0.1, 1), (0.25, 2), (0.5, 3), (1.0, 6)])
def test_identical_frames_become_one_a_segment(temporal, segments):
    x = noise(1, 12, 8).expand(6, 12, 8)
    tokens = video(x)
    reduction = PruneVid(spatial=1.0, temporal=temporal).reduce(tokens)
    assert len(reduction.index) == 12 * segments
    assert (reduction.index % 12).tolist() == list(range(12)) * segments
    torch.testing.assert_close(reduction.apply(tokens.features), x[0].repeat(segments, 1))


def test_a_constant_field_stays_what_it_is():
    x = noise(1, 1, 8).expand(6, 16, 8)
    tokens = video(x)
    for method in (PruneVid(keep=0.1), PruneVid(keep=0.1, tau=1.0), PruneVid(spatial=0.5, temporal=0.5)):
        out = method.reduce(tokens).apply(tokens.features)
        torch.testing.assert_close(out, x[0, :1].expand_as(out))


def test_without_still_tokens_at_full_ratio_nothing_changes():
    tokens = video(noise(4, 9, 32))
    reduction = PruneVid(spatial=1.0, tau=1.0).reduce(tokens)
    assert reduction.mix is None
    assert torch.equal(reduction.index, torch.arange(36))


def test_an_image_is_clustered_in_space():
    x = noise(1, 30, 6)
    method = PruneVid(keep=9)
    reduction = method.reduce(video(x, kind="image"))
    centres = peaks(x[0], range(30), 9, 7)
    cluster = nearest(x[0], centres)
    assert reduction.index.tolist() == centres
    want = torch.stack([x[0, [i for i in range(30) if cluster[i] == c]].mean(0) for c in range(9)])
    torch.testing.assert_close(reduction.apply(x[0]), want)


@pytest.mark.parametrize(("n", "share", "number"), [(21, 0.4, 9), (20, 0.4, 8), (100, 0.07, 7), (3, 0.01, 1)])
def test_the_inner_part_keeps_the_ceiling_of_the_share(n, share, number):
    x, score = noise(1, n, 6), noise(1, n, seed=1)
    reduction = PruneVid(inner_keep=share).reduce_inside(video(x, score))
    assert reduction.mix is None
    assert reduction.index.tolist() == sorted(sorted(range(n), key=lambda i: -float(score[0, i]))[:number])
    assert PruneVid(inner_keep=1.0).reduce_inside(video(x, score)) is None


def test_more_than_there_are_names_the_nearest():
    with pytest.raises(MethodError, match="nearest number is 18"):
        PruneVid(keep=19).reduce(video(noise(2, 9, 4)))


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


AttentionInterface.register("prunevid_map", keep_the_map)
AttentionMaskInterface.register("prunevid_map", sdpa_mask)


@pytest.mark.parametrize("family", ALL, ids=ids(ALL))
def test_kept_inside_are_those_that_any_token_of_the_question_attends_to_most(model, family):
    net, kinds, layer = model(family), mixture(family), 2
    inputs = family.inputs(kinds)
    net.set_attn_implementation({"text_config": "prunevid_map"})
    try:
        call(net, inputs)
    finally:
        net.set_attn_implementation({"text_config": "sdpa"})
    weights = MAPS[layer - 1].mean(1)
    with mmaccel.accelerate(net, f"prunevid:spatial=1.0;tau=1.0;inner_layer={layer}") as handle:
        call(net, inputs)
        kept = handle.report().kept("prunevid")
    by_last = 0
    for row, (places, left) in enumerate(zip(family.places(kinds), kept, strict=True)):
        visual = [i for i, place in enumerate(places) if place is not None and place.x >= 0]
        start = int((inputs["attention_mask"][row] == 0).sum())
        if not visual:
            assert left == list(range(start, len(places)))
            continue
        question = range(max(i for i, place in enumerate(places) if place is not None) + 1, len(places))
        assert len(question) > 1
        score = {i: max(float(weights[row, q, i]) for q in question) for i in visual}
        number = math.ceil(0.4 * len(visual) - 1e-9)
        best = set(sorted(visual, key=lambda i, score=score: -score[i])[:number])
        assert left == [i for i in range(start, len(places)) if i not in visual or i in best]
        last = sorted(visual, key=lambda i, row=row: -float(weights[row, len(places) - 1, i]))[:number]
        by_last += best == set(last)
    assert by_last < sum(kind != "text" for kind in kinds), "the last token alone would have chosen the same"


def test_the_layer_of_the_paper_scales_with_the_depth():
    assert [PruneVid()._layer(depth) for depth in (2, 4, 28, 32)] == [1, 1, 9, 10]
    net = FAMILIES["llava"].build()
    with mmaccel.accelerate(net, "prunevid:keep=0.5;inner_layer=99") as handle:
        assert "inner part is off" in str(handle.report().as_dict()["notes"])


@pytest.mark.parametrize("family", ALL, ids=ids(ALL))
def test_guesses_behind_the_prompt_are_no_question(model, family, monkeypatch):
    net, inputs = model(family), family.inputs(mixture(family)[0])
    # the last token stands in front of the video too, so what followed it there is guessed
    first, end = torch.tensor([[97, 98, 99, 100]]), torch.tensor([[97]])
    inputs = {**inputs, "input_ids": torch.cat([first, inputs["input_ids"], end], 1)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (4, 1))
    scores, read = [], []
    monkeypatch.setattr(PruneVid, "reduce_inside", lambda _self, tokens: scores.append(tokens.score))
    hook = net.model.language_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: read.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    with mmaccel.accelerate(net, "prunevid:keep=0.5;inner_layer=2"):
        generate(net, inputs, steps=3)
        plain = read[0]
        read.clear()
        generate(net, inputs, steps=3, prompt_lookup_num_tokens=3)
    hook.remove()
    assert read[0] > plain
    assert len(scores) == 2
    close(scores[1], scores[0], atol=1e-7)
