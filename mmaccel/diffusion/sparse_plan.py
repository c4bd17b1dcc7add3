"""A plan of steps for the token cache, measured in the first run: no training, and NOT DiffSparse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mmaccel.diffusion.diffusers_caches import STEPS
from mmaccel.errors import AdapterError, MethodError, NotApplicableError
from mmaccel.method import Info, Method, Stage, Touch, knob

if TYPE_CHECKING:
    from mmaccel.core.velocity_record import Measured
    from mmaccel.install import Installer
    from mmaccel.targets import Target
    from mmaccel.tokens.levels import LevelPlan

__all__ = ["LEVELS", "SparsePlan", "cache_touches"]

LEVELS = 5
# Tokens that are computed among held ones see old neighbours, and what follows does not begin a new gap: counted at
# their full change, partial steps are chosen where whole ones do better (4 dB on the embedded class-to-image model). So
# partial steps only take what whole ones leave of the budget.
_PARTIAL = 0.02


def cache_touches(method: str, target: Target) -> list[Touch]:
    """The transformers and modules of a token cache.

    Raises:
        NotApplicableError: the transformer stands alone, or has nothing that can be cached by token.
    """
    from mmaccel.core.cached_modules import cached_modules

    site = target.site
    if site.pipeline is None:
        raise NotApplicableError(f"{method} needs the schedule of a sampling run; give it the pipeline.")
    touches = []
    for name, transformer in site.transformers.items():
        try:
            modules = cached_modules(site, transformer)
        except (AdapterError, NotApplicableError) as error:
            raise NotApplicableError(f"{method}: {error}") from None
        touches.append(Touch(name, "tells which step of which run it is"))
        touches += [Touch(f"{name}.{module.name}", "computes some tokens, and holds the others") for module in modules]
    return touches


@dataclass(frozen=True)
class SparsePlan(Method):
    """Compute whole and partial steps where holding would hurt most, as measured in the first run, which is dense.

    Sentence: how far guided velocities would be off if they were held, early errors counting more -> levels of steps
    with the least sum of errors at exactly the budget -> tokens whose input has changed most -> reuse each module's
    output, keys and values -> the block's own residuals and gates. NOT DiffSparse: nothing is learned, and all layers
    of a step have one level. Its cache and its levels are those of "DiffSparse: Accelerating Diffusion Transformers
    with Learned Token Sparsity" (2026). The program over steps is our own: a table of one-shot errors by step and
    layer, solved by DiffSparse's program, does not know how long something has been held (tried: no better than equal
    shares). cost 1.0 is the identity. Every number of steps is measured in its own first run; the more samples that
    run has, the better. One tensor a module is held (two with order 1), and keys and values of
    self-attentions where a step is partial.
    """

    cost: float = knob(0.46, "fraction of the dense blocks' multiply-adds", above=0.0, high=1.0)
    order: int = knob(1, "held outputs: 0 as they are, 1 carried on along their last change", low=0, high=1)
    staleness: float = knob(0.25, "weight of a step of age in the choice of tokens", low=0.0)
    bonus: float = knob(0.0, "share by which the best token of 2 x 2 is raised", low=0.0)
    by_module: bool = knob(False, "choose tokens anew in each module, not once a step")

    info: ClassVar[Info] = Info(
        name="sparse-plan", verb="reuse", stage=Stage.DIFFUSION,
        summary="computes steps where holding would hurt, as measured in its first run (not DiffSparse)",
        source="our own, on the token cache of DiffSparse", year=2026, targets=("diffusion",), slots=(STEPS,),
    )  # fmt: skip

    @property
    def neutral(self) -> bool:
        """Everything is computed."""
        return self.cost == 1.0

    def plan(self, target: Target) -> list[Touch]:
        """The scheduler, the transformers and their modules."""
        return [Touch("scheduler.step", "measures velocities in a dense run"), *cache_touches(self.info.name, target)]

    def install(self, installer: Installer) -> None:
        """Put the hooks on."""
        from mmaccel.core.token_cache import TokenCache
        from mmaccel.core.token_choice import Signals
        from mmaccel.core.velocity_record import VelocityRecord

        site, report = installer.target.site, installer.report
        known: dict[int, Any] = {}
        if self.neutral:
            return

        def finished(steps: int, measured: Measured) -> None:
            known[steps] = self._levels(steps, measured)
            report.events[f"levels of {steps} steps"] = "".join(map(str, known[steps].tolist()))

        def plan(steps: int, layers: int) -> LevelPlan:
            from mmaccel.tokens.levels import LevelPlan

            record.check()
            self._total(steps)
            levels = known.get(steps)
            if levels is None:
                report.note(f"{self.info.name}: the first run of {steps} steps is dense, as it measures")
                return LevelPlan.dense(steps, layers)
            return LevelPlan.of_steps(levels, LEVELS - 1, layers)

        record = VelocityRecord(site, lambda steps: steps not in known, finished)
        signals = Signals(self.staleness, 2, self.bonus, self.by_module)
        record.install(installer.patcher)
        TokenCache(site, report, self.info.name, plan, signals, self.order).install(installer.patcher)

    def _total(self, steps: int) -> int:
        total = round(self.cost * steps * (LEVELS - 1))
        if total < LEVELS - 1 or steps < 2:
            raise MethodError(
                f"{self.info.name}: cost={self.cost:g} cannot be reached in {steps} steps, as the first one is whole; "
                f"the smallest cost is {1 / steps:.3g}."
            )
        return total

    def _levels(self, steps: int, measured: Measured) -> Any:
        from mmaccel.tokens.gaps import early_weights, held_errors, levels_of_steps, remaining_change

        weights = measured.lengths * early_weights(steps)
        errors = held_errors(measured.gram, measured.times, self.order, weights)
        left = remaining_change(measured.changes, LEVELS)
        left[:-1] = 1.0 - _PARTIAL * (1.0 - left[:-1])
        return levels_of_steps(errors, left, self._total(steps), self.order)
