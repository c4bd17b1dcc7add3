"""Handle: what `accelerate` returns; remove, pause and report."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

from mmaccel.compose import check
from mmaccel.core.patching import Patcher, forget_compiled, refuse_copies
from mmaccel.errors import MMAccelError
from mmaccel.install import Installer
from mmaccel.method import Method
from mmaccel.report import Report
from mmaccel.targets import Target

__all__ = ["Handle", "present"]

_active: weakref.WeakKeyDictionary[Any, list[Method]] = weakref.WeakKeyDictionary()


def present(target: Target) -> list[Method]:
    """The methods that handles have put on this target and not removed."""
    return list(_active.get(target.root, ()))


class Handle:
    """Methods on a target. A context manager that removes them at its end; `target` is the object that was given."""

    def __init__(self, target: Target, methods: list[Method]) -> None:
        check(methods, present(target))
        self._target, self._methods = target, methods
        self._patcher = Patcher()
        self._report = Report(methods=[method.spec for method in methods])
        self._removed = self._paused = False
        self._install()
        _active.setdefault(target.root, []).extend(methods)

    def _install(self) -> None:
        try:
            forget_compiled()
            for module in {id(m): m for m in (self._target.root, self._target.site.target)}.values():
                for name in ("__deepcopy__", "__reduce_ex__"):
                    self._patcher.set(module, name, refuse_copies)
            installer = Installer(self._target, self._patcher, self._report)
            for method in self._methods:
                method.install(installer)
            installer.finish()
            if not len(self._patcher):
                raise MMAccelError(f"{self._report.methods} touched no module of {type(self._target.given).__name__}.")
        except BaseException:
            self._patcher.undo()
            raise

    @property
    def target(self) -> Any:
        """The object that was accelerated; it is changed in place."""
        return self._target.given

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods, in the order in which they work."""
        return tuple(self._methods)

    def report(self) -> Report:
        """What has happened so far under this handle."""
        return self._report

    def remove(self) -> None:
        """Take the methods off; the target is then what it was. A second call does nothing."""
        if self._removed:
            return
        self._removed = True
        self._patcher.undo()
        methods = _active.get(self._target.root, [])
        for method in self._methods:
            methods.remove(method)
        if not methods:
            _active.pop(self._target.root, None)

    @contextlib.contextmanager
    def paused(self) -> Iterator[Any]:
        """Within this block the target is the unmodified one.

        Raises:
            MMAccelError: the handle has been removed or is paused already.
        """
        if self._removed or self._paused:
            raise MMAccelError("this handle is " + ("removed" if self._removed else "paused already") + ".")
        self._patcher.undo()
        self._paused = True
        try:
            yield self.target
        finally:
            self._paused = False
            if not self._removed:
                self._install()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "removed" if self._removed else "paused" if self._paused else "active"
        return f"<Handle {' + '.join(self._report.methods)} on {type(self.target).__name__}, {state}>"
