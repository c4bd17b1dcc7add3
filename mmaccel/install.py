"""Installer: what a method gets in order to put itself on a target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmaccel.core.patching import Patcher
from mmaccel.report import Report
from mmaccel.targets import Target

__all__ = ["Installer"]


class Installer:
    """The target, the patcher and the report of one handle.

    `prefill` exists for vision-language models: methods tell it what to reduce and where, and its hooks are put on
    once, after all methods of the handle have spoken.
    """

    def __init__(self, target: Target, patcher: Patcher, report: Report) -> None:
        self.target, self.patcher, self.report = target, patcher, report
        self._prefill: Any = None
        self._gates: list[Any] = []
        self._inside: list[Callable[[], None]] = []

    @property
    def prefill(self) -> Any:
        """The `PrefillHooks` of the handle."""
        if self._prefill is None:
            from mmaccel.core.prefill import PrefillHooks

            self._prefill = PrefillHooks(self.target.site, self.patcher, self.report.count, self.report.note)
        return self._prefill

    def gate(self, thin: Any) -> None:
        """Pass the calls of the vision tower through `thin`, see `core.gate`."""
        self._gates.append(thin)

    def inside_gates(self, put: Callable[[], None]) -> None:
        """Put hooks on the vision tower, by calling `put`, so that they see what gates have left of a call."""
        self._inside.append(put)

    def finish(self) -> None:
        """Put on the hooks that methods share."""
        if self._prefill is not None:
            from mmaccel.core.watch import watch_overhead, watch_stages

            # ahead of the prefill's hooks and behind them, and so around what they do
            key = watch_stages(self.patcher, self.target.site, self.report)
            self._prefill.install()
            watch_overhead(self.patcher, self.target.site, self.report, key)
        for thin in self._gates:
            from mmaccel.core.gate import gate_tower

            gate_tower(self.patcher, self.target.site, thin)
        for put in self._inside:
            put()
