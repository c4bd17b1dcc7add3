"""One token of each cell of a grid, against a loop over cells."""

from __future__ import annotations

import itertools

import pytest
import torch

from mmaccel.errors import MethodError
from mmaccel.tokens.cells import one_a_cell


@pytest.mark.parametrize("seed", [None, 0, 7])
@pytest.mark.parametrize(("grid", "cell"), [((4, 6), 2), ((3, 5, 7), 2), ((2, 4, 4), 3), ((5, 5), 1), ((2, 3), 8)])
def test_each_cell_of_each_frame_has_one(grid, cell, seed):
    marked = one_a_cell(grid, cell, seed)
    frames = marked.view(-1, *grid[-2:])
    for frame in frames:
        for y, x in itertools.product(range(0, grid[-2], cell), range(0, grid[-1], cell)):
            square = frame[y : y + cell, x : x + cell]
            assert square.sum() == 1
            assert seed is not None or square[0, 0]
    assert torch.equal(marked, one_a_cell(grid, cell, seed))


def test_draws_reach_every_place_and_sequences_have_runs():
    drawn = torch.stack([one_a_cell((2, 2), 2, seed) for seed in range(60)]).sum(0)
    assert (drawn > 3).all()
    runs = one_a_cell((10,), 2, 3)
    assert [int(run.sum()) for run in runs.split(4)] == [1, 1, 1]
    assert one_a_cell((9,), 2).nonzero()[:, 0].tolist() == [0, 4, 8]
    with pytest.raises(MethodError, match="cells of 0 x 0"):
        one_a_cell((4, 4), 0)
