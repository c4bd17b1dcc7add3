"""Decoding on the CPU by torchcodec, with the FFmpeg libraries that are installed on the machine."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mmaccel.errors import VideoError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

__all__ = ["TorchcodecPictures", "library"]


def library() -> Any:
    """The module; VideoError says why there is none, and what to install."""
    try:
        return importlib.import_module("torchcodec.decoders")
    except ModuleNotFoundError as error:
        if error.name != "torchcodec":
            raise
        raise VideoError(
            "torchcodec is not installed; pip install torchcodec, and FFmpeg's shared libraries"
        ) from error
    except (ImportError, OSError, RuntimeError) as error:
        # It tries every version of FFmpeg, and answers with a page of traces.
        reason = str(error).strip().partition("\n")[0]
        raise VideoError(
            f"torchcodec cannot be loaded ({reason}); install FFmpeg's shared libraries, and the torchcodec that is "
            "built for this torch"
        ) from error


class TorchcodecPictures:
    """A video as torchcodec sees it; see `Pictures`. data: a path, or the encoded bytes. Raises VideoError."""

    turned = True

    def __init__(self, data: str | bytes, threads: int) -> None:
        module = library()
        self._failures = (RuntimeError, ValueError, IndexError)
        try:
            self._decoder = module.VideoDecoder(
                data,
                dimension_order="NHWC",
                num_ffmpeg_threads=threads,
                device="cpu",
                seek_mode="exact",
            )
            self.count = len(self._decoder)
            self._first = float(self._decoder.metadata.begin_stream_seconds)
        except self._failures as error:
            raise VideoError(f'torchcodec cannot open the video ({_said(error)}); use backend="pyav"') from error

    def get(self, slots: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """See `Pictures`."""
        try:
            batch = self._decoder.get_frames_at(list(slots))
        except self._failures as error:
            raise VideoError(f'torchcodec cannot decode the video ({_said(error)}); use backend="pyav"') from error
        return batch.data.numpy(), batch.pts_seconds.numpy() - self._first

    def close(self) -> None:
        """See `Pictures`."""
        del self._decoder


def _said(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
