"""A frame number as black and white blocks in the top of a picture, readable after lossy coding and at any size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["BITS", "draw_number", "numbers_in"]

BITS = 10
# The stripe is an eighth of the picture high.
_STRIPE = 8
_BLACK, _WHITE = 16, 235


def draw_number(luma: np.ndarray, number: int) -> None:
    """Draw the lowest `BITS` bits of a number into the top rows of a luma plane [H, W], in place."""
    height, width = luma.shape
    edges = np.linspace(0, width, BITS + 1).round().astype(int)
    for bit in range(BITS):
        luma[: height // _STRIPE, edges[bit] : edges[bit + 1]] = _WHITE if number >> bit & 1 else _BLACK


def numbers_in(frames: np.ndarray) -> list[int]:
    """The number in each of some RGB pictures, [N, H, W, 3] or [N, 3, H, W], uint8.

    Each bit is the mean of the middle of its block, so neither blur nor ringing at its edges changes it.
    """
    if frames.shape[-1] != 3:
        frames = frames.transpose(0, 2, 3, 1)
    height, width = frames.shape[1:3]
    rows = _middle(0, height / _STRIPE)
    bits = [frames[:, rows, _middle(width * bit / BITS, width * (bit + 1) / BITS)] for bit in range(BITS)]
    return _joined([block.mean(axis=(1, 2, 3)) > 127 for block in bits])


def _middle(start: float, end: float) -> slice:
    quarter = (end - start) / 4
    first = int(start + quarter)
    return slice(first, max(first + 1, int(end - quarter)))


def _joined(bits: Sequence[np.ndarray]) -> list[int]:
    return sum((bit.astype(np.int64) << place for place, bit in enumerate(bits)), np.zeros(len(bits[0]), int)).tolist()
