"""What the settings of a session may be; numbers of numpy and fractions are numbers too, bools are none."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

from mmaccel.errors import MethodError

__all__ = ["is_number", "is_whole", "rate_of"]


def is_whole(value: Any) -> bool:
    """Whether it is a whole number."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a real number."""
    return isinstance(value, Real) and not isinstance(value, bool)


def rate_of(fps: Any) -> float:
    """Frames a second.

    Raises:
        MethodError: it is no positive, finite number.
    """
    if not is_number(fps) or not 0 < fps < float("inf"):
        raise MethodError(f"fps must be a positive number, not {fps!r}.")
    return float(fps)
