"""Gaps: how far a sampling goes astray while its velocities are held, and at which steps to compute them anew."""

from __future__ import annotations

import numpy as np
import torch

from mmaccel.errors import MethodError

__all__ = ["early_weights", "held_errors", "levels_of_steps", "remaining_change"]


def early_weights(steps: int, first: float = 3.0) -> torch.Tensor:
    """Return how much an error counts by step: 1 + `first` at the first one down to 1 at the last one, float64 (T,).

    All later steps start from where an early error has led. Our own; 3 was found on the embedded class-to-image model,
    where plans are 1 to 4 dB nearer to dense than with equal weights.
    """
    return 1.0 + first * torch.linspace(1.0, 0.0, steps, dtype=torch.float64)


def held_errors(
    gram: torch.Tensor, times: torch.Tensor, order: int, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the error of a velocity at step t that was computed last at a, and before that at b: float64 [b, a, t].

    gram: (B, T, T), inner products of the velocities of all pairs of steps, of B items. times: (T,), the timesteps.
    order 0 holds the velocity of a; order 1 carries it on along the line through b and a, and b = a means that there is
    no line yet. weights: (T,), factors of the errors of each step, such as its length. The error is the mean over items
    of the length of the difference; entries that are not b <= a < t are 0.
    """
    T = gram.shape[1]
    G = gram.to("cpu", torch.float64)
    t = times.to("cpu", torch.float64)
    b, a, now = torch.meshgrid(*[torch.arange(T)] * 3, indexing="ij")
    run = t[a] - t[b]
    slope = torch.where(run == 0, 0.0, (t[now] - t[a]) / torch.where(run == 0, torch.ones_like(run), run))
    if not order:
        slope = torch.zeros_like(slope)
    # v(t) - (1 + k) v(a) + k v(b), squared, from inner products alone
    one, two = 1.0 + slope, slope
    square = (
        G[:, now, now] + one**2 * G[:, a, a] + two**2 * G[:, b, b]
        - 2 * one * G[:, now, a] + 2 * two * G[:, now, b] - 2 * one * two * G[:, a, b]
    )  # fmt: skip
    errors = square.clamp_min(0).sqrt().mean(0)
    if weights is not None:
        errors = errors * weights.to("cpu", torch.float64)
    return torch.where((b <= a) & (a < now), errors, torch.zeros_like(errors))


def remaining_change(changes: torch.Tensor, levels: int) -> torch.Tensor:
    """Return which share of a change is left when the tokens that changed most are computed, float64 (levels,).

    changes: (..., N), squared lengths by token. Level s of levels computes s / (levels - 1) of the tokens; the last
    one leaves 0, the first one 1.
    """
    ordered = changes.double().sort(-1, descending=True).values
    whole = ordered.sum(-1)
    left = []
    for level in range(levels):
        computed = round(level * ordered.shape[-1] / (levels - 1))
        rest = ordered[..., computed:].sum(-1)
        left.append(torch.where(whole > 0, rest / whole.clamp_min(1e-300), rest).sqrt().mean())
    return torch.stack(left)


def levels_of_steps(errors: torch.Tensor, left: torch.Tensor, total: int, order: int = 1) -> torch.Tensor:
    """Choose a level for each step, so that the levels sum to `total` exactly and the errors add up to least.

    errors: (T, T, T) of `held_errors`. left: (S,), the share of the error that each level leaves; the last level
    computes everything and begins a new gap. The first step is computed whole. Returns int64 (T,). An exact dynamic
    program over step, budget and the last two whole steps.

    Raises MethodError where no choice has this total, and names the nearest that has one.
    """
    T, S = errors.shape[0], left.shape[0]
    whole = S - 1
    if not whole <= total <= whole * T:
        nearest = min(max(total, whole), whole * T)
        raise MethodError(f"no choice of levels sums to {total}; the nearest total that one does is {nearest}")
    E, rest = errors.numpy(), left.tolist()
    best = np.full((T, T, total + 1), np.inf)
    best[0, 0, whole] = 0.0
    levels = np.zeros((T, T, T, total + 1), dtype=np.int8)
    origins = np.zeros((T, T, total + 1), dtype=np.int16)
    for t in range(1, T):
        after = np.full_like(best, np.inf)
        for level in range(whole):
            found = best[:t, :t, : total + 1 - level] + rest[level] * E[:t, :t, t, None]
            place = after[:t, :t, level:]
            better = found < place
            place[better] = found[better]
            levels[t, :t, :t, level:][better] = level
        # [a, budget]: the best way to have computed a last, whatever was before it
        before = best[:t, :t].argmin(0)
        reached = np.take_along_axis(best[:t, :t], before[None], 0)[0][:, : total + 1 - whole]
        if order:
            after[:t, t, whole:] = reached
            origins[t, :t, whole:] = before[:, : total + 1 - whole]
        else:
            after[t, t, whole:] = reached.min(0)
            origins[t, t, whole:] = reached.argmin(0)
        best = after
    b, a = np.unravel_index(best[:, :, total].argmin(), (T, T))
    chosen = []
    for t in range(T - 1, 0, -1):
        if a == t:
            chosen.append(whole)
            total -= whole
            origin = int(origins[t, b, total + whole])
            b, a = (origin, b) if order else (origin, origin)
        else:
            chosen.append(int(levels[t, b, a, total]))
            total -= chosen[-1]
    return torch.tensor([whole, *chosen[::-1]], dtype=torch.int64)
