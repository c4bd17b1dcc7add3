from __future__ import annotations

import itertools
import math
import random

import pytest

from mmaccel.errors import MMAccelError
from mmaccel.measure.nvdec import lower_bound, simulate

ORDERS = ("longest", "arrival", "static")


def best_makespan(costs, engines):
    """The optimum, by trying every assignment of units to engines."""
    best = math.inf
    for assignment in itertools.product(range(engines), repeat=len(costs)):
        loads = [0.0] * engines
        for cost, engine in zip(costs, assignment, strict=True):
            loads[engine] += cost
        best = min(best, max(loads))
    return best


def drawn(seed):
    """A node, requests that arrive over time and their units, with copies and sessions."""
    draw = random.Random(seed)
    R, gpus, engines = draw.randint(1, 4), draw.randint(1, 3), draw.randint(1, 3)
    requests = sorted(draw.randrange(R) for _ in range(draw.randint(0, 25)))
    return [draw.randint(1, 50) / 8 for _ in requests], {
        "engines": engines,
        "gpus": gpus,
        "requests": requests,
        "arrivals": [draw.choice((0.0, draw.randint(0, 120) / 8)) for _ in range(R)],
        "homes": [draw.randrange(gpus) for _ in range(R)],
        "session": draw.choice((0.0, 1.5)),
        "reuse": draw.random() < 0.5,
        "copy": [draw.randint(0, 16) / 8 for _ in requests],
    }


def work(costs, options, result):
    """What each run must cost its engine: the unit, and a session where the engine opens one."""
    seen = set()
    for run in result.runs:
        fresh = run.engine not in seen or not options["reuse"]
        seen.add(run.engine)
        yield run, costs[run.unit] + (options["session"] if fresh else 0.0)


@pytest.mark.parametrize("seed", range(40))
def test_longest_first_is_within_grahams_bound_of_the_optimum(seed):
    draw = random.Random(seed)
    engines = draw.randint(2, 3)
    costs = [draw.randint(1, 40) for _ in range(draw.randint(1, 8))]
    best = best_makespan(costs, engines)
    bound = lower_bound(costs, engines)
    assert bound <= best
    longest = simulate(costs, engines).makespan
    assert best <= longest <= (4 / 3 - 1 / (3 * engines)) * best + 1e-9
    # any order of a shared queue keeps the older bound, 2 - 1/m
    assert best <= simulate(costs, engines, order="arrival").makespan <= (2 - 1 / engines) * best + 1e-9


def test_grahams_worst_case_is_met_exactly():
    # 2m + 1 units: two each of 2m - 1 to m + 1 and three of m
    m = 3
    costs = [5, 5, 4, 4, 3, 3, 3]
    assert best_makespan(costs, m) == 9
    assert simulate(costs, m).makespan == 11 == pytest.approx((4 / 3 - 1 / (3 * m)) * 9)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seed", range(30))
def test_work_is_conserved(order, seed):
    costs, options = drawn(seed)
    result = simulate(costs, order=order, **options)
    assert sorted(run.unit for run in result.runs) == list(range(len(costs)))
    busy = [0.0] * (options["engines"] * options["gpus"])
    end = [0.0] * len(busy)
    for run, spent in work(costs, options, result):
        assert run.end - run.start == spent
        assert run.start >= options["arrivals"][options["requests"][run.unit]]
        assert run.start >= end[run.engine], "an engine decodes one unit at a time"
        busy[run.engine] += spent
        end[run.engine] = run.end
        remote = run.engine // options["engines"] != options["homes"][options["requests"][run.unit]]
        assert run.delivered >= run.end + (options["copy"][run.unit] if remote else 0)
        assert remote or run.delivered == run.end
    assert list(result.busy) == busy
    assert result.makespan == max((run.delivered for run in result.runs), default=0)
    assert [spent + free for spent, free in zip(result.busy, result.idle, strict=True)] == [result.makespan] * len(busy)
    for request, arrival in enumerate(options["arrivals"]):
        mine = [run for run in result.runs if options["requests"][run.unit] == request]
        first = min(mine, key=lambda run: run.unit, default=None)
        assert result.first_unit[request] == (first.delivered - arrival if first else 0)
        assert result.latency[request] == max((run.delivered - arrival for run in mine), default=0)


