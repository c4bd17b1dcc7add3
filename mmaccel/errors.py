"""The errors that mmaccel raises: all are `MMAccelError`, each says what to do next."""

from __future__ import annotations

__all__ = [
    "AdapterError",
    "ConflictError",
    "MMAccelError",
    "MethodError",
    "NonFiniteError",
    "NotApplicableError",
    "StreamError",
    "VideoError",
    "VocabularyError",
]


class MMAccelError(Exception):
    """Base class of every error that mmaccel raises on purpose."""


class MethodError(MMAccelError, ValueError):
    """An unknown method, an unknown knob, or a knob outside its range."""


class AdapterError(MMAccelError, TypeError):
    """The target is of a class for which no adapter exists, or lacks a module that its adapter names."""


class NotApplicableError(MMAccelError, TypeError):
    """The method is known and the target is known, but the two do not fit together."""


class ConflictError(MMAccelError, ValueError):
    """Two methods exclude each other, or stand in an order that cannot work."""


class NonFiniteError(MMAccelError, ArithmeticError):
    """A module produced NaN or infinity where scores are about to be computed from its output."""


class VideoError(MMAccelError, ValueError):
    """A video that cannot be opened or decoded, or a request that it cannot satisfy."""


class StreamError(MMAccelError, ValueError):
    """A streaming session used in a way that cannot work: no frame yet, a budget below one frame, a closed session."""


class VocabularyError(MMAccelError, ValueError):
    """A word that an embedded model was never taught."""
