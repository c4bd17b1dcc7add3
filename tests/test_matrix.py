"""Every method on every family: identity, drop equals mask, positions, batches, repeated calls, counts."""

from __future__ import annotations

import math

import pytest
import torch
from checks import (
    ALL,
    VIDEO,
    cache_of,
    cached,
    call,
    close,
    closed_up,
    dropped,
    generate,
    ids,
    masked,
    mixture,
    rows_of,
    seen_by_language_model,
)

import mmaccel

DROPS = {
    "random": "random:keep=0.3",
    "uniform": "uniform:keep=0.4",
    "evs": "evs:keep=0.4",
    "visionzip": "visionzip:keep=0.3;contextual=0.0",
    "holitom": "holitom:keep=0.3;tau=1.0;inner_keep=1.0",
    "idpruner": "idpruner:keep=0.3",
    "divprune": "divprune:keep=0.3",
    "vidcom2": "vidcom2:keep=0.4",
    "prumerge": "prumerge:keep=0.3;neighbours=0;rest=false",
    "stc": "stc:keep=0.3;refresh=1.0",
    "fastv": "fastv:keep=0.4;layer=2",
    "earlytom": "earlytom:keep=0.3;layers=;inner_keep=1.0",
    "dycoke": "dycoke:keep=0.4",
    "fastvid": "fastvid:keep=0.3;contextual=0.0",
    "prunevid": "prunevid:spatial=1.0;tau=1.0;inner_layer=2",
}
FIRST = {"fastv": 2, "prunevid": 2}  # the decoder layer in front of which these drop
DEFAULTS = {
    "random": "random:keep=0.3",
    "uniform": "uniform:keep=0.3",
    "evs": "evs:keep=0.3",
    "visionzip": "visionzip:keep=0.3",
    "holitom": "holitom:keep=0.3;tau=0.3;contextual=0.3",
    "idpruner": "idpruner:keep=0.3;importance=norm",
    "divprune": "divprune:keep=0.3",
    "vidcom2": "vidcom2:keep=0.3",
    "prumerge": "prumerge:keep=0.3;neighbours=4;spread=0.3",
    "stc": "stc:keep=0.3;refresh=0.3",
    "fastv": "fastv:keep=0.3",
    "dycoke": "dycoke",
    "fastvid": "fastvid:keep=0.3;segments=2",
    "prunevid": "prunevid:keep=0.3;tau=0.3;temporal=0.5",
    "fewer-pixels": "fewer-pixels:keep=0.3",
    "fewer-frames": "fewer-frames:keep=0.5",
    "earlytom": "earlytom:keep=0.3;tau=-1.0;layers=0/1",
    "tome": "tome:keep=0.4",
}
EXACT = ["random", "uniform", "visionzip", "idpruner", "divprune", "vidcom2", "prumerge", "stc"]
# what besides keep switches a method off
ALSO_OFF = {"stc": ";refresh=1.0"}
each_family = pytest.mark.parametrize("family", ALL, ids=ids(ALL))
each_drop = pytest.mark.parametrize("method", DROPS)
each_method = pytest.mark.parametrize("method", DEFAULTS)


def fits(family, method):
    if method in ("fewer-frames", "earlytom") and (family not in VIDEO or family.name == "internvl"):
        pytest.skip("the family encodes images only")


def original(spec):
    return spec if spec.startswith("fastv") else spec + ";positions=original"


@pytest.fixture(scope="module")
def dense(model):
    """dense(family, kinds) -> inputs, logits of a forward, ids and logits of a short generation, without methods."""
    known = {}

    def get(family, kinds):
        key = family.name, str(kinds)
        if key not in known:
            inputs = family.inputs(kinds)
            known[key] = (inputs, call(model(family), inputs).logits, *generate(model(family), inputs, steps=2))
        return known[key]

    return get


@each_method
@each_family
def test_neutral_knob_changes_nothing(model, dense, family, method):
    fits(family, method)
    kinds = [kind for kind in family.kinds if kind != "turn"]
    with mmaccel.accelerate(model(family), f"{method}:keep=1.0{ALSO_OFF.get(method, '')}"):
        for kind in [*kinds, mixture(family)]:
            inputs, logits, tokens, steps = dense(family, kind)
            assert torch.equal(call(model(family), inputs).logits, logits), kind
            got, got_steps = generate(model(family), inputs, steps=2)
            assert torch.equal(got, tokens), kind
            assert all(map(torch.equal, got_steps, steps)), kind


