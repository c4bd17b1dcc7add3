from __future__ import annotations

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn

from mmaccel.errors import NotApplicableError
from mmaccel.tiny.families import FAMILIES, KINDS, REAL, build_real, real_inputs

torch.set_num_threads(1)

CASES = [(family, kind) for family in FAMILIES.values() for kind in family.kinds]
IDS = [f"{family.name}-{kind}" for family, kind in CASES]
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def mixed(family):
    return ["video" if "video" in family.modalities else "image", "text", "images"]


@pytest.fixture(scope="module")
def models():
    built = {}

    def get(family):
        if family.name not in built:
            built[family.name] = family.build()
        return built[family.name]

    return get


def visual_mask(family, ids):
    wanted = torch.tensor(sorted(set(family.visual_token_ids.values())))
    return torch.isin(ids, wanted)


def tower(model):
    return model.model.visual if hasattr(model.model, "visual") else model.model.vision_tower


def embeddings(model, inputs):
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return seen[0]


def test_every_family_and_kind_is_there():
    assert set(FAMILIES) == {
        "llava", "llava-next-video", "llava-onevision", "qwen2-vl", "qwen2.5-vl", "qwen3-vl", "internvl",
    }  # fmt: skip
    for family in FAMILIES.values():
        want = set(KINDS) if "video" in family.modalities else {"text", "image", "images", "turn"}
        assert set(family.kinds) == want


@pytest.mark.parametrize(("family", "kind"), CASES, ids=IDS)
def test_places_are_the_positions_that_the_processor_fills(family, kind):
    ids = family.inputs(kind, batch=2)["input_ids"]
    places = family.places(kind, batch=2)
    assert [[place is not None for place in row] for row in places] == visual_mask(family, ids).tolist()
    for row, tokens in zip(places, ids, strict=True):
        for place, token in zip(row, tokens.tolist(), strict=True):
            assert place is None or token == family.visual_token_ids[place.modality]
        assert len({place.item for place in row if place}) == len(KINDS[kind])
        cells = [place for place in row if place and place.x >= 0]
        assert len(cells) == len(set(cells))


@each_family
def test_prompts_of_a_batch_differ_in_length_and_are_padded_on_the_left(family):
    kinds = mixed(family)
    inputs = family.inputs(kinds)
    lengths = inputs["attention_mask"].sum(1).tolist()
    assert len(set(lengths)) == len(kinds)
    total = inputs["attention_mask"].shape[1]
    for row, length in enumerate(lengths):
        assert inputs["attention_mask"][row].tolist() == [0] * (total - length) + [1] * length
        alone = family.inputs(kinds, row=row)
        assert alone["input_ids"].tolist() == [inputs["input_ids"][row, total - length :].tolist()]
        assert family.places(kinds, row=row) == [family.places(kinds)[row][total - length :]]