@pytest.mark.parametrize("order", ["longest", "arrival"])
@pytest.mark.parametrize("seed", range(30))
def test_no_engine_is_idle_while_a_unit_waits(order, seed):
    costs, options = drawn(seed)
    result = simulate(costs, order=order, **options)
    engines = options["engines"] * options["gpus"]
    for run in result.runs:
        arrival = options["arrivals"][options["requests"][run.unit]]
        moments = {arrival, *(other.end for other in result.runs), *(other.start for other in result.runs)}
        for moment in moments:
            if arrival <= moment < run.start:
                assert sum(other.start <= moment < other.end for other in result.runs) == engines


@pytest.mark.parametrize("seed", range(20))
def test_copies_out_of_a_gpu_follow_each_other(seed):
    costs, options = drawn(seed)
    result = simulate(costs, **options)
    free = [0.0] * options["gpus"]
    for run in sorted(result.runs, key=lambda run: (run.end, run.engine)):
        gpu = run.engine // options["engines"]
        if gpu != options["homes"][options["requests"][run.unit]]:
            free[gpu] = max(run.end, free[gpu]) + options["copy"][run.unit]
            assert run.delivered == free[gpu]


def test_a_split_beforehand_is_worse_where_costs_differ():
    # a film whose second half is still: its groups cost a tenth
    costs = [10.0] * 8 + [1.0] * 8
    static = simulate(costs, 4, order="static")
    assert static.makespan == 40
    assert static.busy == (40, 40, 4, 4)
    assert simulate(costs, 4).makespan == 22 == lower_bound(costs, 4)
    assert simulate(costs, 4, order="arrival").makespan == 22


def test_equal_units_gain_nothing_from_stealing():
    for order in ORDERS:
        assert simulate([2.0] * 14, 7, order=order).makespan == 4
    assert simulate([2.0] * 3, 7, gpus=2, order="static").busy[:4] == (2, 2, 2, 0)


def test_orders_of_one_engine():
    costs = [1.0, 3.0, 2.0]

    def sequence(**options):
        return [run.unit for run in simulate(costs, 1, **options).runs]

    assert sequence(order="arrival") == [0, 1, 2]
    assert sequence(order="longest") == [1, 2, 0]
    assert simulate(costs, 1, order="longest").first_unit == (6,)
    assert simulate(costs, 1, order="arrival").first_unit == (1,)
    # an earlier request is served before a longer unit of a later one
    late = {"requests": [1, 1, 0], "arrivals": [0.5, 1.0]}
    assert sequence(**late) == [2, 1, 0]
    assert simulate(costs, 1, **late).latency == (2, 5.5)


def test_sessions_and_copies_by_hand():
    # the first engine opens its session once; the other GPU helps and pays for the way
    once = simulate([2.0, 2.0, 2.0], 1, gpus=2, session=1.0, copy=0.5)
    assert [(run.engine, run.start, run.end, run.delivered) for run in once.runs] == [
        (0, 0, 3, 3),
        (1, 0, 3, 3.5),
        (0, 3, 5, 5),
    ]
    assert (once.makespan, once.idle) == (5, (0, 2))
    assert simulate([2.0, 2.0, 2.0], 1, session=1.0, reuse=False).makespan == 9
    # an idle engine on the home GPU is taken before one elsewhere, an open session before none
    at_home = simulate([1.0], 2, gpus=2, homes=[1], copy=9.0)
    assert at_home.runs[0].engine == 2
    again = simulate([1.0, 1.0], 2, requests=[0, 1], arrivals=[0.0, 5.0], session=1.0)
    assert [run.engine for run in again.runs] == [0, 0]


def test_nothing_to_decode():
    result = simulate([], 2)
    assert (result.makespan, result.runs, result.busy, result.latency) == (0, (), (0, 0), (0,))
    assert lower_bound([], 3) == 0


@pytest.mark.parametrize(
    ("costs", "options"),
    [
        ([1.0], {"engines": 0}),
        ([1.0], {"gpus": 0}),
        ([-1.0], {}),
        ([math.nan], {}),
        ([1.0], {"order": "random"}),
        ([1.0], {"requests": [0, 0]}),
        ([1.0], {"requests": [1]}),
        ([1.0], {"homes": [1]}),
        ([1.0], {"homes": [0, 0]}),
        ([1.0], {"arrivals": [math.inf]}),
        ([1.0], {"session": -1.0}),
        ([1.0], {"copy": [1.0, 1.0]}),
    ],
)
def test_wrong_arguments(costs, options):
    with pytest.raises(MMAccelError):
        simulate(costs, **options)
