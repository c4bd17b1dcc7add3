"""The shape that token reducers share: a method file says how one grid is reduced, everything else is here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mmaccel.errors import NotApplicableError
from mmaccel.method import Method, Touch, knob
from mmaccel.tokens.allocate import resolve_keep

if TYPE_CHECKING:
    from mmaccel.core.prefill import VisualTokens
    from mmaccel.install import Installer
    from mmaccel.targets import Target
    from mmaccel.tokens.place import Reduction

__all__ = ["BEFORE_LLM", "INSIDE_ENCODER", "INSIDE_LLM", "GridReducer", "prefill_touches"]

BEFORE_LLM = "on the visual tokens in front of the language model"
INSIDE_ENCODER = "inside the vision encoder"
INSIDE_LLM = "on the visual tokens between decoder layers"


def prefill_touches(site: Any, *, neutral: bool = False) -> list[Touch]:
    """What every method touches that takes tokens out of a prefill.

    Raises:
        NotApplicableError: some decoder layers attend inside a window, and the method is not switched off.
    """
    if site.windowed and not neutral:
        raise NotApplicableError(
            f"some decoder layers of this {site.family} attend inside a sliding window, which counts the tokens that "
            "are left instead of those that were seen; use fewer frames or fewer pixels when you load the video."
        )
    prefix = "" if site.root is site.target else "model."
    touches = [Touch(f"{prefix}{method}", "notes the layout of the features") for method in site.encoders.values()]
    touches.append(
        Touch(f"{prefix}language_model", "takes tokens out of the sequence, keeps masks, positions and cache right")
    )
    touches.append(
        Touch(f"{prefix}language_model.layers.0-{len(site.layers) - 1}", "fits masks and positions to each layer")
    )
    return touches


@dataclass(frozen=True)
class GridReducer(Method):
    """A method that reduces each image or video by itself, before the language model.

    keep: a float is the fraction of each item's visual tokens that stays, an int their number. positions: "compact"
    renumbers what is left, "original" leaves every token its position (dropping then equals masking).
    """

    keep: float | int = knob(0.25, "fraction in (0, 1] or number of visual tokens kept of each image or video")
    positions: Literal["compact", "original"] = knob(
        "compact", "renumber the tokens that are left, or leave each its position", choices=("compact", "original")
    )

    needs_scores: ClassVar[bool] = False

    @property
    def reads_scores(self) -> bool:
        """Whether this instance reads the vision tower's attention."""
        return self.needs_scores

    @property
    def needs(self) -> tuple[str, ...]:
        """Vision attention only where it is read."""
        return tuple(need for need in super().needs if need != "vision attention" or self.reads_scores)

    def budget(self, n: int) -> int:
        """The number of tokens kept of n.

        Raises:
            MethodError: `keep` asks for more than n.
        """
        return resolve_keep(self.keep, n)

    def reduce(self, tokens: VisualTokens) -> Reduction | None:
        """Which of the living tokens of one grid survive; None leaves the grid as it is."""
        raise NotImplementedError

    def plan(self, target: Target) -> list[Touch]:
        """The hooks of a prefill reduction, and the vision layer whose attention is read, if any."""
        site = target.site
        touches = prefill_touches(site, neutral=self.neutral)
        if self.reads_scores:
            site.score_attention()
            touches.insert(
                0, Touch(f"vision layer {site.score_layer()}", f"reads q and k for scores ({site.score_kind()})")
            )
        return touches

    def install(self, installer: Installer) -> None:
        """Hand `reduce` to the prefill hooks."""
        score = installer.target.site.score_kind() if self.reads_scores and not self.neutral else None
        reduce = None if self.neutral else self.reduce
        installer.prefill.reduce_before(
            self.info.name, reduce, score=score, positions=self.positions, stage=self.info.stage
        )
        if self.keep == 1 and isinstance(self.keep, int):
            installer.report.note(f"{self.info.name}: keep=1 keeps one; write keep=1.0 to keep all")
