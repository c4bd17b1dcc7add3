"""What a method costs in quality: accuracy, agreement, divergence, each with an honest interval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = ["Interval", "bootstrap_difference", "bootstrap_mean", "bootstrap_ratio", "kl_to_dense"]


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
        raise NotImplementedError


def bootstrap_mean(
    values: Any, groups: Any = None, *, samples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Mean of `values` [n] with its interval; whole groups [n] (questions of one clip) are drawn together."""
    raise NotImplementedError


def bootstrap_difference(
    a: Any, b: Any, groups: Any = None, *, samples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Interval:
    """mean(a) - mean(b) of paired values [n], both drawn together."""
    raise NotImplementedError


def bootstrap_ratio(
    a: Any, b: Any, groups: Any = None, *, samples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Interval:
    """mean(a) / mean(b) of paired values [n], both drawn together; b is the dense model's, its mean above 0."""
    raise NotImplementedError


def kl_to_dense(dense: torch.Tensor, logits: torch.Tensor) -> np.ndarray:
    """KL(dense || other) of next-token logits [n, V] in nats, float64 [n]."""
    raise NotImplementedError
