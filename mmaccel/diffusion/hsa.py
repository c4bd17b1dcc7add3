"""HSA: every token of a latent gets its own number of denoising steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mmaccel.diffusion.diffusers_caches import STEPS, TOKENS, refuse_cache
from mmaccel.errors import AdapterError, MethodError, NotApplicableError
from mmaccel.method import Info, Method, Stage, Touch, knob

if TYPE_CHECKING:
    from mmaccel.install import Installer
    from mmaccel.targets import Target
    from mmaccel.tokens.steps import Plan


@dataclass(frozen=True)
class HSA(Method):
    """Compute tokens whose velocity changes often, others seldom; attention sees the last keys and values of all.

    Sentence: how fast a token's velocity changes -> how many of the neediest tokens each step computes -> rows whose
    step it is -> reuse the velocity, keys and values of the rest -> all tokens advance together. "Not All Tokens Need
    40 Steps: Heterogeneous Step Allocation in Diffusion Transformers for Efficient Video Generation" (2026); its body
    was not at hand. Inferred: guided velocities are scored, and fixed tokens (those of a conditioning image with
    timestep 0) come last. With `divisors`, `first`, `last` or `staggered` the plan is the paper's: a window with groups
    of step divisors, by default d and 2 d with the shares that meet the runtime. Ours: without them whole steps are
    spread over the run, evenly, or closer at the beginning and up to the last step where the scheduler is a multistep
    solver (UniPC, DPM-Solver++), and all tokens have the same ones; `between` takes a part of the work from them for
    tokens in need between the first of them, which on the embedded model came out further from dense. The score is the
    size of the change and not relative to the velocity, which says little about the error. Held velocities go on along
    their last change (order 1); order 0 holds them, as the paper does. runtime 1 is the identity. The keys and values
    take 2 x layers x tokens x width numbers a clip and branch of guidance while a step that computes some of the tokens
    is ahead; they are sized and printed (as a logged warning) before they are made, and refused where memory does not
    suffice.
    """

    runtime: float = knob(0.5, "fraction of the dense transformer time", above=0.0, high=1.0)
    between: float = knob(
        0.0, "fraction of the work for tokens in need, between the first whole steps", low=0.0, high=0.9
    )
    divisors: int | str | None = knob(None, "step divisors of the groups, joined by -; None has the solver choose")
    staggered: bool = knob(False, "tokens of a group take turns, so that steps cost alike")
    first: int | None = knob(None, "whole steps at the beginning; None has the solver choose", low=2)
    last: int | None = knob(None, "whole steps at the end; None has the solver choose", low=0)
    order: int = knob(1, "held velocities: 0 as they are, 1 carried on along their last change", low=0, high=1)
    memory: str = knob("full", "how keys and values are stored", choices=("full", "half", "fp8"))
    layers: float = knob(
        1.0, "fraction of layers that keep them; others attend among computed tokens", low=0.0, high=1.0
    )
    offload: bool = knob(False, "store keys and values in the memory of the CPU")

    info: ClassVar[Info] = Info(
        name="hsa", verb="reuse", stage=Stage.DIFFUSION,
        summary="computes some denoising steps whole, or some of their tokens, and carries velocities on between",
        source="Not All Tokens Need 40 Steps: Heterogeneous Step Allocation in Diffusion Transformers for Efficient "
        "Video Generation", year=2026, targets=("diffusion",), slots=(STEPS, TOKENS),
    )  # fmt: skip

    @property
    def neutral(self) -> bool:
        """Every token is computed at every step."""
        return self.runtime == 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        parts = [] if self.divisors is None else str(self.divisors).split("-")
        if not all(part.isdecimal() and int(part) > 0 for part in parts) or len(set(parts)) < len(parts):
            raise MethodError(f"hsa: divisors={self.divisors!r} are not different whole numbers joined by -.")

        if self.between and not self._spread:
            raise MethodError("hsa: between is for plans without divisors, first, last and staggered.")

    @property
    def _spread(self) -> bool:
        return self.divisors is None and self.first is None and self.last is None and not self.staggered

    def plan(self, target: Target) -> list[Touch]:
        """The transformers, their blocks and self-attentions.

        Raises:
            NotApplicableError: the transformer stands alone, its layout is not known, or the scheduler has no sigmas.
            ConflictError: diffusers itself has a cache on.
        """
        site = target.site
        if site.pipeline is None:
            raise NotApplicableError("hsa needs the schedule of a sampling run; give it the pipeline.")
        try:
            layout = site.layout
        except AdapterError as error:
            raise NotApplicableError(f"hsa: {error}") from None
        if not hasattr(site.scheduler, "sigmas"):
            raise NotApplicableError(
                f"hsa holds velocities along sigmas, and {type(site.scheduler).__name__} has none; use a flow-matching "
                "scheduler such as FlowMatchEulerDiscreteScheduler or UniPCMultistepScheduler."
            )
        refuse_cache(site)
        touches = []
        for name, transformer in site.transformers.items():
            touches.append(Touch(name, "holds and merges velocities"))
            for block, module in site.blocks(transformer).items():
                touches.append(Touch(f"{name}.{block}", "computes the rows whose turn it is"))
                touches += [
                    Touch(f"{name}.{block}.{attention}", "attends to the keys and values of all rows")
                    for attention in layout.keeping
                    if getattr(module, attention, None) is not None
                ]
        return touches

    def install(self, installer: Installer) -> None:
        """Put the hooks on."""
        from mmaccel.core.held_velocity import HeldVelocity, Storage
        from mmaccel.tokens.steps import spread_plan, step_plan

        def plan(steps: int) -> Plan:
            if self._spread:
                # asked anew in every run, as the scheduler may have been replaced
                multistep = installer.target.site.scheduler.config.get("solver_order", 1) > 1
                return spread_plan(steps, self.runtime, between=self.between, multistep=multistep)
            divisors = () if self.divisors is None else tuple(sorted(map(int, str(self.divisors).split("-"))))
            return step_plan(
                steps,
                self.runtime,
                divisors=divisors,
                first=self.first,
                last=self.last,
                staggered=self.staggered,
            )

        scheduler = installer.target.site.scheduler
        predicted = scheduler.config.get("prediction_type", "flow_prediction")
        if predicted != "flow_prediction":
            installer.report.note(
                f"hsa: this {type(scheduler).__name__} takes a prediction of type {predicted}; it is held in place of "
                "the velocity of flow matching, for which the method was published"
            )
        storage = Storage(self.memory, self.layers, self.offload)
        HeldVelocity(installer.target.site, installer.report, self.info.name, plan, self.order, storage).install(
            installer.patcher
        )
