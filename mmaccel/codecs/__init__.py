"""Video in and out: exact sampled frames from any file that FFmpeg reads, live streams, and a small writer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmaccel.codecs.live import LiveFrame as LiveFrame
    from mmaccel.codecs.live import LiveStats as LiveStats
    from mmaccel.codecs.live import LiveStream as LiveStream
    from mmaccel.codecs.live import open_stream as open_stream
    from mmaccel.codecs.reader import Video as Video
    from mmaccel.codecs.reader import VideoWarning as VideoWarning
    from mmaccel.codecs.reader import load_video as load_video
    from mmaccel.codecs.writer import write_video as write_video

_HOMES = {
    "LiveFrame": "live",
    "LiveStats": "live",
    "LiveStream": "live",
    "Video": "reader",
    "VideoWarning": "reader",
    "load_video": "reader",
    "open_stream": "live",
    "write_video": "writer",
}

__all__ = ["LiveFrame", "LiveStats", "LiveStream", "Video", "VideoWarning", "load_video", "open_stream", "write_video"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
