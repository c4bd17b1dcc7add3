"""mmaccel makes the multimodal model or pipeline that you already have faster.

One line puts it on, the same line undone takes it off exactly, and a report says what it did:

    with mmaccel.accelerate(model, mmaccel.HoliTom(keep=0.15)) as handle:
        model.generate(**inputs)
    print(handle.report())
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mmaccel.api import accelerate, explain, methods
    from mmaccel.codecs import iter_video, load_video, load_videos, open_stream
    from mmaccel.errors import MMAccelError
    from mmaccel.handle import Handle
    from mmaccel.measure.calibrated import Calibration
    from mmaccel.measure.calibration import calibrate
    from mmaccel.method import Method
    from mmaccel.session import stream

_LAZY = {
    "accelerate": "mmaccel.api",
    "explain": "mmaccel.api",
    "methods": "mmaccel.api",
    "Calibration": "mmaccel.measure.calibrated",
    "calibrate": "mmaccel.measure.calibration",
    "iter_video": "mmaccel.codecs",
    "load_video": "mmaccel.codecs",
    "load_videos": "mmaccel.codecs",
    "open_stream": "mmaccel.codecs",
    "MMAccelError": "mmaccel.errors",
    "Handle": "mmaccel.handle",
    "Method": "mmaccel.method",
    "stream": "mmaccel.session",
}

_MODULES = ("codecs", "kernels", "measure", "tiny", "tokens")

__all__ = [
    "Calibration",
    "Handle",
    "MMAccelError",
    "Method",
    "__version__",
    "accelerate",
    "calibrate",
    "explain",
    "iter_video",
    "load_video",
    "load_videos",
    "methods",
    "open_stream",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in _MODULES:
        return import_module(f"mmaccel.{name}")
    if name[:1].isupper():
        for cls in import_module("mmaccel.method").registry().values():
            if cls.__name__ == name:
                return cls
    raise AttributeError(f"module 'mmaccel' has no attribute {name!r}")


def __dir__() -> list[str]:
    known = import_module("mmaccel.method").registry().values()
    return sorted([*__all__, *_MODULES, *(cls.__name__ for cls in known)])
