"""Video in and out: exact sampled frames from any file that FFmpeg reads, and a small writer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmaccel.codecs.cache import CacheStats as CacheStats
    from mmaccel.codecs.cache import CacheWarning as CacheWarning
    from mmaccel.codecs.cache import FrameCache as FrameCache
    from mmaccel.codecs.inspection import VideoProbe as VideoProbe
    from mmaccel.codecs.inspection import probe_video as probe_video
    from mmaccel.codecs.plugin import register as register
    from mmaccel.codecs.plugin import registered as registered
    from mmaccel.codecs.plugin import unregister as unregister
    from mmaccel.codecs.reader import iter_video as iter_video
    from mmaccel.codecs.reader import load_video as load_video
    from mmaccel.codecs.reader import load_videos as load_videos
    from mmaccel.codecs.video import Part as Part
    from mmaccel.codecs.video import Video as Video
    from mmaccel.codecs.video import VideoWarning as VideoWarning
    from mmaccel.codecs.writer import write_video as write_video

_HOMES = {
    "CacheStats": "cache",
    "CacheWarning": "cache",
    "FrameCache": "cache",
    "Part": "video",
    "Video": "video",
    "VideoProbe": "inspection",
    "VideoWarning": "video",
    "iter_video": "reader",
    "load_video": "reader",
    "load_videos": "reader",
    "probe_video": "inspection",
    "register": "plugin",
    "registered": "plugin",
    "unregister": "plugin",
    "write_video": "writer",
}

__all__ = [
    "CacheStats",
    "CacheWarning",
    "FrameCache",
    "Part",
    "Video",
    "VideoProbe",
    "VideoWarning",
    "iter_video",
    "load_video",
    "load_videos",
    "probe_video",
    "register",
    "registered",
    "unregister",
    "write_video",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
