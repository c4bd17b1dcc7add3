"""The two runners of generation, on few clips and steps, against calls made by hand."""

from __future__ import annotations

import inspect
import json

import diffusers
import numpy as np
import pytest
import torch

import mmaccel
from mmaccel.errors import MMAccelError
from mmaccel.measure.generation_settings import applied, missing
from mmaccel.measure.scenario import Scenario, run_scenario
from mmaccel.tiny import IMAGE_CALL, class_to_image
from mmaccel.tiny.families.real_generators import REAL_GENERATORS, build_generator, generator_call

SPECS = ["hsa:runtime=0.5", "fewer-steps:keep=0.5", "sparse-plan:cost=0.5", "seacache:threshold=0.2"]
QUALITY = Scenario(
    "diffusion/test", "test", "generation-quality",
    {"model": "class-to-image", "specs": SPECS, "clips": 3, "seeds": [0, 1], "batch": 2, "steps": 8, "first": 1000,
     "samples": 50},
)  # fmt: skip


@pytest.fixture(scope="module")
def quality(tmp_path_factory):
    out = tmp_path_factory.mktemp("quality") / "rows.jsonl"
    return out, run_scenario(QUALITY, out)


def setting(rows, spec, seed="all"):
    return next(row for row in rows if row["kind"] == "setting" and row["spec"] == spec and row["seed"] == seed)


def test_quality_is_the_distance_of_calls_made_by_hand(quality):
    _, rows = quality
    pipe = class_to_image()

    def latents(batch):
        labels = [number % 24 for number in batch]
        noise = [torch.Generator().manual_seed(number) for number in batch]
        seen = {}
        step = pipe.scheduler.step

        def keep(*args, **kwargs):
            seen["last"] = step(*args, **kwargs)
            return seen["last"]

        pipe.scheduler.step = keep
        try:
            pipe(class_labels=labels, generator=noise, output_type="np", **{**IMAGE_CALL, "num_inference_steps": 8})
        finally:
            del pipe.scheduler.step
        return seen["last"].prev_sample.double()

    wanted = []
    for first in (1000, 1003):
        for batch in (range(first, first + 2), range(first + 2, first + 3)):
            dense = latents(batch)
            with mmaccel.accelerate(pipe, SPECS[0]):
                fast = latents(batch)
            wanted += [float((a - b).norm() / b.norm()) for a, b in zip(fast, dense, strict=True)]
    row = setting(rows, SPECS[0])
    assert row["clips"] == 6
    assert row["latents"]["value"] == pytest.approx(np.mean(wanted), rel=1e-4)
    assert row["latents_median"] == pytest.approx(np.median(wanted), rel=1e-4)


def test_dense_is_itself_and_the_others_are_not(quality):
    _, rows = quality
    dense = setting(rows, "dense")
    assert dense["time"] == dense["work"] == 1
    assert dense["latents"]["value"] == 0
    assert dense["psnr"]["value"] == 100
    for spec in SPECS[:3]:
        row = setting(rows, spec)
        assert row["work"] < 0.75
        assert row["latents"]["value"] > 0
        assert row["psnr"]["value"] < 60
        assert row["memory"]["peak"] > 0
        assert row["read_back"]["n"] == 18
    # its first call measures, dense: without the settling call it would be dense in every batch
    assert setting(rows, "sparse-plan:cost=0.5")["settles"]


def test_what_does_not_fit_says_why_and_is_not_compared(quality):
    _, rows = quality
    assert "diffusers cannot read the latents" in setting(rows, "seacache:threshold=0.2")["missing"]
    rivals = {row["rival"] for row in rows if row["kind"] == "comparison"}
    assert rivals == {"fewer-steps", "sparse-plan"}


def test_a_second_run_reads_what_is_there_and_other_options_are_refused(quality):
    out, rows = quality
    before = out.read_bytes()
    assert run_scenario(QUALITY, out) == rows
    assert out.read_bytes() == before
    with pytest.raises(MMAccelError, match="other options"):
        run_scenario(QUALITY, out, {"clips": 2})


