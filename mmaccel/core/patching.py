"""Patcher: the only code of mmaccel that touches an object which belongs to somebody else."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["Patcher"]

_ABSENT = object()


class _Layers:
    """The values that several patchers have put over one attribute, oldest first."""

    def __init__(self, original: Any) -> None:
        self.original = original
        self.values: list[Any] = []


class _Chain:
    """A callable put over a bound method; calls its wrappers, newest outermost, and the original innermost."""

    def __init__(self, original: Callable[..., Any], own: Any) -> None:
        functools.update_wrapper(self, original)
        self.original, self.own = original, own
        self.wrappers: list[Callable[..., Any]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.original
        for wrapper in self.wrappers:
            call = functools.partial(wrapper, call)
        return call(*args, **kwargs)


# Keyed weakly: a patched object that is thrown away takes its records along.
_overrides: weakref.WeakKeyDictionary[Any, dict[str, _Layers]] = weakref.WeakKeyDictionary()


class Patcher:
    """Records every change that it makes and takes back each by its own record.

    Only three kinds of change exist: torch hooks, values put over an instance attribute, and wrappers put around a
    bound method of one instance. Classes, module-level functions and global tables are out of reach. Nothing is
    restored from a snapshot, so what a library changes on the same object in the meantime stays, and patchers may be
    undone in any order.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def __len__(self) -> int:
        return len(self._undo)

    def before(self, module: nn.Module, hook: Callable[..., Any], *, first: bool = False) -> None:
        """Run `hook(module, args, kwargs)` before each call; it may return new `(args, kwargs)`."""
        handle = module.register_forward_pre_hook(hook, prepend=first, with_kwargs=True)
        self._undo.append(handle.remove)

    def after(self, module: nn.Module, hook: Callable[..., Any], *, always: bool = False, first: bool = False) -> None:
        """Run `hook(module, args, kwargs, output)` after each call; with `always` also after one that raised."""
        handle = module.register_forward_hook(hook, prepend=first, with_kwargs=True, always_call=always)
        self._undo.append(handle.remove)

    def set(self, obj: Any, name: str, value: Any) -> None:
        """Put `value` over the instance attribute `name` of `obj`."""
        records = _overrides.setdefault(obj, {})
        if name not in records:
            records[name] = _Layers(vars(obj).get(name, _ABSENT))
        layers = records[name]
        layers.values.append(value)
        setattr(obj, name, value)
        reference = weakref.ref(obj)
        self._undo.append(lambda: _unset(reference(), name, value))

    def wrap(self, obj: Any, name: str, wrapper: Callable[..., Any]) -> None:
        """Call `wrapper(original, *args, **kwargs)` wherever the method `name` of this one object is called."""
        chain = vars(obj).get(name)
        if not isinstance(chain, _Chain):
            chain = _Chain(getattr(obj, name), vars(obj).get(name, _ABSENT))
            vars(obj)[name] = chain
        chain.wrappers.append(wrapper)
        reference = weakref.ref(obj)
        self._undo.append(lambda: _unwrap(reference(), name, chain, wrapper))

    def on_undo(self, callback: Callable[[], None]) -> None:
        """Call `callback` when this patcher is undone, in the order opposite to that of the records."""
        self._undo.append(callback)

    def undo(self) -> None:
        """Take back every change, newest first. A second call does nothing."""
        while self._undo:
            self._undo.pop()()


def _unset(obj: Any, name: str, value: Any) -> None:
    if obj is None:
        return
    layers = _overrides[obj][name]
    on_top = layers.values and layers.values[-1] is value
    # by identity: two values of two patchers may be equal, as configs are
    del layers.values[next(i for i, other in enumerate(layers.values) if other is value)]
    if on_top and vars(obj).get(name, _ABSENT) is value:
        below = layers.values[-1] if layers.values else layers.original
        if below is _ABSENT:
            delattr(obj, name)
        else:
            setattr(obj, name, below)
    if not layers.values:
        del _overrides[obj][name]
        if not _overrides[obj]:
            del _overrides[obj]


def _unwrap(obj: Any, name: str, chain: _Chain, wrapper: Callable[..., Any]) -> None:
    chain.wrappers.remove(wrapper)
    # Somebody may have wrapped our chain since; an empty chain is a plain call of the original, so it may stay there.
    if obj is None or chain.wrappers or vars(obj).get(name) is not chain:
        return
    if chain.own is _ABSENT:
        del vars(obj)[name]
    else:
        vars(obj)[name] = chain.own
