"""Run: the state of one call of a model, found through a context variable, gone when the call ends or raises."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, TypeVar

from torch import nn

from mmaccel.core.patching import Patcher

__all__ = ["Run", "current", "open_around_forward", "open_around_method"]

T = TypeVar("T")

_runs: ContextVar[dict[int, Run]] = ContextVar("mmaccel_runs", default={})  # noqa: B039 - replaced, never mutated


class Run:
    """What one outermost call of a root module knows; methods keep their own state in it, by class.

    A run belongs to one root module in one thread or task, so that two models, or two threads on one model, never
    meet. Nested calls (generate -> forward) share the run of the outermost one.
    """

    def __init__(self) -> None:
        self.scopes: set[object] = set()
        self.methods = 0
        self._state: dict[type, Any] = {}

    def get(self, kind: type[T]) -> T:
        """The state object of class `kind`, made on first use."""
        if kind not in self._state:
            self._state[kind] = kind()
        return self._state[kind]

    def drop(self, kind: type) -> None:
        """Forget the state object of class `kind`."""
        self._state.pop(kind, None)


def current(root: nn.Module) -> Run | None:
    """The run of `root` that is open in this context, or None outside of any call."""
    return _runs.get().get(id(root))


def _open(root: nn.Module) -> Run:
    run = Run()
    _runs.set({**_runs.get(), id(root): run})
    return run


def _close_if_done(root: nn.Module, run: Run) -> None:
    if not run.scopes and run.methods <= 0:
        _runs.set({key: value for key, value in _runs.get().items() if key != id(root)})


def open_around_forward(patcher: Patcher, root: nn.Module) -> None:
    """Keep a run of `root` open during every call of it, also one that raises."""
    scope = object()

    def enter(_module: nn.Module, _args: Any, _kwargs: Any) -> None:
        run = current(root)
        # torch does not call its hooks after a KeyboardInterrupt. A root never calls itself, so a scope that is
        # still open belongs to such a call, and its state must not reach this one.
        if run is None or (scope in run.scopes and not run.methods):
            run = _open(root)
        run.scopes.add(scope)

    def leave(_module: nn.Module, _args: Any, _kwargs: Any, _output: Any = None) -> None:
        run = current(root)
        if run is not None:
            run.scopes.discard(scope)
            _close_if_done(root, run)

    patcher.before(root, enter, first=True)
    patcher.after(root, leave, always=True)


def open_around_method(patcher: Patcher, obj: Any, name: str, root: nn.Module) -> None:
    """Keep a run of `root` open during every call of the method `name` of `obj`."""

    def around(call: Any, *args: Any, **kwargs: Any) -> Any:
        run = current(root) or _open(root)
        run.methods += 1
        try:
            return call(*args, **kwargs)
        finally:
            run.methods -= 1
            if not run.methods:
                run.scopes.clear()
            _close_if_done(root, run)

    patcher.wrap(obj, name, around)
