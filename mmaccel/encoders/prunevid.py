"""PruneVid: average what stands still, cluster in space, and keep what the question attends to inside the model."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from mmaccel.method import Info, Stage, knob
from mmaccel.reducer import BEFORE_LLM, INSIDE_LLM, TwiceReducer
from mmaccel.tokens import allocate, reduce, select
from mmaccel.tokens.place import Reduction
from mmaccel.tokens.segments import contiguous, mean_pairwise_cosine

if TYPE_CHECKING:
    from mmaccel.core.prefill import VisualTokens


@dataclass(frozen=True)
class PruneVid(TwiceReducer):
    """PruneVid: Visual Token Pruning for Efficient Video Large Language Models (2024).

    Sentence, outer part: mean cosine of all pairs of a segment's frames, position by position -> in proportion to what
    is left when positions above `tau` are averaged over their segment -> density peaks among the still tokens of each
    segment and the others of each frame -> mean of each cluster -> place. Segments are clusters of frames, as many as
    the share `temporal` of the frames. Inner part: attention in the decoder layer before `inner_layer`, mean over
    heads, the largest that any text token behind the last image or video pays -> all visual tokens -> top-k -> drop.

    The number that enters the language model is exact, unless averaging over time alone leaves fewer. The paper asks
    for a share of what that leaves instead: `spatial`, which takes the place of `keep`. Images have one frame, so only
    clustering in space is left of the outer part.

    Differs from the paper: a cluster stands at its peak, a still one in the first frame of its segment, and all are in
    the order of the video; the number of segments is rounded half up; the decoder layers before `inner_layer` keep all
    tokens in their cache, where the paper prunes these too. Inferred: how clusters of frames become contiguous
    (`tokens.segments.contiguous`), and the number of neighbours of the density, that of `tokens.select.density_peaks`.
    """

    inner_keep: float = knob(
        0.4, "fraction of visual tokens kept at the inner layer; 1.0 switches the inner part off", above=0.0, high=1.0
    )
    tau: float = knob(0.8, "mean cosine over a segment above which a position counts as still", low=-1.0, high=1.0)
    temporal: float = knob(0.25, "number of segments, as a fraction of the frames", above=0.0, high=1.0)
    spatial: float | None = knob(
        None, "fraction kept of what averaging over time leaves (the paper's ratio); keep is then not used",
        above=0.0, high=1.0,
    )  # fmt: skip

    info: ClassVar[Info] = Info(
        name="prunevid", verb="merge", stage=Stage.BEFORE_LLM,
        summary="averages still tokens over time, clusters in space, keeps what the question attends to",
        source="PruneVid: Visual Token Pruning for Efficient Video Large Language Models", year=2024,
        targets=("video-lm",), slots=(BEFORE_LLM, INSIDE_LLM), needs=("decoder attention",), licence="non-commercial",
    )  # fmt: skip
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "spatial": 0.5, "tau": 0.8, "temporal": 0.25, "inner_keep": 0.4, "inner_layer": 10,
            "source": "paper: tau 0.8, gamma 0.25, beta 0.5, alpha 0.4, layer 10 of PLLaVA-7B, ST-LLM and "
            "LLaVA-OneVision-7B",
        }
    }  # fmt: skip
    inner_depth: ClassVar[float] = 10 / 32
    inner_queries: ClassVar[Literal["last", "question"]] = "question"

    @property
    def neutral(self) -> bool:
        """Keep everything; the average over time and the inner part are off as well."""
        return super().neutral and self.spatial is None

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """The outer part on one image or video."""
        T, S = tokens.frames()
        x = tokens.features.view(T, S, -1).float()
        groups = self._groups(tokens, x)
        sizes = [group.shape[1] for group in groups]
        budget = self._budget(tokens, sum(sizes))
        shares = allocate.per_segment(budget, torch.tensor(sizes)).tolist()

        flat = x.view(T * S, -1)
        assignment = torch.full((T * S,), -1, dtype=torch.int64, device=x.device)
        weight = x.new_zeros(T * S)
        kept, done = [], 0
        for group, share in zip(groups, shares, strict=True):
            if share == 0:
                continue
            mean = flat[group].mean(0, keepdim=True)
            peaks = select.density_peaks(mean, share)
            cluster = reduce.nearest_centre(mean, peaks)[0]
            members = torch.bincount(cluster, minlength=share) * len(group)
            assignment[group] = cluster + done
            weight[group] = 1 / members[cluster].float()
            kept.append(group[0, peaks[0]])
            done += share
        return reduce.merge_as_weighted(torch.cat(kept), assignment, weight).reduction(0)

    def _budget(self, tokens: VisualTokens, left: int) -> int:
        if self.spatial is not None:
            return allocate.resolve_keep(self.spatial, left)
        wanted = self.budget(len(tokens))
        if wanted > left:
            tokens.note(
                f"prunevid: keep={self.keep} asks for {wanted} of {len(tokens)} tokens, but averaging over time leaves "
                f"{left}; raise tau to keep more"
            )
        return min(wanted, left)

    def _groups(self, tokens: VisualTokens, x: torch.Tensor) -> list[torch.Tensor]:
        """Tokens that are clustered together: int64 [copies, n], copies of one position below each other."""
        T, S = x.shape[:2]
        number = torch.arange(T * S, device=x.device).view(T, S)
        groups, likest = [], -1.0
        for start, stop in self._segments(x):
            still = torch.zeros(S, dtype=torch.bool, device=x.device)
            if stop - start > 1:
                likeness = mean_pairwise_cosine(x[start:stop])
                still = likeness > self.tau
                likest = max(likest, float(likeness.max()))
            groups.append(number[start:stop, still])
            groups.extend(number[t : t + 1, ~still] for t in range(start, stop))
        averaged = any(len(group) > 1 and group.shape[1] for group in groups)
        if T > 1:
            inert = f"prunevid: tau={self.tau} never reached, largest mean cosine {likest:.3f}"
            tokens.note("" if averaged else inert, "prunevid tau")
        return groups

    def _segments(self, x: torch.Tensor) -> list[tuple[int, int]]:
        frames = x.mean(1)[None]
        peaks = select.density_peaks(frames, allocate.resolve_keep(self.temporal, len(x)))
        return contiguous(reduce.nearest_centre(frames, peaks)[0])

    def reduce_inside(self, tokens: VisualTokens) -> Reduction | None:
        """The inner part on all visual tokens of a prompt."""
        assert tokens.score is not None
        n = len(tokens)
        wanted = int((Decimal(repr(self.inner_keep)) * n).to_integral_value(ROUND_CEILING))
        return None if wanted >= n else Reduction(select.top_k(tokens.score[None], wanted)[0])
