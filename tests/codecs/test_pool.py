"""The crew of threads, on tasks whose units only take time: none is idle while there is work."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from mmaccel.codecs.pool import Crew


class Units:
    """A task of units that take their length in seconds; says who did what."""

    def __init__(self, lengths: list[float], fails: int | None = None, plans: float = 0.0) -> None:
        self.left, self.fails, self.plans = sorted(lengths, reverse=True), fails, plans
        self.done: list[tuple[str, float, float]] = []
        self.hands = 0
        self.lock = threading.Lock()
        self.stop = self.finished = False
        self.working = 0

    def lead(self, hands: int, shared: Callable[[], None], /) -> None:
        self.hands = hands
        time.sleep(self.plans)
        shared()
        self.assist()

    def assist(self) -> None:
        self.working += 1
        while not self.stop:
            with self.lock:
                if not self.left:
                    break
                length = self.left.pop(0)
            start = time.perf_counter()
            time.sleep(length)
            self.done.append((threading.current_thread().name, start, time.perf_counter()))
            if len(self.done) == self.fails:
                raise RuntimeError("a unit has failed")
        self.working -= 1

    def spare(self) -> bool:
        return bool(self.left)

    def abandon(self) -> None:
        self.stop = True

    def finish(self) -> int:
        assert self.working == 0, "somebody is still at work"
        assert not self.finished
        self.finished = True
        return len(self.done)


def test_one_task_is_shared_out_longest_first() -> None:
    lengths = [0.2, 0.16, 0.12, 0.1, 0.08, 0.06, 0.04, 0.04]
    with Crew[int](3) as crew:
        task = Units(lengths)
        assert crew.result(crew.add(task)) == 8
    assert len({name for name, _, _ in task.done}) == 3
    # Graham's bound for a list that is longest first, on what the units really took.
    took = [end - start for _, start, end in task.done]
    makespan = max(end for _, _, end in task.done) - min(start for _, start, _ in task.done)
    assert makespan <= (4 / 3 - 1 / 9) * max(sum(took) / 3, max(took)) + 0.15


def test_nobody_is_idle_while_units_are_left() -> None:
    with Crew[int](3) as crew:
        tasks = [Units([0.05] * 4, plans=0.02), Units([0.05] * 9), Units([0.3])]
        tickets = [crew.add(task) for task in tasks]
        assert [crew.result(ticket) for ticket in tickets] == [4, 9, 1]
    everything = sorted((start, end) for task in tasks for _, start, end in task.done)
    last_start = everything[-1][0]
    for moment in (everything[0][0] + k * (last_start - everything[0][0]) / 20 for k in range(6, 20)):
        assert sum(start <= moment < end for start, end in everything) >= 2


def test_many_tasks_have_a_thread_each() -> None:
    with Crew[int](2) as crew:
        tasks = [Units([0.02] * 5) for _ in range(6)]
        assert [crew.result(ticket) for ticket in [crew.add(task) for task in tasks]] == [5] * 6
    # The last ones may be shared; before that, opening a video twice would be a waste.
    assert all(len({name for name, _, _ in task.done}) == 1 for task in tasks[:4])
    assert tasks[0].hands == 2 or tasks[0].hands == 1
    assert tasks[2].hands == 1


def test_an_error_is_that_of_its_task_alone() -> None:
    before = threading.active_count()
    with Crew[int](2) as crew:
        bad, good = Units([0.01] * 6, fails=2), Units([0.01] * 6)
        tickets = [crew.add(bad), crew.add(good)]
        with pytest.raises(RuntimeError, match="a unit has failed"):
            crew.result(tickets[0])
        assert crew.result(tickets[1]) == 6
    assert not bad.finished
    assert threading.active_count() == before


def test_leaving_early_stops_after_the_present_unit() -> None:
    before = threading.active_count()
    task = Units([0.02] * 500)
    with Crew[int](2) as crew:
        ended = threading.Event()
        crew.add(task, ended.set)
        time.sleep(0.1)
    assert threading.active_count() == before
    assert 0 < len(task.done) < 100
    assert not task.finished
    assert ended.wait(1)


def test_a_crew_of_one() -> None:
    with Crew[int](1) as crew:
        assert [crew.result(ticket) for ticket in [crew.add(Units([0.0] * 3)) for _ in range(4)]] == [3] * 4
