"""Several sessions on one model: what may be streamed, and methods that are put on once for all of them."""

from __future__ import annotations

import threading
import weakref
from typing import Any

from mmaccel.errors import AdapterError, ConflictError, NotApplicableError
from mmaccel.handle import Handle, present
from mmaccel.method import Method, registry
from mmaccel.report import Report
from mmaccel.targets import Target

__all__ = ["Shared", "check_streams"]

_lock = threading.RLock()  # a session that nobody has any more leaves whenever memory is collected
_open: weakref.WeakKeyDictionary[Any, Shared] = weakref.WeakKeyDictionary()


class Shared:
    """The methods of the sessions that are open on one model: put on by the first, taken off by the last."""

    def __init__(self, target: Target, methods: list[Method]) -> None:
        self._target, self._methods, self._users = target, methods, 0
        self._handle = Handle(target, methods) if methods else None
        self.report = Report() if self._handle is None else self._handle.report()

    @classmethod
    def join(cls, target: Target, methods: list[Method]) -> Shared:
        """The one of this model, if it has the same methods, or a new one.

        Raises:
            ConflictError: there are other methods on the model.
        """
        with _lock:
            found = _open.get(target.root)
            if found is None:
                _refuse(present(target), [])
                found = _open[target.root] = cls(target, methods)
            elif found._methods != methods:
                raise ConflictError(
                    f"another session with {_named(found._methods)} is open on this model, and this one has "
                    f"{_named(methods)}; give all sessions of a model the same methods, or close that one first."
                )
            found._users += 1
            return found

    def leave(self) -> None:
        """One session less."""
        with _lock:
            self._users -= 1
            if not self._users:
                _open.pop(self._target.root, None)
                if self._handle is not None:
                    self._handle.remove()

    def check(self) -> None:
        """Refuse to go on while others have put methods on the model.

        Raises:
            ConflictError: they have.
        """
        _refuse(present(self._target), self._methods)


def _refuse(on: list[Method], ours: list[Method]) -> None:
    if on != ours:
        raise ConflictError(
            f"{_named(on)} is on this model, and the session has {_named(ours)}; give the methods to mmaccel.stream, "
            "not to accelerate."
        )


def _named(methods: list[Method]) -> str:
    return " + ".join(method.spec for method in methods) or "no method"


def check_streams(target: Target, methods: list[Method]) -> None:
    """Refuse what cannot be streamed.

    Raises:
        AdapterError: the model cannot answer. NotApplicableError: it takes no videos, or forgets by itself; a method
        does not fit it or needs a whole video.
    """
    from mmaccel.api import plan

    site = target.site
    if target.kind != "video-lm":
        raise AdapterError(f"{type(target.given).__name__} is a {target.kind}; a stream needs a vision-language model.")
    if "video" not in site.encoders:
        raise NotApplicableError(
            f"{site.family} takes frames as images, each behind its number, and such a prompt cannot go on without "
            "end; use a model that takes videos."
        )
    if site.windowed:
        raise NotApplicableError(
            f"some decoder layers of this {site.family} attend inside a sliding window, whose cache cannot lose tokens."
        )
    if getattr(site.target, "get_output_embeddings", lambda: None)() is None:
        raise AdapterError(f"{type(site.target).__name__} has no output head to answer with; give the whole model.")
    for method in methods:
        plan(method, target)
        if not method.streams:
            able = ", ".join(name for name, cls in registry().items() if cls.streams)
            raise NotApplicableError(
                f"{method.info.name} needs the whole video or prompt, and a stream comes frame by frame; methods that "
                f"can: {able}."
            )
