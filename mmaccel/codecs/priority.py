"""Keep an encoder from changing how the threads of this process are scheduled."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["kept_priority"]


@contextmanager
def kept_priority() -> Iterator[None]:
    """Give the calling thread its scheduling policy back at the end of the block.

    SVT-AV1, run by root on Linux, puts the thread that opens it under real-time scheduling at the highest priority, and
    leaves it there. Every thread that starts later inherits that: on a machine with fewer cores than such threads they
    take turns only when they sleep, an interrupt is seen late, and two that wait for each other in a loop hang.
    """
    if not hasattr(os, "sched_getscheduler"):
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        if os.sched_getscheduler(0) != policy:
            os.sched_setscheduler(0, policy, parameters)
