"""Frames with what a method dropped darkened."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mmaccel.errors import MMAccelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

__all__ = ["kept_cells", "strip"]

_GAP = 4
_DIMMED = 0.25


def kept_cells(input_ids: Any, video_token_id: int, kept: Sequence[int], frames: int) -> np.ndarray:
    """Which cells of a square grid per frame are left, bool [frames, side, side].

    input_ids: int64 [S], one prompt with one video. kept: the places in it that are left, as `Report.kept` says.
    Tokens behind the last whole frame (a newline at the end of the video) are no cells.

    Raises:
        MMAccelError: the tokens of a frame form no square.
    """
    places = (input_ids == video_token_id).nonzero().flatten().tolist()
    per_frame = len(places) // frames
    side = round(per_frame**0.5)
    if side * side != per_frame:
        raise MMAccelError(f"{per_frame} tokens a frame form no square, so they cannot be drawn on it.")
    left = set(kept)
    alive = [place in left for place in places[: frames * per_frame]]
    return np.array(alive).reshape(frames, side, side)


def strip(frames: np.ndarray, cells: np.ndarray | None, shrunk: bool = False) -> Image:
    """The frames uint8 [T, H, W, 3] side by side; cells bool [T, h, w] that are not left are dark and grey.

    shrunk: what is left is a corner that holds the whole frame at a smaller size.
    """
    from PIL import Image

    T, H, W, _ = frames.shape
    shown = frames
    if cells is not None and shrunk:
        height, width = H * cells[0].any(1).sum() // cells.shape[1], W * cells[0].any(0).sum() // cells.shape[2]
        shown = np.zeros_like(frames)
        for number, frame in enumerate(frames):
            shown[number, :height, :width] = Image.fromarray(frame).resize((width, height))
    elif cells is not None:
        rows, cols = np.arange(H) * cells.shape[1] // H, np.arange(W) * cells.shape[2] // W
        alive = cells[:, rows][:, :, cols, None]
        grey = frames.mean(axis=-1, keepdims=True)
        shown = np.where(alive, frames, grey * _DIMMED).astype(np.uint8)
    canvas = np.full((H, T * (W + _GAP) - _GAP, 3), 255, dtype=np.uint8)
    for number, frame in enumerate(shown):
        left = number * (W + _GAP)
        canvas[:, left : left + W] = frame
    return Image.fromarray(canvas)
