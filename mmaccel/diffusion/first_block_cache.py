"""First-block cache: skip all blocks but the first while the first one hardly changes from step to step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mmaccel.diffusion.diffusers_caches import STEPS, Clock, DiffusersCache
from mmaccel.diffusion.diffusers_hooks import Installed, blocks, known_blocks
from mmaccel.errors import NotApplicableError
from mmaccel.method import Info, Stage, knob

if TYPE_CHECKING:
    from mmaccel.install import Installer
    from mmaccel.report import Report


@dataclass(frozen=True)
class FirstBlockCache(DiffusersCache):
    """diffusers' own first-block cache under our handle: same hooks, exact undo, a report of what it did.

    Sentence: mean absolute change of the first block's residual against the last computed step, relative to its size
    -> whole step -> threshold -> reuse the residual of the remaining blocks. Idea: ParaAttention (2024), after
    TeaCache, "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model" (2024). threshold 0 never skips
    and is the identity.
    """

    threshold: float = knob(0.05, "largest relative change of the first block's residual that counts as none", low=0.0)

    info: ClassVar[Info] = Info(
        name="first-block-cache", verb="reuse", stage=Stage.DIFFUSION,
        summary="skips the blocks behind the first while it hardly changes (diffusers' own)",
        source="ParaAttention first-block cache, as shipped by diffusers", year=2024, targets=("diffusion",),
        slots=(STEPS,), licence="Apache-2.0 (diffusers)",
    )  # fmt: skip

    @property
    def neutral(self) -> bool:
        """No change is below 0."""
        return self.threshold == 0

    def sites(self, transformer: Any) -> list[str]:
        """All blocks; at least two."""
        found = known_blocks(self.info.name, transformer)
        if any(getattr(block, "context_pre_only", False) for block in blocks(transformer).values()):
            raise NotApplicableError(
                f"first-block-cache needs blocks that all return the prompt's states too; the last one of "
                f"{type(transformer).__name__} returns none. Use magcache or taylorseer."
            )
        if len(found) < 2:
            raise NotApplicableError(
                f"first-block-cache finds {len(found)} blocks in {type(transformer).__name__}; it needs at least 2."
            )
        return found

    def apply(self) -> Any:
        """diffusers' function."""
        from diffusers.hooks.first_block_cache import apply_first_block_cache

        return apply_first_block_cache

    def config(self, transformer: Any, clock: Clock) -> Any:  # noqa: ARG002
        """The threshold."""
        from diffusers.hooks.first_block_cache import FirstBlockCacheConfig

        return FirstBlockCacheConfig(threshold=self.threshold)

    def watch(self, installer: Installer, installed: Installed, config: Any) -> None:  # noqa: ARG002
        """The decision lies inside the first block's hook, which computes at each step."""
        hook = installed.hooks[0][2]
        installer.patcher.wrap(hook, "_should_compute_remaining_blocks", _watch(hook, installer.report, self.threshold))


def _watch(hook: Any, report: Report, threshold: float) -> Any:
    """Count computed and reused steps, and remember by how little a threshold that never fired was missed."""
    smallest = float("inf")

    def decide(call: Any, residual: Any) -> bool:
        nonlocal smallest
        before = hook.state_manager.get_state().head_block_residual
        compute = call(residual)
        event = "steps computed" if compute else "steps reused"
        report.events[event] = report.events.get(event, 0) + 1
        if before is not None:
            smallest = min(smallest, float((residual - before).abs().mean() / before.abs().mean()))
        if report.events.get("steps reused"):
            report.events.pop("threshold", None)
        elif before is not None:
            report.events["threshold"] = f"{threshold} never reached, smallest change {smallest:.3g}"
        return compute

    return decide
