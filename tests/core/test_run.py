from __future__ import annotations

import contextvars
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch import nn

from mmaccel.core import run as module
from mmaccel.core.patching import Patcher
from mmaccel.core.run import Run, current, open_around_forward, open_around_method, opened


class Counter:
    def __init__(self):
        self.calls = 0


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, fails=None):
        run = current(self)
        self.seen.append(run)
        run.get(Counter).calls += 1
        if fails:
            raise fails
        return run.get(Counter).calls

    def generate(self, steps=3, fails=None):
        return [self(fails if step == steps - 1 else None) for step in range(steps)]


@pytest.fixture
def net():
    made, patcher = Net(), Patcher()
    open_around_method(patcher, made, "generate", made)
    open_around_forward(patcher, made)
    yield made
    patcher.undo()
    assert current(made) is None


def test_state_lives_for_one_outermost_call(net):
    assert [net(), net()] == [1, 1]
    assert net.generate() == [1, 2, 3]
    assert net.generate() == [1, 2, 3]
    assert len({id(run) for run in net.seen[2:5]}) == 1
    assert current(net) is None


@pytest.mark.parametrize("through", ["forward", "generate"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_call_that_raises_does_not_reach_the_next(net, through, error):
    for _ in range(2):
        with pytest.raises(error):
            net(error) if through == "forward" else net.generate(fails=error)
        if error is ValueError or through == "generate":
            assert current(net) is None
        assert net() == 1
        assert net.generate() == [1, 2, 3]
        assert current(net) is None


def test_an_interrupted_call_is_closed_with_its_hooks():
    net, patcher, other = Net(), Patcher(), Patcher()
    open_around_forward(patcher, net)
    with pytest.raises(KeyboardInterrupt):
        net(KeyboardInterrupt)
    stale = current(net)
    assert stale is not None
    open_around_forward(other, net)
    patcher.undo()
    assert current(net) is None
    assert net() == 1
    assert net.seen[-1] is not stale
    other.undo()


def test_a_generation_after_an_interrupted_forward_starts_clean(net):
    with pytest.raises(KeyboardInterrupt):
        net(KeyboardInterrupt)
    assert current(net) is not None
    assert net.generate() == [1, 2, 3]
    assert current(net) is None


def test_a_block_joins_what_is_open_and_ends_with_itself_otherwise(net):
    with opened(net) as run:
        assert current(net) is run
        assert [net(), net()] == [1, 2]
        with opened(net) as same:
            assert same is run
        assert current(net) is run
    assert current(net) is None
    seen = []

    def inside(*_):
        with opened(net) as run:
            seen.append(run is current(net))
        seen.append(current(net) is not None)

    hook = net.register_forward_pre_hook(inside)
    assert [net(), net()] == [1, 1]
    hook.remove()
    assert seen == [True] * 4


def test_two_patchers_share_the_run(net):
    patcher = Patcher()
    open_around_forward(patcher, net)
    assert net() == 1
    patcher.undo()
    assert net() == 1


def test_a_module_around_the_root_opens_the_run_of_the_root():
    root, patcher = Net(), Patcher()

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.root = root

        def forward(self):
            return [self.root(), self.root()]

    around = Around()
    open_around_forward(patcher, around, root)
    open_around_forward(patcher, root)
    assert around() == [1, 2]
    assert root() == 1
    patcher.undo()


def test_models_and_threads_do_not_meet(net):
    other, patcher = Net(), Patcher()
    open_around_forward(patcher, other)

    seen = []
    hook = net.register_forward_pre_hook(lambda *_: seen.append((current(net), current(other))))
    net()
    hook.remove()
    ((run, none),) = seen
    assert isinstance(run, Run)
    assert none is None
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: net.generate(20), range(8))) == [list(range(1, 21))] * 8
    patcher.undo()


def test_a_stale_run_is_not_taken_for_that_of_a_model_at_the_same_address():
    def inside():
        net, patcher = Net(), Patcher()
        open_around_forward(patcher, net)
        with pytest.raises(KeyboardInterrupt):
            net(KeyboardInterrupt)
        stale, address = current(net), id(net)
        assert stale is not None
        other = Net()
        module._runs.set({id(other): module._runs.get()[address]})
        assert current(other) is None
        del net, patcher
        gc.collect()

    contextvars.copy_context().run(inside)
