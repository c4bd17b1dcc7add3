"""EarlyTom: frames that repeat each other become one inside the vision encoder, then tokens are selected in space."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from mmaccel.core.layout import MERGED_SCORE
from mmaccel.errors import MethodError, NotApplicableError
from mmaccel.inner_merge import InnerMerge
from mmaccel.method import Info, Stage, Touch, knob
from mmaccel.reducer import BEFORE_LLM, INSIDE_ENCODER, INSIDE_LLM
from mmaccel.tokens import select
from mmaccel.tokens.frames import FrameGroups, MergedFrames, merge_middles, segments, threshold_for
from mmaccel.tokens.place import Reduction

if TYPE_CHECKING:
    from mmaccel.core.encoder import Encoder
    from mmaccel.core.prefill import VisualTokens
    from mmaccel.install import Installer
    from mmaccel.targets import Target

_DEPTHS = (0.15, 0.54, 0.92)  # layers 4, 14, 24 of 26, one of the paper's choices
# tau by benchmark, at keep 0.10, 0.15, 0.20, 0.25
_TAUS = {
    "mvbench": (0.65, 0.8, 0.8, 0.8),
    "videomme": (0.3, 0.4, 0.5, 0.7),
    "longvideobench": (0.3, 0.5, 0.6, 0.8),
    "egoschema": (0.3, 0.5, 0.6, 0.7),
}


@dataclass(frozen=True)
class EarlyTom(InnerMerge):
    """EarlyTom: Early Token Compression Completes Fast Video Understanding (2026).

    Sentence, inside the vision encoder: mean cosine of two frames, place by place -> segments by a running mean ->
    pairs of middle frames that are the local best -> merge -> the rest of the encoder computes fewer frames. Behind it:
    attention received in the last merging layer, merged with the frames -> the budget over the frames that are left ->
    the best tokens of a segment's first and last frame, one token a window in the frames between -> drop -> place. Then
    HoliTom's merge inside the language model (`inner_keep`).

    keep counts the tokens of all frames that went in. The number kept differs from it by rounding, at most one token a
    living frame; it cannot exceed what the merging leaves. A merged frame stands at the place of the one of its frames
    that is nearest to their mean time, so M-RoPE and time stamps fit. With tau=None (the default) the threshold is
    chosen for each video and layer so that about the share `frames` of them is left; the paper tunes tau and layers by
    benchmark and ratio (`presets`).

    Differs from the authors' code: copies merge, as a pair has to be at least as alike as its segment's ends (`strict`
    asks for more than that, as the paper does); a middle frame that is left over at the end stays; a segment holds up
    to `longest` frames; attention maps are never made, the attention that each token receives is what is merged. Layers
    are counted from 0 (inferred from the code's loop). Images are one frame: only the selection in space is left.
    """

    tau: float | None = knob(
        None, "similarity to its first frame below which a segment ends; None: chosen by `frames`", low=-1.0
    )
    frames: float = knob(0.5, "share of the frames that is to be left, where tau is None", above=0.0, high=1.0)
    layers: tuple[int, ...] | str | None = knob(
        None, 'vision layers, from 0, behind which frames merge: (4, 14, 24) or "4/14/24"; "" for none; None: at 0.15, '
        "0.54 and 0.92 of the depth that is used",
    )  # fmt: skip
    longest: int | None = knob(6, "longest segment in frames; None for any length", low=1)
    ema: float = knob(0.9, "weight of the newest similarity in the running mean of a segment", above=0.0, high=1.0)
    strict: bool = knob(False, "merge only frames that are more alike than the ends of their segment")
    temporal_only: bool = knob(False, "no selection in space: keep is not used, all tokens of what is left stay")

    info: ClassVar[Info] = Info(
        name="earlytom", verb="merge", stage=Stage.ENCODER,
        summary="merges frames inside the vision encoder, selects in space behind it, merges again inside the model",
        source="EarlyTom: Early Token Compression Completes Fast Video Understanding", year=2026,
        targets=("video-lm",), slots=("on the frames of the input", INSIDE_ENCODER, BEFORE_LLM, INSIDE_LLM),
        needs=("vision attention", "decoder attention"), licence="Apache-2.0",
    )  # fmt: skip
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        f"llava-onevision {benchmark} keep {keep:.2f}": {
            "keep": keep, "tau": tau, "layers": "6/21/23", "longest": 6, "strict": True,
            "source": f"tau of the paper for {benchmark}, layers as the code's default, strict comparison of the paper",
        }
        for benchmark, taus in _TAUS.items()
        for keep, tau in zip((0.10, 0.15, 0.20, 0.25), taus, strict=True)
    }  # fmt: skip
    needs_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        given = self.layers
        if isinstance(given, (tuple, list)):
            object.__setattr__(self, "layers", "/".join(map(str, given)))
        elif isinstance(given, int) and not isinstance(given, bool):
            object.__setattr__(self, "layers", str(given))
        super().__post_init__()
        self._numbers()

    def _numbers(self) -> tuple[int, ...] | None:
        if self.layers is None:
            return None
        try:
            numbers = tuple(int(part) for part in str(self.layers).split("/") if part)
        except ValueError:
            numbers = (-1,)
        if any(number < 0 for number in numbers) or list(numbers) != sorted(set(numbers)):
            raise MethodError(f'earlytom: layers={self.layers!r} must be numbers that rise, such as "4/14/24".')
        return numbers

    @property
    def neutral(self) -> bool:
        """Keep everything; merging and the inner part are off as well."""
        return super().neutral and not self.temporal_only

    def merging_layers(self, encoder: Encoder) -> tuple[int, ...]:
        """The blocks behind which frames merge, counted from 0.

        Raises:
            NotApplicableError: the encoder has no such block, or does not use it.
        """
        used, numbers = encoder.last + 1, self._numbers()
        if numbers is None:
            return tuple(sorted({min(round(depth * used), encoder.last) for depth in _DEPTHS}))
        if numbers and numbers[-1] > encoder.last:
            raise NotApplicableError(
                f"earlytom: layers={self.layers} reaches behind the last vision layer that this model uses, "
                f"{encoder.last}."
            )
        return numbers

    def plan(self, target: Target) -> list[Touch]:
        """The vision blocks, the boundary behind them, and the prefill.

        Raises:
            NotApplicableError: the family does not tell frames from images before it encodes them.
        """
        site = target.site
        if "video" not in site.encoders:
            raise NotApplicableError(f"earlytom needs a video encoder, and {site.family} encodes images only.")
        encoder = site.encoder()
        touches = [Touch(f"{encoder.path} layer {n}", "merges frames behind it") for n in self.merging_layers(encoder)]
        touches.append(Touch(encoder.path, "computes the frames that are left"))
        touches += [Touch(name, "gives every frame its place again") for name in _names(site)]
        rest = super().plan(target)
        if layers := self.merging_layers(encoder):
            # scores are read where frames merge, not at the usual layer
            rest = [touch for touch in rest if touch.where != f"vision layer {site.score_layer()}"]
            rest.append(
                Touch(f"{encoder.path} layer {site.sees_whole_frames(max(layers))}", "reads q and k for scores")
            )
        return touches + rest

    def score_name(self, site: Any) -> str:
        """Scores are read where frames merge; without such a place at the usual layer."""
        return MERGED_SCORE if self.merging_layers(site.encoder()) else super().score_name(site)

    def install(self, installer: Installer) -> None:
        """Hook the vision blocks and hand the selection to the prefill hooks."""
        from mmaccel.core.frame_merging import merge_frames

        super().install(installer)
        if self.neutral:
            return
        site = installer.target.site
        encoder = site.encoder()
        if layers := self.merging_layers(encoder):
            patcher, compute = installer.patcher, installer.report.compute
            installer.inside_gates(
                lambda: merge_frames(patcher, site, encoder, layers, self.longest, self.merge, self.cut, compute)
            )

    def merge(self, c: list[list[float]], merged: MergedFrames) -> tuple[FrameGroups, float]:
        """Which of the living frames become one, c their similarities; and the threshold that was used."""
        tau = self.tau
        if tau is None:
            wanted = max(1, round(self.frames * merged.T))
            tau = threshold_for(c, wanted, ema=self.ema, longest=self.longest, strict=self.strict)
        return merge_middles(c, self.cut(c, tau), strict=self.strict), tau

    def cut(self, c: list[list[float]], tau: float) -> list[tuple[int, int]]:
        """The segments of frames with similarities c."""
        return segments(c, tau, ema=self.ema, longest=self.longest)

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """The selection in space on one video."""
        assert tokens.score is not None
        T, S = tokens.frames()
        merged = tokens.merged or MergedFrames(T, [[(t, 1.0)] for t in range(T)], [(t, t + 1) for t in range(T)])
        if tokens.merged is not None and T > 1:
            tokens.note(f"earlytom: {len(merged)} of {T} frames are left behind the encoder", "earlytom frames")
        n = T * S
        if isinstance(self.keep, int) and self.keep > n:
            raise MethodError(f"earlytom: keep={self.keep} tokens cannot be kept of {n}; the nearest number is {n}.")
        wanted = self.keep if isinstance(self.keep, float) else self.keep / n
        ratio = 1.0 if self.temporal_only else min(wanted * T / len(merged), 1.0)
        score = tokens.score.view(T, S)
        kept = []
        for start, stop in merged.cuts:
            for living in range(start, stop):
                place = merged.places[living]
                ends = stop - start <= 2 or living in (start, stop - 1)
                kept.append(place * S + self._select(score[place][None], ratio, ends)[0])
        return Reduction(torch.cat(kept))

    def _select(self, score: torch.Tensor, ratio: float, ends: bool) -> torch.Tensor:
        S = score.shape[1]
        if ends:
            # the product of floats may lie a little above a whole number
            return select.top_k(score, min(S, math.ceil(round(S * ratio, 9))))
        return select.per_window_top_k(score, min(S, max(1, round(S * ratio))))


def _names(site: Any) -> list[str]:
    """What of the family's frame boundary is called, as seen from the user's object."""
    names = {id(module): name for name, module in site.target.named_modules()}
    boundary = [part if isinstance(part, tuple) else (part, "") for part in site.frame_boundary()]
    return [".".join(filter(None, (names[id(module)], method))) for module, method in boundary]
