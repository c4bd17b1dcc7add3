"""Some tokens of a latent are computed at a denoising step, the others go on with the velocity that they had last."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmaccel.core.denoising import Call, Denoising
from mmaccel.core.free_memory import free_memory
from mmaccel.core.patching import Patcher
from mmaccel.core.row_attention import KeysValues
from mmaccel.core.token_rows import TokenRows, latent_tokens, token_grid, token_mask
from mmaccel.errors import MethodError, NonFiniteError
from mmaccel.report import Report
from mmaccel.tokens.signals import change
from mmaccel.tokens.steps import StepPlan

__all__ = ["HeldVelocity", "Storage"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Storage:
    """How keys and values are kept: "full", "half" or "fp8", of a fraction of the layers, on the CPU or in place."""

    precision: str = "full"
    layers: float = 1.0
    offload: bool = False

    def dtype(self, model: torch.dtype) -> torch.dtype:
        """The dtype in which a model's keys and values are stored."""
        if self.precision == "fp8":
            return torch.float8_e4m3fn
        return torch.bfloat16 if self.precision == "half" and model.itemsize > 2 else model

    def chosen(self, names: list[str]) -> list[str]:
        """The attentions that keep keys and values, spread evenly."""
        count = round(self.layers * len(names))
        return [names[(2 * index + 1) * len(names) // (2 * count)] for index in range(count)] if count else []


@dataclass
class _Branch:
    """What a branch of guidance holds: its last velocity, what was expected for it, how fast it changes, since when.

    step: when it was called last; a branch may pause.
    """

    step: int = -1
    last: Tensor | None = None
    before: Tensor | None = None
    slope: Tensor | None = None
    since: Tensor | None = None
    kept: dict[str, KeysValues] = field(default_factory=dict)
    prompt: tuple[Any, ...] = ()
    text: dict[Any, Tensor] = field(default_factory=dict)


@dataclass
class _Run:
    plan: StepPlan
    transformer: Any = None
    whole: int = -1
    branches: dict[int, _Branch] = field(default_factory=dict)
    tokens: int = 0
    parts: int = 1
    active: Tensor | None = None
    order: Tensor | None = None


class HeldVelocity:
    """Runs transformers of a pipeline by a plan of steps; `plan(steps)` makes one for each run.

    site: the adapter. order: 0 holds velocities, 1 carries them on along their last change.
    """

    def __init__(
        self, site: Any, report: Report, name: str, plan: Callable[[int], StepPlan], order: int, storage: Storage
    ) -> None:
        self.site, self.report, self.name, self.plan = site, report, name, plan
        self.order, self.storage = order, storage
        self._steps = Denoising(lambda: site.scheduler)
        self._run: _Run | None = None
        self._text: dict[Any, Tensor] | None = None

    def install(self, patcher: Patcher) -> None:
        """Put the hooks on every transformer of the pipeline."""
        patcher.on_undo(self._forget)
        for transformer in self.site.transformers.values():
            blocks = self.site.blocks(transformer)
            rows = TokenRows(self.site.layout)
            rows.install(patcher, blocks)
            for block in blocks.values():
                for path in self.site.layout.projections:
                    module = _inside(block, path)
                    if module is not None:
                        patcher.wrap(module, "forward", self._remember(module))
            patcher.wrap(transformer, "forward", self._around(transformer, rows))

    def _forget(self) -> None:
        self._run = None

    def _remember(self, module: Any) -> Callable[..., Any]:
        """The prompt is the same at every step, and so is what a projection makes of it."""

        def around(call: Any, states: Any, *args: Any, **kwargs: Any) -> Any:
            if self._text is None or args or kwargs:
                return call(states, *args, **kwargs)
            if module not in self._text:
                self._text[module] = call(states)
            return self._text[module]

        return around

    def _around(self, transformer: Any, rows: TokenRows) -> Callable[..., Any]:
        def around(call: Any, *args: Any, **kwargs: Any) -> Any:
            given = self.site.arguments(transformer, args, kwargs)
            at = self._steps.call(given["timestep"], given["hidden_states"])
            run = self._begin(at, transformer, given)
            branch = run.branches.setdefault(at.branch, _Branch())
            self._text = self._known_text(branch, given)
            try:
                with rows:
                    return self._step(call, args, kwargs, given, run, branch, at, transformer, rows)
            finally:
                if at.step + 1 >= at.total and all(other.step != at.step - 1 for other in run.branches.values()):
                    self._run = None  # nothing is held from one call of the pipeline to the next
                self._text = None

        return around

    def _begin(self, at: Call, transformer: Any, given: dict[str, Any]) -> _Run:
        if at.fresh or self._run is None:
            self._run = None  # what is held goes before anything new comes
            if not torch.isfinite(given["hidden_states"]).all():
                raise NonFiniteError(
                    "the latents of the first step hold NaN or infinity; check what was given to the pipeline."
                )
            self._run = _Run(self.plan(at.total), transformer)
        run = self._run
        if run.transformer is not transformer:
            run.transformer, run.whole = transformer, at.step
            for branch in run.branches.values():
                branch.kept, branch.text, branch.prompt = {}, {}, ()
        return run

    def _known_text(self, branch: _Branch, given: dict[str, Any]) -> dict[Any, Tensor] | None:
        prompt = tuple(given.get(name) for name in ("encoder_hidden_states", "encoder_hidden_states_image"))
        if torch.is_grad_enabled() or given.get("attention_kwargs") or given.get("cross_attention_kwargs"):
            return None
        if len(prompt) != len(branch.prompt) or any(a is not b for a, b in zip(prompt, branch.prompt, strict=True)):
            branch.prompt, branch.text = prompt, {}
        return branch.text

    def _rows(self, run: _Run, step: int) -> Tensor | None:
        """Places in the order of need that a step computes, None for all."""
        if not run.plan.first <= step < run.plan.steps - run.plan.last or step == run.whole:
            return None
        if run.active is None:
            run.active = run.plan.active(run.tokens)
        chosen = run.active[step - run.plan.first]
        return None if chosen.all() else chosen.nonzero()[:, 0]

    def _step(
        self, call: Any, args: Any, kwargs: Any, given: dict[str, Any], run: _Run, branch: _Branch, at: Call,
        transformer: Any, rows: TokenRows,
    ) -> Any:  # fmt: skip
        latents, time = given["hidden_states"], given["timestep"]
        frames_first = self.site.layout.frames_first
        patch = self.site.patch(transformer, latents)
        rows.tokens = run.tokens = math.prod(token_grid(latents, patch, frames_first))
        chosen = self._rows(run, at.step)
        if branch.last is None or branch.step != at.step - 1:
            chosen = None
        elif chosen is not None and not len(chosen) and self.site.layout.companion:
            chosen = chosen.new_zeros(1)
        branch.step = at.step
        count = run.tokens if chosen is None else len(chosen)
        self.report.count(self.name, "transformer", run.tokens, count)
        if chosen is None:
            ahead = range(at.step + 1, run.plan.steps)
            if all(self._rows(run, step) is None for step in ahead):
                branch.kept = {}
            elif self._rows(run, at.step + 1) is not None and not branch.kept:
                self._allocate(run, branch, at, run.tokens, latents, transformer)
            rows.kept, run.order = branch.kept, None
            output = call(*args, **kwargs)
            self._whole(branch, _velocity(output)[0], time)
            return output
        if run.order is None:
            self._score(run, latents, time, patch, frames_first, transformer)
        assert run.order is not None
        if not count:
            held = self._merge(branch, None, None, time)
            return (held,) if given.get("return_dict") is False else self.site.output(held)
        rows.kept = branch.kept
        rows.rows = self._places(run, chosen, latents)
        velocity, rebuild = _velocity(call(*args, **kwargs))
        computed = torch.zeros(rows.rows.shape[0], run.tokens, dtype=torch.bool, device=velocity.device)
        computed.scatter_(1, rows.rows, value=True)
        return rebuild(self._merge(branch, velocity, token_mask(computed, velocity, patch, frames_first), time))

    def _places(self, run: _Run, chosen: Tensor, latents: Tensor) -> Tensor:
        assert run.order is not None
        rows = run.order.index_select(1, chosen.to(run.order.device)).sort(1).values
        return rows if rows.shape[0] == 1 else rows.repeat(latents.shape[0] // rows.shape[0], 1)

    def _whole(self, branch: _Branch, velocity: Tensor, time: Tensor) -> None:
        now = time.detach().float().max()
        branch.before = branch.last
        if self.order and branch.last is not None and branch.since is not None:
            gap = _gap(now - branch.since).to(velocity.dtype)
            if branch.slope is not None:
                branch.before = branch.last + branch.slope * gap
            branch.slope = (velocity - branch.last) / gap
        branch.last = velocity.detach().clone()
        branch.since = now

    def _merge(self, branch: _Branch, velocity: Tensor | None, mask: Tensor | None, time: Tensor) -> Tensor:
        last = branch.last
        assert last is not None
        if not self.order or branch.slope is None or branch.since is None:
            if velocity is not None and mask is not None:
                branch.last = last = torch.where(mask, velocity, last)
            return last.clone()
        now = time.detach().float().max()
        gap = _gap(now - branch.since).to(last.dtype)
        held = last + branch.slope * gap
        if velocity is None or mask is None:
            return held
        branch.slope = torch.where(mask, (velocity - last) / gap, branch.slope)
        branch.last = torch.where(mask, velocity, last)
        branch.since = torch.where(mask, now, branch.since)
        return torch.where(mask, velocity, held)

    def _score(
        self, run: _Run, latents: Tensor, time: Tensor, patch: tuple[int, ...], frames_first: bool, transformer: Any
    ) -> None:
        run.parts = self.site.parts(latents)
        score = self._need(run, run.parts, patch, frames_first, transformer)
        if time.ndim == 2 and time.shape[1] == score.shape[1]:
            score = score.masked_fill(time[: score.shape[0]] == 0, -1.0)
        run.order = score.sort(dim=1, descending=True, stable=True).indices

    def _need(self, run: _Run, parts: int, patch: tuple[int, ...], frames_first: bool, transformer: Any) -> Tensor:
        """How fast each token's velocity changes, float32 [B, N]: of the guided velocity where branches are calls."""
        held = [run.branches[index] for index in sorted(run.branches) if run.branches[index].before is not None]
        held = [branch for branch in held if _items(branch) == _items(held[0])]
        scale = self.site.guidance(transformer)
        sides = []
        for name in ("before", "last"):
            values = [latent_tokens(getattr(branch, name).float(), patch, frames_first) for branch in held]
            if len(values) == 2 and scale is not None:
                values = [values[1] + scale * (values[0] - values[1])]
            sides.append(torch.cat([torch.cat(value.chunk(parts), -1) for value in values], -1))
        score = change(sides[1], sides[0])
        if not torch.isfinite(score).all():
            raise NonFiniteError(
                "the transformer gave NaN or infinity as velocity; try another dtype or fewer methods."
            )
        return score

    def _allocate(self, run: _Run, branch: _Branch, at: Call, tokens: int, latents: Tensor, transformer: Any) -> None:
        attentions = {
            f"{name}.{attribute}": self.site.width(transformer, getattr(block, attribute))
            for name, block in self.site.blocks(transformer).items()
            for attribute in self.site.layout.keeping
            if getattr(block, attribute, None) is not None
        }
        dtype = latents.dtype
        if at.branch == 0:
            items = sum(_items(other) for other in run.branches.values())
            self._check_memory(attentions, tokens * items, dtype, latents.device)
        target = self.storage.dtype(dtype)
        device = "cpu" if self.storage.offload else None
        branch.kept = {
            name: KeysValues(target if target != dtype else None, device)
            for name in self.storage.chosen(list(attentions))
        }

    def _check_memory(self, widths: dict[str, int], tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        if self.storage.offload:
            device = torch.device("cpu")
        free = free_memory(device)

        def size(storage: Storage) -> int:
            return 2 * tokens * storage.dtype(dtype).itemsize * sum(widths[name] for name in storage.chosen([*widths]))

        wanted = size(self.storage)
        text = f"{wanted / 1e9:.3g} GB for keys and values of {len(widths)} attentions on {device}"
        self.report.events["memory of keys and values"] = text
        logger.info("%s: %s, %s free", self.name, text, "unknown" if free is None else f"{free / 1e9:.3g} GB")
        if free is None or wanted <= free:
            return
        choices = [Storage(p, share) for p in ("full", "half", "fp8") for share in (1.0, 0.5, 0.25)]
        fitting = [
            f"memory={choice.precision};layers={choice.layers:g} ({size(choice) / 1e9:.3g} GB)"
            for choice in choices
            if size(choice) <= free and size(choice) < wanted
        ]
        if device.type != "cpu" and wanted <= (free_memory("cpu") or 0):
            fitting.append("offload=true")
        raise MethodError(
            f"{self.name}: {text} are needed and {free / 1e9:.3g} GB are free. What fits: "
            f"{', '.join(fitting[:4]) or 'nothing; use a smaller clip, or another method'}."
        )


def _gap(times: Any) -> Any:
    return torch.where(times == 0, torch.ones_like(times), times)


def _items(branch: _Branch) -> int:
    return 0 if branch.last is None else branch.last.shape[0]


def _velocity(output: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    if isinstance(output, tuple):
        return output[0], lambda value: (value, *output[1:])
    return output.sample, lambda value: type(output)(**{**output, "sample": value})


def _inside(block: Any, path: str) -> Any:
    for name in path.split("."):
        block = getattr(block, name, None)
    return block
