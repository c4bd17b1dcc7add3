"""Threads that share out the work on one or many videos: none of them is idle while there is a unit to be done."""

from __future__ import annotations

import os
import threading
from collections import deque
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from mmaccel.codecs.sampling import whole_number
from mmaccel.errors import VideoError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

__all__ = ["Crew", "Task", "Ticket", "cores", "thread_count"]

_MOST_THREADS = 256
_GLANCE = 0.2  # seconds

Result = TypeVar("Result", covariant=True)


class Task(Protocol[Result]):
    """A video to be read: planned by one thread, its units of work then done by that one and by idle ones.

    The first error of any of its methods is the error of the task.
    """

    def lead(self, hands: int, shared: Callable[[], None], /) -> None:
        """Plan, call `shared()` when there are units for others to take, then work until none is left.

        `hands` is how many threads may work on it at once.
        """
        ...

    def assist(self) -> None:
        """Take units until none is left."""
        ...

    def spare(self) -> bool:
        """Whether it pays for another thread to come."""
        ...

    def abandon(self) -> None:
        """Make all threads that work on it stop soon."""
        ...

    def finish(self) -> Result:
        """Give the result; called when no unit is left and nobody works on it any more."""
        ...


class Ticket(Generic[Result]):
    """What the crew knows of a task."""

    def __init__(self, task: Task[Result], ended: Callable[[], None]) -> None:
        self.task, self.ended = task, ended
        self.hands = 0
        self.planning = True
        self.done = False
        self.error: BaseException | None = None
        self.results: list[Result] = []


class Crew(Generic[Result]):
    """At most `threads` threads; a with-block around their work, at whose end all of them are gone.

    Tasks are taken in the order in which they came. A thread without one takes units of the earliest task that has some
    to spare: so one video keeps all threads busy, and many videos are each opened once.
    """

    def __init__(self, threads: int) -> None:
        self._limit = threads
        self._change = threading.Condition()
        self._waiting: deque[Ticket[Result]] = deque()
        self._active: list[Ticket[Result]] = []
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._stopped = False

    def __enter__(self) -> Crew[Result]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._change:
            self._stopped = True
            self._waiting.clear()
            for ticket in self._active:
                ticket.task.abandon()
            self._change.notify_all()
        for thread in self._threads:
            thread.join()

    def add(self, task: Task[Result], ended: Callable[[], None] = lambda: None) -> Ticket[Result]:
        """Take a task in; the ticket is for `result`, `ended()` is called when that need not wait any more."""
        ticket = Ticket(task, ended)
        with self._change:
            self._waiting.append(ticket)
            self._recruit()
        return ticket

    def result(self, ticket: Ticket[Result]) -> Result:
        """Wait for a task, and return what it finished with; raise its error if it has failed."""
        with self._change:
            # A signal that comes just before the wait is only seen when it ends: so it is a short one.
            while not ticket.done:
                self._change.wait(_GLANCE)
        if ticket.error is not None:
            raise ticket.error
        return ticket.results[0]

    def _recruit(self) -> None:
        """Wake a thread that waits, or start one more."""
        if self._idle:
            self._change.notify_all()
        elif len(self._threads) < self._limit:
            thread = threading.Thread(target=self._serve, name=f"mmaccel-decode-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self) -> None:
        while (chosen := self._choose()) is not None:
            ticket, leads = chosen
            try:
                if leads:
                    share = len(self._active) + len(self._waiting)
                    ticket.task.lead(max(1, self._limit // share), lambda ticket=ticket: self._share(ticket))
                else:
                    ticket.task.assist()
            except BaseException as error:
                self._fail(ticket, error)
            self._leave(ticket)

    def _choose(self) -> tuple[Ticket[Result], bool] | None:
        """Wait for something to do; None when the crew is dissolved."""
        with self._change:
            while not self._stopped:
                if self._waiting:
                    ticket = self._waiting.popleft()
                    self._active.append(ticket)
                    ticket.hands = 1
                    return ticket, True
                for ticket in self._active:
                    if not ticket.planning and ticket.error is None and ticket.hands and ticket.task.spare():
                        ticket.hands += 1
                        # What is left may do for one more.
                        self._recruit()
                        return ticket, False
                self._idle += 1
                self._change.wait()
                self._idle -= 1
            return None

    def _share(self, ticket: Ticket[Result]) -> None:
        with self._change:
            ticket.planning = False
            self._recruit()

    def _fail(self, ticket: Ticket[Result], error: BaseException) -> None:
        with self._change:
            if ticket.error is None:
                ticket.error = error
            ticket.task.abandon()

    def _leave(self, ticket: Ticket[Result]) -> None:
        """Finish a task if this was the last thread that worked on it."""
        with self._change:
            ticket.hands -= 1
            if ticket.hands:
                return
        if ticket.error is None and not self._stopped:
            try:
                ticket.results.append(ticket.task.finish())
            except BaseException as error:
                ticket.error = error
        with self._change:
            self._active.remove(ticket)
            ticket.done = True
            self._change.notify_all()
        ticket.ended()


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_count(threads: int | None, usual: int = 16) -> int:
    """Check a number of threads; None is one a core, and at most `usual`. Raises VideoError."""
    count = min(cores(), usual) if threads is None else whole_number(threads, "threads")
    if not 1 <= count <= _MOST_THREADS:
        raise VideoError(f"threads must be at least 1 and at most {_MOST_THREADS}")
    return count
