"""HoliTom: merge what stays the same over time, then select in space, then merge once more inside the model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from mmaccel.codecs.signals import change_between
from mmaccel.errors import MethodError
from mmaccel.kernels.frame_dp import frame_dp, windows
from mmaccel.method import Info, Stage, knob
from mmaccel.reducer import BEFORE_LLM, INSIDE_LLM, TwiceReducer
from mmaccel.tokens import reduce, select, signals
from mmaccel.tokens.place import Mix, Reduction

if TYPE_CHECKING:
    from mmaccel.core.prefill import VisualTokens


@dataclass(frozen=True)
class HoliTom(TwiceReducer):
    """HoliTom: Holistic Token Merging for Fast Video Large Language Models (2025).

    Sentence, outer part: cosine to the same position in the next frame -> segments by dynamic programming -> tokens
    that stay alike through a segment are merged over time, the others selected by attention received in the last used
    vision layer -> place. Inner part: attention of the last prompt token one layer before `inner_layer` -> all visual
    tokens -> top-k -> every dropped token is merged into the kept one most like it.

    The number kept differs from keep * tokens by at most frames + segments / 2 (rounding); if the temporal merge alone
    saves more than was asked for, it is what that leaves. With the default `inner_keep` half of these reach the layers
    behind `inner_layer`. Differs from the authors' code: ties in the density clustering go to the earlier token where
    theirs adds noise, the ratio of each video is its own, and the inner merge is one mean where theirs halves token by
    token (so the result depends on no order). Images have one frame, so only the selection in space is left of it.
    """

    tau: float = knob(
        0.8, "cosine above which a position counts as unchanged; the paper takes 0.65 at keep 0.10", low=-1.0, high=1.0
    )
    beta: float = knob(0.6, "weight of a cluster's centre against the mean of its members", low=0.0, high=1.0)
    contextual: float = knob(0.0, "share of the dynamic tokens' budget spent on clustered context", low=0.0, high=1.0)
    longest: int = knob(1024, "longest segment in frames", low=1)
    temporal: Literal["features", "codec"] = knob(
        "features", "where the similarity over time is taken from; codec: 1 - change, see codecs.using_signals",
        choices=("features", "codec"),
    )  # fmt: skip
    temporal_only: bool = knob(False, "no selection in space (the paper's ratio 1): keep is not used")

    info: ClassVar[Info] = Info(
        name="holitom", verb="merge", stage=Stage.BEFORE_LLM,
        summary="merges unchanged tokens over time, selects by attention, merges again inside the model",
        source="HoliTom: Holistic Token Merging for Fast Video Large Language Models", year=2025,
        targets=("video-lm",), slots=(BEFORE_LLM, INSIDE_LLM), needs=("vision attention", "decoder attention"),
        licence="Apache-2.0",
    )  # fmt: skip
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "llava-onevision": {"keep": 0.15, "tau": 0.8, "inner_keep": 0.5, "source": "paper, LLaVA-OneVision-7B"},
        "llava-onevision keep 0.10": {
            "keep": 0.10,
            "tau": 0.65,
            "inner_keep": 0.5,
            "source": "paper, LLaVA-OneVision-7B",
        },
    }
    needs_scores: ClassVar[bool] = True
    inner_depth: ClassVar[float] = 0.64  # layer 18 of 28

    @property
    def neutral(self) -> bool:
        """Keep everything; the temporal merge and the inner part are off as well."""
        return super().neutral and not self.temporal_only

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """The outer part on one video."""
        assert tokens.score is not None
        T, S = tokens.frames()
        x = tokens.features.view(T, S, -1)
        score = tokens.score.view(T, S)
        similarity = self._similarity(tokens, x)
        static = similarity > self.tau
        cut = frame_dp(static[None], self.longest)
        saved = int(cut.saved[0])
        ratio = 1.0 if self.temporal_only else self._ratio(T * S, saved)
        if T > 1:
            inert = f"holitom: tau={self.tau} never reached, largest similarity {float(similarity.max()):.3f}"
            tokens.note("" if saved else inert, "holitom tau")
        parts = _Parts(S)
        for start, stop in windows(cut.starts)[0]:
            alike = (
                static[start : stop - 1].all(0) if stop - start > 1 else torch.zeros_like(score[0], dtype=torch.bool)
            )
            self._static_part(parts, x[start:stop], alike, start, ratio)
            for t in range(start, stop):
                self._dynamic_part(parts, x[t], score[t], ~alike, t, ratio)
        if parts.count == 0:  # everything stood still and the ratio rounds to nothing
            parts.add(select.top_k(score.view(1, -1), 1)[0])
        if isinstance(self.keep, int) and self.keep < T and not self.temporal_only:
            tokens.note(
                f"holitom: keep={self.keep} is below its floor of about one token a frame; {parts.count} were kept"
            )
        reduction = parts.reduction()
        return reduction if tokens.contiguous else _ascending(reduction)

    def _similarity(self, tokens: VisualTokens, x: torch.Tensor) -> torch.Tensor:
        """float32 [T - 1, S]: of each token of x [T, S, D] with the same position in the next frame."""
        if len(x) < 2:
            return x.new_zeros(0, x.shape[1])
        if self.temporal == "codec" and tokens.kind == "video":
            return 1 - change_between(self.info.name, tokens)[1:]
        return signals.cosine_to_previous_frame(x[None])[0]

    def _ratio(self, n: int, saved: int) -> float:
        if isinstance(self.keep, int) and self.keep > n:
            raise MethodError(f"holitom: keep={self.keep} tokens cannot be kept of {n}; the nearest number is {n}.")
        wanted = self.keep if isinstance(self.keep, float) else self.keep / n
        return min(wanted / ((n - saved) / n), 1.0)

    def _static_part(self, parts: _Parts, x: torch.Tensor, alike: torch.Tensor, start: int, ratio: float) -> None:
        places = alike.nonzero().squeeze(1)
        wanted = round(len(places) * ratio)
        if wanted == 0:
            return
        frames = len(x)
        mean = x[:, places].float().mean(0, keepdim=True)
        if wanted == len(places):
            centres, weight, slot = torch.arange(wanted, device=x.device), mean.new_ones(wanted), None
        else:
            centres = select.density_peaks(mean, wanted)
            merge = reduce.merge_to_centres(mean, centres, beta=self.beta)
            centres, weight, slot = centres[0], merge.weight[0], merge.assignment[0]
        slot = torch.arange(wanted, device=x.device) if slot is None else slot
        first = start * parts.S
        rows = slot.repeat(frames)
        cols = (torch.arange(frames, device=x.device)[:, None] * parts.S + places[None]).flatten() + first
        parts.add(places[centres] + first, rows, cols, weight.repeat(frames) / frames)

    def _dynamic_part(
        self, parts: _Parts, x: torch.Tensor, score: torch.Tensor, free: torch.Tensor, t: int, ratio: float
    ) -> None:
        places = free.nonzero().squeeze(1)
        n = len(places)
        if n == 0:
            return
        wanted = math.ceil(n * ratio)
        dominant = round(wanted * (1 - self.contextual))
        best = select.top_k(score[places][None], dominant)[0]
        parts.add(places[best] + t * parts.S)
        if wanted > dominant:
            rest = torch.ones(n, dtype=torch.bool, device=x.device)
            rest[best] = False
            others = places[rest]
            y = x[others].float()[None]
            centres = select.density_peaks(y, wanted - dominant)
            merge = reduce.merge_to_centres(y, centres, beta=self.beta)
            cols = others + t * parts.S
            parts.add(others[centres[0]] + t * parts.S, merge.assignment[0], cols, merge.weight[0])

    def reduce_inside(self, tokens: VisualTokens) -> Reduction | None:
        """The inner part on all visual tokens of a prompt."""
        n = len(tokens)
        wanted = max(1, round(n * self.inner_keep))
        if wanted >= n:
            return None
        assert tokens.score is not None
        kept = select.top_k(tokens.score[None], wanted)
        return reduce.merge_dropped_into_kept(tokens.features[None].float(), kept).reduction(0)


class _Parts:
    """Survivors in output order, and what is merged into them."""

    def __init__(self, S: int) -> None:
        self.S, self.count = S, 0
        self.index: list[torch.Tensor] = []
        self.rows: list[torch.Tensor] = []
        self.cols: list[torch.Tensor] = []
        self.weights: list[torch.Tensor] = []

    def add(
        self, index: torch.Tensor, rows: torch.Tensor | None = None, cols: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        self.index.append(index)
        if rows is not None and cols is not None and weights is not None:
            self.rows.append(rows + self.count)
            self.cols.append(cols)
            self.weights.append(weights)
        self.count += len(index)

    def reduction(self) -> Reduction:
        mix = Mix(torch.cat(self.rows), torch.cat(self.cols), torch.cat(self.weights)) if self.rows else None
        return Reduction(torch.cat(self.index), mix)


def _ascending(reduction: Reduction) -> Reduction:
    # text stands between the frames: each survivor has to stay in its own frame
    index, order = reduction.index.sort()
    if reduction.mix is None:
        return Reduction(index)
    return Reduction(index, Mix(order.argsort()[reduction.mix.rows], reduction.mix.cols, reduction.mix.weights))