@pytest.mark.parametrize("batch", ["alone", "padded"])
@each_drop
@each_family
def test_dropping_equals_masking(model, family, method, batch):
    fits(family, method)
    net = model(family)
    kinds = mixture(family)
    inputs = family.inputs(kinds[0] if batch == "alone" else kinds)
    with mmaccel.accelerate(net, original(DROPS[method])) as handle:
        prefill = call(net, inputs).logits
        kept = handle.report().kept(method)
        tokens, steps = generate(net, inputs)
        assert handle.report().kept(method) == kept
    gone = dropped(kept, inputs)
    assert gone.any() or (method in ("evs", "dycoke") and family not in VIDEO)
    with masked(net, gone, layer=FIRST.get(method, 0)):
        want = call(net, inputs).logits
        want_tokens, want_steps = generate(net, inputs)
    for row, (got, places) in enumerate(zip(rows_of(prefill, kept), kept, strict=True)):
        close(got, want[row, places])
    assert torch.equal(tokens, want_tokens)
    for step, (got, expected) in enumerate(zip(steps, want_steps, strict=True)):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0, msg=lambda m, step=step: f"step {step}: {m}")


@pytest.mark.parametrize("family", [f for f in VIDEO if f.name != "internvl"], ids=lambda f: f.name)
def test_frames_that_were_not_encoded_equal_masked_ones(model, family):
    net, inputs = model(family), family.inputs(["video", "videos"])
    with mmaccel.accelerate(net, "fewer-frames:keep=0.5;positions=original") as handle:
        _, steps = generate(net, inputs, steps=2)
        kept = handle.report().kept("fewer-frames")
    with masked(net, dropped(kept, inputs)):
        _, want = generate(net, inputs, steps=2)
    for got, expected in zip(steps, want, strict=True):
        close(got, expected)


@pytest.mark.parametrize("method", ["random", "evs"])
@each_family
def test_compacted_positions_equal_a_shorter_prompt(model, family, method):
    net, kinds = model(family), mixture(family)
    language_model = net.model.language_model
    inputs = family.inputs(kinds)
    plain = seen_by_language_model(net, lambda: generate(net, inputs, steps=0))
    with mmaccel.accelerate(net, f"{method}:keep=0.3;positions=compact") as handle:
        tokens, steps = generate(net, inputs)
        kept = handle.report().kept(method)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    for row, places in enumerate(kept):
        deep = {}
        if plain.get("visual_pos_masks") is not None:
            where = plain["visual_pos_masks"]
            deep = {"visual_pos_masks": where[row, places][None], "deepstack_visual_embeds": []}
            for feature in plain["deepstack_visual_embeds"]:
                whole = torch.zeros(*where.shape, feature.shape[-1])
                whole[where] = feature
                deep["deepstack_visual_embeds"].append(whole[row, places][where[row, places]])
        position = plain["position_ids"]
        position = position[row][None] if position.dim() == 2 else position[-3:, row]
        want = closed_up(position, family.places(kinds)[row], places)
        embeds, cache, last = plain["inputs_embeds"][row, places][None], None, want[:, -1]
        for step in range(len(steps)):
            with torch.no_grad():
                here = want[:, None] if len(want) > 1 else want
                out = language_model(inputs_embeds=embeds, position_ids=here, **cached(cache), use_cache=True, **deep)
                close(steps[step][row], net.lm_head(out.last_hidden_state[0, -1]))
                embeds, cache, deep = net.get_input_embeddings()(new[row, step])[None, None], cache_of(out), {}
            last = last + 1
            want = last[:, None]


