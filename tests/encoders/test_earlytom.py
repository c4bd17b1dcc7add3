"""EarlyTom against frame-by-frame references that call the library's own blocks."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from checks import VIDEO, call, ids
from made import noise, video

import mmaccel
from mmaccel.adapters import video_lm
from mmaccel.core.encoding import encoding_of
from mmaccel.core.run import opened
from mmaccel.encoders.earlytom import EarlyTom
from mmaccel.errors import ConflictError, MethodError, NonFiniteError, NotApplicableError
from mmaccel.method import parse
from mmaccel.tokens.frames import MergedFrames, frame_similarity, merge_middles, segments, threshold_for

FAMILIES = [family for family in VIDEO if family.name != "internvl"]
each_family = pytest.mark.parametrize("family", FAMILIES, ids=ids(FAMILIES))


def alike(u, v):
    """Mean over the places of the cosine of two frames [S, C], in doubles."""
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(u.double(), v.double(), strict=True)]
    return sum(cosines) / len(cosines)


def walk(frames, tau, ema, longest):
    """The card's first stage on a list of frames: (list of (frames, weights), segments)."""
    cuts, start, mean = [], 0, 1.0
    for i in range(1, len(frames)):
        mean = ema * alike(frames[start], frames[i]) + (1 - ema) * mean
        if mean < tau or i - start >= longest:
            cuts.append(range(start, i))
            start, mean = i, 1.0
    cuts.append(range(start, len(frames)))
    left = []
    for cut in cuts:
        members = list(cut)
        if len(members) < 3:
            left += [[(t, 1.0)] for t in members]
            continue
        middle, bound = members[1:-1], alike(frames[members[0]], frames[members[-1]])
        left.append([(members[0], 1.0)])
        while middle:
            t, rest = middle[0], middle[1:]
            s = alike(frames[t], frames[rest[0]]) if rest else None
            behind = alike(frames[rest[0]], frames[rest[1]]) if len(rest) > 1 else None
            if s is None or s < bound - 1e-4 or (behind is not None and s < behind - 1e-4):
                left.append([(t, 1.0)])
                middle = rest
                continue
            left.append([(t, 1.0)] if behind is None else [(t, s / (s + behind)), (rest[0], behind / (s + behind))])
            middle = rest[1:]
        left.append([(members[-1], 1.0)])
    return left, cuts


