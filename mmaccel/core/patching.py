"""Patcher: the only code of mmaccel that touches an object which belongs to somebody else."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from mmaccel.errors import MMAccelError

__all__ = ["Chain", "Patcher", "forget_compiled", "refuse_copies", "settle", "shared"]

T = TypeVar("T")

_ABSENT = object()
# What patchers have to remember about an object is kept in the object, so that it goes where the object goes.
_LAYERS, _SHARED = "_mmaccel_layers", "_mmaccel_shared"
# A hook of accelerate keeps the `forward` below it here, and puts that back when it goes, over whatever came on top.
_KEPT = {"forward": "_old_forward", "_old_forward": "forward"}


class _Layers:
    """The values that several patchers have put over one attribute, oldest first."""

    def __init__(self, original: Any) -> None:
        self.original = original
        self.values: list[Any] = []


class Chain:
    """A callable put over a bound method; calls its wrappers, newest outermost, and the original innermost."""

    def __init__(self, original: Callable[..., Any], own: Any, place: tuple[int, str]) -> None:
        functools.update_wrapper(self, original)
        self.original, self.own, self.place = original, own, place
        self.wrappers: list[Callable[..., Any]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call through the wrappers."""
        call = self.original
        for wrapper in self.wrappers:
            call = functools.partial(wrapper, call)
        return call(*args, **kwargs)


def refuse_copies(*_: Any) -> Any:
    """Stands for `__deepcopy__` and `__reduce_ex__` of an object with hooks.

    A copy would take the hooks along, and they work for the original: it would compute something else, silently.

    Raises:
        MMAccelError: always.
    """
    raise MMAccelError(
        "this model has methods of mmaccel on it, which work for this object only; copy or pickle it inside "
        "`with handle.paused():`, or remove the handle first."
    )


def forget_compiled() -> None:
    """Have torch.compile compile anew: code from before does not look for hooks that have come since."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


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
        records = vars(obj).setdefault(_LAYERS, {})
        if name not in records:
            records[name] = _Layers(vars(obj).get(name, _ABSENT))
        layers = records[name]
        layers.values.append(value)
        setattr(obj, name, value)
        reference = weakref.ref(obj)
        self._undo.append(lambda: _unset(reference(), name, value))

    def wrap(self, obj: Any, name: str, wrapper: Callable[..., Any]) -> None:
        """Call `wrapper(original, *args, **kwargs)` wherever the method `name` of this one object is called."""
        if name == "forward" and _KEPT[name] in vars(obj):
            name = _KEPT[name]
        chain = vars(obj).get(name)
        # libraries move what they find: a chain of another object is a callable like any other
        if not isinstance(chain, Chain) or chain.place != (id(obj), name):
            chain = Chain(getattr(obj, name), vars(obj).get(name, _ABSENT), (id(obj), name))
            vars(obj)[name] = chain
        chain.wrappers.append(wrapper)
        reference = weakref.ref(obj)
        self._undo.append(lambda: _unwrap(reference(), name, chain, wrapper))

    def share(self, obj: Any, make: type[T]) -> T:
        """The one object of class `make` that all patchers of `obj` have in common; gone with the last of them."""
        shared = vars(obj).setdefault(_SHARED, {})
        value, users = shared.get(make, (None, 0))
        value = make() if value is None else value
        shared[make] = value, users + 1
        reference = weakref.ref(obj)
        self._undo.append(lambda: _unshare(reference(), make))
        return value

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
    layers = vars(obj)[_LAYERS][name]
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
        del vars(obj)[_LAYERS][name]
        if not vars(obj)[_LAYERS]:
            del vars(obj)[_LAYERS]


def shared(obj: Any, kind: type[T]) -> T | None:
    """The object of class `kind` that patchers share on `obj`, None if there is none."""
    return vars(obj).get(_SHARED, {}).get(kind, (None, 0))[0]


def _unshare(obj: Any, kind: type) -> None:
    if obj is None:
        return
    records = vars(obj)[_SHARED]
    value, users = records.pop(kind)
    if users > 1:
        records[kind] = value, users - 1
    if not records:
        del vars(obj)[_SHARED]


def _unwrap(obj: Any, name: str, chain: Chain, wrapper: Callable[..., Any]) -> None:
    chain.wrappers.remove(wrapper)
    # Somebody may have wrapped our chain since; an empty chain is a plain call of the original, so it may stay there.
    if obj is None or chain.wrappers:
        return
    if vars(obj).get(name) is chain:
        settle(obj, name)
    elif vars(obj).get(_KEPT.get(name, name)) is chain:
        vars(obj)[_KEPT[name]] = chain.original


def settle(obj: Any, name: str) -> None:
    """Take an empty chain off `obj`: one that was under somebody's wrapper when its last wrapper went."""
    chain = vars(obj).get(name)
    if not isinstance(chain, Chain) or chain.wrappers or chain.place != (id(obj), name):
        return
    if chain.own is _ABSENT:
        del vars(obj)[name]
    else:
        vars(obj)[name] = chain.own
