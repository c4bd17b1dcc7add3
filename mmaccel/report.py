"""What happened under a handle: tokens, steps, drafts, times, fallbacks."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mmaccel.errors import MMAccelError

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Report", "TokenCount", "plain_text"]


@dataclass
class TokenCount:
    """Visual tokens that went into and came out of one place, summed over calls; `calls` counts those with any."""

    method: str
    place: str
    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    @property
    def kept(self) -> float | None:
        """Fraction kept, None if no token came by."""
        return self.tokens_out / self.tokens_in if self.tokens_in else None


@dataclass
class Report:
    """Counters of one handle. `str()` and rich print a table, `as_dict()` and `json()` give the numbers."""

    methods: list[str] = field(default_factory=list)
    tokens: dict[tuple[str, str], TokenCount] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    flops: dict[str, list[float]] = field(default_factory=dict)
    events: dict[str, Any] = field(default_factory=dict)
    kernels: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    _about: dict[str, str] = field(default_factory=dict, repr=False)
    _last: dict[tuple[str, str], Any] = field(default_factory=dict, repr=False)

    def count(self, method: str, place: str, tokens_in: int, tokens_out: int, tokens: Any = None) -> None:
        """Add one call's visual tokens at `place`; `tokens` is the `TokenMap` of what is left."""
        self._last[method, place] = tokens
        entry = self.tokens.setdefault((method, place), TokenCount(method, place))
        if tokens_in:
            entry.calls += 1
            entry.tokens_in += tokens_in
            entry.tokens_out += tokens_out
        else:
            self.note(f"{method}: a prompt without visual tokens passed unchanged")

    def kept(self, method: str, place: str | None = None) -> list[list[int]]:
        """Which tokens of the prompt were left in the last call, text included: indices into each row of `input_ids`.

        Without `place` the last place at which the method works.

        Raises:
            MMAccelError: the method has not seen a prompt with visual tokens.
        """
        places = [p for m, p in self._last if m == method and place in (None, p)]
        tokens = self._last[method, places[-1]] if places else None
        if tokens is None:
            raise MMAccelError(f"{method} has not reduced a prompt yet; call the model first.")
        return [row[valid].tolist() for row, valid in zip(tokens.source, tokens.valid, strict=True)]

    def spend(self, what: str, seconds: float) -> None:
        """Add wall-clock seconds to the account `what`."""
        self.seconds[what] = self.seconds.get(what, 0.0) + seconds
        self.calls[what] = self.calls.get(what, 0) + 1

    def compute(self, what: str, spent: float, dense: float) -> None:
        """Add closed-form FLOPs of a stage: what it took, and what the dense model would have taken."""
        before = self.flops.get(what, [0.0, 0.0])
        self.flops[what] = [before[0] + spent, before[1] + dense]

    def note(self, text: str, about: str = "") -> None:
        """Say something once. `about` something the latest text counts, and an empty one ends it for good."""
        if about:
            if self._about.get(about) != "":
                self._about[about] = text
        elif text not in self.notes:
            self.notes.append(text)

    def kernel(self, op: str, backend: str, reason: str | None) -> None:
        """Count one kernel call."""
        self.kernels[op, backend, reason or ""] += 1

    def lines(self) -> list[str]:
        """Remarks, among them knobs that never fired."""
        remarks = [*self.notes, *filter(None, self._about.values())]
        remarks += [
            f"{entry.method} ({entry.place}): nothing was dropped in {entry.calls} calls"
            for entry in self.tokens.values()
            if entry.calls and entry.tokens_in == entry.tokens_out
        ]
        if not self.tokens and not self.calls and not self.events:
            remarks.append("the model has not been called yet")
        return remarks

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "methods": list(self.methods),
            "tokens": [
                {
                    "method": e.method, "place": e.place, "calls": e.calls,
                    "tokens_in": e.tokens_in, "tokens_out": e.tokens_out, "kept": e.kept,
                }
                for e in self.tokens.values()
            ],
            "seconds": {k: {"total": v, "calls": self.calls[k]} for k, v in self.seconds.items()},
            "flops": {k: {"spent": spent, "dense": dense} for k, (spent, dense) in self.flops.items()},
            "events": dict(self.events),
            "kernels": [
                {"op": op, "backend": backend, "reason": reason or None, "calls": n}
                for (op, backend, reason), n in self.kernels.items()
            ],
            "notes": self.lines(),
        }  # fmt: skip

    def json(self) -> str:
        """The report as one JSON object."""
        return json.dumps(self.as_dict(), default=float)

    def table(self) -> Table:
        """The report as a rich table."""
        from rich.table import Table

        # measured numbers of a method do not belong in a heading
        title = re.sub(r"\([^()]{30,}\)", "(...)", " + ".join(self.methods)) or "mmaccel"
        table = Table(title=title, caption="\n".join(self.lines()) or None)
        for heading in ("what", "where", "calls", "in", "out", "kept"):
            table.add_column(heading, justify="left" if heading in ("what", "where") else "right")
        for e in self.tokens.values():
            kept = "-" if e.kept is None else f"{e.kept:.1%}"
            table.add_row(e.method, e.place, str(e.calls), str(e.tokens_in), str(e.tokens_out), kept)
        for name, seconds in self.seconds.items():
            table.add_row("time", name, str(self.calls[name]), "", f"{seconds:.3f} s", "")
        for name, (spent, dense) in self.flops.items():
            table.add_row("FLOPs", name, "", f"{dense:.3g}", f"{spent:.3g}", f"{spent / dense:.1%}")
        for name, value in self.events.items():
            table.add_row("event", name, "", "", str(value), "")
        for (op, backend, reason), n in self.kernels.items():
            table.add_row("kernel", f"{op}: {backend}" + (f" ({reason})" if reason else ""), str(n), "", "", "")
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        return plain_text(self.table())


def plain_text(table: Table) -> str:
    """A rich table as text of 110 columns."""
    from io import StringIO

    from rich.console import Console

    console = Console(file=StringIO(), width=110, record=True)
    console.print(table)
    return console.export_text()
