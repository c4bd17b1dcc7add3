"""FewerPixels: the equal-cost baseline of a user who makes the frames smaller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from mmaccel.adapters.towers import corner, smaller
from mmaccel.method import Info, Stage, Touch, knob
from mmaccel.reducer import GridReducer
from mmaccel.tokens.place import Reduction

if TYPE_CHECKING:
    from mmaccel.core.prefill import VisualTokens
    from mmaccel.install import Installer
    from mmaccel.targets import Target


@dataclass(frozen=True)
class FewerPixels(GridReducer):
    """Give the model smaller frames; vision encoder and language model both save.

    Sentence: nothing -> evenly over frames -> a smaller grid -> resize before the encoder -> place. Towers of fixed
    size interpolate their position table. The grid that is nearest to `keep` in whole cells is taken (it has a floor of
    one cell a frame), the report says what was reached. Tiled images of LLaVA-NeXT and LLaVA-OneVision pass unchanged,
    because their tiles are packed by their full size. Where the model pools its grid to an odd size (27 patches to 14
    cells), the smaller grid is pooled at the spacing of the full one.
    """

    keep: float | int = knob(0.25, "fraction in (0, 1] or number of visual tokens kept of each image or frame")

    info: ClassVar[Info] = Info(
        name="fewer-pixels", verb="drop", stage=Stage.INPUT, summary="makes the frames smaller",
        source="equal-cost baseline", year=2026, targets=("video-lm",), slots=("on the pixels of the input",),
        baseline=True,
    )  # fmt: skip

    def reduce(self, tokens: VisualTokens) -> Reduction | None:
        """Drop the cells outside of the corner that holds the smaller frame."""
        T, H, W = tokens.shape
        inside = corner(T, H, W, *smaller(H, W, self._fraction(H * W))).to(tokens.cell.device)
        return Reduction(inside[tokens.cell].nonzero().squeeze(1))

    def _fraction(self, cells: int) -> float:
        return self.keep if isinstance(self.keep, float) else self.budget(cells) / cells

    def plan(self, target: Target) -> list[Touch]:
        """The vision tower and the prefill."""
        return [Touch(target.site.module_paths()[0], "encodes smaller frames"), *super().plan(target)]

    def install(self, installer: Installer) -> None:
        """Gate the tower and hand `reduce` to the prefill hooks."""
        site = installer.target.site
        tower = site.tower()

        def reduce(tokens: VisualTokens) -> Reduction | None:
            return self.reduce(tokens) if site.resizable(tokens.kind) else None

        installer.prefill.reduce_before(
            self.info.name, None if self.neutral else reduce, score=None, positions=self.positions,
            stage=self.info.stage,
        )  # fmt: skip
        if self.neutral:
            return

        def thin(modality: str, arguments: dict[str, Any], pixels: torch.Tensor, grids: torch.Tensor | None) -> Any:
            if not site.resizable(modality):
                return None
            return tower.pixels(arguments, pixels, grids, self._fraction)

        installer.gate(thin)
