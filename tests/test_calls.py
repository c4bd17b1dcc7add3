"""Ways to call a model: other inputs, other outputs, offloaded, low precision, several models, several threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from checks import (
    ALL,
    cache_of,
    cached,
    call,
    close,
    dropped,
    fresh,
    generate,
    ids,
    masked,
    mixture,
    rows_of,
    seen_by_language_model,
    snapshot,
)

import mmaccel
from mmaccel.errors import NotApplicableError
from mmaccel.tiny.families import FAMILIES

SPECS = {"random": "random:keep=0.3;positions=original", "fastv": "fastv:keep=0.4;layer=2"}
SOME = [FAMILIES[name] for name in ("llava-onevision", "qwen2.5-vl", "qwen3-vl")]
each_family = pytest.mark.parametrize("family", ALL, ids=ids(ALL))
some_families = pytest.mark.parametrize("family", SOME, ids=ids(SOME))
drop_or_fastv = pytest.mark.parametrize("method", SPECS)


def layer_of(method):
    return 2 if method == "fastv" else 0


def positions_of(net, inputs):
    position = seen_by_language_model(net, lambda: generate(net, inputs, steps=0))["position_ids"]
    return position if position.dim() == 2 else position[-3:]


def against_masked(net, inputs, method, run):
    """run(net) -> logits [B, L, V]; those of the kept tokens must be those of the masked dense model."""
    with mmaccel.accelerate(net, SPECS[method]) as handle:
        got = run(net)
        kept = handle.report().kept(method)
    gone = torch.ones(len(kept), inputs["input_ids"].shape[1], dtype=torch.bool)
    for row, places in zip(gone, kept, strict=True):
        row[places] = False
    with masked(net, gone & inputs["attention_mask"].bool(), layer_of(method)):
        want = run(net)
    return got, want, kept


@drop_or_fastv
@each_family
def test_embeddings_in_place_of_ids(model, family, method):
    net, inputs = model(family), family.inputs(mixture(family))
    embeds = net.get_input_embeddings()(inputs["input_ids"]).detach()
    given = {key: value for key, value in inputs.items() if key not in ("input_ids", "mm_token_type_ids")}
    given |= {"inputs_embeds": embeds, "position_ids": positions_of(net, inputs)}
    got, want, kept = against_masked(net, inputs, method, lambda net: call(net, given).logits)
    assert any(len(places) < valid for places, valid in zip(kept, inputs["attention_mask"].sum(1), strict=True))
    for row, (mine, places) in enumerate(zip(rows_of(got, kept), kept, strict=True)):
        close(mine, want[row, places])


@drop_or_fastv
@each_family
def test_padding_on_the_right(model, family, method):
    net, kinds = model(family), mixture(family)
    inputs = family.inputs(kinds)
    pads = (inputs["attention_mask"] == 0).sum(1).tolist()
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if name in inputs:
            rows = [row.roll(-pad) for row, pad in zip(inputs[name], pads, strict=True)]
            inputs[name] = torch.stack(rows)
    got, want, kept = against_masked(net, inputs, method, lambda net: call(net, inputs).logits)
    for row, (mine, places) in enumerate(zip(rows_of(got, kept, left=False), kept, strict=True)):
        close(mine, want[row, places])


def causal(mask, new=None):
    """bool [B, 1, S, S], or its last `new` rows."""
    S = mask.shape[1]
    whole = torch.ones(S, S, dtype=torch.bool).tril() & mask.bool()[:, None, None]
    # a padding row that sees nothing at all is as good as undefined
    whole |= torch.eye(S, dtype=torch.bool)
    return whole if new is None else whole[:, :, -new:]


@pytest.mark.parametrize("kind", ["bool", "float"])
@drop_or_fastv
@some_families
def test_masks_of_four_dimensions(model, family, method, kind):
    net, inputs = model(family), family.inputs(mixture(family))
    position, valid = positions_of(net, inputs), inputs["attention_mask"]

    def given(mask):
        return mask if kind == "bool" else torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)

    def two_steps(net, first, second):
        out = call(net, {**inputs, "attention_mask": first}, position_ids=position, use_cache=True)
        step = {"input_ids": inputs["input_ids"][:, -1:], "attention_mask": second}
        last = call(net, step, position_ids=position[..., -1:] + 1, **cached(cache_of(out)))
        return [out.logits[:, -1], last.logits[:, -1]]

    after = torch.cat([valid, torch.ones_like(valid[:, :1])], 1)
    with mmaccel.accelerate(net, SPECS[method]):
        want = two_steps(net, valid, after)
        got = two_steps(net, given(causal(valid)), given(causal(after, new=1)))
    for one, other in zip(got, want, strict=True):
        close(one, other)


@pytest.mark.parametrize("first", ["dense call", "accelerated call"])
@drop_or_fastv
@some_families
def test_hidden_states_are_what_each_layer_gets(family, method, first):
    net, inputs = family.build(), family.inputs(mixture(family))
    S = inputs["input_ids"].shape[1]
    if first == "dense call":
        call(net, inputs, output_hidden_states=True)
    with mmaccel.accelerate(net, SPECS[method]):
        want = call(net, inputs).logits
        out = call(net, inputs, output_hidden_states=True)
    assert torch.equal(out.logits, want)
    lengths = [state.shape[1] for state in out.hidden_states]
    L = want.shape[1]
    assert L < S
    assert lengths == ([S, S] + [L] * 3 if method == "fastv" else [L] * 5)
    assert torch.equal(net.lm_head(out.hidden_states[-1]), want)


@drop_or_fastv
@each_family
def test_without_a_cache(model, family, method):
    net, inputs = model(family), family.inputs(mixture(family))
    got, want, kept = against_masked(net, inputs, method, lambda net: call(net, inputs, use_cache=False).logits)
    for row, (mine, places) in enumerate(zip(rows_of(got, kept), kept, strict=True)):
        close(mine, want[row, places])
    if method == "random":
        with mmaccel.accelerate(net, SPECS[method]):
            tokens, steps = generate(net, inputs, steps=3)
            again, logits = generate(net, inputs, steps=3, use_cache=False)
        assert torch.equal(tokens, again)
        for one, other in zip(steps, logits, strict=True):
            close(one, other)


@drop_or_fastv
@some_families
def test_tuples_and_few_logits(model, family, method):
    net, inputs = model(family), family.inputs(mixture(family))
    with mmaccel.accelerate(net, SPECS[method]):
        want = call(net, inputs).logits
        assert torch.equal(call(net, inputs, return_dict=False)[0], want)
        close(call(net, inputs, logits_to_keep=2).logits, want[:, -2:])
        with pytest.raises(NotApplicableError, match="logits_to_keep"):
            call(net, inputs, logits_to_keep=torch.tensor([0, 1]))
        assert torch.equal(call(net, inputs).logits, want)


@pytest.mark.parametrize("spec", ["random", "fastv"])
def test_labels_need_the_whole_prompt(model, spec):
    family = FAMILIES["llava-onevision"]
    net, inputs, text = model(family), family.inputs("video"), family.inputs("text")
    labels = inputs["input_ids"].clamp_max(255)
    want = call(net, inputs, labels=labels).loss
    with mmaccel.accelerate(net, f"{spec}:keep=0.5") as handle:
        with pytest.raises(NotApplicableError, match=r"labels .*paused"):
            call(net, inputs, labels=labels)
        assert torch.isfinite(call(net, text, labels=text["input_ids"]).loss)
        with handle.paused():
            assert torch.equal(call(net, inputs, labels=labels).loss, want)
        call(net, inputs)
    with mmaccel.accelerate(net, f"{spec}:keep=1.0"):
        assert torch.equal(call(net, inputs, labels=labels).loss, want)


@pytest.mark.parametrize("spec", ["random:keep=0.5", "fastv:keep=0.5"])
def test_features_that_were_encoded_before_the_call(model, spec):
    family = FAMILIES["llava-onevision"]
    net, inputs = model(family), family.inputs("video")
    given = {key: value for key, value in inputs.items() if key != "pixel_values_videos"}

    def encode():
        with torch.no_grad():
            return {"video": net.get_video_features(inputs["pixel_values_videos"])}

    early = encode()
    with mmaccel.accelerate(net, spec):
        want = call(net, inputs).logits
        with pytest.raises(NotApplicableError, match="pixel values"):
            call(net, given, mm_encoder_outputs=early)
        for _ in range(2):
            assert torch.equal(call(net, given, mm_encoder_outputs=encode()).logits, want)
    with mmaccel.accelerate(net, "visionzip:keep=0.5"):
        late = encode()
        with_scores = call(net, inputs).logits
        assert torch.equal(call(net, given, mm_encoder_outputs=late).logits, with_scores)
    with mmaccel.accelerate(net, "random:keep=0.5"):
        late = encode()
    with (
        mmaccel.accelerate(net, "visionzip:keep=0.5"),
        pytest.raises(NotApplicableError, match="needs the vision encoder's attention"),
    ):
        call(net, given, mm_encoder_outputs=late)


def test_features_that_a_user_asks_for_are_whole():
    family = FAMILIES["llava-onevision"]
    net, inputs = family.build(), family.inputs("video")
    with torch.no_grad():
        want = net.get_video_features(inputs["pixel_values_videos"]).pooler_output
        with mmaccel.accelerate(net, "fewer-frames:keep=0.5"):
            assert torch.equal(net.get_video_features(inputs["pixel_values_videos"]).pooler_output, want)


@drop_or_fastv
@some_families
def test_gradients_are_those_of_the_masked_model(family, method):
    net, inputs = family.build(), family.inputs(mixture(family))

    def gradients(net):
        net.zero_grad()
        net(**fresh(inputs)).logits[:, -1].square().sum().backward()
        return {name: each.grad.clone() for name, each in net.named_parameters() if each.grad is not None}

    with mmaccel.accelerate(net, SPECS[method]) as handle:
        got = gradients(net)
        gone = dropped(handle.report().kept(method), inputs)
    with masked(net, gone, layer_of(method)):
        want = gradients(net)
    assert any("vis" in name for name in want)
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-4, rtol=1e-3)


def offloaded(net, how, folder):
    import accelerate

    if how == "cpu":
        accelerate.cpu_offload(net, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(net, folder, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_offloaded_models_give_the_same_bits(tmp_path, how, when, dtype):
    spec = "holitom:keep=0.4;tau=0.3;contextual=0.3"
    # without LLaVA-OneVision: a parameter of its root keeps even the dense model from generating when offloaded
    for family in (FAMILIES["llava-next-video"], FAMILIES["qwen2.5-vl"]):
        inputs = family.inputs("video")
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        plain = family.build(dtype=dtype)
        with mmaccel.accelerate(plain, spec):
            tokens, logits = generate(plain, inputs, steps=2)
        assert all(torch.isfinite(each).all() for each in logits)
        net = family.build(dtype=dtype)
        folder = tmp_path / family.name
        if when == "before":
            offloaded(net, how, folder)
        with mmaccel.accelerate(net, spec):
            if when == "after":
                offloaded(net, how, folder)
            got = generate(net, inputs, steps=2)
            assert torch.equal(got[0], tokens)
            assert all(map(torch.equal, got[1], logits))
        assert torch.equal(call(net, inputs).logits, call(plain, inputs).logits)


@pytest.mark.filterwarnings("ignore:The following device_map keys")
def test_a_device_map_with_parts_on_disk(tmp_path):
    family = FAMILIES["llava-onevision"]
    inputs, plain = family.inputs("video"), family.build()
    plain.save_pretrained(tmp_path / "model")
    parts = {"model.vision_tower": "disk", "model.multi_modal_projector": "cpu", "model.image_newline": "cpu",
             "model.language_model": "disk", "lm_head": "cpu"}  # fmt: skip
    net = type(plain).from_pretrained(tmp_path / "model", device_map=parts, offload_folder=tmp_path / "offload")
    net.generation_config = plain.generation_config
    for spec in ("visionzip:keep=0.4", "random:keep=0.5+fastv:keep=0.4"):
        with mmaccel.accelerate(plain, spec):
            want, whole = generate(plain, inputs, steps=2), call(plain, inputs).logits
        with mmaccel.accelerate(net, spec):
            got = generate(net, inputs, steps=2)
            assert torch.equal(call(net, inputs).logits, whole)
        assert torch.equal(got[0], want[0])
        # not bit for bit: products with one row depend on where in memory a matrix lies, in the dense model as well
        for one, other in zip(got[1], want[1], strict=True):
            close(one, other)


def test_two_models_of_one_config_object_stay_apart():
    import transformers

    family = FAMILIES["qwen2.5-vl"]
    config, inputs = family.config(), family.inputs("video")
    cls = getattr(transformers, family.model_class)
    torch.manual_seed(0)
    one, other = cls(config).eval(), cls(config).eval()
    assert one.config is other.config
    call(other, inputs)
    want, before = call(other, inputs).logits, snapshot(other)
    with mmaccel.accelerate(one, "visionzip:keep=0.4+fastv:keep=0.4"):
        assert call(one, inputs).logits.shape != want.shape
        assert torch.equal(call(other, inputs).logits, want)
        assert snapshot(other) == before
        with mmaccel.accelerate(other, "random:keep=0.5"):
            assert call(other, inputs).logits.shape != want.shape
        assert torch.equal(call(other, inputs).logits, want)
    assert snapshot(other) == before


@pytest.mark.parametrize("spec", ["holitom:keep=0.4", "random:keep=0.5+fastv:keep=0.4"])
def test_two_threads_on_one_model(model, spec):
    family = FAMILIES["llava-onevision"]
    net = model(family)
    prompts = [family.inputs(kind) for kind in ("video", "images", "text", "image+video")]
    with mmaccel.accelerate(net, spec):
        want = [generate(net, inputs, steps=3) for inputs in prompts]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda n: generate(net, prompts[n % 4], steps=3), range(16)))
    for n, (tokens, logits) in enumerate(found):
        assert torch.equal(tokens, want[n % 4][0])
        assert all(map(torch.equal, logits, want[n % 4][1]))


@drop_or_fastv
def test_layers_are_not_told_positions_with_gaps(model, method):
    """Flash attention takes a gap in position_ids for the border of a packed sequence."""
    family = FAMILIES["llava-onevision"]
    net, inputs, seen = model(family), family.inputs("video"), []

    def look(module, args, kwargs):
        seen.append(kwargs.get("position_ids"))

    with mmaccel.accelerate(net, SPECS[method]):
        layers = net.model.language_model.layers
        hooks = [layer.self_attn.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
        call(net, inputs)
        for hook in hooks:
            hook.remove()
    assert len(seen) == 4
    assert all(ids is None or bool((ids.diff() == 1).all()) for ids in seen)


def test_a_prompt_without_anything_visual_is_left_alone_and_reported(model):
    family = FAMILIES["qwen3-vl"]
    net, inputs = model(family), family.inputs("text", batch=2)
    want = generate(net, inputs, steps=3)
    with mmaccel.accelerate(net, "random:keep=0.3+fastv:keep=0.3") as handle:
        got = generate(net, inputs, steps=3)
    assert torch.equal(got[0], want[0])
    assert all(map(torch.equal, got[1], want[1]))
    notes = handle.report().as_dict()["notes"]
    assert [note.split(":")[0] for note in notes] == ["random", "fastv"]
    assert all("without visual tokens" in note for note in notes)


@drop_or_fastv
@each_family
def test_masks_that_are_bool_or_left_out(model, family, method):
    net, inputs, batch = model(family), family.inputs(mixture(family)[0]), family.inputs(mixture(family))
    without = {key: value for key, value in inputs.items() if key != "attention_mask"}
    true = {**batch, "attention_mask": batch["attention_mask"].bool()}
    with mmaccel.accelerate(net, SPECS[method]):
        assert torch.equal(call(net, without).logits, call(net, inputs).logits)
        want, want_steps = generate(net, batch, steps=3)
        got, steps = generate(net, true, steps=3)
    assert torch.equal(got, want)
    assert all(map(torch.equal, steps, want_steps))


def test_a_cache_of_the_user_empty_or_emptied(model):
    from transformers import DynamicCache

    family = FAMILIES["llava-onevision"]
    net, inputs = model(family), family.inputs(mixture(family))
    with mmaccel.accelerate(net, "random:keep=0.4+fastv:keep=0.4"):
        want, want_steps = generate(net, inputs, steps=3)
        cache = DynamicCache()
        for _ in range(2):
            got, steps = generate(net, inputs, steps=3, **cached(cache))
            assert torch.equal(got, want)
            assert all(map(torch.equal, steps, want_steps))
            cache.reset()
    dense = generate(net, inputs, steps=3)
    again = generate(net, inputs, steps=3, **cached(cache))
    assert torch.equal(again[0], dense[0])
    assert all(map(torch.equal, again[1], dense[1]))


def test_layers_of_different_kinds_get_masks_of_their_own():
    """fastv behind layers with a window: each later layer's own mask is cut, not that of its neighbour."""
    import transformers

    family = FAMILIES["llava-onevision"]
    config = family.config()
    depth = config.text_config.num_hidden_layers
    net = getattr(transformers, family.model_class)(config).eval()
    inputs, seen = family.inputs("video"), []

    def narrow(number):
        def hook(_module, args, kwargs):
            S = kwargs["position_embeddings"][0].shape[1]
            mask = torch.ones(1, 1, S, S, dtype=torch.bool).tril()
            return args, {**kwargs, "attention_mask": mask & mask.triu(-20 if number % 2 else -S)}

        return hook

    def look(_module, _args, kwargs):
        seen.append(kwargs["attention_mask"])

    layers = net.model.language_model.layers
    hooks = [layer.register_forward_pre_hook(narrow(n), with_kwargs=True) for n, layer in enumerate(layers)]
    with mmaccel.accelerate(net, "fastv:keep=0.3;layer=2") as handle:
        hooks += [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
        call(net, inputs, use_cache=False)
        kept = torch.tensor(handle.report().kept("fastv")[0])
    for hook in hooks:
        hook.remove()
    assert len(seen) == depth
    for number in range(2, depth):
        whole = torch.ones(inputs["input_ids"].shape[1], inputs["input_ids"].shape[1], dtype=torch.bool).tril()
        whole = whole & whole.triu(-20 if number % 2 else -len(whole))
        assert torch.equal(seen[number][0, 0], whole[kept][:, kept])
