"""Run: the state of one call of a model, found through a context variable, gone when the call ends or raises."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

from mmaccel.core.patching import Patcher
from mmaccel.core.state import State

__all__ = ["Run", "current", "open_around_forward", "open_around_method", "opened"]

_runs: ContextVar[dict[int, Run]] = ContextVar("mmaccel_runs", default={})  # noqa: B039 - replaced, never mutated


class Run(State):
    """What one outermost call of a root module knows; methods keep their own state in it, by class.

    A run belongs to one root module in one thread or task, so that two models, or two threads on one model, never
    meet. Nested calls (generate -> forward) share the run of the outermost one.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.root = weakref.ref(root)
        self.scopes: set[object] = set()
        self.methods = 0

    def drop(self, kind: type) -> None:
        """Forget the state object of class `kind`."""
        self._state.pop(kind, None)


def current(root: nn.Module) -> Run | None:
    """The run of `root` that is open in this context, or None outside of any call."""
    run = _runs.get().get(id(root))
    # a run that was left open by a model which is gone must not be taken for that of a model at the same address
    return run if run is not None and run.root() is root else None


def _open(root: nn.Module) -> Run:
    run = Run(root)
    _runs.set({**_runs.get(), id(root): run})
    return run


def _close_if_done(root: nn.Module, run: Run) -> None:
    if not run.scopes and run.methods <= 0:
        _runs.set({key: value for key, value in _runs.get().items() if key != id(root)})


@contextmanager
def opened(root: nn.Module) -> Iterator[Run]:
    """Keep a run of `root` open in this block: the one that is open already, or a new one."""
    run = current(root) or _open(root)
    run.methods += 1
    try:
        yield run
    finally:
        run.methods -= 1
        _close_if_done(root, run)


def open_around_forward(patcher: Patcher, module: nn.Module, root: nn.Module | None = None) -> None:
    """Keep a run of `root` (by default of `module` itself) open during every call of `module`, also one that raises."""
    owner = module if root is None else root
    scope = object()

    def enter(_module: nn.Module, _args: Any, _kwargs: Any) -> None:
        run = current(owner)
        # torch does not call its hooks after a KeyboardInterrupt. A module never calls itself, so a scope that is
        # still open belongs to such a call, and its state must not reach this one.
        if run is None or (scope in run.scopes and not run.methods):
            run = _open(owner)
        run.scopes.add(scope)

    def leave(_module: nn.Module, _args: Any, _kwargs: Any, _output: Any = None) -> None:
        run = current(owner)
        if run is not None:
            run.scopes.discard(scope)
            _close_if_done(owner, run)

    # when the hooks go, so does what an interrupted call has left open
    patcher.on_undo(lambda: leave(owner, (), {}))
    patcher.before(module, enter, first=True)
    patcher.after(module, leave, always=True)


def open_around_method(patcher: Patcher, obj: Any, name: str, root: nn.Module) -> None:
    """Keep a run of `root` open during every call of the method `name` of `obj`."""

    def around(call: Any, *args: Any, **kwargs: Any) -> Any:
        run = current(root)
        if run is not None and not run.methods:
            _open(root)  # a forward does not call this method: what is open was left by one that was interrupted
        with opened(root) as run:
            try:
                return call(*args, **kwargs)
            finally:
                if run.methods == 1:
                    run.scopes.clear()

    patcher.wrap(obj, name, around)
