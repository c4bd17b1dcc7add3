"""Modules of a diffusion transformer compute some tokens and take the others from what they gave last."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmaccel.core.cached_modules import Module, cached_modules
from mmaccel.core.denoising import Call, Denoising
from mmaccel.core.module_call import ModuleCall
from mmaccel.core.patching import Patcher
from mmaccel.core.row_attention import KeysValues
from mmaccel.core.token_choice import Signals, TokenChoice
from mmaccel.core.token_rows import put_rows, take_rows, token_grid
from mmaccel.errors import NonFiniteError, NotApplicableError
from mmaccel.report import Report
from mmaccel.tokens.levels import LevelPlan

__all__ = ["Entry", "Now", "TokenCache"]


@dataclass
class Entry:
    """What is held of one module: its output [B, N, D], since when [B, N, 1], how it changes, its keys and values.

    prompt: the same of the prompt's tokens, all computed at one time, where they go through the module.
    """

    output: Tensor
    since: Tensor
    slope: Tensor | None = None
    kept: KeysValues | None = None
    prompt: Entry | None = None

    @property
    def nbytes(self) -> int:
        """The memory held, in bytes."""
        parts = (self.output, self.since, self.slope, self.kept, self.prompt)
        return sum(part.nbytes for part in parts if part is not None)


@dataclass
class _Run:
    plan: LevelPlan
    choice: TokenChoice
    transformer: Any
    branches: dict[int, dict[str, Entry]] = field(default_factory=dict)


@dataclass
class Now:
    """The call of a transformer that is under way."""

    plan: LevelPlan
    choice: TokenChoice
    at: Call
    time: float
    tokens: int
    text: int
    entries: dict[str, Entry]
    spent: float = 0.0
    dense: float = 0.0


class TokenCache:
    """Runs the attentions and feed-forwards of a pipeline's transformers by a plan; residuals and gates stay outside.

    `plan(steps, layers)` makes one for each run. At a level in between, the tokens that ask most for it are gathered,
    computed and written back. A self-attention then makes queries, keys and values of these tokens only, and they see
    the last keys and values of the others: its work falls with their number, and two more tensors a layer are held.
    Tokens of the prompt that go through a module are computed whenever any of the latent's are.
    All branches of guidance compute the same tokens. Where nothing is held a module is computed whole, whatever the
    plan says. order: 0 gives held outputs as they are, 1 carries them on along their last change.
    """

    def __init__(
        self, site: Any, report: Report, name: str, plan: Callable[[int, int], LevelPlan],
        signals: Signals | None = None, order: int = 0,
    ) -> None:  # fmt: skip
        self.site, self.report, self.name, self.plan = site, report, name, plan
        self.signals, self.order = signals or Signals(), order
        self._steps = Denoising(lambda: site.scheduler)
        self._run: _Run | None = None
        self._now: Now | None = None
        self._most = 0
        self._sums = [0.0, 0.0]

    def install(self, patcher: Patcher) -> None:
        """Put the hooks on every transformer of the pipeline."""
        patcher.on_undo(self._forget)
        for transformer in self.site.transformers.values():
            modules = cached_modules(self.site, transformer)
            for module in modules:
                patcher.wrap(module.module, "forward", self._around_module(module, first=module is modules[0]))
            # offloading puts its own forward on a transformer after each call of the pipeline; hooks stay
            patcher.before(transformer, self._enter(transformer, 1 + modules[-1].layer))
            patcher.after(transformer, self._leave, always=True)

    def _forget(self) -> None:
        self._run = self._now = None

    def _enter(self, transformer: Any, layers: int) -> Callable[..., None]:
        def enter(_: Any, args: Any, kwargs: Any) -> None:
            given = self.site.arguments(transformer, args, kwargs)
            latents, text = given["hidden_states"], given.get("encoder_hidden_states")
            at = self._steps.call(given["timestep"], latents)
            grid = token_grid(latents, self.site.patch(transformer, latents), self.site.layout.frames_first)
            run = self._begin(at, transformer, layers, latents, grid)
            if at.branch == 0:
                run.choice.begin()
            self._now = Now(
                run.plan, run.choice, at, float(given["timestep"].max()), math.prod(grid),
                0 if text is None else text.shape[1], run.branches.setdefault(at.branch, {}),
            )  # fmt: skip

        return enter

    def _leave(self, _module: Any, _args: Any, _kwargs: Any, _output: Any = None) -> None:
        now, run, self._now = self._now, self._run, None
        if now is None or run is None:
            return
        self._tell(now, run)
        if now.at.step + 1 >= now.at.total and now.at.branch + 1 >= len(run.branches):
            self._run = None  # nothing is held from one call of the pipeline to the next

    def _begin(self, at: Call, transformer: Any, layers: int, latents: Tensor, grid: tuple[int, ...]) -> _Run:
        if at.fresh or self._run is None:
            self._run = None  # what is held goes before anything new comes
            if not torch.isfinite(latents).all():
                raise NonFiniteError(
                    "the latents of the first step hold NaN or infinity; check what was given to the pipeline."
                )
            choice = TokenChoice(self.signals, grid, self.site.parts(latents))
            self._run = _Run(self.plan(at.total, layers), choice, transformer)
        if self._run.transformer is not transformer:
            self._run.transformer = transformer
            self._run.branches.clear()
        return self._run

    def _tell(self, now: Now, run: _Run) -> None:
        self.report.compute("attention and feed-forward of the blocks", 2 * now.spent, 2 * now.dense)
        held = sum(entry.nbytes for entries in run.branches.values() for entry in entries.values())
        self._most = max(self._most, held + run.choice.nbytes)
        self._sums = [self._sums[0] + now.spent, self._sums[1] + now.dense]
        self.report.events["cache memory"] = f"{self._most / 1e6:.4g} MB"
        if self._sums[1]:
            share = self._sums[0] / self._sums[1]
            self.report.events["cost of the blocks"] = f"{share:.1%} of their multiply-adds, {now.plan.cost:.1%} asked"

    def _around_module(self, module: Module, *, first: bool) -> Callable[..., Any]:
        signature = inspect.signature(type(module.module).forward)
        # what attentions pass on to their processors, rotary tables among it
        passed = [entry.name for entry in signature.parameters.values() if entry.kind is entry.VAR_KEYWORD]

        def around(call: Any, *args: Any, **kwargs: Any) -> Any:
            now = self._now
            if now is None:
                return call(*args, **kwargs)
            bound = signature.bind(module.module, *args, **kwargs)
            asked = ModuleCall(module, call, bound, passed, self.site.layout, now.tokens)
            if asked.states.ndim != 3 or asked.beside not in (0, now.text if module.joint else 0):
                raise NotApplicableError(
                    f"{self.name}: {module.name} was given {tuple(asked.states.shape)} where {now.tokens} tokens were "
                    "expected; switch feed-forward chunking and other token reducers off."
                )
            return self._module(now, asked, first=first)

        return around

    def _module(self, now: Now, asked: ModuleCall, *, first: bool) -> Any:
        module, states = asked.module, asked.latent
        entry = now.entries.get(module.feeds or module.name)
        place = now.at.step, module.layer, module.kind
        count = now.plan.rows(*place, now.tokens) if entry is not None else now.tokens
        now.spent += states.shape[0] * module.work(count, now.tokens, now.text)
        now.dense += states.shape[0] * module.work(now.tokens, now.tokens, now.text)
        self.report.count(self.name, module.kind, now.tokens, count)
        key = self._look(now, module, states, count, first=first)
        if entry is None or count == now.tokens:
            return asked.whole() if module.feeds else self._whole(now, asked, entry)
        rows = now.choice.rows(key, count, states.shape[0]) if count else None
        if module.feeds:  # nobody looks at the rows that are left out
            return asked.some_alone(rows)
        held = self._held(entry, now.time)
        if rows is None:
            prompt = None if entry.prompt is None else self._held(entry.prompt, now.time)
            return asked.joined(held, prompt)
        output, prompt = asked.some(rows, entry.kept)
        if prompt is not None:
            entry.prompt = self._fresh(now, prompt, entry.prompt)
        return asked.joined(self._renew(entry, held, rows, output, now.time), prompt)

    def _look(self, now: Now, module: Module, states: Tensor, count: int, *, first: bool) -> str:
        """Rank tokens where it is this module's turn; returns under which key."""
        if self.signals.by_module:
            if module.fed:
                return module.fed
            if now.at.branch == 0 and now.plan.partial_ahead(-1, module.layer, module.kind, first=False):
                now.choice.look(module.name, states, count)
            return module.name
        if first and now.at.branch == 0 and now.plan.partial:
            counts = now.plan.counts(now.at.step, now.tokens)
            partial = any(0 < other < now.tokens for other in counts)
            now.choice.look("", states, max(*counts, count), rank=partial)
        return ""

    def _whole(self, now: Now, asked: ModuleCall, before: Entry | None) -> Any:
        module = asked.module
        place = now.at.step, module.layer, module.kind
        now.entries.pop(module.name, None)
        if not now.plan.ahead(*place, later=self.order > 0):
            return asked.whole()
        kept = KeysValues() if module.kind == "self-attention" and now.plan.partial_ahead(*place) else None
        given = asked.whole(kept)
        output, prompt = asked.parted(given)
        entry = self._fresh(now, output, before)
        entry.kept = kept
        if prompt is not None:
            entry.prompt = self._fresh(now, prompt, None if before is None else before.prompt)
        now.entries[module.name] = entry
        return given

    def _fresh(self, now: Now, output: Tensor, before: Entry | None) -> Entry:
        """An entry of tokens that were all computed now."""
        since = torch.full((*output.shape[:2], 1), now.time, device=output.device)
        slope = None
        if self.order and before is not None:
            slope = (output - before.output) / _gap(since - before.since).to(output.dtype)
        return Entry(output, since, slope)

    def _held(self, entry: Entry, time: float) -> Tensor:
        if entry.slope is None:
            return entry.output
        return entry.output + entry.slope * (time - entry.since).to(entry.output.dtype)

    def _renew(self, entry: Entry, held: Tensor, rows: Tensor, output: Tensor, time: float) -> Tensor:
        """Write what was computed into what is held; tensors that were given away do not change."""
        if not self.order:
            entry.output = put_rows(entry.output, rows, output)
            return entry.output
        since = take_rows(entry.since, rows, 1)
        slope = (output - take_rows(entry.output, rows, 1)) / _gap(time - since).to(output.dtype)
        old = torch.zeros_like(entry.output) if entry.slope is None else entry.slope
        entry.slope = put_rows(old, rows, slope)
        entry.output = put_rows(entry.output, rows, output)
        entry.since = put_rows(entry.since, rows, torch.full_like(since, time))
        return put_rows(held, rows, output)


def _gap(times: Tensor) -> Tensor:
    return torch.where(times == 0, torch.ones_like(times), times)
