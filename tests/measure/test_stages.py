"""Stages: told apart exactly, for every family, and without a trace on the model."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from mmaccel import accelerate, kernels
from mmaccel.adapters import video_lm
from mmaccel.errors import AdapterError, MMAccelError
from mmaccel.measure import Spread, compare, stages, time_per_output_token, ttft
from mmaccel.measure.boundaries import split, watch
from mmaccel.measure.stages import first_token
from mmaccel.tiny.families import FAMILIES

VIDEO = [(name, "video" if "video" in family.kinds else "image") for name, family in FAMILIES.items()]


class LinearMeter:
    """Counts the calls of every linear layer: a meter whose readings the test knows in advance."""

    def __init__(self, model):
        self.calls = 0
        self.handles = [
            m.register_forward_hook(self.count, prepend=True) for m in model.modules() if isinstance(m, nn.Linear)
        ]

    def count(self, *_):
        self.calls += 1

    def read(self):
        return self.calls

    def close(self):
        for handle in self.handles:
            handle.remove()


def linears(module):
    return sum(isinstance(m, nn.Linear) for m in module.modules())


def metered(model, inputs, read):
    start = read()
    with watch(model, read) as spans:
        first_token(model, inputs)
    return split(spans.totals(lambda a, b: b - a), read() - start)


@pytest.mark.parametrize(("name", "kind"), VIDEO)
def test_every_linear_layer_is_counted_in_its_own_stage(model, name, kind):
    family = FAMILIES[name]
    tiny = model(family)
    site = video_lm(tiny)
    meter = LinearMeter(tiny)
    try:
        found, own = metered(tiny, family.inputs(kind), meter.read)
    finally:
        meter.close()
    projector = site.root.get_submodule(site.projector)
    inside = any(m is projector for m in site.vision_tower.modules())
    tower = linears(site.vision_tower) - (linears(projector) if inside else 0)
    # SigLIP's unused pooling head and the like are modules that do not run
    ran = found["encode"]
    assert 0 < ran <= tower
    assert tower - ran <= 2
    assert found["project"] == linears(projector)
    assert found["prefill"] == linears(site.language_model)
    assert found["rest"] == 1  # the output head
    assert own == 0


@pytest.mark.parametrize(("name", "kind"), VIDEO)
def test_ops_of_mmaccel_are_all_its_own(model, name, kind):
    family = FAMILIES[name]
    tiny = model(family)
    for spec in ("visionzip:keep=0.5", "fastv:keep=0.5"):
        with kernels.recording() as events, accelerate(tiny, spec):
            _, own = metered(tiny, family.inputs(kind), lambda: len(events))
        assert own == len(events) > 0


def test_wrappers_of_encoder_methods_are_own_work(model):
    family = FAMILIES["llava-onevision"]
    tiny = model(family)
    ticks = itertools.count()
    with accelerate(tiny, "random:keep=0.5"), watch(tiny, lambda: next(ticks)) as spans:
        first_token(tiny, family.inputs("video"))
    (outer,), (inner,) = spans.pairs["call"], spans.pairs["wrapped"]
    assert outer[0] < inner[0] < inner[1] < outer[1]


def trace(module):
    """Everything a watch could leave behind."""
    return [
        (
            list(m._forward_pre_hooks.items()),
            list(m._forward_hooks.items()),
            sorted(vars(m)),
            list(vars(getattr(m, "config", m)).get("_mmaccel_listeners", ())),
        )
        for m in module.modules()
    ]


@pytest.mark.parametrize("spec", [None, "holitom:keep=0.5"])
def test_the_model_is_left_as_it_was(model, spec):
    family = FAMILIES["qwen2.5-vl"]
    tiny = model(family)
    inputs = family.inputs("video")
    first_token(tiny, inputs)  # the library adds hooks of its own in a first call
    cut = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"][:-4]}
    with accelerate(tiny, spec) if spec else nullcontext():
        before = trace(tiny)
        ttft(tiny, inputs, repeats=1, warmup=0)
        assert trace(tiny) == before
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            ttft(tiny, cut, repeats=1, warmup=0)
        assert trace(tiny) == before


def test_stages_add_up_and_carry_what_came_before(model):
    family = FAMILIES["llava-onevision"]
    times = ttft(model(family), family.inputs("video"), repeats=1, warmup=0, before={"decode": 3.0, "preprocess": 0.5})
    assert list(times.stages) == ["decode", "preprocess", "encode", "project", "prefill", "rest"]
    assert times.stages["decode"].median == 3.0
    assert times.total.median == pytest.approx(sum(stage.median for stage in times.stages.values()))
    assert times.overhead.median == 0
    assert min(times.stages[name].median for name in ("encode", "project", "prefill")) > 0
    data = times.as_dict()
    assert data["total"]["n"] == 1
    assert data["stages"]["decode"] == {"median": 3.0, "low": 3.0, "high": 3.0, "n": 1}


def test_spread_is_the_middle_three_fifths():
    spread = Spread.of([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    assert (spread.median, spread.low, spread.high, spread.n) == (3.5, 2.0, 5.0, 6)


def test_compare_takes_turns(model):
    family = FAMILIES["llava-onevision"]
    tiny = model(family)
    lengths, progress = [], []
    layer = video_lm(tiny).layers[-1]
    handle = layer.register_forward_pre_hook(lambda _m, args: lengths.append(args[0].shape[1]))
    specs = ["random:keep=0.5", "random:keep=0.25"]
    done = lambda *pair: progress.append(pair)  # noqa: E731
    times = compare(tiny, family.inputs("video"), specs, repeats=2, warmup=1, progress=done)
    handle.remove()
    assert list(times) == ["dense", *specs]
    assert len(lengths) == 9
    assert lengths[:3] == lengths[3:6] == lengths[6:]
    assert lengths[0] > lengths[1] > lengths[2]
    assert progress == [(number, 9) for number in range(1, 10)]
    assert all(entry.total.n == 2 for entry in times.values())
    assert times[specs[0]].overhead.median > 0


def test_compare_refuses_an_eager_baseline():
    family = FAMILIES["llava-onevision"]
    tiny = family.build()
    tiny.set_attn_implementation("eager")
    with pytest.raises(MMAccelError, match="sdpa"):
        compare(tiny, family.inputs("video"), [], repeats=1)


def test_time_per_output_token_counts_steps_behind_the_first(model, monkeypatch):
    family = FAMILIES["qwen2-vl"]
    tiny = model(family)
    ticks = itertools.count()
    monkeypatch.setattr(stages.time, "perf_counter", lambda: float(next(ticks)))
    spread = time_per_output_token(tiny, family.inputs("video"), new_tokens=5, repeats=2, warmup=0)
    assert spread == Spread(1.0, 1.0, 1.0, 2)  # one reading a step


@pytest.mark.parametrize("wrong", [{"repeats": 0}, {"warmup": -1}])
def test_wrong_counts(model, wrong):
    family = FAMILIES["llava-onevision"]
    with pytest.raises(MMAccelError, match="at least"):
        ttft(model(family), {}, **wrong)


def test_wrong_targets(model):
    with pytest.raises(AdapterError):
        ttft(nn.Linear(2, 2).to(torch.float32), {}, repeats=1)
    tiny = model(FAMILIES["llava-onevision"])
    with pytest.raises(MMAccelError, match="at least 2"):
        time_per_output_token(tiny, {}, new_tokens=1)
    with pytest.raises(MMAccelError, match="generate"):
        time_per_output_token(tiny.model, {}, new_tokens=2)
