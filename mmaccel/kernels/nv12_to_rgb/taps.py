"""The numbers that the conversion works with, as libswscale has them: filter taps in 14 and 12 bits, colours in 13.

They follow libswscale's integer arithmetic step by step, roundings included, because a picture that is to be the same
on every device needs the same taps.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from mmaccel.errors import MethodError

__all__ = ["ACROSS_BITS", "DOWN_BITS", "INTERPOLATIONS", "MATRICES", "colour", "filter_taps", "tables"]

ACROSS_BITS, DOWN_BITS = 14, 12
# Red's and blue's share in luma.
MATRICES = {
    "bt601": (0.299, 0.114),
    "bt709": (0.2126, 0.0722),
    "bt2020": (0.2627, 0.0593),
    "fcc": (0.30, 0.11),
    "smpte240m": (0.212, 0.087),
}
# Source pixels under the kernel of one target pixel, at equal sizes.
_SUPPORT = {"BICUBIC": 4, "BILINEAR": 2, "AREA": 1, "LANCZOS": 6, "POINT": 0}
INTERPOLATIONS = tuple(_SUPPORT)
# Filters are filled up to a multiple of this: taps next to the cut then stay in.
_MULTIPLE = {ACROSS_BITS: 4, DOWN_BITS: 2}
_LONGEST = 256  # from here on libswscale resizes in two steps, with other results
_NEGLIGIBLE = 0.002


def colour(matrix: str, full_range: bool) -> list[int]:
    """The six whole numbers of a matrix and range: luma's, red's, blue's and green's two factors, luma's offset.

    Factors are in 1/8192; the offset is in eighths of a level.
    """
    red, blue = MATRICES[matrix]
    green = 1 - red - blue
    parts = (2 * (1 - red), 2 * (1 - blue), -2 * blue * (1 - blue) / green, -2 * red * (1 - red) / green)
    fine = [65536 * 255 // 219, *(round(65536 * 255 / 224 * part) for part in parts)]
    if full_range:
        # libswscale keeps the factors of the limited range, and takes these back
        fine = [65536, *(int(part * 224 / 255) for part in fine[1:])]
    return [*((part + 4) >> 3 for part in fine), 0 if full_range else 128]


def _weights(step: int, source: int, target: int, how: str, one: int) -> tuple[np.ndarray, np.ndarray]:
    """First source pixel [n] and weights [n, K], as fractions of `one`; positions are in 1/65536 of a pixel."""
    place = np.arange(target, dtype=np.int64)
    if abs(step - 65536) < 10:
        return place, np.full((target, 1), one, dtype=np.int64)
    if how == "POINT":
        return (step // 2 + step * place) >> 16, np.full((target, 1), one, dtype=np.int64)
    if how == "AREA" and step <= 65536:
        centre = step // 2 - 32768 + step * place
        at = centre >> 16
        far = np.abs(((at[:, None] + np.arange(2)) << 16) - centre[:, None])
        return at, np.maximum(one - far * (one >> 16), 0)
    support = _SUPPORT[how]
    length = 1 + support if step <= 65536 else 1 + (support * source + target - 1) // target
    length = max(1, min(length, source - 2))
    centre = step - 65536 + 2 * step * place
    at = _towards_zero(centre - (length - 2) * 65536, 1 << 17)
    far = np.abs((at[:, None] + np.arange(length)) * (1 << 17) - centre[:, None]) << 13
    if step > 65536:
        far = far * target // source
    return at, _kernel(far, step, how, one)


def _kernel(far: np.ndarray, step: int, how: str, one: int) -> np.ndarray:
    """The weight at distances in units of 2^-30 source pixels (of target pixels, if the picture shrinks)."""
    unit = 1 << 30
    if how == "BILINEAR":
        return np.maximum(unit - far, 0) * (one >> 30)
    if how == "AREA":
        edge = step * (far - unit // 2)
        return np.clip((1 << 45) - edge, 0, 1 << 46) * (one >> 46)
    if how == "LANCZOS":
        x = np.maximum(far * (1.0 / unit), 1e-12)
        window = np.sin(x * np.pi) * np.sin(x * np.pi / 3.0) / (x * x * np.pi * np.pi / 3.0)
        return np.where(far == 0, one, np.where(x > 3.0, 0, np.trunc(window * one))).astype(np.int64)
    # Mitchell and Netravali's cubic with B = 0 and C = 0.6, six times over, in 24 bits.
    square = (far * far) >> 30
    cube = (square * far) >> 30
    c, whole = int(0.6 * (1 << 24)), 1 << 24
    near = (12 * whole - 6 * c) * cube + (6 * c - 18 * whole) * square + 6 * whole * unit
    tail = -6 * c * cube + 30 * c * square - 48 * c * far + 24 * c * unit
    return _towards_zero(np.where(far < unit, near, np.where(far < 2 * unit, tail, 0)), (1 << 54) // one)


def _towards_zero(value: np.ndarray, divisor: int) -> np.ndarray:
    return np.sign(value) * (np.abs(value) // divisor)


def _trimmed(at: list[int], weights: np.ndarray, one: int, multiple: int) -> tuple[list[int], np.ndarray]:
    """Shift what is next to nothing out on the left, and cut as many taps on the right as no pixel needs."""
    rows, needed, most = weights.tolist(), 0, _NEGLIGIBLE * one
    for i in range(len(rows) - 1, -1, -1):
        row, gone = rows[i], 0
        for _ in range(len(row)):
            gone += abs(row[0])
            if gone > most or (i + 1 < len(rows) and at[i] >= at[i + 1]):
                break
            row.append(row.pop(0) * 0)
            at[i] += 1
        length, gone = len(row), 0
        while length > 1:
            gone += abs(row[length - 1])
            if gone > most:
                break
            length -= 1
        needed = max(needed, length)
    if needed == 1 and multiple == 2:
        multiple = 1
    length = -(-needed // multiple) * multiple
    kept = np.zeros((len(rows), length), dtype=np.int64)
    given = np.array(rows, dtype=np.int64)[:, :length]
    kept[:, : given.shape[1]] = given
    return at, kept


def _inside(at: list[int], weights: np.ndarray, source: int) -> None:
    """Give what falls outside the picture to its first and last pixel, in place."""
    K = weights.shape[1]
    for i, first in enumerate(at):
        if 0 <= first <= source - K:
            continue
        pixels = np.clip(np.arange(first, first + K), 0, source - 1)
        at[i] = max(0, min(first, source - K))
        row = np.zeros(K, dtype=np.int64)
        np.add.at(row, pixels - at[i], weights[i])
        weights[i] = row


def filter_taps(source: int, target: int, how: str, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """How `source` pixels in a line become `target`: first source pixel int64 [n], taps int64 [n, K] of 2^bits in sum.

    Taps may be filled up with zeros beyond the last source pixel. Raises MethodError where a side shrinks so much that
    the filter is longer than 255 pixels.
    """
    step = ((source << 16) + (target >> 1)) // target
    one = 1 << (54 - min(max(source // target, 1).bit_length() - 1, 8))
    first, weights = _weights(step, source, target, how, one)
    at, weights = _trimmed(first.tolist(), weights, one, _MULTIPLE[bits])
    if weights.shape[1] >= _LONGEST:
        raise MethodError(f"{source} pixels cannot become {target} with {how} in one step; resize twice, or less")
    _inside(at, weights, source)

    total = (weights.sum(1) + (1 << bits) // 2) // (1 << bits)
    total[total == 0] = 1
    taps, rest = np.empty_like(weights), np.zeros_like(total)
    for k in range(weights.shape[1]):
        # what rounding one tap has lost or won goes to the next
        value = weights[:, k] + rest
        taps[:, k] = np.sign(value) * ((np.abs(value) + (total >> 1)) // total)
        rest = value - taps[:, k] * total
    return np.array(at, dtype=np.int64), taps


@functools.lru_cache(maxsize=256)
def tables(source: int, target: int, how: str, bits: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """`filter_taps` on a device: first pixels int32 [n], taps int32 [K, n]; kept for the next frame of the size."""
    at, taps = filter_taps(source, target, how, bits)
    return torch.from_numpy(at).int().to(device), torch.from_numpy(taps.T.copy()).int().to(device)
