"""CodecFrames: of the sampled frames the model is given those that the codec does not call copies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmaccel.codecs.signals import changes_of, select_frames
from mmaccel.encoders.fewer_frames import FewerFrames
from mmaccel.method import Info, Stage


@dataclass(frozen=True)
class CodecFrames(FewerFrames):
    """Give the model the frames of each video that changed most; vision encoder and language model both save.

    Sentence: change in the codec's signals -> whole video -> drop the least changed, one by one -> drop before the
    encoder -> place. The calls it works on stand inside `mmaccel.codecs.using_signals`. Who loads the frames anyway can
    do with `select_frames(signals, keep)` and hand the model fewer frames. In `benchmarks/codecs/signals.toml` two
    frames of eight chosen so answer more than two spaced evenly, one does not; changes of raw pixels, see
    `mmaccel.codecs.pixel_change`, choose as well as the codec's.
    """

    info: ClassVar[Info] = Info(
        name="codec-frames", verb="drop", stage=Stage.INPUT, summary="drops frames that the codec says are copies",
        source="motion vectors and intra blocks of the bitstream", year=2026, targets=("video-lm",),
        slots=("on the frames of the input",), needs=("codec signals",),
    )  # fmt: skip

    def kept(self, video: int, T: int) -> list[int]:
        """Which of the T frames of a video the model is given, ascending.

        Raises:
            NotApplicableError: the call was given no signals of this video, or some of other frames.
        """
        return select_frames(changes_of(self.info.name, video, T), self.keep)