def test_an_interrupted_run_goes_on_where_it_was(quality, tmp_path):
    _, rows = quality
    out = tmp_path / "rows.jsonl"

    def stop(what, done, total):
        if what == "diffusion/test" and done >= 5:  # in the second batch
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_scenario(QUALITY, out, progress=stop)
    held = [json.loads(line) for line in out.with_name("rows.jsonl.part").read_text().splitlines()]
    assert sum("batch" in row for row in held) == 1
    assert not out.exists()
    again = run_scenario(QUALITY, out)
    for spec in ("dense", *SPECS[:3]):
        assert setting(again, spec)["psnr"] == setting(rows, spec)["psnr"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "nothing"}, "text-to-video"),
        ({"scheduler": "euler"}, "must be own"),
        ({"specs": ["nothing:a=1"]}, "nothing"),
        ({"specs": ["hsa", "hsa"]}, "once"),
        ({"specs": ["cache-dit:depth=3"]}, "cache-dit takes blocks"),
        ({"clips": 0}, "at least 1"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(tmp_path, change, says):
    with pytest.raises(MMAccelError, match=says):
        run_scenario(QUALITY, tmp_path / "rows.jsonl", change)
    assert not list(tmp_path.iterdir())


def test_cache_dit_is_missing_where_it_is_not_installed(monkeypatch):
    pipe = class_to_image()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert missing("cache-dit:blocks=1", pipe) == "cache-dit is not installed"


def test_a_setting_is_off_behind_its_block():
    pipe = class_to_image()
    call = {"class_labels": [3], "output_type": "np", **IMAGE_CALL, "num_inference_steps": 6}
    before = pipe(generator=torch.Generator().manual_seed(0), **call).images
    with applied(pipe, "fewer-steps:keep=0.5"):
        assert not np.array_equal(pipe(generator=torch.Generator().manual_seed(0), **call).images, before)
    with applied(pipe, "dense"):
        assert np.array_equal(pipe(generator=torch.Generator().manual_seed(0), **call).images, before)


def test_speed_of_a_published_config(tmp_path):
    options = {
        "models": ["pixart-xl-2-512"], "specs": ["hsa:runtime=0.5", "hsa:runtime=0.1", "fewer-steps:keep=0.5"],
        "layers": [1], "steps": 6, "repeats": 1, "device": "cpu",
    }  # fmt: skip
    scenario = Scenario("diffusion/test", "test", "generation-speed", options)
    rows = {row["spec"]: row for row in run_scenario(scenario, tmp_path / "rows.jsonl")}
    assert rows["dense"]["work"] == 1
    assert rows["dense"]["layers"] == {"num_layers": 1}
    assert rows["fewer-steps:keep=0.5"]["work"] == pytest.approx(0.5)
    assert rows["hsa:runtime=0.5"]["work"] == pytest.approx(0.5, abs=0.03)
    assert rows["hsa:runtime=0.5"]["memory"]["peak"] > 0
    assert rows["hsa:runtime=0.5"]["transformer_ratio"]["n"] == 1
    assert "cannot be reached" in rows["hsa:runtime=0.1"]["missing"]
    assert run_scenario(scenario, tmp_path / "rows.jsonl") == list(rows.values())


@pytest.mark.parametrize("name", sorted(REAL_GENERATORS))
def test_published_depths_are_those_of_the_classes(name):
    model = REAL_GENERATORS[name]
    code = getattr(diffusers, model.transformer).__init__.__wrapped__
    defaults = {key: value.default for key, value in inspect.signature(code).parameters.items()}
    if name != "wan-2.1-1.3b":  # the defaults of that class are those of the 14B
        assert {field: defaults[field] for field in model.depths} == model.depths


def test_wrong_speed_options_are_refused(tmp_path):
    base = {"models": ["pixart-xl-2-512"], "specs": []}
    for change, says in (
        ({"models": ["nothing"]}, "nothing"),
        ({"layers": [1, 2]}, "one for each"),
        ({"repeats": 0}, "at least 1"),
    ):
        with pytest.raises(MMAccelError, match=says):
            run_scenario(
                Scenario("diffusion/test", "test", "generation-speed", {**base, **change}), tmp_path / "rows.jsonl"
            )
    with pytest.raises(MMAccelError, match="ask for 1 to 28"):
        build_generator("pixart-xl-2-512", 40, dtype=torch.float32)


def test_a_guided_call_has_a_prompt_for_its_other_branch():
    for name, model in REAL_GENERATORS.items():
        call = generator_call(name, dtype=torch.float32, guided=True)
        assert call["num_inference_steps"] == model.steps
        assert call["height"] % 32 == 0
        assert name == "flux.1-dev" or (call["guidance_scale"] > 1 and "negative_prompt_embeds" in call)
