"""Scores of tokens that ask for being computed: against loops."""

from __future__ import annotations

import pytest
import torch

from mmaccel.errors import MethodError
from mmaccel.tokens.refresh import cell_bonus, refresh_scores


@pytest.mark.parametrize(("grid", "cell"), [((4, 6), 2), ((3, 5), 2), ((2, 4, 4), 2), ((5, 7), 3), ((7,), 3)])
def test_the_best_token_of_every_cell_is_raised(grid, cell):
    scores = torch.rand(2, torch.Size(grid).numel(), generator=torch.Generator().manual_seed(0))
    planes = scores.view(2, -1, *((1, *grid) if len(grid) == 1 else grid[-2:])).clone()
    height, width = planes.shape[-2:]
    tall = 1 if len(grid) == 1 else cell
    for plane in planes.flatten(0, 1):
        for y in range(0, height, tall):
            for x in range(0, width, cell):
                square = plane[y : y + tall, x : x + cell]
                square[square == square.max()] *= 1.6
    assert torch.allclose(cell_bonus(scores, grid, cell, 0.6), planes.view(2, -1))


def test_equal_scores_raise_one_token_and_a_wrong_grid_is_refused():
    raised = cell_bonus(torch.ones(1, 4), (2, 2), 2, 0.5)
    assert raised.tolist() == [[1.5, 1.0, 1.0, 1.0]]
    with pytest.raises(MethodError, match="do not fill"):
        cell_bonus(torch.ones(1, 5), (2, 2), 2, 0.5)


def test_scores_are_relative_changes_over_their_mean_and_age():
    generator = torch.Generator().manual_seed(1)
    now, reference = torch.randn(2, 5, 3, generator=generator), torch.randn(2, 5, 3, generator=generator)
    age = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0]])
    found = refresh_scores(now, reference, age, staleness=0.5)
    for item in range(2):
        moved = [float((now[item, n] - reference[item, n]).norm() / reference[item, n].norm()) for n in range(5)]
        mean = sum(moved) / 5
        assert found[item].tolist() == pytest.approx([m / mean + 0.5 * n for n, m in enumerate(moved)], rel=1e-5)


def test_nothing_moved_is_a_score_of_age_alone():
    same = torch.randn(1, 4, 3)
    age = torch.tensor([[2.0, 0.0, 1.0, 0.0]])
    assert refresh_scores(same, same, age, staleness=0.25).tolist() == [[0.5, 0.0, 0.25, 0.0]]
    assert refresh_scores(same, same, age).tolist() == [[0.0] * 4]
