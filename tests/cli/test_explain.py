"""mmaccel explain: what fits, from configuration alone."""

from __future__ import annotations

import json

import pytest

import mmaccel
from mmaccel.cli.models import outline
from mmaccel.tiny.families import FAMILIES
from mmaccel.tiny.pipelines import tiny_text_lm, tiny_wan_pipeline


def methods_for(kind):
    return {name for name, cls in mmaccel.methods().items() if kind in cls.info.targets}


@pytest.mark.parametrize("name", ["tiny", "llava-onevision-0.5b", "qwen2.5-vl-7b"])
def test_outlines_have_no_weights(name):
    assert {parameter.device.type for parameter in outline(name).parameters()} == {"meta"}


@pytest.mark.parametrize("name", ["tiny", "llava", "internvl", "qwen2.5-vl-7b"])
def test_every_method_is_accounted_for(document, name):
    found = document("explain", name)
    assert found["kind"] == "video-lm"
    assert set(found["fits"]) | set(found["does_not_fit"]) == set(mmaccel.methods())
    assert not set(found["fits"]) & set(found["does_not_fit"])
    assert "first-block-cache" in found["does_not_fit"]
    assert {"evs", "random", "fastv"} <= set(found["fits"])
    assert all(touch["where"] and touch["why"] for touches in found["fits"].values() for touch in touches)


def test_the_outline_gives_the_same_answer_as_the_model(document):
    family = FAMILIES["qwen2-vl"]
    assert document("explain", "qwen2-vl")["fits"] == mmaccel.explain(family.build()).as_dict()["fits"]


@pytest.mark.parametrize(("name", "kind"), [("tiny-text", "text-lm"), ("tiny-wan", "diffusion")])
def test_other_kinds(document, name, kind):
    found = document("explain", name)
    assert found["kind"] == kind
    assert set(found["fits"]) <= methods_for(kind)
    assert found["fits"]


def test_a_folder_needs_its_config_only(document, tmp_path):
    FAMILIES["qwen2.5-vl"].config().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    found = document("explain", tmp_path)
    assert found["family"] == "qwen2.5-vl"
    assert found["model"] == str(tmp_path)


def test_a_folder_of_a_text_model(document, tmp_path):
    tiny_text_lm()[0].config.save_pretrained(tmp_path)
    assert document("explain", tmp_path)["kind"] == "text-lm"


def test_a_folder_of_a_diffusion_pipeline_needs_no_weights(document, tmp_path):
    pipe = tiny_wan_pipeline()
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    pipe.transformer.save_config(tmp_path / "transformer")
    found = document("explain", tmp_path)
    assert found["kind"] == "diffusion"
    assert len(found["fits"]["first-block-cache"]) == len(pipe.transformer.blocks)


def test_for_people(cli):
    code, out, _ = cli("explain", "tiny")
    assert code == 0
    assert "does not fit" in out
    assert "model.language_model" in out


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (None, "config.json"),
        ({"config.json": "{"}, "config.json"),
        ({"config.json": '{"model_type": "no-such-model"}'}, "no-such-model"),
        ({"config.json": '{"model_type": "vit"}'}, "vit"),
        ({"model_index.json": "{}"}, "without a transformer"),
        ({"model_index.json": '{"transformer": ["diffusers", "NoSuchTransformer"]}'}, "without a transformer"),
    ],
)
def test_folders_that_will_not_do(refused, tmp_path, write, reason):
    for name, text in (write or {}).items():
        (tmp_path / name).write_text(text)
    assert reason in refused(1, "explain", tmp_path)


def test_names_that_mean_nothing(refused, tmp_path):
    for name in ("lava", "", " "):
        assert "llava-onevision-0.5b" in refused(1, "explain", name)
    assert "nobody/nothing" in refused(1, "explain", "nobody/nothing")
    file = tmp_path / "weights.bin"
    file.write_bytes(b"0")
    assert "is a file" in refused(1, "explain", file)
