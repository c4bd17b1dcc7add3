"""FastV: after a few decoder layers drop the visual tokens that the end of the prompt hardly attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mmaccel.errors import NotApplicableError
from mmaccel.method import Info, Method, Stage, Touch, knob
from mmaccel.reducer import INSIDE_LLM, prefill_touches
from mmaccel.tokens import select
from mmaccel.tokens.allocate import resolve_keep
from mmaccel.tokens.place import Reduction

if TYPE_CHECKING:
    from mmaccel.core.prefill import VisualTokens
    from mmaccel.install import Installer
    from mmaccel.targets import Target


@dataclass(frozen=True)
class FastV(Method):
    """An Image is Worth 1/2 Tokens After Layer 2 (2024).

    Sentence: attention of the last prompt token in decoder layer `layer` - 1, mean over heads -> all visual tokens of
    the prompt -> top-k -> drop before layer `layer` -> place. Kept tokens keep their positions. Layers before `layer`
    hold all tokens in their cache, later ones the kept ones. The attention row is computed from q and k, SDPA stays on.
    """

    keep: float | int = knob(0.5, "fraction in (0, 1] or number of the prompt's visual tokens kept")
    layer: int = knob(2, "first decoder layer that sees the kept tokens only", low=1)

    info: ClassVar[Info] = Info(
        name="fastv", verb="drop", stage=Stage.LLM, summary="drops visual tokens with little attention after layer 2",
        source="An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large "
        "Vision-Language Models", year=2024, targets=("video-lm",), slots=(INSIDE_LLM,), needs=("decoder attention",),
        licence="no licence file found",
    )  # fmt: skip
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "llava": {"keep": 0.5, "layer": 2, "source": "paper: K = 2, R = 50 %"}
    }

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Keep the tokens that the last prompt token attends to most."""
        assert tokens.score is not None
        return Reduction(select.top_k(tokens.score[None], resolve_keep(self.keep, len(tokens)))[0])

    def plan(self, target: Target) -> list[Touch]:
        """The hooks of a prefill reduction, and the attention of one decoder layer.

        Raises:
            NotApplicableError: the model has no such layer, or layers that attend inside a window.
        """
        depth = target.site.depth
        if not self.layer < depth and not self.neutral:
            raise NotApplicableError(
                f"fastv: layer must be in 1..{depth - 1} for this model of {depth} decoder layers, not {self.layer}."
                if depth > 1
                else "fastv works between decoder layers, and this model has one."
            )
        return [
            Touch(f"decoder layer {self.layer - 1}", "reads q and k of the last prompt token, then drops"),
            *prefill_touches(target.site, neutral=self.neutral),
        ]

    def install(self, installer: Installer) -> None:
        """Hand `reduce` to the prefill hooks."""
        installer.prefill.reduce_inside(self.info.name, self.layer, None if self.neutral else self.reduce)
