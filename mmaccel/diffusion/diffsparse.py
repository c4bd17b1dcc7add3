"""DiffSparse: how many tokens each layer computes at each step is learned, once for a model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mmaccel.diffusion.diffusers_caches import STEPS
from mmaccel.diffusion.sparse_plan import cache_touches
from mmaccel.errors import MethodError, NotApplicableError
from mmaccel.method import Info, Method, Stage, Touch, knob

if TYPE_CHECKING:
    from mmaccel.install import Installer
    from mmaccel.targets import Target
    from mmaccel.tokens.levels import LevelPlan

__all__ = ["DiffSparse", "Schedule"]


@dataclass(frozen=True)
class Schedule:
    """A learned table of costs: `table` float32 [T, L, S], S levels from nothing to everything, and its facts.

    Facts: `model` (class of the transformer), `steps`, `layers`, `cost` (at which it was trained), `order`.
    """

    path: Path
    table: Any
    facts: dict[str, Any]

    @classmethod
    def load(cls, path: str | None) -> Schedule:
        """Read a safetensors file with a tensor `table` and its facts as JSON in the metadata under `mmaccel`.

        Without a path the one of the embedded class-to-image model.

        Raises:
            MethodError: there is no such file, or it is no schedule.
        """
        from safetensors import SafetensorError, safe_open

        from mmaccel.tiny import CLASS_TO_IMAGE_SCHEDULE

        file = CLASS_TO_IMAGE_SCHEDULE if path is None else Path(path)
        try:
            with safe_open(file, "pt") as opened:
                facts = json.loads((opened.metadata() or {})["mmaccel"])
                table = opened.get_tensor("table")
            if tuple(table.shape[:2]) != (facts["steps"], facts["layers"]) or table.ndim != 3:
                raise KeyError("table")
        except FileNotFoundError:
            raise MethodError(f"diffsparse: no schedule at {file}.") from None
        except (SafetensorError, KeyError, ValueError) as error:
            raise MethodError(f"diffsparse: {file} is no schedule of mmaccel ({error}).") from None
        return cls(file, table, facts)

    def check(self, model: str, layers: int, steps: int | None = None) -> None:
        """Raise NotApplicableError if it was not trained for this model, or not for so many steps."""
        facts = self.facts
        whose = f"the schedule {self.path.name} was trained for {facts['model']} with {facts['layers']} layers"
        advice = "train one for it as mmaccel.tiny.train_diffsparse does, or use sparse-plan, which needs none"
        if (model, layers) != (facts["model"], facts["layers"]):
            raise NotApplicableError(f"diffsparse: {whose}, and this is {model} with {layers}; {advice}.")
        if steps is not None and steps != facts["steps"]:
            raise NotApplicableError(
                f"diffsparse: {whose} and {facts['steps']} steps, and this call has {steps}; call with "
                f"num_inference_steps={facts['steps']}, {advice}."
            )


@dataclass(frozen=True)
class DiffSparse(Method):
    """Each layer computes a learned share of its tokens at each step, and takes the others from a cache.

    Sentence: change of a module's input since a token was computed, its age, spatial bonus -> a trained table of costs
    and an exact program under one budget -> top tokens -> reuse each module's output, keys and values -> the block's
    own residuals and gates. "DiffSparse: Accelerating Diffusion Transformers with Learned Token Sparsity" (2026), from
    a note on it; no code was public. Ours: tokens are ranked by the change of what they are given, once a step (the
    paper: by maps of attention, once a module), self-attention is refreshed partially against held keys and values,
    and outputs may be carried on along their last change (order 1; the paper holds them). A schedule belongs to a
    model, a sampler and a number of steps, not to a resolution. It is trained at one cost; others are solved from the
    same table, which the report says. cost 1.0 is the identity.
    """

    cost: float = knob(0.46, "fraction of the dense blocks' multiply-adds", above=0.0, high=1.0)
    schedule: str | None = knob(None, "file of a trained schedule; None: that of the embedded class-to-image model")
    order: int | None = knob(
        None, "held outputs: 0 as they are, 1 carried on; None: as the schedule was trained", low=0, high=1
    )
    staleness: float = knob(0.25, "weight of a step of age in the choice of tokens", low=0.0)
    bonus: float = knob(0.0, "share by which the best token of 2 x 2 is raised", low=0.0)
    by_module: bool = knob(False, "choose tokens anew in each module, not once a step")

    info: ClassVar[Info] = Info(
        name="diffsparse", verb="reuse", stage=Stage.DIFFUSION,
        summary="computes a learned share of the tokens in each layer at each step",
        source="DiffSparse: Accelerating Diffusion Transformers with Learned Token Sparsity", year=2026,
        targets=("diffusion",), slots=(STEPS,), trained=True,
    )  # fmt: skip

    @property
    def neutral(self) -> bool:
        """Everything is computed."""
        return self.cost == 1.0

    def plan(self, target: Target) -> list[Touch]:
        """The transformers and their modules.

        Raises:
            NotApplicableError: the schedule is for another model, or tokens cannot be cached here.
        """
        touches = cache_touches(self.info.name, target)
        if not self.neutral:
            schedule = Schedule.load(self.schedule)
            for transformer in target.site.transformers.values():
                schedule.check(type(transformer).__name__, len(target.site.blocks(transformer)))
        return touches

    def install(self, installer: Installer) -> None:
        """Put the hooks on."""
        from mmaccel.core.token_cache import TokenCache
        from mmaccel.core.token_choice import Signals

        if self.neutral:
            return
        site, report = installer.target.site, installer.report
        schedule = Schedule.load(self.schedule)
        facts = schedule.facts
        if abs(self.cost - facts["cost"]) > 0.005:
            report.note(
                f"diffsparse: the schedule was trained at cost {facts['cost']:g}; at {self.cost:g} it is solved from "
                "the same table, untrained"
            )
        levels = self._levels(schedule)

        def plan(steps: int, layers: int) -> LevelPlan:
            schedule.check(facts["model"], layers, steps)
            return levels

        order = facts.get("order", 0) if self.order is None else self.order
        signals = Signals(self.staleness, 2, self.bonus, self.by_module)
        TokenCache(site, report, self.info.name, plan, signals, order).install(installer.patcher)

    def _levels(self, schedule: Schedule) -> LevelPlan:
        import torch

        from mmaccel.tokens.levels import LevelPlan, cheapest_levels

        T, L, S = schedule.table.shape
        total = round(self.cost * T * L * (S - 1))
        if total < L * (S - 1):
            raise MethodError(
                f"diffsparse: cost={self.cost:g} cannot be reached in {T} steps, as the first one is whole; the "
                f"smallest cost is {1 / T:.3g}."
            )
        forced = torch.full((T, L), -1)
        forced[0] = S - 1
        levels = cheapest_levels(schedule.table.flatten(0, 1), torch.arange(S), total, forced.flatten())
        return LevelPlan.of_layers(levels.unflatten(0, (T, L)), S - 1)
