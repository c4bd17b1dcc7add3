"""Several methods at once: their order, what they leave together, and which exclude each other."""

from __future__ import annotations

import itertools

import pytest
import torch
from checks import VIDEO, call, close, dropped, generate, ids, masked, mixture

import mmaccel
from mmaccel.errors import ConflictError
from mmaccel.tiny.families import FAMILIES

each_video_family = pytest.mark.parametrize("family", VIDEO, ids=ids(VIDEO))


@pytest.mark.parametrize(
    "stack",
    [("random:keep=0.5", "fastv:keep=0.5"), ("fewer-pixels:keep=0.5", "evs:keep=0.5", "fastv:keep=0.5")],
    ids=["random+fastv", "fewer-pixels+evs+fastv"],
)
@pytest.mark.parametrize("family", VIDEO[1:4], ids=ids(VIDEO[1:4]))
def test_the_order_of_handles_does_not_matter(model, family, stack):
    net, inputs = model(family), family.inputs("video")
    with mmaccel.accelerate(net, "+".join(stack)) as handle:
        want = generate(net, inputs, steps=2)
        kept = handle.report().kept("fastv")
    for order in itertools.permutations(stack):
        handles = [mmaccel.accelerate(net, spec) for spec in order]
        # what is paused and put on again comes last, and must not work last
        with handles[0].paused():
            pass
        got = generate(net, inputs, steps=2)
        reports = [handle.report() for handle in handles]
        for handle in handles:
            handle.remove()
        assert torch.equal(got[0], want[0])
        assert all(map(torch.equal, got[1], want[1]))
        assert reports[order.index(stack[-1])].kept("fastv") == kept


@each_video_family
def test_a_stack_equals_two_masks(model, family):
    net, inputs = model(family), family.inputs(mixture(family))
    with mmaccel.accelerate(net, "random:keep=0.5;positions=original+fastv:keep=0.5;layer=2") as handle:
        got = generate(net, inputs)
        outer, inner = (dropped(handle.report().kept(name), inputs) for name in ("random", "fastv"))
    assert (inner | outer).equal(inner)
    assert inner.sum() > outer.sum()
    with masked(net, outer), masked(net, inner, layer=2):
        want = generate(net, inputs)
    assert torch.equal(got[0], want[0])
    for one, other in zip(got[1], want[1], strict=True):
        close(one, other)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("random", "random:seed=1", "random is on this model already"),
        ("random", "uniform", "uniform and random exclude each other"),
        ("holitom", "fastv", "fastv and holitom exclude each other"),
        ("prunevid", "fastv", "fastv and prunevid exclude each other"),
        ("dycoke", "fastvid", "exclude each other"),
        ("visionzip", "evs", "exclude each other"),
    ],
)
def test_two_methods_in_one_place(model, first, second, message):
    net = model(FAMILIES["llava-onevision"])
    inputs = FAMILIES["llava-onevision"].inputs("video")
    dense = call(net, inputs).logits
    with mmaccel.accelerate(net, first):
        want = call(net, inputs).logits
        with pytest.raises(ConflictError, match=message):
            mmaccel.accelerate(net, second)
        assert torch.equal(call(net, inputs).logits, want)
    with pytest.raises(ConflictError):
        mmaccel.accelerate(net, first, second)
    assert torch.equal(call(net, inputs).logits, dense)
    with mmaccel.accelerate(net, second):
        call(net, inputs)


@pytest.mark.parametrize("name", ["holitom", "prunevid"])
def test_without_its_inner_part_a_method_leaves_the_layers_free(model, name):
    net = model(FAMILIES["llava-onevision"])
    with mmaccel.accelerate(net, f"{name}:inner_keep=1.0+fastv") as handle:
        call(net, FAMILIES["llava-onevision"].inputs("video"))
        assert [entry["method"] for entry in handle.report().as_dict()["tokens"]] == [name, "fastv"]
