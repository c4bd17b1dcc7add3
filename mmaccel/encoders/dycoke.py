"""DyCoke: in each window of four frames, drop what repeats an earlier frame of the window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from mmaccel.method import Info, Stage, knob
from mmaccel.reducer import BEFORE_LLM, GridReducer
from mmaccel.tokens import allocate, select, signals
from mmaccel.tokens.place import Reduction

if TYPE_CHECKING:
    from mmaccel.core.prefill import VisualTokens

_WINDOW = 4
_BACK = (0, 1, 2, 1)  # frames 2 and 4 of a window are compared with the one before, frame 3 with the first


@dataclass(frozen=True)
class DyCoke(GridReducer):
    """DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models (2024). Images pass unchanged.

    Sentence: 1 - cosine to the same position of an earlier frame of the window -> evenly over all frames but the
    windows' first -> top-k -> drop -> place. Windows hold four frames; frame 2 is compared with frame 1, 4 with 3, and
    3 with 1. A last window that is shorter is treated alike, so it keeps its first frame whole.

    The paper's share k of these frames that is dropped follows from `keep`: with whole windows keep = 1 - 3 k / 4, and
    the default is its k = 0.7. The number kept is exact, with a floor of the windows' first frames: a quarter of the
    tokens, more with a short last window, all of a video of one frame. Differences are compared in steps of 2^-12, ties
    go to the earlier position, so that a still video does not depend on rounding noise.

    Left out: the paper's second part, which parks the keys and values of little attended visual tokens at each decoding
    step and may fetch them back.
    """

    keep: float | int = knob(
        0.475, "fraction in (0, 1] or number of visual tokens kept of each video; at least one frame of four"
    )

    info: ClassVar[Info] = Info(
        name="dycoke", verb="drop", stage=Stage.BEFORE_LLM,
        summary="drops tokens that repeat an earlier frame of their window of four",
        source="DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models", year=2024,
        targets=("video-lm",), slots=(BEFORE_LLM,), licence="no licence file found",
    )  # fmt: skip
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"keep": 0.475, "source": "paper: k = 0.7 of 3 frames in 4"}
    }

    def reduce(self, tokens: VisualTokens) -> Reduction | None:
        """Drop what is most like the earlier frame."""
        if tokens.kind != "video":
            return None
        T, S = tokens.frames()
        n, wanted = len(tokens), self.budget(len(tokens))
        frame = torch.arange(T, device=tokens.features.device)
        later = frame[frame % _WINDOW > 0]
        floor = n - len(later) * S
        if wanted < floor:
            tokens.note(
                f"dycoke: keep={self.keep} asks for {wanted} tokens of a video, and its floor, the first frame of "
                f"every window of {_WINDOW}, {floor}, was kept"
            )
        if len(later) == 0:
            return None
        x = tokens.features.view(T, S, -1)
        earlier = later - torch.tensor(_BACK, device=later.device)[later % _WINDOW]
        change = signals.change(x[later], x[earlier], measure="cosine")
        dropped = allocate.per_frame(n - max(wanted, floor), torch.ones(len(later), device=later.device), S)
        kept = torch.ones(T, S, dtype=torch.bool, device=later.device)
        kept[later] = select.top_k_mask(torch.round(change * 4096), S - dropped)
        return Reduction(kept.flatten().nonzero().squeeze(1))
