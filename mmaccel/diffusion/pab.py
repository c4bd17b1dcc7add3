"""Pyramid attention broadcast: reuse attention outputs over some steps of the middle of the sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mmaccel.diffusion.diffusers_caches import STEPS, Clock, DiffusersCache, one_batch
from mmaccel.diffusion.diffusers_hooks import Installed
from mmaccel.errors import MethodError
from mmaccel.method import Info, Stage, knob

if TYPE_CHECKING:
    from mmaccel.install import Installer


@dataclass(frozen=True)
class PAB(DiffusersCache):
    """diffusers' own pyramid attention broadcast under our handle, with the timestep that it needs.

    Sentence: nothing -> every attention alike -> every n-th call inside a range of timesteps -> recompute -> the
    attention's last output elsewhere. Source: "Real-Time Video Generation with Pyramid Attention Broadcast" (2024).
    The timestep (0 .. 1000) comes from the pipeline, or from the argument `timestep` of a transformer alone. diffusers
    counts calls and not steps, and keeps one output a module: where a pipeline calls the transformer twice a step, with
    and without the prompt (Wan), even ranges reuse the output of the other branch. every=1 is the identity.
    """

    every: int = knob(2, "calls from one computed self-attention to the next", low=1)
    cross_every: int = knob(1, "calls from one computed cross-attention to the next", low=1)
    start: float = knob(100, "timestep above which outputs are reused", low=0)
    stop: float = knob(800, "timestep below which outputs are reused", low=0, high=1000)

    info: ClassVar[Info] = Info(
        name="pab", verb="reuse", stage=Stage.DIFFUSION,
        summary="reuses attention outputs over some calls (diffusers' own)",
        source="Real-Time Video Generation with Pyramid Attention Broadcast", year=2024,
        targets=("diffusion",), slots=(STEPS,), licence="Apache-2.0 (diffusers)",
    )  # fmt: skip

    @property
    def neutral(self) -> bool:
        """Every call computes."""
        return self.every == 1 and self.cross_every == 1

    def sites(self, transformer: Any) -> list[str]:
        """Attention modules of diffusers' classes below the known block lists.

        Raises:
            MethodError: no timestep lies between `start` and `stop`.
        """
        if not self.start < self.stop:
            raise MethodError(f"pab: start={self.start} must be below stop={self.stop}; else nothing is reused.")
        from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS, _ATTENTION_CLASSES

        return [
            name
            for name, module in transformer.named_modules()
            if isinstance(module, _ATTENTION_CLASSES)
            and any(part in name for part in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS)
        ]

    def apply(self) -> Any:
        """diffusers' function."""
        from diffusers.hooks.pyramid_attention_broadcast import apply_pyramid_attention_broadcast

        return apply_pyramid_attention_broadcast

    def config(self, transformer: Any, clock: Clock) -> Any:  # noqa: ARG002
        """The same range for all attentions."""
        from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastConfig

        inside: Any = (self.start, self.stop)
        callback: Any = clock
        return PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=self.every, temporal_attention_block_skip_range=self.every,
            cross_attention_block_skip_range=self.cross_every, spatial_attention_timestep_skip_range=inside,
            temporal_attention_timestep_skip_range=inside, cross_attention_timestep_skip_range=inside,
            current_timestep_callback=callback,
        )  # fmt: skip

    def watch(self, installer: Installer, installed: Installed, config: Any) -> None:
        """One output a module fits calls of one batch only."""
        super().watch(installer, installed, config)
        one_batch(installer, installed, self.info.name)