@each_method
@each_family
def test_padded_batch_equals_single_prompts(model, family, method):
    fits(family, method)
    net, kinds = model(family), mixture(family)
    with mmaccel.accelerate(net, DEFAULTS[method]) as handle:
        tokens, steps = generate(net, family.inputs(kinds), steps=3)
        tokens_stay = method == "tome"
        kept = None if tokens_stay else handle.report().kept(method)
        pads = (family.inputs(kinds)["attention_mask"] == 0).sum(1).tolist()
        for row, pad in enumerate(pads):
            alone = family.inputs(kinds, row=row)
            one, logits = generate(net, alone, steps=3)
            for got, expected in zip(steps, logits, strict=True):
                close(got[row], expected[0])
            assert torch.equal(tokens[row, -4:], one[0, -4:])
            if kinds[row] != "text" and kept is not None:
                assert handle.report().kept(method) == [[place - pad for place in kept[row]]]


@each_method
@each_family
def test_second_call_equals_the_first(model, family, method):
    fits(family, method)
    net, kinds = model(family), mixture(family)
    inputs, other = family.inputs(kinds[0]), family.inputs(kinds)
    with mmaccel.accelerate(net, DEFAULTS[method]):
        first = call(net, inputs).logits
        tokens, steps = generate(net, other, steps=2)
        call(net, other)
        again, again_steps = generate(net, other, steps=2)
        assert torch.equal(call(net, inputs).logits, first)
    assert torch.equal(again, tokens)
    assert all(map(torch.equal, again_steps, steps))


def cells_of(places):
    """Number of visual tokens, newlines apart, of each grid: (item, part), where a picture's overview is a part."""
    counts = {}
    for place in places:
        if place is not None and place.x >= 0:
            part = place.t if place.modality == "image" else 0
            counts[place.item, part] = counts.get((place.item, part), 0) + 1
    return counts


@pytest.mark.parametrize("keep", [0.29, 0.5, 3, 9])
@pytest.mark.parametrize("method", [*EXACT, "fastvid"])
@each_family
def test_counts_are_exact(model, family, method, keep):
    net = model(family)
    kind = "videos" if "video" in family.modalities else "images"
    places = family.places(kind)[0]
    with mmaccel.accelerate(net, f"{method}:keep={keep}") as handle:
        call(net, family.inputs(kind))
        kept = handle.report().kept(method)[0]
    want = {}
    for grid, n in cells_of(places).items():
        want[grid] = keep if isinstance(keep, int) else max(1, math.floor(keep * n + 0.5 + 1e-9))
    assert cells_of([places[place] for place in kept]) == want
    structure = [i for i, place in enumerate(places) if place is None or place.x < 0]
    assert set(structure) <= set(kept)
    entry = handle.report().as_dict()["tokens"][0]
    assert (entry["tokens_in"], entry["tokens_out"]) == (sum(cells_of(places).values()), sum(want.values()))


@pytest.mark.parametrize("keep", [0.29, 3])
@each_family
def test_fastv_counts_are_exact(model, family, keep):
    net, kinds = model(family), mixture(family)
    with mmaccel.accelerate(net, f"fastv:keep={keep}") as handle:
        call(net, family.inputs(kinds))
        kept = handle.report().kept("fastv")
    for places, left in zip(family.places(kinds), kept, strict=True):
        n = sum(cells_of(places).values())
        want = min(n, keep) if isinstance(keep, int) else math.floor(keep * n + 0.5 + 1e-9)
        assert sum(cells_of([places[place] for place in left]).values()) == want


@pytest.mark.parametrize("method", [*EXACT, "holitom", "fastv", "evs", "dycoke", "fastvid", "prunevid"])
def test_more_tokens_than_there_are_is_an_error_that_names_the_nearest(model, method):
    family = VIDEO[1]
    net, inputs = model(family), family.inputs("video")
    n = sum(cells_of(family.places("video")[0]).values())
    with (
        mmaccel.accelerate(net, f"{method}:keep={n + 1}"),
        pytest.raises(mmaccel.MMAccelError, match=rf"\b{n}\b"),
    ):
        call(net, inputs)
    off = ";inner_keep=1.0;tau=1.0" if method in ("holitom", "prunevid") else ""
    with mmaccel.accelerate(net, f"{method}:keep={n}{off}") as handle:
        call(net, inputs)
        assert len(handle.report().kept(method)[0]) == inputs["input_ids"].shape[1]
