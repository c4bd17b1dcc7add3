from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from mmaccel.core.patching import Chain, Patcher, settle, shared


class Thing(nn.Module):
    label = "of the class"

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.setting = {"a": 1}

    def forward(self, x, scale=1.0):
        return self.inner(x) * scale

    def name(self, suffix=""):
        return "thing" + suffix


def state(module):
    flags = ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    seen = {name: value for name, value in vars(module).items() if name not in (*flags, *hooks)}
    return seen, [list(vars(module)[name].values()) for name in hooks], [len(vars(module)[name]) for name in flags]


def wrapper(mark):
    return lambda call, *args, **kwargs: f"{mark}({call(*args, **kwargs)})"


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_three_patchers_are_undone_in_any_order(order):
    thing = Thing()
    before = state(thing)
    patchers = [Patcher() for _ in range(3)]
    for mark, patcher in zip("abc", patchers, strict=True):
        patcher.set(thing, "setting", mark)
        patcher.set(thing, "label", mark)
        patcher.wrap(thing, "name", wrapper(mark))
        patcher.before(thing, lambda module, args, kwargs: None)
        patcher.after(thing, lambda module, args, kwargs, output: None, always=True)
        patcher.share(thing, list).append(mark)
    assert thing.name("!") == "c(b(a(thing!)))"
    left = ["a", "b", "c"]
    for position in order:
        patchers[position].undo()
        patchers[position].undo()
        left.remove("abc"[position])
        assert thing.setting == (left[-1] if left else {"a": 1})
        assert thing.label == (left[-1] if left else "of the class")
        want = "thing"
        for mark in left:
            want = f"{mark}({want})"
        assert thing.name() == want
        assert (shared(thing, list) is None) == (not left)
    assert state(thing) == before
    assert "label" not in vars(thing)


def test_values_that_are_equal_but_not_the_same_are_told_apart():
    thing, one, other = Thing(), Patcher(), Patcher()
    first, second = {"b": 2}, {"b": 2}
    original = thing.setting
    one.set(thing, "setting", first)
    other.set(thing, "setting", second)
    other.undo()
    assert thing.setting is first
    one.undo()
    assert thing.setting is original


def test_what_somebody_else_changes_in_between_stays():
    thing, patcher = Thing(), Patcher()
    patcher.set(thing, "setting", "ours")
    thing.setting = "theirs"
    thing.other = "theirs"
    hook = thing.register_forward_hook(lambda *_: None)
    patcher.undo()
    assert thing.setting == thing.other == "theirs"
    assert list(thing._forward_hooks) == [hook.id]


def test_a_method_that_was_wrapped_from_outside_stays_wrapped():
    thing, patcher = Thing(), Patcher()
    patcher.wrap(thing, "name", wrapper("ours"))
    ours = thing.name
    thing.name = lambda: f"theirs({ours()})"
    assert thing.name() == "theirs(ours(thing))"
    patcher.undo()
    assert thing.name() == "theirs(thing)"


def test_a_method_of_the_instance_comes_back():
    thing, patcher = Thing(), Patcher()
    thing.name = own = lambda: "own"
    patcher.wrap(thing, "name", wrapper("ours"))
    assert thing.name() == "ours(own)"
    patcher.undo()
    assert vars(thing)["name"] is own


def test_other_objects_of_the_class_notice_nothing():
    thing, other, patcher = Thing(), Thing(), Patcher()
    patcher.wrap(thing, "name", wrapper("ours"))
    patcher.set(thing, "label", "ours")
    assert (other.name(), other.label, Thing.label) == ("thing", "of the class", "of the class")
    patcher.undo()


def test_hooks_see_keywords_and_errors():
    thing, patcher, seen = Thing(), Patcher(), []
    patcher.after(thing, lambda module, args, kwargs, output: seen.append((kwargs, output)), always=True)
    with pytest.raises(RuntimeError):
        thing(torch.zeros(1, 3), scale=2.0)
    assert seen == [({"scale": 2.0}, None)]
    patcher.before(thing, lambda module, args, kwargs: (args, {"scale": 0.0}))
    assert not thing(torch.ones(1, 2), scale=2.0).any()
    patcher.undo()
    assert len(patcher) == 0


def test_undo_runs_newest_first():
    order, patcher = [], Patcher()
    for number in range(3):
        patcher.on_undo(lambda number=number: order.append(number))
    patcher.undo()
    assert order == [2, 1, 0]


class Holder:
    below: Any


def test_a_chain_that_a_library_moved_is_no_chain_of_ours():
    """diffusers puts what it finds as `forward` under a name of its own, on an object of its own."""
    module, elsewhere = nn.Linear(2, 2), Holder()
    one, two = Patcher(), Patcher()
    one.wrap(module, "forward", lambda call, x: call(x) + 1)
    elsewhere.below = module.forward
    vars(module)["forward"] = lambda x: elsewhere.below(x) * 2
    two.wrap(elsewhere, "below", lambda call, x: call(x) + 10)
    x = torch.ones(1, 2)
    plain = nn.functional.linear(x, module.weight, module.bias)
    assert torch.equal(module(x), (plain + 11) * 2)
    two.undo()
    assert torch.equal(module(x), (plain + 1) * 2)
    one.undo()
    assert torch.equal(module(x), plain * 2)
    module.forward = elsewhere.below
    settle(module, "forward")
    assert "forward" not in vars(module)
    assert torch.equal(module(x), plain)


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("hooked", ["before", "after"])
def test_a_wrapper_outlives_the_hooks_of_accelerate(hooked, gone):
    """Offloading takes its hook away and puts it on again behind every call of a pipeline."""
    thing, twin, patcher = Thing(), Thing(), Patcher()
    before, x = state(thing)[0].keys(), torch.ones(1, 2)
    thing.load_state_dict(twin.state_dict())
    if hooked == "before":
        add_hook_to_module(thing, ModelHook())
    patcher.wrap(thing, "forward", lambda call, *args, **kwargs: call(*args, **kwargs) + 1)
    if hooked == "after":
        add_hook_to_module(thing, ModelHook())
    for _ in range(2):
        assert torch.equal(thing(x), twin(x) + 1)
        remove_hook_from_module(thing)
        assert torch.equal(thing(x), twin(x) + 1)
        add_hook_to_module(thing, ModelHook())
    if gone:
        remove_hook_from_module(thing)
    patcher.undo()
    assert torch.equal(thing(x), twin(x))
    if not gone:
        remove_hook_from_module(thing)
    assert not any(isinstance(value, Chain) for value in vars(thing).values())
    assert state(thing)[0].keys() - before <= {"forward"}  # accelerate leaves the method of the class there
    assert thing.forward == Thing.forward.__get__(thing)
