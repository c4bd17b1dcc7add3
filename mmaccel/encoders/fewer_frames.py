"""FewerFrames: the equal-cost baseline of a user who samples the video more coarsely."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from mmaccel.adapters.towers import kept_frames
from mmaccel.errors import NotApplicableError
from mmaccel.method import Info, Stage, Touch, knob
from mmaccel.reducer import GridReducer
from mmaccel.tokens.allocate import resolve_keep
from mmaccel.tokens.place import Reduction

if TYPE_CHECKING:
    from mmaccel.core.prefill import VisualTokens
    from mmaccel.install import Installer
    from mmaccel.targets import Target


@dataclass(frozen=True)
class FewerFrames(GridReducer):
    """Give the model fewer frames of each video; vision encoder and language model both save. Images pass unchanged.

    Sentence: time -> whole video -> first, last and evenly between -> drop before the encoder -> place. In models that
    encode frames in groups (Qwen-VL: pairs) a group counts as one frame, so the fraction reached is that of groups.
    """

    keep: float | int = knob(0.5, "fraction in (0, 1] or number of the frames (temporal groups) kept of each video")

    info: ClassVar[Info] = Info(
        name="fewer-frames", verb="drop", stage=Stage.INPUT, summary="samples the video more coarsely",
        source="equal-cost baseline", year=2026, targets=("video-lm",), slots=("on the frames of the input",),
        baseline=True,
    )  # fmt: skip

    def kept(self, _video: int, T: int) -> list[int]:
        """Which of the T frames of a video the model is given, ascending."""
        return kept_frames(T, resolve_keep(self.keep, T))

    def reduce(self, tokens: VisualTokens) -> Reduction | None:
        """Drop the tokens of the frames that the encoder has not seen."""
        if tokens.kind != "video":
            return None
        kept = torch.tensor(self.kept(tokens.video, tokens.shape[0]), device=tokens.cell.device)
        return Reduction(torch.isin(tokens.time, kept).nonzero().squeeze(1))

    def plan(self, target: Target) -> list[Touch]:
        """The vision tower and the prefill.

        Raises:
            NotApplicableError: the family does not tell frames from images before it encodes them.
        """
        site = target.site
        if "video" not in site.encoders:
            raise NotApplicableError(f"{self.info.name} needs a video encoder, and {site.family} encodes images only.")
        return [Touch(site.module_paths()[0], "encodes the kept frames only"), *super().plan(target)]

    def install(self, installer: Installer) -> None:
        """Gate the tower and hand `reduce` to the prefill hooks."""
        super().install(installer)
        if self.neutral:
            return
        site = installer.target.site
        tower = site.tower()

        def thin(modality: str, arguments: dict[str, Any], pixels: torch.Tensor, grids: torch.Tensor | None) -> Any:
            if modality != "video":
                return None
            return tower.frames(arguments, pixels, grids, self.kept)

        installer.gate(thin)