def spots(family, kind):
    """Give each visual place of the main picture with the pixel (frame, y, x) in the middle of what it looks at."""
    places = [place for place in family.places(kind)[0] if place and place.x >= 0]
    if kind == "image":
        inner = {"llava-next-video": {1}, "llava-onevision": {1}, "internvl": {0, 1}}.get(family.name, {0})
        places = [place for place in places if place.t in inner]
        frames, columns_of = 1, lambda place: 3 * place.t + place.x if family.name == "internvl" else place.x
    else:
        frames, columns_of = family.frames[0], lambda place: place.x
    height, width = family.sizes[kind][0]
    rows = 1 + max(place.y for place in places)
    columns = 1 + max(map(columns_of, places))
    groups = 1 + max(place.t for place in places) if kind == "video" else 1
    result = []
    for place in places[:: max(1, len(places) // 11)]:
        y, x = (place.y + 0.5) * height / rows, (columns_of(place) + 0.5) * width / columns
        result.append((place, place.t * frames // groups if kind == "video" else 0, int(y), int(x)))
    return places, result


@pytest.mark.parametrize(
    ("family", "kind"),
    [pytest.param(*case, id=name) for case, name in zip(CASES, IDS, strict=True) if case[1] in ("image", "video")],
)
def test_a_pixel_reaches_the_token_whose_place_says_so(family, kind):
    model = family.build()
    layers = next(m for m in tower(model).modules() if isinstance(m, nn.ModuleList) and len(m) >= 4)
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.zero_()  # without blocks, a token sees nothing but its own pixels
    row = family.places(kind)[0]
    pictures = family.pictures(kind)
    before = embeddings(model, family.inputs(kind, pictures=pictures))[0]
    main, chosen = spots(family, kind)
    for place, frame, y, x in chosen:
        changed = pictures[0][0].clone()
        pixel = changed[frame] if kind == "video" else changed
        pixel[:, y, x] = 255 - pixel[:, y, x]
        after = embeddings(model, family.inputs(kind, pictures=[[changed]]))[0]
        moved = (after != before).any(-1).nonzero().flatten().tolist()
        assert [row[index] for index in moved if row[index] in main] == [place]


@pytest.mark.parametrize(("family", "kind"), CASES, ids=IDS)
def test_forward_and_generate(family, kind, models):
    model = models(family)
    inputs = family.inputs(kind, batch=2)
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape == (*inputs["input_ids"].shape, 288)
    assert torch.isfinite(logits).all()
    assert 0.5 < logits[:, -1].std() < 5
    written = model.generate(**inputs, max_new_tokens=4)[:, inputs["input_ids"].shape[1] :]
    assert written.shape == (2, 4)
    assert written.max() < 256


@each_family
def test_a_padded_batch_equals_its_prompts_alone(family, models):
    model = models(family)
    kinds = mixed(family)
    batch = family.inputs(kinds)
    with torch.no_grad():
        together = model(**batch).logits[:, -1]
    written = model.generate(**batch, max_new_tokens=4)[:, -4:]
    for row in range(len(kinds)):
        single = family.inputs(kinds, row=row)
        with torch.no_grad():
            alone = model(**single).logits[0, -1]
        assert (together[row] - alone).abs().max() < 1e-5
        assert model.generate(**single, max_new_tokens=4)[0, -4:].tolist() == written[row].tolist()


@each_family
def test_a_visual_token_taken_away_is_seen_in_the_logits(family, models):
    model = models(family)
    kind = mixed(family)[0]
    inputs = family.inputs(kind)
    position = [index for index, place in enumerate(family.places(kind)[0]) if place][7]
    masked = inputs["attention_mask"].clone()
    masked[0, position] = 0
    length = masked.shape[1]
    # The same positions in both calls, so that the only difference is the token that is not looked at.
    positions = torch.arange(length).expand(1, length)
    with torch.no_grad():
        whole = model(**inputs, position_ids=positions).logits[0, -1]
        less = model(**inputs | {"attention_mask": masked}, position_ids=positions).logits[0, -1]
    assert (whole - less).abs().max() > 1e-3


@each_family
def test_seeds_decide_everything(family, models):
    first, again, other = models(family), family.build(seed=0), family.build(seed=1)
    for one, two in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)
    head = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(first.get_parameter(head), other.get_parameter(head))
    kind = mixed(family)[0]
    drawn, same, new = (family.inputs(kind, seed=seed) for seed in (3, 3, 4))
    assert drawn.keys() == same.keys()
    for name, value in drawn.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(same[name])), name
    pixels = "pixel_values_videos" if "pixel_values_videos" in drawn else "pixel_values"
    assert not torch.equal(drawn[pixels], new[pixels])


@each_family
def test_shapes_are_what_the_methods_need(family, models):
    model = models(family)
    config = model.config.get_text_config()
    assert config.num_hidden_layers >= 4
    assert config.num_key_value_heads < config.num_attention_heads
    assert model.config._attn_implementation == "sdpa"
    assert not model.training
    rope = getattr(config, "rope_parameters", None) or {}
    if "mrope_section" in rope:
        assert sum(rope["mrope_section"]) == config.hidden_size // config.num_attention_heads // 2
    if family.name == "qwen2.5-vl":
        full = model.config.vision_config.fullatt_block_indexes
        depth = model.config.vision_config.depth
        assert depth >= 4
        assert 0 < len(full) < depth - 1
        assert max(full) < depth - 1
    if family.name == "qwen3-vl":
        assert len(model.config.vision_config.deepstack_visual_indexes) >= 2


@each_family
def test_buffers_equal_those_of_an_ordinary_construction(family, models):
    model = models(family)
    ordinary = dict(type(model)(family.config()).named_buffers())
    buffers = dict(model.named_buffers())
    assert buffers.keys() == ordinary.keys()
    assert any("inv_freq" in name for name in buffers)
    for name, buffer in buffers.items():
        assert buffer.dtype == ordinary[name].dtype
        assert torch.equal(buffer, ordinary[name]), name


@each_family
def test_half_precision_keeps_rotary_frequencies_exact(family, models):
    model = family.build(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    exact = dict(models(family).named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, exact[name]), name
    kind = mixed(family)[0]
    with torch.no_grad():
        assert torch.isfinite(model(**family.inputs(kind)).logits).all()


@pytest.mark.parametrize("kind", ["video", "image+video", "audio"])
def test_a_kind_that_a_family_does_not_take_is_refused(kind):
    with pytest.raises(NotApplicableError, match=r"llava takes no prompt of kind .*use one of: text, image"):
        FAMILIES["llava"].inputs(kind)


# What the public model pages state, in units of 1e9, as remembered: a check on the configs as a whole.
@pytest.mark.parametrize(
    ("name", "billions"),
    [("llava-onevision-0.5b", 0.89), ("llava-onevision-7b", 8.03), ("qwen2.5-vl-3b", 3.75), ("qwen2.5-vl-7b", 8.29)],
)
def test_real_configs_have_the_published_number_of_parameters(name, billions):
    import transformers

    with init_empty_weights():
        model = getattr(transformers, REAL[name].model_class)(REAL[name].config())
    model.tie_weights()
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.006)


def test_a_real_model_shortened_to_one_layer_runs():
    model = build_real("llava-onevision-0.5b", layers=1, vision_layers=1)
    decoder = model.model.language_model
    assert len(decoder.layers) == len(tower(model).encoder.layers) == 1
    assert model.lm_head.weight is decoder.embed_tokens.weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    rotary = type(decoder.rotary_emb)(model.config.text_config)
    assert decoder.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(decoder.rotary_emb.inv_freq, rotary.inv_freq)
    inputs = real_inputs("llava-onevision-0.5b", frames=1)
    assert visual_count(inputs["input_ids"], 151647) == 14 * 14 + 1
    with torch.no_grad():
        logits = model(**inputs, logits_to_keep=1).logits
    assert torch.isfinite(logits).all()
    assert 0.1 < logits.float().std() < 10


def visual_count(ids, marker):
    return int((ids == marker).sum())


def test_real_inputs_of_qwen_have_a_token_for_each_two_by_two_patches():
    inputs = real_inputs("qwen2.5-vl-3b", frames=4, size=(112, 168), batch=2)
    patches = 2 * (112 // 14) * (168 // 14)
    assert inputs["pixel_values_videos"].shape == (2 * patches, 3 * 2 * 14 * 14)
    assert inputs["video_grid_thw"].tolist() == [[2, 8, 12]] * 2
    assert visual_count(inputs["input_ids"], 151656) == 2 * patches // 4
    assert torch.equal(inputs["mm_token_type_ids"] == 2, inputs["input_ids"] == 151656)
    again = real_inputs("qwen2.5-vl-3b", frames=4, size=(112, 168), batch=2)
    assert all(torch.equal(value, again[name]) for name, value in inputs.items())


@pytest.mark.parametrize("depth", [1, 4, 9, 32])
def test_a_shortened_qwen_tower_keeps_a_full_attention_block(depth):
    vision = REAL["qwen2.5-vl-3b"].config(layers=2, vision_layers=depth).vision_config
    assert vision.depth == depth
    assert list(vision.fullatt_block_indexes)
    assert max(vision.fullatt_block_indexes) < depth


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build_real("gpt"), "no real config 'gpt'; use one of: llava-onevision-0.5b"),
        (lambda: build_real("qwen2.5-vl-7b", layers=29), "has 28 layers; ask for 1 to 28, not 29"),
        (lambda: build_real("qwen2.5-vl-7b", vision_layers=0), "has 32 vision_layers; ask for 1 to 32, not 0"),
        (lambda: real_inputs("llava-onevision-7b", frames=2, size=(224, 224)), "384 x 384 pixels only"),
        (lambda: real_inputs("qwen2.5-vl-7b", frames=3), "even number of frames"),
        (lambda: real_inputs("qwen2.5-vl-7b", frames=2, size=(100, 112)), "multiples of 28"),
        (lambda: real_inputs("llava-onevision-7b", frames=0), "at least one frame"),
    ],
)
def test_requests_that_a_real_config_cannot_meet_are_refused(call, message):
    with pytest.raises(NotApplicableError, match=message):
        call()
