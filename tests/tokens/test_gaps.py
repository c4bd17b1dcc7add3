"""Errors of held velocities against the definition, and the choice of steps against enumeration of all choices."""

from __future__ import annotations

import itertools

import pytest
import torch

from mmaccel.errors import MethodError
from mmaccel.tokens.gaps import early_weights, held_errors, levels_of_steps, remaining_change


def velocities(steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, steps, 7, generator=generator, dtype=torch.float64).cumsum(1)


def naive_error(v, times, b, a, t, order):
    held = v[:, a]
    if order and b < a:
        held = v[:, a] + (v[:, a] - v[:, b]) * (times[t] - times[a]) / (times[a] - times[b])
    return float((v[:, t] - held).norm(dim=1).mean())


@pytest.mark.parametrize("order", [0, 1])
def test_errors_are_lengths_of_differences(order):
    v, times = velocities(6), torch.tensor([990.0, 800.0, 650.0, 500.0, 200.0, 10.0])
    weights = torch.rand(6)
    found = held_errors(v @ v.mT, times, order, weights)
    for b, a, t in itertools.product(range(6), repeat=3):
        wanted = naive_error(v, times, b, a, t, order) * float(weights[t]) if b <= a < t else 0.0
        assert float(found[b, a, t]) == pytest.approx(wanted, abs=1e-9)


def test_velocities_on_a_line_are_carried_on_without_error():
    times = torch.tensor([9.0, 7.0, 6.0, 2.0])
    v = torch.randn(1, 1, 5, dtype=torch.float64) + times.double()[None, :, None] * torch.randn(1, 1, 5).double()
    errors = held_errors(v @ v.mT, times, 1)
    assert errors[0, 1].abs().max() < 1e-5
    assert errors[0, 0, 2] > 1e-2


def enumerate_all(v, times, left, order):
    best = {}
    steps, whole = v.shape[1], len(left) - 1
    for rest in itertools.product(range(whole + 1), repeat=steps - 1):
        loss, b, a = 0.0, 0, 0
        for t, level in enumerate(rest, 1):
            if level == whole:
                b, a = (a, t) if order else (t, t)
            else:
                loss += left[level] * naive_error(v, times, b, a, t, order)
        total = whole + sum(rest)
        if loss < best.get(total, (float("inf"),))[0]:
            best[total] = loss, (whole, *rest)
    return best


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("left", [[1.0, 0.6, 0.0], [1.0, 0.0], [1.0, 0.5, 0.3, 0.0]])
def test_every_total_agrees_with_enumeration(order, left):
    v, times = velocities(6, seed=len(left)), torch.arange(6, 0, -1.0)
    errors = held_errors(v @ v.mT, times, order)
    for total, (_, levels) in enumerate_all(v, times, left, order).items():
        found = levels_of_steps(errors, torch.tensor(left, dtype=torch.float64), total, order)
        assert found.tolist() == list(levels)
        assert int(found.sum()) == total


def test_a_total_below_the_first_step_or_above_all_is_refused():
    errors = torch.zeros(4, 4, 4, dtype=torch.float64)
    left = torch.tensor([1.0, 0.5, 0.0])
    with pytest.raises(MethodError, match="sums to 1; the nearest total that one does is 2"):
        levels_of_steps(errors, left, 1)
    with pytest.raises(MethodError, match="nearest total that one does is 8"):
        levels_of_steps(errors, left, 9)


def test_what_is_left_of_a_change():
    changes = torch.tensor([[0.0, 16.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    # the first item is done with one token of four; the second one falls with the root of the number that is left
    wanted = [1.0, 0.75**0.5 / 2, 0.5**0.5 / 2, 0.25, 0.0]
    assert torch.allclose(remaining_change(changes, 5), torch.tensor(wanted, dtype=torch.float64))
    assert remaining_change(torch.zeros(1, 4), 5).tolist() == [0.0] * 5


def test_early_errors_count_more():
    assert early_weights(4).tolist() == pytest.approx([4.0, 3.0, 2.0, 1.0])
