"""FastVID: keep what the vision encoder attends to, and merge the rest of each segment into tokens of a few frames."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from mmaccel.method import Info, Stage, knob
from mmaccel.reducer import BEFORE_LLM, GridReducer
from mmaccel.tokens import allocate, reduce, select, signals
from mmaccel.tokens.place import Reduction
from mmaccel.tokens.segments import cut_where_unlike

if TYPE_CHECKING:
    from mmaccel.core.prefill import VisualTokens


@dataclass(frozen=True)
class FastVID(GridReducer):
    """FastVID: Dynamic Density Pruning for Fast Video Large Language Models (2025).

    Sentence: attention in the last used vision layer, and cosine between whole frames -> evenly over frames, of which
    the share `contextual` of each goes to its segment -> top-k by attention, and density peaks on every `stride`-th
    frame of the segment -> every other token of the segment is merged into the anchor most like it -> place. A segment
    ends at the `segments` - 1 smallest similarities of neighbouring frames and wherever one is below `tau`; its last
    frame and every `stride`-th before it hold its anchors. Where a segment has no anchor, its other tokens are dropped.

    The number kept is exact. Where the anchors of a segment do not fit into its frames, more of these hold anchors.
    Kept tokens keep their positions by default. Differs from the authors' code: budgets are split exactly where theirs
    are rounded down for each frame; a token goes into one anchor where theirs goes into one of every anchor frame; ties
    go to the earlier token where theirs adds noise. The feature of a frame is the mean of its projected tokens, and the
    attention that of the encoder, where theirs come from the encoder's pooling head (inferred to be alike in purpose).
    """

    positions: Literal["compact", "original"] = knob(
        "original", "renumber the tokens that are left, or leave each its position", choices=("compact", "original")
    )
    segments: int = knob(8, "least number of segments", low=1)
    tau: float = knob(0.9, "cosine of two neighbouring frames below which a segment ends", low=-1.0, high=1.0)
    contextual: float = knob(0.4, "share of the budget that is merged anchors", low=0.0, high=1.0)
    stride: int = knob(4, "distance in frames of the frames that hold a segment's anchors", low=1)
    beta: float = knob(
        0.6, "weight of an anchor against the mean of its n members; at least 1 / (n + 1)", low=0.0, high=1.0
    )

    info: ClassVar[Info] = Info(
        name="fastvid", verb="merge", stage=Stage.BEFORE_LLM,
        summary="keeps attended tokens, merges the rest of each segment into dense ones of a few frames",
        source="FastVID: Dynamic Density Pruning for Fast Video Large Language Models", year=2025,
        targets=("video-lm",), slots=(BEFORE_LLM,), needs=("vision attention",), licence="MIT",
    )  # fmt: skip
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "llava-onevision": {
            "keep": 0.10, "segments": 8, "tau": 0.9, "contextual": 0.4, "stride": 4, "beta": 0.6,
            "source": "paper, LLaVA-OneVision-7B: r = 0.10, c = 8, tau = 0.9, d = 0.4, p = 4, beta = 0.6",
        }
    }  # fmt: skip
    needs_scores: ClassVar[bool] = True

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Keep salient tokens of every frame, merge the others into the anchors of their segment."""
        assert tokens.score is not None
        T, S = tokens.frames()
        device = tokens.features.device
        x = tokens.features.view(T, S, -1)
        budgets = allocate.per_frame(self.budget(len(tokens)), torch.ones(T), S).tolist()
        context = [int(Decimal(repr(self.contextual)) * budget) for budget in budgets]
        salient = torch.tensor([whole - part for whole, part in zip(budgets, context, strict=True)], device=device)
        kept_as_is = select.top_k_mask(tokens.score.view(T, S), salient)

        kept = [kept_as_is.flatten().nonzero().squeeze(1)]
        done = len(kept[0])
        assignment = torch.full((T * S,), -1, dtype=torch.int64, device=device)
        weight = torch.ones(T * S, device=device)
        assignment[kept[0]] = torch.arange(done, device=device)
        for start, stop in self._segments(x):
            anchors = self._anchors(x[start:stop], ~kept_as_is[start:stop], sum(context[start:stop]))
            if len(anchors) == 0:
                continue
            rest = ~kept_as_is[start:stop].flatten()
            merge = reduce.merge_to_centres(
                x[start:stop].reshape(1, -1, x.shape[2]).float(), anchors[None], beta=self.beta, mask=rest[None],
                metric="cosine", with_centre=True,
            )  # fmt: skip
            here = slice(start * S, stop * S)
            assignment[here] = torch.where(rest, merge.assignment[0] + done, assignment[here])
            weight[here] = torch.where(rest, merge.weight[0], weight[here])
            kept.append(anchors + start * S)
            done += len(anchors)
        return reduce.merge_as_weighted(torch.cat(kept), assignment, weight).reduction(0)

    def _segments(self, x: torch.Tensor) -> list[tuple[int, int]]:
        if len(x) == 1:
            return [(0, 1)]
        frames = x.float().mean(1)
        similarity = signals.cosine_to_previous_frame(frames[None, :, None])[0, :, 0]
        return cut_where_unlike(similarity, self.segments, self.tau)

    def _anchors(self, x: torch.Tensor, free: torch.Tensor, wanted: int) -> torch.Tensor:
        """int64 [wanted]: density peaks among the free tokens of a segment x [L, S, D], counted through it."""
        L, S = free.shape
        room = free.sum(1)
        if wanted == 0:
            return room.new_zeros(0)
        stride = min(self.stride, L)
        while int(room.flip(0)[::stride].sum()) < wanted:
            stride -= 1
        frames = torch.arange(L - 1, -1, -stride, device=x.device).flip(0)
        share = allocate.per_frame(wanted, torch.ones(len(frames), device=x.device), room[frames])
        peaks = select.density_peaks(x[frames].float(), share, mask=free[frames], neighbours=4, at_most_k=False)
        return (peaks + frames[:, None] * S)[peaks >= 0]
