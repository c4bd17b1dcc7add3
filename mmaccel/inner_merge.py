"""The second half of reducers that merge once more between two decoder layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmaccel.method import Touch, knob
from mmaccel.reducer import BEFORE_LLM, INSIDE_LLM, GridReducer
from mmaccel.tokens import reduce, select

if TYPE_CHECKING:
    from mmaccel.core.prefill import VisualTokens
    from mmaccel.install import Installer
    from mmaccel.targets import Target
    from mmaccel.tokens.place import Reduction

__all__ = ["InnerMerge"]

_INNER_DEPTH = 0.64  # layer 18 of 28 in HoliTom's paper


@dataclass(frozen=True)
class InnerMerge(GridReducer):
    """A reducer with an inner part: before decoder layer `inner_layer` it merges what the last prompt token ignores.

    Each token that goes is merged into the kept one most like it, all in one mean.
    """

    inner_keep: float = knob(
        0.5, "fraction of visual tokens kept at the inner layer; 1.0 switches the inner part off", above=0.0, high=1.0
    )
    inner_layer: int | None = knob(
        None, "decoder layer before which the inner part merges; default 0.64 of the depth", low=1
    )

    @property
    def slots(self) -> tuple[str, ...]:
        """Without the inner part the decoder layers are free for another method."""
        taken = (slot for slot in self.info.slots if slot not in (BEFORE_LLM, INSIDE_LLM))
        return (*taken, BEFORE_LLM, INSIDE_LLM) if self._inner else (*taken, BEFORE_LLM)

    @property
    def _inner(self) -> bool:
        return self.inner_keep < 1.0 and not self.neutral

    def _layer(self, depth: int) -> int:
        return self.inner_layer if self.inner_layer is not None else max(1, round(_INNER_DEPTH * depth))

    def plan(self, target: Target) -> list[Touch]:
        """The outer part's hooks, and the attention of one decoder layer."""
        touches = super().plan(target)
        layer = self._layer(target.site.depth)
        if self._inner and layer < target.site.depth:
            touches.append(Touch(f"decoder layer {layer - 1}", "reads q and k of the last prompt token, then merges"))
        return touches

    def install(self, installer: Installer) -> None:
        """Hand both parts to the prefill hooks; an inner layer behind the last one means no inner part."""
        super().install(installer)
        depth, name = installer.target.site.depth, self.info.name
        if self._inner and self._layer(depth) >= depth:
            installer.report.note(
                f"{name}: inner_layer={self._layer(depth)} is behind the last of {depth} decoder layers, so the inner "
                "part is off"
            )
        elif self._inner:
            installer.prefill.reduce_inside(name, self._layer(depth), self.merge_inside)

    def merge_inside(self, tokens: VisualTokens) -> Reduction | None:
        """The inner part on all visual tokens of a prompt."""
        n = len(tokens)
        wanted = max(1, round(n * self.inner_keep))
        if wanted >= n:
            return None
        assert tokens.score is not None
        kept = select.top_k(tokens.score[None], wanted)
        return reduce.merge_dropped_into_kept(tokens.features[None].float(), kept).reduction(0)
