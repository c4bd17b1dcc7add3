"""First-block cache: skip all blocks but the first while the first one hardly changes from step to step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mmaccel.errors import ConflictError, NotApplicableError
from mmaccel.method import Info, Method, Stage, Touch, knob

if TYPE_CHECKING:
    from mmaccel.install import Installer
    from mmaccel.report import Report
    from mmaccel.targets import Target

_SLOT = "on the steps of the diffusion transformer"


@dataclass(frozen=True)
class FirstBlockCache(Method):
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
        slots=(_SLOT,), licence="Apache-2.0 (diffusers)",
    )  # fmt: skip

    @property
    def neutral(self) -> bool:
        """No change is below 0."""
        return self.threshold == 0

    def plan(self, target: Target) -> list[Touch]:
        """The transformer's blocks.

        Raises:
            NotApplicableError: the transformer has no cache interface, or too few blocks that diffusers can hook.
            ConflictError: a cache of diffusers is switched on already.
        """
        transformer = target.site.transformer
        if not hasattr(transformer, "enable_cache"):
            raise NotApplicableError(f"{type(transformer).__name__} has no cache interface of diffusers.")
        if transformer.is_cache_enabled:
            raise ConflictError(
                f"{type(transformer).__name__} has diffusers' {type(transformer._cache_config).__name__} on; call "
                "disable_cache() first."
            )
        blocks = _blocks(transformer)
        if len(blocks) < 2:
            raise NotApplicableError(
                f"first-block-cache finds {len(blocks)} blocks in {type(transformer).__name__}; it needs at least 2."
            )
        return [Touch(f"transformer.{name}", "diffusers' hook: computes or reuses") for name in blocks]

    def install(self, installer: Installer) -> None:
        """Have diffusers put its hooks on, and note which traces to take away behind them."""
        from diffusers.hooks.first_block_cache import FirstBlockCacheConfig

        site, patcher = installer.target.site, installer.patcher
        transformer = site.transformer
        before, called = _traces(transformer), []
        # whatever fails half way must find its undo recorded
        patcher.on_undo(lambda: _restore(transformer, before, called=bool(called)))
        patcher.before(transformer, lambda *_: called.append(True) if not called else None)
        transformer.enable_cache(FirstBlockCacheConfig(threshold=self.threshold))
        head = next(iter(_blocks(transformer).values()))
        hook = next(iter(head._diffusers_hook.hooks.values()))
        patcher.wrap(hook, "_should_compute_remaining_blocks", _watch(hook, installer.report, self.threshold))
        if site.pipeline is not None:
            # the pipeline clears the cache at its end, which a call that raised never reaches
            patcher.wrap(site.pipeline.scheduler, "set_timesteps", _fresh(transformer))


def _blocks(transformer: Any) -> dict[str, Any]:
    from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS as KNOWN

    return {
        f"{name}.{index}": block
        for name, blocks in transformer.named_children()
        if name in KNOWN and type(blocks).__name__ == "ModuleList"
        for index, block in enumerate(blocks)
    }


def _fresh(transformer: Any) -> Any:
    def around(call: Any, *args: Any, **kwargs: Any) -> Any:
        transformer._reset_stateful_cache()
        return call(*args, **kwargs)

    return around


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


def _traces(transformer: Any) -> dict[Any, dict[str, Any]]:
    names = ("_diffusers_hook", "_cache_config", "forward")
    modules = [transformer, *_blocks(transformer).values()]
    return {module: {name: vars(module)[name] for name in names if name in vars(module)} for module in modules}


def _restore(transformer: Any, before: dict[Any, dict[str, Any]], *, called: bool) -> None:
    """Take off what diffusers' own removal leaves behind: a registry, a `forward`, a `_cache_config`."""
    if transformer.is_cache_enabled:
        transformer.disable_cache()
    for module, had in before.items():
        own = vars(module)
        # the pipeline's first call puts a registry on the transformer, cache or not, and it stays there
        stays = "_diffusers_hook" in had or (module is transformer and called)
        registry = own.get("_diffusers_hook")
        if registry is not None and not stays and not registry.hooks:
            del own["_diffusers_hook"]
        if "forward" not in had and getattr(own.get("forward"), "__func__", None) is type(module).forward:
            del own["forward"]
        if "_cache_config" not in had and own.get("_cache_config", ...) is None:
            del own["_cache_config"]
    registry = vars(transformer).get("_diffusers_hook")
    if registry is not None:
        registry._get_child_registries()
