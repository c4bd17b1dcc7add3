"""accelerate, explain, Handle and its report: what they take, what they refuse, what they leave alone."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from checks import ALL, VIDEO, call, generate, ids, snapshot
from torch import nn

import mmaccel
from mmaccel.errors import AdapterError, MethodError, MMAccelError, NotApplicableError
from mmaccel.tiny.families import FAMILIES

each_family = pytest.mark.parametrize("family", ALL, ids=ids(ALL))


@each_family
def test_explain_names_what_fits_and_touches_nothing(family):
    net = family.build()
    before = snapshot(net)
    found = mmaccel.explain(net)
    assert snapshot(net) == before
    assert (found.kind, found.family) == ("video-lm", family.name)
    want = {
        "holitom",
        "visionzip",
        "fastv",
        "evs",
        "dycoke",
        "fastvid",
        "prunevid",
        "random",
        "uniform",
        "fewer-pixels",
    }
    assert want <= set(found.touches)
    assert ("fewer-frames" in found.touches) == (family in VIDEO and family.name != "internvl")
    assert {"first-block-cache"} <= set(found.reasons)
    assert all(touches for touches in found.touches.values())
    assert json.loads(json.dumps(found.as_dict()))["target"] == family.model_class
    assert "holitom" in str(found)


@each_family
def test_explain_tells_the_truth_about_what_is_touched(family):
    for name, touches in mmaccel.explain(family.build()).touches.items():
        net = family.build()
        if name == "prompt-lookup":
            continue
        before = snapshot(net)
        with mmaccel.accelerate(net, f"{name}:keep=0.5"):
            changed = {path for (path, *_), value in snapshot(net).items() if value != before.get((path, *_))}
        said = " ".join(touch.where for touch in touches)
        for path in changed:
            # the root and the model's own generate and forward are always touched
            known = path in ("", "model") or "language_model" in path or "visual" in path or "vision_tower" in path
            assert known or path in said, path
        if any("visual" in path or "vision_tower" in path for path in changed):
            assert "vis" in said


@pytest.mark.parametrize(
    ("methods", "error", "message"),
    [
        ((), MethodError, "no method given"),
        (([],), MethodError, "no method given"),
        (("nonsense",), MethodError, "no method is called 'nonsense'"),
        (("random:keep=0.5;kep=1",), MethodError, "no knob 'kep'"),
        ((3,), MethodError, "3 is no method"),
        (("first-block-cache",), NotApplicableError, "works on diffusion.*methods that fit: .*holitom"),
    ],
)
def test_what_accelerate_refuses_leaves_the_model_alone(methods, error, message):
    net = FAMILIES["llava"].build()
    before = snapshot(net)
    with pytest.raises(error, match=message):
        mmaccel.accelerate(net, *methods)
    assert snapshot(net) == before


@pytest.mark.parametrize("target", [nn.Linear(2, 2), "a path", None, 3, object()])
def test_targets_without_an_adapter(target):
    for use in (lambda: mmaccel.accelerate(target, "random"), lambda: mmaccel.explain(target)):
        with pytest.raises(AdapterError, match=r"it takes vision-language models .*llava"):
            use()


def test_an_image_family_refuses_frames():
    with pytest.raises(NotApplicableError, match="needs a video encoder"):
        mmaccel.accelerate(FAMILIES["llava"].build(), "fewer-frames")


def test_a_text_model_refuses_visual_methods():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    net = Qwen2ForCausalLM(Qwen2Config(hidden_size=16, intermediate_size=16, num_hidden_layers=2, vocab_size=32,
                                       num_attention_heads=2, num_key_value_heads=1))  # fmt: skip
    with pytest.raises(NotApplicableError, match=r"is a text-lm; methods that fit: prompt-lookup"):
        mmaccel.accelerate(net, "holitom")
    assert "prompt-lookup" in mmaccel.explain(net).touches


def test_a_module_that_the_adapter_names_is_missing():
    net = FAMILIES["llava"].build()
    net.model.vision_tower.encoder = nn.Identity()
    with pytest.raises(MMAccelError, match=r"layers|encoder"):
        mmaccel.accelerate(net, "visionzip")
    net = FAMILIES["llava"].build()
    del net.model.vision_tower
    with pytest.raises(AdapterError, match="'vision_tower'"):
        mmaccel.accelerate(net, "random")


def test_instances_specs_stacks_and_lists_mean_the_same(model):
    family = FAMILIES["llava-onevision"]
    net, inputs = model(family), family.inputs("video")
    ways = [
        (mmaccel.Random(keep=0.4), mmaccel.FastV(keep=0.5)),
        ("fastv:keep=0.5+random:keep=0.4",),
        (["random:keep=0.4", mmaccel.FastV(keep=0.5)],),
        ("fastv:keep=0.5", [["random:keep=0.4"]]),
    ]
    results = []
    for way in ways:
        with mmaccel.accelerate(net, *way) as handle:
            results.append(call(net, inputs).logits)
            assert [method.info.name for method in handle.methods] == ["random", "fastv"]
            assert handle.target is net
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("target", ["model", "root", "pipeline"])
def test_the_model_its_root_and_a_pipeline_around_it(target):
    family = FAMILIES["llava-onevision"]
    net, inputs = family.build(), family.inputs("video")
    given = net
    if target == "root":
        given = net.model
    if target == "pipeline":
        from transformers import ImageTextToTextPipeline

        given = ImageTextToTextPipeline(model=net, processor=family.processor())
    with mmaccel.accelerate(net, "random:keep=0.4"):
        want = call(net, inputs).logits
    with mmaccel.accelerate(given, "random:keep=0.4") as handle:
        assert torch.equal(call(net, inputs).logits, want)
        assert handle.target is given
        kept = handle.report().kept("random")
        if target == "root":
            generate(net, inputs, steps=1)
            assert handle.report().kept("random") == kept
            assert call(net.model, inputs).last_hidden_state.shape[1] == want.shape[1]


def test_the_model_keeps_its_class_and_signatures(model):
    import inspect

    family = FAMILIES["qwen2-vl"]
    net = model(family)
    cls, generate_like, forward_like = type(net), inspect.signature(net.generate), inspect.signature(net.forward)
    with mmaccel.accelerate(net, "holitom"):
        assert type(net) is cls
        assert inspect.signature(net.generate) == generate_like
        assert inspect.signature(net.forward) == forward_like


def test_the_report_counts_what_came_in_and_out(model):
    family = FAMILIES["llava-onevision"]
    net = model(family)
    visual = sum(place is not None and place.x >= 0 for place in family.places("video")[0])
    with mmaccel.accelerate(net, "random:keep=0.25+fastv:keep=0.5") as handle:
        with pytest.raises(MMAccelError, match="call the model first"):
            handle.report().kept("random")
        assert "has not been called" in str(handle.report().as_dict()["notes"])
        for _ in range(3):
            call(net, family.inputs("video"))
        generate(net, family.inputs("video"), steps=4)
        report = handle.report()
        with pytest.raises(MMAccelError, match="evs"):
            report.kept("evs")
    first, second = report.as_dict()["tokens"]
    one = round(visual * 0.25)
    assert (first["method"], first["calls"], first["tokens_in"], first["tokens_out"]) == (
        "random",
        4,
        4 * visual,
        4 * one,
    )
    assert (second["method"], second["place"]) == ("fastv", "layer 2")
    assert (second["tokens_in"], second["tokens_out"]) == (4 * one, 4 * round(one * 0.5))
    assert json.loads(report.json())["methods"] == ["random", "fastv"]
    assert "fastv" in str(report)


def test_a_handle_says_what_state_it_is_in(model):
    net = model(FAMILIES["llava"])
    handle = mmaccel.accelerate(net, "random:keep=0.5")
    assert "random:keep=0.5 on LlavaForConditionalGeneration, active" in repr(handle)
    with handle.paused():
        assert "paused" in repr(handle)
    handle.remove()
    handle.remove()
    assert "removed" in repr(handle)


def test_a_handle_that_is_removed_while_paused_stays_off(model):
    family = FAMILIES["llava"]
    net, inputs = model(family), family.inputs("image")
    want = call(net, inputs).logits
    handle = mmaccel.accelerate(net, "random:keep=0.5")
    with handle.paused():
        handle.remove()
    assert torch.equal(call(net, inputs).logits, want)


def test_an_error_inside_the_block_takes_the_method_off(model):
    family = FAMILIES["llava"]
    net, inputs = model(family), family.inputs("image")
    want = call(net, inputs).logits
    with pytest.raises(RuntimeError), mmaccel.accelerate(net, "random:keep=0.5"):
        raise RuntimeError
    assert torch.equal(call(net, inputs).logits, want)


def test_a_required_knob_of_one_method_does_not_end_explain(model, monkeypatch):
    from dataclasses import dataclass

    from mmaccel import api
    from mmaccel.encoders.uniform import Uniform
    from mmaccel.method import registry

    @dataclass(frozen=True, kw_only=True)
    class Needy(Uniform):
        info = Uniform.info
        wish: int

    monkeypatch.setattr(api, "registry", lambda: {**registry(), "needy": Needy})
    found = mmaccel.explain(model(FAMILIES["llava"]))
    assert "holitom" in found.touches
    assert found.reasons["needy"] == "cannot be tried without values for wish"


@pytest.mark.parametrize("spec", ["random:keep=0.3", "fastv:keep=0.3", "prompt-lookup"])
def test_copies_and_pickles_of_an_accelerated_model_are_refused(spec, tmp_path):
    from mmaccel.tiny.pipelines import tiny_text_lm

    net = tiny_text_lm()[0] if spec == "prompt-lookup" else FAMILIES["llava-onevision"].build()
    before = snapshot(net)
    with mmaccel.accelerate(net, spec) as handle:
        for attempt in (copy.deepcopy, pickle.dumps, lambda model: torch.save(model, tmp_path / "model.pt")):
            with pytest.raises(MMAccelError, match="paused"):
                attempt(net)
        torch.save(net.state_dict(), tmp_path / "weights.pt")
        with handle.paused():
            twin = copy.deepcopy(net)
    assert snapshot(net) == before == snapshot(twin)


def test_code_that_was_compiled_before_sees_the_methods():
    family = FAMILIES["llava-onevision"]
    net, inputs = family.build(), family.inputs("video")
    compiled = torch.compile(net, backend="eager")
    dense = call(compiled, inputs).logits
    with mmaccel.accelerate(compiled, "random:keep=0.3") as handle:
        short = call(compiled, inputs).logits
        assert torch.equal(short, call(net, inputs).logits)
        assert short.shape[1] < dense.shape[1]
        assert handle.report().kept("random")
    assert torch.equal(call(compiled, inputs).logits, dense)


def test_a_wrapper_in_the_manner_of_peft_is_looked_through():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.config = inner, inner.config

        def get_base_model(self):
            return self.inner

    family = FAMILIES["llava-onevision"]
    net, inputs = family.build(), family.inputs("video")
    with mmaccel.accelerate(Wrapper(net), "random:keep=0.3"):
        assert call(net, inputs).logits.shape[1] < inputs["input_ids"].shape[1]


def test_explain_and_accelerate_agree_about_short_models():
    family = FAMILIES["llava-onevision"]
    config = family.config()
    config.text_config.num_hidden_layers = 2
    config.text_config.layer_types = config.text_config.layer_types[:2]
    import transformers

    net = getattr(transformers, family.model_class)(config).eval()
    assert "1..1" in mmaccel.explain(net).reasons["fastv"]
    with pytest.raises(NotApplicableError, match=r"1\.\.1"):
        mmaccel.accelerate(net, "fastv:layer=2")
    mmaccel.accelerate(net, "fastv:keep=1.0").remove()


def test_windows_of_attention_are_refused_before_anything_is_touched():
    import transformers

    family = FAMILIES["llava-onevision"]
    config = family.config()
    depth = config.text_config.num_hidden_layers
    config.text_config.use_sliding_window = True
    config.text_config.sliding_window = 16
    config.text_config.layer_types = ["sliding_attention", "full_attention"] * (depth // 2)
    net, inputs = getattr(transformers, family.model_class)(config).eval(), family.inputs("video")
    dense = call(net, inputs).logits
    before = snapshot(net)
    for spec in ("random:keep=0.3", "fastv", "holitom"):
        with pytest.raises(NotApplicableError, match="sliding window"):
            mmaccel.accelerate(net, spec)
    with mmaccel.accelerate(net, "random:keep=1.0"):
        assert torch.equal(call(net, inputs).logits, dense)
    assert snapshot(net) == before


@pytest.mark.parametrize("change", ["pixtral", "full"])
def test_towers_of_llava_that_the_adapter_does_not_know(change):
    family = FAMILIES["llava"]
    net = family.build()
    if change == "pixtral":
        net.config.vision_config.model_type = "pixtral"
    else:
        net.config.vision_feature_select_strategy = "full"
    with pytest.raises(AdapterError, match="square grid"):
        mmaccel.accelerate(net, "random:keep=0.5")


def test_features_of_another_layer_than_the_scored_one(model):
    family = FAMILIES["llava"]
    net, inputs = model(family), family.inputs("image")
    with mmaccel.accelerate(net, "visionzip:keep=0.5"):
        call(net, inputs, vision_feature_layer=net.config.vision_feature_layer)
        with pytest.raises(NotApplicableError, match="set config"):
            call(net, inputs, vision_feature_layer=1)


def test_knobs_that_did_nothing_are_named(model):
    family = FAMILIES["llava-onevision"]
    net, inputs = model(family), family.inputs("video")

    def remarks(spec):
        with mmaccel.accelerate(net, spec) as handle:
            call(net, inputs)
            return " / ".join(handle.report().lines())

    assert "tau=1.0 never reached, largest similarity" in remarks("holitom:keep=0.5;tau=1.0")
    assert "never reached" not in remarks("holitom:keep=0.5;tau=-1.0")
    assert "inner part is off" in remarks("holitom:keep=0.5;inner_layer=99")
    assert "floor of one frame" in remarks("evs:keep=0.01")
    assert "floor" not in remarks("evs:keep=0.9")
    assert "keep=1.0 to keep all" in remarks("random:keep=1")
    assert "floor of about one token a frame" in remarks("holitom:keep=1")
