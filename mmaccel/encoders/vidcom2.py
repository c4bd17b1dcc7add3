"""VidCom2: of every frame what is least like the frame and the video, and more of frames that stand out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from mmaccel.method import Info, Stage, knob
from mmaccel.reducer import BEFORE_LLM, GridReducer
from mmaccel.tokens import allocate, reduce, select, signals
from mmaccel.tokens.place import Reduction

if TYPE_CHECKING:
    from mmaccel.core.prefill import VisualTokens


@dataclass(frozen=True)
class VidCom2(GridReducer):
    """Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language Models (2025).

    Sentence: Gaussian similarity, in the channels that vary least, to the mean of the video plus that to the mean of
    the frame -> over frames, by how little a frame resembles the video -> lowest in each frame -> drop -> place.
    A frame's share of the budget is `1 + softmax(-s / temperature) - 1 / frames`, s the mean similarity of its tokens
    to the video, and no more than the frame holds. An image is a video of one frame. Needs features only.

    Differs from the authors' code, which rounds every frame by itself: here the frames' numbers add up to the budget
    exactly, and what a full frame has no room for goes to the others (inferred). Every frame keeps a token where the
    budget has one for each.
    """

    channels: float = knob(
        0.5, "share of the channels, those that vary least, that tokens are compared in", above=0.0, high=1.0
    )
    temperature: float = knob(0.01, "the lower, the more the budget goes to the frame that stands out", above=0.0)

    info: ClassVar[Info] = Info(
        name="vidcom2", verb="drop", stage=Stage.BEFORE_LLM,
        summary="keeps what is least like its frame and the video, more of frames that stand out",
        source="Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language Models",
        year=2025, targets=("video-lm",), slots=(BEFORE_LLM,), licence="Apache-2.0",
    )  # fmt: skip
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "llava-onevision": {"keep": 0.25, "source": "paper, LLaVA-OneVision-7B"}
    }

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Drop what looks like everything else."""
        T, S = tokens.frames()
        video, frame = self._similarity(tokens.features, T)
        budgets = self._budgets(self.budget(len(tokens)), video.mean(1), S)
        chosen = select.top_k(-(video + frame), budgets)
        return reduce.joined([Reduction(row[row >= 0]) for row in chosen], [S] * T)

    def _similarity(self, x: torch.Tensor, T: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Float32 [T, S] each: of every token of x [T * S, D] to the mean of the video, and to that of its frame."""
        varying = x[:, signals.low_variance_channels(x[None], self.channels)[0]].float()
        unit = torch.nn.functional.normalize(varying, dim=-1).view(T, -1, varying.shape[1])
        return (
            signals.gaussian_similarity(unit, unit.mean((0, 1))),
            signals.gaussian_similarity(unit, unit.mean(1, keepdim=True)),
        )

    def _budgets(self, budget: int, similarity: torch.Tensor, S: int) -> torch.Tensor:
        """Int64 [T] that sum to `budget`, by the mean similarity [T] of each frame to the video."""
        T = len(similarity)
        weights = 1 + torch.softmax(-similarity.double() / self.temperature, 0) - 1 / T
        return allocate.per_frame(budget, weights, S, floor=int(budget >= T))
