"""MagCache: skip steps by ratios of residual sizes that were measured beforehand."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mmaccel.diffusion.diffusers_caches import STEPS, Clock, DiffusersCache
from mmaccel.diffusion.diffusers_caches import count_steps as count
from mmaccel.diffusion.diffusers_hooks import Installed, known_blocks
from mmaccel.errors import MethodError, NotApplicableError
from mmaccel.method import Info, Stage, knob

if TYPE_CHECKING:
    from mmaccel.install import Installer
    from mmaccel.targets import Target

__all__ = ["MagCache", "measured_ratios"]

# diffusers prints the ratios and clears its state when it has counted so many steps; we measure and clear ourselves
_NEVER = 1 << 62

# by transformer, as long as a MagCache is on it
_configs: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class MagCache(DiffusersCache):
    """diffusers' own MagCache under our handle; it measures the ratios it needs in the first call, which is dense.

    Sentence: product of the ratios of successive residual sizes -> whole step -> accumulated deviation from 1 below
    the threshold -> reuse the residual of all blocks. Source: "MagCache: Fast Video Generation with Magnitude-Aware
    Cache" (2025). Ratios belong to a checkpoint: without `ratios` the first complete call computes all steps and
    measures them (in the branch that comes first; the report says so), and later calls use them, stretched to their
    number of steps, which the scheduler gives. A transformer alone takes its number of steps from the measurement, or
    from the length of `ratios`. threshold 0 skips nothing unless a ratio is exactly 1; max_skip 0 is the identity.
    """

    threshold: float = knob(0.06, "largest accumulated error of skipped steps", low=0.0)
    max_skip: int = knob(3, "most steps skipped in a row", low=0)
    warmup: float = knob(0.2, "fraction of the steps computed at the start", low=0.0, high=1.0)
    ratios: tuple | None = knob(None, "ratios of this checkpoint, one a step; None: measured in the first call")

    info: ClassVar[Info] = Info(
        name="magcache", verb="reuse", stage=Stage.DIFFUSION,
        summary="skips steps by measured ratios of residual sizes (diffusers' own)",
        source="MagCache: Fast Video Generation with Magnitude-Aware Cache", year=2025,
        targets=("diffusion",), slots=(STEPS,), licence="Apache-2.0 (diffusers)",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        ratios = self.ratios
        numbers = all(isinstance(ratio, (int, float)) and 0 < ratio < math.inf for ratio in ratios or ())
        if ratios is not None and not (ratios and numbers):
            raise MethodError("magcache: ratios must be numbers above 0, one a step; None has them measured.")

    @property
    def neutral(self) -> bool:
        """No step may be skipped."""
        return self.max_skip == 0

    def plan(self, target: Target) -> list[Any]:
        """The blocks.

        Raises:
            NotApplicableError: two transformers, each with an unknown part of the steps.
        """
        if len(target.site.transformers) > 1:
            raise NotApplicableError(
                "magcache does not fit a pipeline with two transformers: each runs an unknown part of the steps."
            )
        return super().plan(target)

    def sites(self, transformer: Any) -> list[str]:
        """All blocks."""
        return known_blocks(self.info.name, transformer)

    def apply(self) -> Any:
        """diffusers' function."""
        from diffusers.hooks.mag_cache import apply_mag_cache

        return apply_mag_cache

    def config(self, transformer: Any, clock: Clock) -> Any:  # noqa: ARG002
        """With ratios, or measuring them."""
        from diffusers.hooks.mag_cache import MagCacheConfig

        measure = self.ratios is None
        return MagCacheConfig(
            threshold=self.threshold, max_skip_steps=self.max_skip, retention_ratio=self.warmup,
            num_inference_steps=_NEVER if self.ratios is None else len(self.ratios),
            mag_ratios=None if measure else [float(ratio) for ratio in self.ratios or ()], calibrate=measure,
        )  # fmt: skip

    def watch(self, installer: Installer, installed: Installed, config: Any) -> None:
        """Count steps, and keep the ratios of the branch that comes first."""
        events = installer.report.events
        head = next(hook for _, _, hook, _ in installed.hooks if not hasattr(hook, "is_tail"))
        tail = next(hook for _, _, hook, _ in installed.hooks if getattr(hook, "is_tail", False))
        count(installer, head)
        config.measured, config.source, config.steps = [], self.ratios, None
        _configs[installed.transformer] = config
        installer.patcher.on_undo(lambda: _configs.pop(installed.transformer, None))

        def keep(call: Any, state: Any, residual: Any) -> None:
            call(state, residual)
            if not config.measured or config.measured is state.calibration_ratios:
                config.measured = state.calibration_ratios
            events["ratios"] = f"measured in a dense call of {len(config.measured)} steps"

        installer.patcher.wrap(tail, "_perform_calibration_step", keep)

    def begin(self, config: Any, installed: Installed, steps: int | None) -> None:
        """Take measured ratios into use, stretched to the number of steps of this call."""
        import torch
        from diffusers.hooks.mag_cache import nearest_interp

        measured, before = list(config.measured), config.steps
        installed.fresh()
        # a call that raised was not measured to its end, and one that gave NaN not at all
        whole = steps is None or len(measured) == before
        if config.source is None and measured and whole and all(map(math.isfinite, measured)):
            config.source = tuple(measured)
        config.measured = []
        if config.source is None:
            config.steps = steps
            return
        own = len(config.source) if steps is None else steps
        config.calibrate, config.num_inference_steps, config.steps = False, own, steps
        config.mag_ratios = nearest_interp(torch.tensor(config.source, dtype=torch.float32), own)


def measured_ratios(transformer: Any) -> tuple[float, ...]:
    """The ratios that a MagCache without `ratios` has measured on `transformer` in its last whole call, one a step.

    Raises:
        NotApplicableError: none is on it, or it has not measured yet.
    """
    config = _configs.get(transformer)
    if config is None or not config.measured:
        raise NotApplicableError("magcache has measured no ratios on this transformer; call the pipeline first.")
    return tuple(float(ratio) for ratio in config.measured)
