"""Video in and out: exact sampled frames, signals of the codec, live streams, and a small writer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmaccel.codecs.cache import CacheStats as CacheStats
    from mmaccel.codecs.cache import CacheWarning as CacheWarning
    from mmaccel.codecs.cache import FrameCache as FrameCache
    from mmaccel.codecs.inspection import VideoProbe as VideoProbe
    from mmaccel.codecs.inspection import probe_video as probe_video
    from mmaccel.codecs.live import LiveFrame as LiveFrame
    from mmaccel.codecs.live import LiveStats as LiveStats
    from mmaccel.codecs.live import LiveStream as LiveStream
    from mmaccel.codecs.live import open_stream as open_stream
    from mmaccel.codecs.motion import codec_signals as codec_signals
    from mmaccel.codecs.plugin import register as register
    from mmaccel.codecs.plugin import registered as registered
    from mmaccel.codecs.plugin import unregister as unregister
    from mmaccel.codecs.reader import iter_video as iter_video
    from mmaccel.codecs.reader import load_video as load_video
    from mmaccel.codecs.reader import load_videos as load_videos
    from mmaccel.codecs.signals import CodecSignals as CodecSignals
    from mmaccel.codecs.signals import pixel_change as pixel_change
    from mmaccel.codecs.signals import select_frames as select_frames
    from mmaccel.codecs.signals import using_signals as using_signals
    from mmaccel.codecs.video import Part as Part
    from mmaccel.codecs.video import Video as Video
    from mmaccel.codecs.video import VideoWarning as VideoWarning
    from mmaccel.codecs.writer import write_video as write_video

_HOMES = {
    "CacheStats": "cache",
    "CacheWarning": "cache",
    "CodecSignals": "signals",
    "FrameCache": "cache",
    "LiveFrame": "live",
    "LiveStats": "live",
    "LiveStream": "live",
    "Part": "video",
    "Video": "video",
    "VideoProbe": "inspection",
    "VideoWarning": "video",
    "codec_signals": "motion",
    "iter_video": "reader",
    "load_video": "reader",
    "load_videos": "reader",
    "open_stream": "live",
    "pixel_change": "signals",
    "probe_video": "inspection",
    "register": "plugin",
    "registered": "plugin",
    "select_frames": "signals",
    "unregister": "plugin",
    "using_signals": "signals",
    "write_video": "writer",
}

__all__ = [
    "CacheStats",
    "CacheWarning",
    "CodecSignals",
    "FrameCache",
    "LiveFrame",
    "LiveStats",
    "LiveStream",
    "Part",
    "Video",
    "VideoProbe",
    "VideoWarning",
    "codec_signals",
    "iter_video",
    "load_video",
    "load_videos",
    "open_stream",
    "pixel_change",
    "probe_video",
    "register",
    "registered",
    "select_frames",
    "unregister",
    "using_signals",
    "write_video",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
