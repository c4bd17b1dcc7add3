"""Some tokens of a latent are computed at a denoising step, the others go on with the velocity that they had last."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmaccel.core.denoising import Call, Denoising
from mmaccel.core.free_memory import free_memory
from mmaccel.core.latent_input import LatentInput
from mmaccel.core.patching import Patcher
from mmaccel.core.row_attention import KeysValues
from mmaccel.core.token_rows import TokenRows
from mmaccel.errors import ConflictError, MethodError, NonFiniteError
from mmaccel.report import Report
from mmaccel.tokens.steps import Plan

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
    """What a branch of guidance holds: its last velocity, how fast it changes, since when; `prompt` names a text.

    step: when it was called last; a branch may pause, and begins again with a whole step. sound:
    whether its velocity is known to be finite.
    """

    step: int = -1
    sound: bool = False
    last: Tensor | None = None
    slope: Tensor | None = None
    since: Tensor | None = None
    kept: dict[str, KeysValues] = field(default_factory=dict)
    prompt: tuple[Any, ...] = ()
    text: dict[Any, Tensor] = field(default_factory=dict)


@dataclass
class _Run:
    plan: Plan
    active: Tensor
    transformer: Any = None
    whole: int = -1
    branches: dict[int, _Branch] = field(default_factory=dict)
    checked: int = 0
    order: Tensor | None = None


class HeldVelocity:
    """Runs transformers of a pipeline by a plan of steps; `plan(steps)` makes one for each run.

    site: the adapter. order: 0 holds velocities, 1 carries them on along their last change.
    """

    def __init__(
        self, site: Any, report: Report, name: str, plan: Callable[[int], Plan], order: int, storage: Storage
    ) -> None:
        self.site, self.report, self.name, self.plan = site, report, name, plan
        self.order, self.storage = order, storage
        self._steps = Denoising(lambda: site.scheduler)
        self._run: _Run | None = None
        self._text: dict[Any, Tensor] | None = None
        self._told = ""

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
            given = LatentInput(self.site, transformer, self.site.arguments(transformer, args, kwargs))
            at = self._steps.call(given.time, given.latents)
            run = self._begin(at, given)
            branch = run.branches.setdefault(at.branch, _Branch())
            self._text = self._known_text(branch, given.given)
            try:
                with rows:
                    return self._step(lambda: call(*args, **kwargs), given, run, branch, at, rows)
            finally:
                if at.step + 1 >= at.total and all(other.step != at.step - 1 for other in run.branches.values()):
                    self._run = None  # nothing is held from one call of the pipeline to the next
                self._text = None

        return around

    def _begin(self, at: Call, given: LatentInput) -> _Run:
        if at.fresh or self._run is None:
            self._run = None  # what is held goes before anything new comes
            if self.site.cache is not None:
                raise ConflictError(f"{self.name}: diffusers' {self.site.cache} was put on; call disable_cache().")
            if not torch.isfinite(given.latents).all():
                raise NonFiniteError(
                    "the latents of the first step hold NaN or infinity; check what was given to the pipeline."
                )
            plan = self.plan(at.total)
            self._run = _Run(plan, plan.active(given.count), given.transformer)
        run = self._run
        if run.transformer is not given.transformer:
            run.transformer, run.whole = given.transformer, at.step
            run.checked = 0
            for branch in run.branches.values():
                branch.kept, branch.text, branch.prompt = {}, {}, ()
        return run

    def _known_text(self, branch: _Branch, given: dict[str, Any]) -> dict[Any, Tensor] | None:
        prompt = [given.get(name) for name in ("encoder_hidden_states", "encoder_hidden_states_image")]
        if torch.is_grad_enabled() or given.get("attention_kwargs") or given.get("cross_attention_kwargs"):
            return None
        if any(isinstance(part, Tensor) and part.is_inference() for part in prompt):
            return None  # a change in place would not be seen
        # the version of a tensor counts its changes in place
        known = tuple((part, part._version if isinstance(part, Tensor) else 0) for part in prompt)
        if len(known) != len(branch.prompt) or any(
            a is not b or old != new for (a, old), (b, new) in zip(known, branch.prompt, strict=True)
        ):
            branch.prompt, branch.text = known, {}
        return branch.text

    def _rows(self, run: _Run, step: int) -> Tensor | None:
        """Places in the order of need that a step computes, None for all."""
        chosen = run.active[step]
        if step == run.whole or chosen.all():
            return None
        if self.site.layout.companion and not chosen.any():
            return torch.zeros(1, dtype=torch.int64)  # what runs along needs the step
        return chosen.nonzero()[:, 0]

    def _step(
        self, call: Callable[[], Any], given: LatentInput, run: _Run, branch: _Branch, at: Call, rows: TokenRows
    ) -> Any:
        rows.tokens = run.active.shape[1]
        chosen = self._rows(run, at.step)
        whole = chosen is None
        if branch.last is None or branch.step != at.step - 1:
            chosen = None
        branch.step = at.step
        self.report.count(self.name, "transformer", rows.tokens, rows.tokens if chosen is None else len(chosen))
        if chosen is None:
            self._keep_or_free(run, branch, at, given)
            rows.kept = branch.kept
            if whole:
                run.order = None
            output = call()
            self._whole(branch, _velocity(output)[0], given.now)
            return output
        _check(branch)
        if not len(chosen):
            held = self._merge(branch, None, None, given.now)
            return (held,) if given.given.get("return_dict") is False else self.site.output(held)
        if run.order is None:
            run.order = self._order(run, given)
        rows.kept = branch.kept
        rows.rows = _places(run.order, chosen, given.latents)
        velocity, rebuild = _velocity(call())
        return rebuild(self._merge(branch, velocity, given.mask(rows.rows, velocity), given.now))

    def _keep_or_free(self, run: _Run, branch: _Branch, at: Call, given: LatentInput) -> None:
        """Keys and values are stored where some, not all, of the tokens are computed before the next whole step."""
        ahead = [self._rows(run, step) for step in range(at.step + 1, run.plan.steps)]
        following = next((step for step, rows in enumerate(ahead) if rows is None), len(ahead))
        if not any(rows is not None and len(rows) for rows in ahead):
            branch.kept = {}
        elif any(rows is not None and len(rows) for rows in ahead[:following]) and not branch.kept:
            self._allocate(run, branch, at, given)

    def _whole(self, branch: _Branch, velocity: Tensor, now: Tensor) -> None:
        if branch.last is not None and branch.since is not None:
            branch.slope = (velocity.detach() - branch.last) / _gap(now - branch.since).to(velocity.dtype)
        branch.last = velocity.detach().clone()
        branch.since, branch.sound = now, False

    def _merge(self, branch: _Branch, velocity: Tensor | None, mask: Tensor | None, now: Tensor) -> Tensor:
        last, since, slope = branch.last, branch.since, branch.slope
        assert last is not None
        assert since is not None
        gap = _gap(now - since).to(last.dtype)
        held = last + slope * gap if self.order and slope is not None else last.clone()
        if velocity is None or mask is None:
            return held
        steeper = torch.zeros_like(last) if slope is None else slope
        branch.slope = torch.where(mask, (velocity - last) / gap, steeper)
        branch.last = torch.where(mask, velocity, last)
        branch.since = torch.where(mask, now, since)
        return torch.where(mask, velocity, held)

    def _order(self, run: _Run, given: LatentInput) -> Tensor:
        """The tokens, those in need first: int64 [B or 1, N]."""
        score = self._need(run, given)
        time = given.time
        if time.ndim == 2 and time.shape[1] == score.shape[1]:
            score = score.masked_fill(time[: score.shape[0]] == 0, -1.0)
        return score.sort(dim=1, descending=True, stable=True).indices

    def _need(self, run: _Run, given: LatentInput) -> Tensor:
        """How fast each token's velocity changes, float32 [B, N]: of the guided velocity where branches are calls.

        Before a second velocity is known, its size stands for its change: what is large has more to change. Branches
        with another batch than the first one, or that have just begun, have no say.
        """
        held = [run.branches[index] for index in sorted(run.branches) if run.branches[index].last is not None]
        held = [branch for branch in held if _items(branch) == _items(held[0])]
        held = [branch for branch in held if held[0].slope is None or branch.slope is not None]
        scale = self.site.guidance(given.transformer)
        values = []
        for branch in held:
            value = branch.last if held[0].slope is None else branch.slope
            assert value is not None
            values.append(given.tokens(value))
        if len(values) == 2 and scale is not None:
            values = [values[1] + scale * (values[0] - values[1])]
        parts = self.site.parts(given.latents)
        return torch.cat([torch.cat(value.chunk(parts), -1) for value in values], -1).norm(dim=-1)

    def _allocate(self, run: _Run, branch: _Branch, at: Call, given: LatentInput) -> None:
        attentions = {
            f"{name}.{attribute}": self.site.width(given.transformer, getattr(block, attribute))
            for name, block in self.site.blocks(given.transformer).items()
            for attribute in self.site.layout.keeping
            if getattr(block, attribute, None) is not None
        }
        dtype = given.latents.dtype
        if at.branch >= run.checked:
            expected = max(self.site.branches() if at.branch == 0 else 1, len(run.branches) - run.checked)
            self._check_memory(attentions, expected, given)
            run.checked += expected
        target = self.storage.dtype(dtype)
        device = "cpu" if self.storage.offload else None
        branch.kept = {
            name: KeysValues(target if target != dtype else None, device) for name in self.storage.chosen([*attentions])
        }

    def _check_memory(self, widths: dict[str, int], branches: int, given: LatentInput) -> None:
        latents, dtype = given.latents, given.latents.dtype
        tokens = given.count * latents.shape[0] * branches
        device = torch.device("cpu") if self.storage.offload else latents.device
        free = free_memory(device)

        def size(storage: Storage) -> int:
            return 2 * tokens * storage.dtype(dtype).itemsize * sum(widths[name] for name in storage.chosen([*widths]))

        wanted = size(self.storage)
        text = f"{wanted / 1e9:.3g} GB for keys and values of {len(widths)} attentions on {device}"
        self.report.events["memory of keys and values"] = text
        if text != self._told:
            # a warning is what Python prints where nobody has set logging up
            logger.warning("%s: %s, %s free", self.name, text, "unknown" if free is None else f"{free / 1e9:.3g} GB")
            self._told = text
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


def _places(order: Tensor, chosen: Tensor, latents: Tensor) -> Tensor:
    rows = order.index_select(1, chosen.to(order.device)).sort(1).values
    return rows if rows.shape[0] == 1 else rows.repeat(latents.shape[0] // rows.shape[0], 1)


def _check(branch: _Branch) -> None:
    """Hold no velocity that is not finite; asked once a whole step, as an answer waits for the device."""
    if not branch.sound and branch.last is not None and not torch.isfinite(branch.last).all():
        raise NonFiniteError("the transformer gave NaN or infinity as velocity; try another dtype or fewer methods.")
    branch.sound = True


def _items(branch: _Branch) -> int:
    return 0 if branch.last is None else branch.last.shape[0]


def _gap(times: Any) -> Any:
    return torch.where(times == 0, torch.ones_like(times), times)


def _velocity(output: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    if isinstance(output, tuple):
        return output[0], lambda value: (value, *output[1:])
    return output.sample, lambda value: type(output)(**{**output, "sample": value})


def _inside(block: Any, path: str) -> Any:
    for name in path.split("."):
        block = getattr(block, name, None)
    return block
