"""What the Triton kernels share: how a head is cut into tiles, and when values are widened on load."""

from __future__ import annotations

import os
import sys

import torch

__all__ = ["head_tiles", "interpreted", "widen"]

_SMALLEST = 16  # of a matrix product's inner side


def head_tiles(D: int) -> tuple[int, int]:
    """Two powers of two that cover D channels, the second 0 if one is enough: 72 is 64 + 16, not 128."""
    first = max(_SMALLEST, 1 << (D.bit_length() - 1))
    rest = D - first
    return first, 0 if rest <= 0 else max(_SMALLEST, 1 << (rest - 1).bit_length())


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU (`TRITON_INTERPRET=1`)."""
    triton = sys.modules.get("triton")
    if triton is None:  # to import it only to be told no would cost the first call a sixth of a second
        return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")
    return bool(triton.knobs.runtime.interpret)


def widen(dtype: torch.dtype) -> bool:
    """Whether a kernel must turn values into float32 as it loads them: the interpreter's bfloat16 is wrong."""
    return dtype == torch.bfloat16 and interpreted()
