"""The darkened frames, against loops over pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmaccel.cli.overlay import kept_cells, strip
from mmaccel.errors import MMAccelError

VIDEO = 9


def test_kept_cells_by_counting():
    # two frames of 2 x 2 cells and a newline, between text
    ids = torch.tensor([1, 2, *[VIDEO] * 9, 3])
    kept = [0, 1, 2, 5, 7, 10, 11]
    cells = kept_cells(ids, VIDEO, kept, frames=2)
    assert cells.tolist() == [[[True, False], [False, True]], [[False, True], [False, False]]]


def test_frames_that_form_no_square():
    with pytest.raises(MMAccelError, match="no square"):
        kept_cells(torch.tensor([VIDEO] * 6), VIDEO, [0], frames=2)


def test_dropped_cells_are_grey_and_dark():
    rng = np.random.default_rng(0)
    frames = rng.integers(40, 256, (2, 6, 6, 3), dtype=np.uint8)
    cells = rng.random((2, 3, 3)) < 0.5
    picture = np.array(strip(frames, cells))
    assert picture.shape[0] == 6
    gap = (picture.shape[1] - 12) // 1
    for t in range(2):
        for y in range(6):
            for x in range(6):
                shown, real = picture[y, t * (6 + gap) + x], frames[t, y, x]
                if cells[t, y // 2, x // 2]:
                    assert shown.tolist() == real.tolist()
                else:
                    assert len(set(shown.tolist())) == 1
                    assert shown[0] == int(real.mean() * 0.25)


def test_everything_kept_is_the_frames_themselves():
    frames = np.random.default_rng(1).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    assert np.array_equal(np.array(strip(frames, None)), np.array(strip(frames, np.ones((3, 2, 2), dtype=bool))))


def test_a_smaller_frame_fills_its_corner():
    frames = np.full((1, 8, 8, 3), 200, dtype=np.uint8)
    cells = np.zeros((1, 4, 4), dtype=bool)
    cells[:, :2, :3] = True
    picture = np.array(strip(frames, cells, shrunk=True))
    assert (picture[:4, :6] == 200).all()
    assert not picture[4:].any()
    assert not picture[:, 6:].any()
