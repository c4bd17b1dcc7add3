"""What a sampling run does, step by step: its velocities as they reach the scheduler, thinned out."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmaccel.core.patching import Patcher
from mmaccel.core.token_rows import latent_tokens
from mmaccel.errors import ConflictError

__all__ = ["Measured", "VelocityRecord"]

_TOKENS = 4096


@dataclass(frozen=True)
class Measured:
    """One run of T steps: inner products of velocities [B, T, T], squared changes by token [B, T - 1, N], timesteps
    and lengths of the steps [T]."""

    gram: Tensor
    changes: Tensor
    times: Tensor
    lengths: Tensor


class VelocityRecord:
    """Records what the scheduler is given: the guided velocity, whatever a pipeline's guidance is.

    `finished(steps, measured)` is called at the end of each run that was recorded whole; `wanted(steps)` says whether
    to record one.
    """

    def __init__(self, site: Any, wanted: Callable[[int], bool], finished: Callable[[int, Measured], None]) -> None:
        self.site, self.wanted, self.finished = site, wanted, finished
        self._table: Any = None
        self._found: list[tuple[float, Tensor]] = []
        self._scheduler: Any = None

    def install(self, patcher: Patcher) -> None:
        """Put the hook on the scheduler."""
        self._scheduler = weakref.ref(self.site.scheduler)
        patcher.wrap(self.site.scheduler, "step", self._around)
        patcher.on_undo(self._found.clear)

    def check(self) -> None:
        """Raise ConflictError if the pipeline has another scheduler now, of which nothing would be recorded."""
        if self._scheduler is not None and self._scheduler() is not self.site.scheduler:
            raise ConflictError("the pipeline's scheduler was replaced; remove the handle and accelerate it again.")

    def _around(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        scheduler = self._scheduler()
        # schedulers that look back at their last prediction take it before the timestep
        given = inspect.signature(type(scheduler).step).bind(scheduler, *args, **kwargs).arguments
        table = scheduler.timesteps
        if table is not self._table:
            self._table = table
            self._found.clear()
        steps = len(table)
        if self.wanted(steps):
            self._found.append((float(given["timestep"]), self._thinned(given["model_output"])))
        result = call(*args, **kwargs)
        if len(self._found) == steps:
            measured = self._measured(scheduler)
            self._found.clear()
            self.finished(steps, measured)
        return result

    def _thinned(self, velocity: Tensor) -> Tensor:
        transformer = self.site.transformer
        tokens = latent_tokens(velocity, self.site.patch(transformer, velocity), self.site.layout.frames_first)
        stride = -(-tokens.shape[1] // _TOKENS)
        return tokens[:, ::stride].detach().to("cpu", torch.float32)

    def _measured(self, scheduler: Any) -> Measured:
        times = torch.tensor([time for time, _ in self._found], dtype=torch.float64)
        every = torch.stack([velocity for _, velocity in self._found], 1)
        flat = every.flatten(2).double()
        sigmas = getattr(scheduler, "sigmas", None)
        lengths = torch.ones_like(times)
        if sigmas is not None and len(sigmas) == len(times) + 1:
            lengths = sigmas.detach().to("cpu", torch.float64).diff().abs()
        return Measured(flat @ flat.mT, every.diff(dim=1).square().sum(-1).double(), times, lengths)
