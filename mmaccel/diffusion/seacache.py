"""SeaCache: skip steps while a spectrally filtered view of the latents hardly changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mmaccel.diffusion.diffusers_caches import STEPS, Clock, DiffusersCache, count_steps
from mmaccel.diffusion.diffusers_hooks import Installed, blocks
from mmaccel.errors import NotApplicableError
from mmaccel.method import Info, Stage, knob

if TYPE_CHECKING:
    from mmaccel.install import Installer


@dataclass(frozen=True)
class SeaCache(DiffusersCache):
    """diffusers' own SeaCache under our handle, where diffusers knows how to read the latents.

    Sentence: relative change of the latents under a spectral filter of the noise level -> whole step -> accumulated
    change below the threshold -> residual of all blocks, held or extrapolated. Source: SeaCache (arXiv 2602.18993,
    2026), as shipped by diffusers. It needs the step and the noise level, which the pipeline must announce (of the
    pipelines of diffusers 0.42 those of Wan text-to-video and Cosmos 3 do). threshold 0 is the identity.
    """

    threshold: float = knob(0.25, "accumulated relative change up to which steps are skipped", low=0.0)
    order: int = knob(1, "0 holds the residual, 1 extrapolates it", low=0, high=1)
    max_skip: int = knob(2, "most steps skipped in a row", low=1)

    info: ClassVar[Info] = Info(
        name="seacache", verb="reuse", stage=Stage.DIFFUSION,
        summary="skips steps while the filtered latents hardly change (diffusers' own)",
        source="SeaCache (arXiv 2602.18993), as shipped by diffusers", year=2026,
        targets=("diffusion",), slots=(STEPS,), licence="Apache-2.0 (diffusers)",
    )  # fmt: skip

    @property
    def neutral(self) -> bool:
        """No change is below 0."""
        return self.threshold == 0

    def sites(self, transformer: Any) -> list[str]:
        """All blocks, if diffusers reads the latents of this class.

        Raises:
            NotApplicableError: it does not.
        """
        from diffusers.models.transformers.transformer_cosmos3 import Cosmos3OmniTransformer
        from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

        config = transformer.config
        wan = isinstance(transformer, WanTransformer3DModel) and config["in_channels"] == config["out_channels"]
        if not wan and not isinstance(transformer, Cosmos3OmniTransformer):
            raise NotApplicableError(
                f"seacache: diffusers cannot read the latents of this {type(transformer).__name__}; it can for Wan "
                "text-to-video and Cosmos 3."
            )
        return list(blocks(transformer))

    def apply(self) -> Any:
        """diffusers' function."""
        from diffusers.hooks.sea_cache import apply_sea_cache

        return apply_sea_cache

    def config(self, transformer: Any, clock: Clock) -> Any:  # noqa: ARG002
        """The knobs."""
        from diffusers.hooks.sea_cache import SeaCacheConfig

        return SeaCacheConfig(threshold=self.threshold, residual_order=self.order, max_consecutive_cached=self.max_skip)

    def watch(self, installer: Installer, installed: Installed, config: Any) -> None:  # noqa: ARG002
        """The hook of the first block decides, where there is one."""
        for _, name, hook, _ in installed.hooks:
            if "leader" in name:
                count_steps(installer, hook)
