"""TaylorSeer: predict what attention and feed-forward modules return from finite differences of earlier steps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from mmaccel.diffusion.diffusers_caches import STEPS, Clock, DiffusersCache
from mmaccel.diffusion.diffusers_hooks import blocks
from mmaccel.method import Info, Stage, knob


@dataclass(frozen=True)
class TaylorSeer(DiffusersCache):
    """diffusers' own TaylorSeer under our handle, on the modules that this transformer really has.

    Sentence: finite differences of each module's output over the computed steps -> every module alike -> a fixed
    interval -> Taylor series in the step index -> output of the module. Source: "From Reusing to Forecasting:
    Accelerating Diffusion Models with TaylorSeers" (2025). The patterns that diffusers brings match no module of Wan
    or LTX; here the direct children of each block that are attention or feed-forward are named one by one. interval 1
    computes each step and is the identity. The factors are kept in float32.
    """

    interval: int = knob(5, "steps from one computed step to the next", low=1)
    order: int = knob(1, "highest order of the series", low=0)
    warmup: int = knob(3, "computed steps at the start", low=1)

    info: ClassVar[Info] = Info(
        name="taylorseer", verb="reuse", stage=Stage.DIFFUSION,
        summary="predicts attention and feed-forward outputs by a Taylor series over steps (diffusers' own)",
        source="From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers", year=2025,
        targets=("diffusion",), slots=(STEPS,), licence="Apache-2.0 (diffusers)",
    )  # fmt: skip

    @property
    def neutral(self) -> bool:
        """Every step is computed."""
        return self.interval == 1

    def sites(self, transformer: Any) -> list[str]:
        """Attention and feed-forward modules of the blocks."""
        return [
            f"{block}.{name}"
            for block, module in blocks(transformer).items()
            for name, child in module.named_children()
            if re.search("attention|feedforward|mlp", type(child).__name__.lower()) or re.match("attn|ff", name)
        ]

    def apply(self) -> Any:
        """diffusers' function."""
        from diffusers.hooks.taylorseer_cache import apply_taylorseer_cache

        return apply_taylorseer_cache

    def config(self, transformer: Any, clock: Clock) -> Any:  # noqa: ARG002
        """One pattern for each module."""
        import torch
        from diffusers.hooks.taylorseer_cache import TaylorSeerCacheConfig

        return TaylorSeerCacheConfig(
            cache_interval=self.interval, disable_cache_before_step=self.warmup, max_order=self.order,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=[re.escape(name) for name in self.sites(transformer)],
        )  # fmt: skip
