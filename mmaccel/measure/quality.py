"""What a method costs in quality: accuracy, agreement and divergence, each with an honest interval."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mmaccel.errors import MMAccelError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

__all__ = ["Interval", "bootstrap_difference", "bootstrap_mean", "bootstrap_ratio", "kl_to_dense"]

_CHUNK = 4_000_000  # numbers drawn at a time


@dataclass(frozen=True)
class Interval:
    """An estimate with its percentile bootstrap interval, from n values in `groups` independent groups."""

    value: float
    low: float
    high: float
    n: int
    groups: int
    level: float = 0.95

    def as_dict(self) -> dict[str, float]:
        """Plain data, ready for JSON."""
        return asdict(self)


def bootstrap_mean(
    values: Any, groups: Any = None, *, samples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Mean of `values` [n] with its interval.

    `groups` [n] says which values belong together (the questions of one clip); whole groups are drawn, because answers
    on one clip are not independent. Without it every value is a group.

    Raises:
        MMAccelError: no values, values that are not finite, or arguments of different lengths.
    """
    return _bootstrap((values,), groups, lambda a: a, samples, level, seed)


def bootstrap_difference(
    a: Any, b: Any, groups: Any = None, *, samples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Interval:
    """mean(a) - mean(b) of paired values [n]; each draw takes the same groups of both. Raises as `bootstrap_mean`."""
    return _bootstrap((a, b), groups, lambda a, b: a - b, samples, level, seed)


def bootstrap_ratio(
    a: Any, b: Any, groups: Any = None, *, samples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Interval:
    """mean(a) / mean(b) of paired values [n], b those of the dense model; each draw takes the same groups of both.

    Raises:
        MMAccelError: as `bootstrap_mean`, or the mean of b is 0, in the data or in a draw.
    """
    return _bootstrap((a, b), groups, _ratio, samples, level, seed)


def _ratio(a: Any, b: Any) -> Any:
    if np.any(b == 0):
        raise MMAccelError("a ratio to the dense model needs a dense mean above 0 in every draw; take more questions.")
    return a / b


def _bootstrap(
    columns: tuple[Any, ...], groups: Any, statistic: Callable[..., Any], samples: int, level: float, seed: int
) -> Interval:
    values = np.stack([np.asarray(column, dtype=np.float64).ravel() for column in _equal(columns)])
    n = values.shape[1]
    if n == 0 or not np.isfinite(values).all():
        raise MMAccelError("a bootstrap needs at least one value, all of them finite.")
    if samples < 1 or not 0 < level < 1:
        raise MMAccelError(f"samples must be at least 1 and level inside (0, 1), not {samples} and {level}.")
    names, owner = np.unique(np.arange(n) if groups is None else _equal((groups, columns[0]))[0], return_inverse=True)
    count = len(names)
    sums = np.stack([np.bincount(owner, row, minlength=count) for row in values])
    sizes = np.bincount(owner, minlength=count)
    rng = np.random.default_rng(seed)
    drawn = []
    for start in range(0, samples, max(1, _CHUNK // count)):
        index = rng.integers(0, count, (min(samples - start, max(1, _CHUNK // count)), count))
        drawn.append(statistic(*(row[index].sum(1) / sizes[index].sum(1) for row in sums)))
    low, high = np.quantile(np.concatenate(drawn), ((1 - level) / 2, (1 + level) / 2)).tolist()
    return Interval(float(statistic(*values.mean(1))), low, high, n, count, level)


def _equal(columns: tuple[Any, ...]) -> tuple[Any, ...]:
    lengths = {np.asarray(column).size for column in columns}
    if len(lengths) > 1:
        raise MMAccelError(f"paired values must be equally many, not {sorted(lengths)}.")
    return columns


def kl_to_dense(dense: torch.Tensor, logits: torch.Tensor) -> np.ndarray:
    """KL(dense || other) of next-token logits [n, V], in nats: float64 [n].

    A token that the dense model rules out (logit -inf) counts 0; one that only the other rules out makes it infinite.

    Raises:
        MMAccelError: the shapes differ.
    """
    if dense.shape != logits.shape:
        raise MMAccelError(f"logits of the same questions must have one shape, not {dense.shape} and {logits.shape}.")
    p, q = dense.double().log_softmax(-1), logits.double().log_softmax(-1)
    terms = (p.exp() * (p - q)).masked_fill(p == -np.inf, 0)
    # rounding may leave -1e-17 where the two are equal
    return terms.sum(-1).clamp_min(0).cpu().numpy()
