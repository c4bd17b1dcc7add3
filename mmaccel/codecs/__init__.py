"""Video in and out: exact sampled frames and codec signals of any file that FFmpeg reads, and a small writer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmaccel.codecs.motion import codec_signals as codec_signals
    from mmaccel.codecs.reader import Video as Video
    from mmaccel.codecs.reader import VideoWarning as VideoWarning
    from mmaccel.codecs.reader import load_video as load_video
    from mmaccel.codecs.signals import CodecSignals as CodecSignals
    from mmaccel.codecs.signals import pixel_change as pixel_change
    from mmaccel.codecs.signals import select_frames as select_frames
    from mmaccel.codecs.signals import using_signals as using_signals
    from mmaccel.codecs.writer import write_video as write_video

_HOMES = {
    "CodecSignals": "signals",
    "Video": "reader",
    "VideoWarning": "reader",
    "codec_signals": "motion",
    "load_video": "reader",
    "pixel_change": "signals",
    "select_frames": "signals",
    "using_signals": "signals",
    "write_video": "writer",
}

__all__ = [
    "CodecSignals",
    "Video",
    "VideoWarning",
    "codec_signals",
    "load_video",
    "pixel_change",
    "select_frames",
    "using_signals",
    "write_video",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
