"""EVS: of each video keep the first frame, and of the others what differs most from the frame before."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from mmaccel.codecs.signals import change_between
from mmaccel.method import Info, Stage, knob
from mmaccel.reducer import BEFORE_LLM, GridReducer
from mmaccel.tokens import select, signals
from mmaccel.tokens.place import Reduction

if TYPE_CHECKING:
    from mmaccel.core.prefill import VisualTokens


@dataclass(frozen=True)
class EVS(GridReducer):
    """Efficient Video Sampling (2025), as vLLM and SGLang serve it. Images pass unchanged.

    Sentence: 1 - cosine to the same position one frame earlier -> whole video -> top-k -> drop -> place. The number
    kept, max(tokens per frame, keep * tokens), depends on shapes alone; so keep has a floor of one frame, and the
    report shows what was reached. Differences are compared in steps of 2^-12, ties go to the earlier token, so that a
    still video does not depend on rounding noise.

    With temporal="codec" the difference is what the codec of the file says (`mmaccel.codecs.using_signals`), not a
    cosine of features: known before the encoder has run, and worse. In `benchmarks/codecs/signals.toml` it is no better
    than random tokens at small `keep`; `mmaccel.codecs.pixel_change` given in its place comes closer to features.
    """

    temporal: Literal["features", "codec"] = knob(
        "features", "where the change of a token is taken from; codec: see codecs.using_signals",
        choices=("features", "codec"),
    )  # fmt: skip

    info: ClassVar[Info] = Info(
        name="evs", verb="drop", stage=Stage.BEFORE_LLM, summary="drops tokens that repeat the frame before",
        source="Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference", year=2025,
        targets=("video-lm",), slots=(BEFORE_LLM,), licence="Apache-2.0 (vLLM)",
    )  # fmt: skip

    def reduce(self, tokens: VisualTokens) -> Reduction | None:
        """Drop what is most like the frame before."""
        if tokens.kind != "video":
            return None
        T, S = tokens.frames()
        n = len(tokens)
        # the fraction as it is written: the product of floats 0.29 * 100 is below 29
        wanted = int(Decimal(repr(self.keep)) * (T * S)) if isinstance(self.keep, float) else self.budget(n)
        budget = max(S, wanted)
        if wanted < S:
            tokens.note(f"evs: keep={self.keep} asks for {wanted} tokens, and its floor of one frame, {S}, was kept")
        difference = torch.full((T, S), torch.inf, device=tokens.features.device)
        if self.temporal == "codec":
            change = change_between(self.info.name, tokens)[1:]
        else:
            change = 1 - signals.cosine_to_previous_frame(tokens.features.view(1, T, S, -1))[0]
        difference[1:] = torch.round(change * 4096)
        return Reduction(select.top_k(difference.view(1, n), min(n, budget))[0])