def shot(T, S, C, drift, seed=0):
    """Frames that drift away from the first one, with a cut in the middle."""
    x = noise(1, S, C, seed=seed) + drift * noise(T, S, C, seed=seed + 1).cumsum(0)
    x[T // 2 :] += noise(1, S, C, seed=seed + 2)
    return x


@pytest.mark.parametrize("drift", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("T", [1, 2, 3, 4, 9, 16])
def test_merging_is_the_walk_of_the_card(T, drift):
    x = shot(T, 5, 8, drift)
    c = frame_similarity(x)
    for u, v in itertools.product(range(T), repeat=2):
        assert float(c[u, v]) == pytest.approx(alike(x[u], x[v]), abs=1e-5)
    for tau, longest in itertools.product((-1.0, 0.5, 0.8, 0.95), (3, 6, 99)):
        cuts = segments(c.tolist(), tau, longest=longest)
        groups = merge_middles(c.tolist(), cuts)
        want, want_cuts = walk(list(x), tau, 0.9, longest)
        assert cuts == [(cut.start, cut.stop) for cut in want_cuts]
        assert [[t for t, _ in group] for group in groups] == [[t for t, _ in group] for group in want]
        for group, expected in zip(groups, want, strict=True):
            assert [w for _, w in group] == pytest.approx([w for _, w in expected], abs=1e-4)
            assert sum(w for _, w in group) == pytest.approx(1)
        assert len(cuts) <= len(groups) <= T


@pytest.mark.parametrize("reach", [1, 2, 3, 7])
def test_similarities_within_reach_are_those_of_all_pairs(reach):
    x = noise(11, 4, 6)
    near = (torch.arange(11)[:, None] - torch.arange(11)).abs() <= reach
    torch.testing.assert_close(frame_similarity(x, reach)[near], frame_similarity(x)[near])


def test_thresholds_at_the_ends():
    x = shot(8, 4, 6, 0.3)
    c = frame_similarity(x).tolist()
    assert segments(c, -1.0, longest=8) == [(0, 8)]
    assert segments([[1 - 2e-7] * 8] * 8, 1.0) == [(0, 8)]  # copies, as rounding leaves them
    assert segments(c, 1.1) == [(t, t + 1) for t in range(8)]
    assert merge_middles(c, segments(c, 1.1)) == [[(t, 1.0)] for t in range(8)]
    assert segments(c, -1.0, longest=3) == [(0, 3), (3, 6), (6, 8)]


@pytest.mark.parametrize("T", [3, 4, 6, 9])
def test_copies_merge_unless_more_is_asked_for(T):
    c = frame_similarity(noise(1, 4, 6).expand(T, 4, 6)).tolist()
    cuts = segments(c, 0.8, longest=T)
    middles = T - 2
    assert len(merge_middles(c, cuts)) == 2 + math.ceil(middles / 2)
    exact = [[1.0] * T for _ in range(T)]
    assert len(merge_middles(exact, cuts, strict=True)) == T


@pytest.mark.parametrize("wanted", range(1, 13))
def test_the_automatic_threshold_comes_nearest(wanted):
    c = frame_similarity(shot(12, 4, 6, 0.2)).tolist()

    def left(tau):
        return len(merge_middles(c, segments(c, tau, longest=6)))

    tau = threshold_for(c, wanted, longest=6)
    # every threshold that can make a difference lies between two of these
    means = torch.linspace(-1, 1.01, 2001).tolist()
    assert abs(left(tau) - wanted) <= min(abs(left(other) - wanted) for other in means)


def test_times_and_places_of_merged_frames():
    once = MergedFrames.none(6).then([[(0, 1.0)], [(1, 0.6), (2, 0.4)], [(3, 0.5), (4, 0.5)], [(5, 1.0)]], [(0, 4)])
    assert once.times == pytest.approx([0, 1.4, 3.5, 5])
    assert once.places == [0, 1, 3, 5]
    twice = once.then([[(0, 1.0)], [(1, 0.5), (2, 0.5)], [(3, 1.0)]], [(0, 3)])
    assert twice.groups[1] == [(1, 0.3), (2, 0.2), (3, 0.25), (4, 0.25)]
    assert twice.times == pytest.approx([0, 2.45, 5])
    assert twice.places == [0, 2, 5]


# ---- inside the encoder


class Reference:
    """A vision tower computed frame by frame with the library's own blocks, and merged with `walk`."""

    def __init__(self, net, family, inputs, layers, tau, longest):
        site = video_lm(net)
        encoder = site.encoder()
        known: dict = {}
        hooks = []
        for number, block in enumerate(encoder.blocks):

            def note(_module, args, kwargs, number=number):
                known[number] = (args, dict(kwargs))

            hooks.append(block.module.register_forward_pre_hook(note, with_kwargs=True))
        with torch.no_grad():
            net.model.get_video_features(**inputs)
        for hook in hooks:
            hook.remove()
        args, kwargs = known[0]
        hidden = args[0] if args else kwargs["hidden_states"]
        self.packed = encoder.packed
        if self.packed:
            (T, h, w), *more = inputs["video_grid_thw"].tolist()
            assert not more
            frames = list(hidden.view(T, h * w, -1))
        else:
            T, frames = len(hidden), list(hidden)
        members = [[(t, 1.0)] for t in range(T)]
        self.levels, self.scores = [], None
        deep = getattr(site.vision_tower, "deepstack_visual_indexes", ())
        score_at = site.sees_whole_frames(max(layers)) if layers else None
        with torch.no_grad():
            for number, block in enumerate(encoder.blocks):
                if number == score_at:
                    self.scores = [self.received(block, frame, known[number][1]) for frame in frames]
                frames = [self.block(block.module, known[number], frame) for frame in frames]
                if number in layers:
                    groups, _ = walk([frame[encoder.prefix :] for frame in frames], tau, 0.9, longest)
                    frames, members = self.merged(frames, groups), self.joined(members, groups)
                    if self.scores is not None:
                        self.scores = self.merged(self.scores, groups)
                    if number == max(layers):
                        _, cuts = walk([frame[encoder.prefix :] for frame in frames], tau, 0.9, longest)
                        self.cuts = [(cut.start, cut.stop) for cut in cuts]
                if number in deep:
                    merger = site.vision_tower.deepstack_merger_list[deep.index(number)]
                    self.levels.append(([merger(frame) for frame in frames], members))
                if number == encoder.last:
                    used = frames
            self.members, self.T = members, T
            if self.packed:
                self.features = [site.vision_tower.merger(frame) for frame in used]
            else:
                stacked = torch.stack(used)[:, encoder.prefix :] if site.has_class_token else torch.stack(used)
                self.features = list(project(net, stacked))

    @staticmethod
    def merged(frames, groups):
        return [sum(frames[t].double() * w for t, w in group).to(frames[0].dtype) for group in groups]

    @staticmethod
    def joined(members, groups):
        return [[(t, w * inner) for old, w in group for t, inner in members[old]] for group in groups]

    def parts(self, kwargs, n):
        rotary = tuple(table[:n] for table in kwargs["position_embeddings"])
        cuts = kwargs["cu_seqlens"]
        return rotary, cuts[cuts <= n]

    def block(self, module, known, frame):
        args, kwargs = known
        if not self.packed:
            return module(frame[None], *args[1:], **{k: v for k, v in kwargs.items() if k != "hidden_states"})[0]
        rotary, cuts = self.parts(kwargs, len(frame))
        rest = {k: v for k, v in kwargs.items() if k not in ("hidden_states", "cu_seqlens", "position_embeddings")}
        return module(frame, cu_seqlens=cuts, position_embeddings=rotary, **rest)

    def received(self, block, frame, kwargs):
        h = block.norm1(frame)
        q, k = block.query(h), block.key(h)
        if self.packed:
            rotary, _ = self.parts(kwargs, len(frame))
            q, k = block.rotate(q, rotary), block.rotate(k, rotary)
        return torch.softmax(q.double() @ k.double().mT * block.scale, -1).mean((0, 1)).float()

    def place(self, group):
        time = sum(t * w for t, w in group)
        return min((t for t, _ in group), key=lambda t: (abs(t - time), t))


def project(net, frames):
    model = net.model
    if hasattr(model, "vision_resampler"):
        return model.multi_modal_projector(model.vision_resampler(frames))
    return model.apply_pooling(model.multi_modal_projector(frames))


def features_of(output, T):
    """[T, S, D] of the one video of a call."""
    found = output.pooler_output
    found = found[0] if isinstance(found, (tuple, list)) else found.reshape(-1, found.shape[-1])
    return found[: len(found) // T * T].view(T, -1, found.shape[-1])


@pytest.mark.parametrize("tau", [-1.0, 0.9])
@pytest.mark.parametrize("layers", [(0,), (0, 1), (1, 2)])
@each_family
def test_the_encoder_computes_what_merging_frame_by_frame_gives(model, family, layers, tau):
    net, inputs = model(family), redundant(family, 8)
    want = Reference(net, family, inputs, layers, tau, longest=6)
    with mmaccel.accelerate(net, EarlyTom(keep=0.3, tau=tau, layers=layers)) as handle:
        site = video_lm(net)
        with opened(site.root), torch.no_grad():
            output = net.model.get_video_features(**inputs)
        report = handle.report()
    encoded = encoding_of(output)
    (merged,) = encoded.merged
    assert merged.T == want.T
    assert [[t for t, _ in group] for group in merged.groups] == [[t for t, _ in group] for group in want.members]
    for group, expected in zip(merged.groups, want.members, strict=True):
        assert [w for _, w in group] == pytest.approx([w for _, w in expected], abs=1e-3)
    assert merged.cuts == want.cuts
    assert merged.places == [want.place(group) for group in want.members]
    if tau < 0:
        assert len(merged) < want.T
    got = features_of(output, want.T)
    expected = torch.zeros_like(got)
    for place, features in zip(merged.places, want.features, strict=True):
        expected[place] = features
    if family.name == "qwen2.5-vl":
        expected = in_order(net, inputs, expected)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    scores = torch.cat([part.view(want.T, -1) for part in encoded.scores["received by merged frames"]])
    torch.testing.assert_close(scores[merged.places], torch.stack(want.scores), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scores[merged.places].sum(1), torch.ones(len(merged)), atol=1e-5, rtol=0)
    for level, (frames, members) in enumerate(want.levels):
        found = output.deepstack_features[level][0].view(want.T, -1, frames[0].shape[-1])
        inner = {t: frame for frame, group in zip(frames, members, strict=True) for t, _ in group}
        for place, group in zip(merged.places, merged.groups, strict=True):
            known = [(t, w) for t, w in group if t in inner]
            mix = sum(inner[t] * w for t, w in known) / sum(w for _, w in known)
            torch.testing.assert_close(found[place], mix, atol=2e-5, rtol=1e-4)
    spent, dense = report.as_dict()["flops"]["encode"].values()
    assert (spent < dense) == (len(merged) < want.T and layers[0] < len(site.encoder().blocks) - 1)


def in_order(net, inputs, features):
    from transformers.vision_utils import get_vision_window_index

    vision = net.config.vision_config
    order, _ = get_vision_window_index(
        inputs["video_grid_thw"], spatial_merge_size=vision.spatial_merge_size, window_size=vision.window_size,
        patch_size=vision.patch_size,
    )  # fmt: skip
    flat = features.flatten(0, 1)
    return flat[torch.argsort(order)].view_as(features)


def redundant(family, T):
    """The first frame of the family's video T times, drifting a little; for Qwen T pairs of frames."""
    inputs = family.inputs(["video"])
    pixels = inputs["pixel_values_videos"]
    if "video_grid_thw" in inputs:
        _, h, w = inputs["video_grid_thw"][0].tolist()
        first = pixels[: h * w]
        frames = [first + 0.1 * k * noise(*first.shape, seed=3) for k in range(T)]
        return {"pixel_values_videos": torch.cat(frames), "video_grid_thw": torch.tensor([[T, h, w]])}
    first = pixels[0, 0]
    return {"pixel_values_videos": torch.stack([first + 0.1 * k * noise(*first.shape, seed=3) for k in range(T)])[None]}


# ---- the selection in space


def chosen(tokens, **knobs):
    return EarlyTom(**knobs).reduce(tokens).index.tolist()


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.29, 20, 60])
def test_without_merging_every_frame_keeps_its_best_tokens(keep):
    T, S = 5, 12
    tokens = video(noise(T, S, 8), noise(T, S, seed=1))
    share = keep if isinstance(keep, float) else keep / (T * S)
    want = []
    for t in range(T):
        row = tokens.score.view(T, S)[t].tolist()
        best = sorted(range(S), key=lambda p, row=row: -row[p])[: math.ceil(S * share - 1e-9)]
        want += [t * S + p for p in sorted(best)]
    assert chosen(tokens, keep=keep) == want


def test_frames_between_keep_one_token_a_window():
    T, S = 8, 13
    groups = [[(0, 1.0)], [(1, 0.7), (2, 0.3)], [(3, 1.0)], [(4, 0.5), (5, 0.5)], [(6, 1.0)], [(7, 1.0)]]
    merged = MergedFrames(T, groups, [(0, 4), (4, 6)])
    tokens = video(noise(T, S, 8), noise(T, S, seed=1))
    tokens = dataclasses.replace(tokens, merged=merged)
    ratio = 0.3 * T / 6
    want = []
    for living, place in enumerate([0, 1, 3, 4, 6, 7]):
        row = tokens.score.view(T, S)[place].tolist()
        if living in (1, 2):
            k = round(S * ratio)
            sizes = [S // k + (i < S % k) for i in range(k)]
            edges = [0, *itertools.accumulate(sizes)]
            best = [max(range(a, b), key=lambda p, row=row: (row[p], -p)) for a, b in itertools.pairwise(edges)]
        else:
            best = sorted(sorted(range(S), key=lambda p, row=row: -row[p])[: math.ceil(S * ratio)])
        want += [place * S + p for p in best]
    assert chosen(tokens, keep=0.3) == want
    every = [place * S + p for place in (0, 1, 3, 4, 6, 7) for p in range(S)]
    assert chosen(tokens, keep=0.3, temporal_only=True) == chosen(tokens, keep=0.99) == every
    # at least one token a frame
    assert len(chosen(tokens, keep=1)) == 6


def test_an_image_is_one_frame():
    tokens = video(noise(1, 9, 8), noise(1, 9, seed=1), kind="image")
    assert len(chosen(tokens, keep=0.5)) == 5


# ---- as users meet it


@each_family
def test_empty_layers_select_as_if_nothing_had_merged(model, family):
    net, inputs = model(family), family.inputs(["video"])
    kept = []
    for spec in ("earlytom:layers=;keep=0.4;inner_keep=1.0", "earlytom:tau=1.5;layers=1;keep=0.4;inner_keep=1.0"):
        with mmaccel.accelerate(net, spec) as handle:
            call(net, inputs)
            kept.append([len(row) for row in handle.report().kept("earlytom")])
    assert kept[0] == kept[1]
    with mmaccel.accelerate(net, "holitom:keep=0.4;tau=1.0;inner_keep=1.0") as handle:
        call(net, inputs)
        holitom = handle.report().kept("holitom")
    with mmaccel.accelerate(net, "earlytom:layers=;keep=0.4;inner_keep=1.0") as handle:
        call(net, inputs)
        assert handle.report().kept("earlytom") == holitom


@each_family
def test_merging_alone_keeps_every_token_of_the_frames_that_are_left(model, family):
    net, inputs = model(family), family.inputs(["video"])
    with mmaccel.accelerate(net, "earlytom:layers=0;tau=-1.0;temporal_only=true;inner_keep=1.0") as handle:
        call(net, inputs)
        report = handle.report()
    entry = report.tokens["earlytom", "before the language model"]
    (note,) = [note for note in report.lines() if "frames are left" in note]
    left, T = int(note.split()[1]), int(note.split()[3])
    assert 1 <= left <= T
    assert entry.tokens_out * T == entry.tokens_in * left


@each_family
def test_two_videos_of_a_call_merge_by_themselves(model, family):
    net = model(family)
    single = family.inputs(["video"])
    spec = "earlytom:layers=0/1;frames=0.6;keep=0.5;positions=original"
    with mmaccel.accelerate(net, spec):
        alone = call(net, single).logits
        both = call(net, family.inputs(["video", "videos"])).logits
    length = single["input_ids"].shape[1]
    assert both.shape[1] >= alone.shape[1]
    assert length >= alone.shape[1]
    torch.testing.assert_close(both[0, -1], alone[0, -1], atol=2e-5, rtol=1e-4)


def test_wrong_use(model):
    family = next(family for family in FAMILIES if family.name == "llava-onevision")
    net = model(family)
    for layers in ("4/x", "3/2", (1, 1), "-1", "1,2"):
        with pytest.raises(MethodError, match="numbers that rise"):
            EarlyTom(layers=layers)
    with pytest.raises(MethodError, match="frames"):
        EarlyTom(frames=0.0)
    with pytest.raises(NotApplicableError, match="behind the last vision layer"):
        mmaccel.accelerate(net, EarlyTom(layers=(9,)))
    with pytest.raises(ConflictError, match="fewer-frames"):
        mmaccel.accelerate(net, "earlytom", "fewer-frames:keep=0.5")
    with mmaccel.accelerate(net, "earlytom:keep=100000"), pytest.raises(MethodError, match="nearest number"):
        call(net, family.inputs(["video"]))
    for other in VIDEO:
        if other.name == "internvl":
            with pytest.raises(NotApplicableError, match="encodes images only"):
                mmaccel.accelerate(model(other), "earlytom")


def test_nan_inside_the_tower_is_named(model):
    family = next(family for family in FAMILIES if family.name == "llava-onevision")
    net, inputs = model(family), dict(family.inputs(["video"]))
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].clone()
    inputs["pixel_values_videos"][0, 1] = torch.nan
    with mmaccel.accelerate(net, "earlytom:layers=0"), pytest.raises(NonFiniteError, match="vision_tower"):
        call(net, inputs)


def test_layers_are_given_in_three_ways():
    assert EarlyTom(layers=(4, 14)).spec == "earlytom:layers=4/14"
    assert parse("earlytom:layers=4")[0] == EarlyTom(layers=(4,)) == EarlyTom(layers="4")
    preset = EarlyTom.preset("llava-onevision mvbench keep 0.10")
    assert (preset.tau, preset.strict, preset.layers) == (0.65, True, "6/21/23")


@each_family
def test_frames_that_were_made_smaller_merge_too(model, family):
    net, inputs = model(family), family.inputs(["video", "videos"])
    smaller = "fewer-pixels:keep=0.4"
    logits, kept = [], []
    for spec in ("earlytom:layers=;keep=0.6;inner_keep=1.0", "earlytom:tau=2.0;layers=1;keep=0.6;inner_keep=1.0"):
        with mmaccel.accelerate(net, smaller, spec) as handle:
            logits.append(call(net, inputs).logits)
            kept.append([len(row) for row in handle.report().kept("earlytom")])
    assert kept[0] == kept[1]
    with mmaccel.accelerate(net, smaller) as handle:
        call(net, inputs)
        left = handle.report().kept("fewer-pixels")
    with mmaccel.accelerate(net, smaller, "earlytom:tau=-1.0;layers=0;temporal_only=true;inner_keep=1.0") as handle:
        merged = call(net, inputs).logits
        both = handle.report().kept("earlytom")
    for ours, theirs in zip(both, left, strict=True):
        assert set(ours) <= set(theirs)
    assert both != left  # some frames did merge
    assert torch.isfinite(merged).all()


def test_gradients_pass_through_merged_frames(model):
    family = next(family for family in FAMILIES if family.name == "llava-onevision")
    net = model(family)
    given = redundant(family, 8)
    pixels = given["pixel_values_videos"].clone()
    pixels[:, 3] = pixels[:, 2]
    pixels.requires_grad_()
    with mmaccel.accelerate(net, "earlytom:layers=0;tau=-1.0;longest=none;temporal_only=true;inner_keep=1.0"):
        with opened(video_lm(net).root):
            output = net.model.get_video_features(pixel_values_videos=pixels)
        (merged,) = encoding_of(output).merged
        output.pooler_output.square().sum().backward()
    assert any(len(group) > 1 for group in merged.groups)
    touched = pixels.grad.abs().flatten(2).sum(2)[0] > 0
    assert touched.nonzero().squeeze(1).tolist() == sorted(t for group in merged.groups for t, _ in group)
