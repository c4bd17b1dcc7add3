"""Stream: what methods remember from one call to the next on a live stream; explicit, one object a stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from mmaccel.core.state import State

__all__ = ["Stream", "current_stream", "following"]

_stream: ContextVar[Stream | None] = ContextVar("mmaccel_stream", default=None)


class Stream(State):
    """The memory of one stream; methods keep their own state in it, by class. Several streams never meet.

    A session works on a `copy` and keeps it only if the frame was taken. So what a state object refers to is replaced,
    never changed in place; one that cannot do so has a `__copy__` that copies it.
    """

    def clear(self) -> None:
        """Forget everything, as after a cut to another scene."""
        self._state.clear()


def current_stream() -> Stream | None:
    """The stream that the calls of this context belong to, None for a video that is given as a whole."""
    return _stream.get()


@contextmanager
def following(stream: Stream) -> Iterator[Stream]:
    """Calls in this block go on where the earlier ones of `stream` have ended."""
    token = _stream.set(stream)
    try:
        yield stream
    finally:
        _stream.reset(token)
