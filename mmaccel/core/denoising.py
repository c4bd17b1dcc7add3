"""Which step of which sampling run a call of a diffusion transformer belongs to, found from the calls themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Call", "Denoising"]


@dataclass(frozen=True)
class Call:
    """One call of a transformer in a run of `total` steps: step index, branch of guidance, first call of a run."""

    step: int
    total: int
    branch: int
    fresh: bool


class Denoising:
    """Counts the steps of sampling runs; knows no model, needs no reset and no cache context.

    A run begins when the scheduler has a new table of timesteps, when the timestep goes up, or when the shape of the
    latents changes from step to step. A step begins when the timestep or the scheduler's own index changes; further
    calls in it are further branches of guidance, which may have a batch of their own. `scheduler` gives the scheduler
    of the moment.
    """

    def __init__(self, scheduler: Callable[[], Any]) -> None:
        self._scheduler = scheduler
        self._table: Any = None
        self._shape: tuple[int, ...] = ()
        self._key: tuple[float, Any] = (float("-inf"), None)
        self._step = self._branch = 0

    def call(self, timestep: Tensor, latents: Tensor) -> Call:
        """Place a call with `timestep` (any shape; the largest counts) and `latents` [B, ...]."""
        scheduler = self._scheduler()
        table = getattr(scheduler, "timesteps", None)
        time = float(timestep.max())
        key = (time, getattr(scheduler, "step_index", None))
        # an index that was not set yet is the first one; that is no new step
        same = key == self._key or (time == self._key[0] and self._key[1] is None)
        other = not same and tuple(latents.shape) != self._shape
        fresh = table is not self._table or time > self._key[0] or other
        if fresh:
            self._table, self._shape, self._step, self._branch = table, tuple(latents.shape), 0, 0
        elif same:
            self._branch += 1
        else:
            self._step, self._branch = self._step + 1, 0
        self._key = key
        begin = getattr(scheduler, "begin_index", None) or 0
        total = len(table) - begin if table is not None else 0
        return Call(self._step, total, self._branch, fresh)
