"""Decoding on the CPU by decord."""

from __future__ import annotations

import importlib
import io
from typing import TYPE_CHECKING, Any

import numpy as np

from mmaccel.errors import VideoError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["DecordPictures", "library"]


def library() -> Any:
    """The module; VideoError says why there is none, and what to install."""
    try:
        return importlib.import_module("decord")
    except ModuleNotFoundError as error:
        if error.name != "decord":
            raise
        raise VideoError("decord is not installed; pip install decord (Linux, x86-64)") from error
    except (ImportError, OSError, RuntimeError) as error:
        raise VideoError(f"decord cannot be loaded ({str(error).strip().splitlines()[0]}); install it anew") from error


class DecordPictures:
    """A video as decord sees it; see `Pictures`. data: a path, or the encoded bytes. Raises VideoError."""

    turned = True

    def __init__(self, data: str | bytes, threads: int) -> None:
        module = library()
        self._failures = (module.DECORDError, module.DECORDLimitReachedError, RuntimeError)
        target = io.BytesIO(data) if isinstance(data, bytes) else data
        try:
            # A frame that another one stands in for is an error: more than this share of them are. It wants a point.
            self._reader = module.VideoReader(target, ctx=module.cpu(0), num_threads=threads, fault_tol="0.000000001")
            self.count = len(self._reader)
            self._first = float(self._reader.get_frame_timestamp([0])[0, 0])
        except self._failures as error:
            raise VideoError(f'decord cannot open the video ({_said(error)}); use backend="pyav"') from error

    def get(self, slots: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """See `Pictures`."""
        try:
            batch = self._reader.get_batch(list(slots))
            times = self._reader.get_frame_timestamp(list(slots))[:, 0]
        except self._failures as error:
            raise VideoError(f'decord cannot decode the video ({_said(error)}); use backend="pyav"') from error
        # A bridge that the program has chosen makes it another library's tensor.
        images = batch.asnumpy() if hasattr(batch, "asnumpy") else np.asarray(batch)
        return images, times.astype(np.float64) - self._first

    def close(self) -> None:
        """See `Pictures`."""
        del self._reader


def _said(error: Exception) -> str:
    """The message without the trace of C++ that comes with it."""
    first = str(error).strip().partition("\n")[0]
    return first.partition(".cc:")[2].partition(": ")[2] or first
