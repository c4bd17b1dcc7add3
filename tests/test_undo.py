"""Undo is exact: after remove() a model equals an untouched twin that has made the same calls."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch
from checks import ALL, VIDEO, call, generate, ids, mixture, snapshot

import mmaccel
from mmaccel.core.run import current
from mmaccel.errors import MMAccelError, NonFiniteError
from mmaccel.tiny.families import FAMILIES

METHODS = [
    "random:keep=0.3",
    "uniform:keep=0.3",
    "evs:keep=0.3",
    "visionzip:keep=0.3",
    "idpruner:keep=0.3",
    "divprune:keep=0.3",
    "vidcom2:keep=0.3",
    "prumerge:keep=0.3",
    "holitom:keep=0.3;tau=0.3",
    "stc:keep=0.3;refresh=0.3",
    "fastv:keep=0.3",
    "dycoke",
    "fastvid:keep=0.3",
    "prunevid:keep=0.3;tau=0.3",
    "fewer-pixels:keep=0.3",
    "fewer-frames:keep=0.5",
]
STACKS = [
    ("random:keep=0.5", "fastv:keep=0.5"),
    ("evs:keep=0.5", "fastv:keep=0.5"),
    ("fewer-frames:keep=0.5", "holitom:keep=0.5"),
    ("stc:keep=1.0", "visionzip:keep=0.5"),
    ("fewer-pixels:keep=0.5", "visionzip:keep=0.5", "fastv:keep=0.5"),
]


def fits(family, spec):
    return not spec.startswith("fewer-frames") or (family in VIDEO and family.name != "internvl")


def test_the_snapshot_sees_hooks_attributes_configs_and_weights():
    net = FAMILIES["llava"].build()
    before = snapshot(net)
    assert snapshot(net) == before

    def differs():
        return snapshot(net) != before

    hook = net.model.register_forward_pre_hook(lambda *_: None)
    assert differs()
    hook.remove()
    net.model.language_model.layers[1].extra = None
    assert differs()
    del net.model.language_model.layers[1].extra
    net.config._attn_implementation = "eager"
    assert differs()
    net.config._attn_implementation = "sdpa"
    assert not differs()
    net.lm_head.weight.data[0, 0] += 1
    assert differs()


@pytest.fixture(scope="module")
def twin(model):
    """twin(family) -> a model that no method ever touches and that makes the same calls; and its state."""
    known = {}

    def get(family):
        if family.name not in known:
            known[family.name] = family.build()
        return known[family.name]

    return get


@pytest.mark.parametrize("family", ALL, ids=ids(ALL))
def test_each_method_leaves_nothing_behind(family):
    net, twin = family.build(), family.build()
    one, batch = family.inputs(mixture(family)[0]), family.inputs(mixture(family))
    for spec in METHODS:
        if not fits(family, spec):
            continue
        with mmaccel.accelerate(net, spec):
            call(net, one)
            generate(net, batch, steps=1)
        call(twin, one)
        generate(twin, batch, steps=1)
        assert snapshot(net) == snapshot(twin), spec
    assert torch.equal(call(net, one).logits, call(twin, one).logits)
    got, want = generate(net, batch, steps=2), generate(twin, batch, steps=2)
    assert torch.equal(got[0], want[0])
    assert all(map(torch.equal, got[1], want[1]))
    assert snapshot(net) == snapshot(twin)


@pytest.mark.parametrize("stack", STACKS, ids=["+".join(s.split(":")[0] for s in stack) for stack in STACKS])
@pytest.mark.parametrize("family", [VIDEO[1], VIDEO[3]], ids=ids([VIDEO[1], VIDEO[3]]))
def test_stacks_are_removed_in_every_order(family, stack):
    net, twin = family.build(), family.build()
    inputs = family.inputs("video")
    call(twin, inputs)
    call(net, inputs)
    for order in itertools.permutations(range(len(stack))):
        handles = [mmaccel.accelerate(net, spec) for spec in stack]
        accelerated = call(net, inputs).logits
        for position in order:
            others = [handles[i] for i in order if i != position and not handles[i]._removed]
            if others:
                with others[0].paused():
                    call(net, inputs)
                    with handles[position].paused():
                        call(net, inputs)
            if all(not handle._removed for handle in handles):
                assert torch.equal(call(net, inputs).logits, accelerated)
            handles[position].remove()
            call(net, inputs)
        assert snapshot(net) == snapshot(twin), order
    assert torch.equal(call(net, inputs).logits, call(twin, inputs).logits)


@pytest.mark.parametrize("spec", METHODS, ids=[spec.split(":")[0] for spec in METHODS])
def test_pausing_gives_back_the_dense_model_and_then_the_method(model, spec):
    family = FAMILIES["llava-onevision"]
    net, inputs = model(family), family.inputs("video")
    dense = call(net, inputs).logits
    with mmaccel.accelerate(net, spec) as handle:
        first = call(net, inputs).logits
        with handle.paused() as plain:
            assert plain is net
            assert torch.equal(call(net, inputs).logits, dense)
            with pytest.raises(MMAccelError, match="paused already"), handle.paused():
                pass
        assert torch.equal(call(net, inputs).logits, first)
    assert first.shape != dense.shape
    assert torch.equal(call(net, inputs).logits, dense)
    handle.remove()
    with pytest.raises(MMAccelError, match="removed"), handle.paused():
        pass


class BoomError(Exception):
    pass


@pytest.mark.parametrize("how", [BoomError, KeyboardInterrupt], ids=["exception", "interrupt"])
@pytest.mark.parametrize("where", ["vision", "layer 0", "layer 3"])
@pytest.mark.parametrize("through", ["forward", "generate"])
@pytest.mark.parametrize(
    "spec", ["holitom:keep=0.3", "random:keep=0.5+fastv:keep=0.5"], ids=["holitom", "random+fastv"]
)
def test_a_call_that_raises_leaves_no_state(family_twins, spec, through, where, how):
    family, net, twin = family_twins
    inputs = family.inputs("video")
    paths = {"vision": "model.vision_tower.encoder.layers.1"}
    path = paths.get(where, f"model.language_model.layers.{where[-1]}")

    def interrupted(model):
        def stop(*_):
            raise how

        hook = model.get_submodule(path).register_forward_pre_hook(stop)
        with pytest.raises(how):
            call(model, inputs) if through == "forward" else generate(model, inputs)
        hook.remove()

    with mmaccel.accelerate(net, spec):
        want = call(net, inputs).logits
        interrupted(net)
        if how is BoomError or through == "generate":
            assert current(net.model) is None
        assert torch.equal(call(net, inputs).logits, want)
        assert current(net.model) is None
        interrupted(net)
    assert current(net.model) is None
    call(twin, inputs)
    interrupted(twin)
    call(twin, inputs)
    interrupted(twin)
    assert snapshot(net) == snapshot(twin)
    assert torch.equal(call(net, inputs).logits, call(twin, inputs).logits)


@pytest.fixture(scope="module")
def family_twins():
    family = FAMILIES["llava-onevision"]
    return family, family.build(), family.build()


def test_a_handle_that_comes_after_an_interrupted_call_starts_clean(family_twins):
    family, net, _ = family_twins
    inputs = family.inputs("video")

    def stop(*_):
        raise KeyboardInterrupt

    first = mmaccel.accelerate(net, "fastv:keep=0.5")
    hook = net.model.language_model.layers[3].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        call(net, inputs)
    hook.remove()
    second = mmaccel.accelerate(net, "random:keep=0.5")
    first.remove()
    got = call(net, inputs).logits
    assert current(net.model) is None
    second.remove()
    with mmaccel.accelerate(net, "random:keep=0.5"):
        assert torch.equal(call(net, inputs).logits, got)


@pytest.mark.parametrize("spec", ["random:keep=0.5", "fastv:keep=0.5", "visionzip:keep=0.5", "holitom:keep=0.5"])
def test_features_that_are_not_finite_name_the_module(spec):
    family = FAMILIES["qwen2.5-vl"]
    net, inputs = family.build(), family.inputs("video")
    for path, name in (
        ("model.visual.blocks.4.mlp.down_proj", "model.visual produced"),
        ("model.visual.merger.mlp.2", "model.visual.merger produced"),
    ):
        weight = net.get_submodule(path).weight
        kept = weight.detach().clone()
        with mmaccel.accelerate(net, spec):
            want = call(net, inputs).logits
            weight.data[0] = float("nan")
            with pytest.raises(NonFiniteError, match=name):
                call(net, inputs)
            weight.data.copy_(kept)
            assert torch.equal(call(net, inputs).logits, want)


@pytest.mark.parametrize("spec", ["fastv:keep=0.5;layer=3", "holitom:keep=0.5", "prunevid:keep=0.5;inner_layer=3"])
def test_scores_that_are_not_finite_name_the_layer(spec):
    family = FAMILIES["llava-onevision"]
    net, inputs = family.build(), family.inputs("video")
    net.model.language_model.layers[1].mlp.down_proj.weight.data[0] = float("nan")
    with (
        mmaccel.accelerate(net, spec),
        pytest.raises(NonFiniteError, match=r"model\.language_model\.layers\.2 "),
    ):
        call(net, inputs)


def test_a_failing_install_takes_everything_back(monkeypatch):
    family = FAMILIES["qwen3-vl"]
    net = family.build()
    before = snapshot(net)
    from mmaccel.core.patching import Patcher

    for stop in range(1, 60):
        calls = itertools.count(1)

        def failing(name, stop=stop, calls=calls):
            method = getattr(Patcher, name)

            def put_on(self, *args, **kwargs):
                if next(calls) == stop:
                    raise BoomError
                return method(self, *args, **kwargs)

            return put_on

        with monkeypatch.context() as patch:
            for name in ("before", "after", "set", "wrap"):
                patch.setattr(Patcher, name, failing(name))
            try:
                mmaccel.accelerate(net, "fewer-frames:keep=0.5+holitom:keep=0.5").remove()
                break
            except BoomError:
                pass
        assert snapshot(net) == before, stop
    else:
        pytest.fail("never got through")
    assert stop > 10


def test_a_model_that_is_thrown_away_under_a_method_is_freed():
    family = FAMILIES["llava-onevision"]
    net = family.build()
    mmaccel.accelerate(net, "holitom:keep=0.5")
    call(net, family.inputs("video"))
    there = weakref.ref(net)
    del net
    gc.collect()
    assert there() is None
