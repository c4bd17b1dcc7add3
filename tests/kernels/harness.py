"""What the kernel tests share: where they run, coverings of shapes, and the bound on errors."""

from __future__ import annotations

import itertools
import os

import pytest
import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# the interpreter widens bfloat16 as it loads, so there is nothing of the GPU's bfloat16 to see in it
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def gpu_only():
    """Skip a test without a GPU, or fail it under MMACCEL_REQUIRE_GPU=1."""
    if not GPU and os.environ.get("MMACCEL_REQUIRE_GPU") == "1":
        pytest.fail("MMACCEL_REQUIRE_GPU=1 and torch sees no CUDA device")
    if not GPU:
        pytest.skip("needs a CUDA device")


def covering(**factors):
    """Combinations, as dictionaries, in which every pair of values of two factors occurs; greedy, always the same."""
    names = list(factors)

    def pairs(values):
        return set(itertools.combinations(enumerate(values), 2))

    every = list(itertools.product(*(range(len(factors[name])) for name in names)))
    missing = set().union(*map(pairs, every))
    chosen = []
    while missing:
        best = max(every, key=lambda values: len(pairs(values) & missing))
        missing -= pairs(best)
        chosen.append({name: factors[name][i] for name, i in zip(names, best, strict=True)})
    return chosen


def describe(case):
    return "-".join(f"{name}={value}".replace("torch.", "") for name, value in case.items())


def as_good_as(got, low, exact, floor):
    """Assert that `got` is at most twice as far from the float64 result as torch in low precision, above a floor."""
    assert got.shape == exact.shape
    error = (got.double().cpu() - exact.cpu()).abs().max() if got.numel() else torch.tensor(0.0)
    allowed = (low.double().cpu() - exact.cpu()).abs().max() if got.numel() else torch.tensor(0.0)
    assert error <= max(2 * allowed, floor), f"error {error:.2e}, torch in this dtype {allowed:.2e}, floor {floor:.0e}"


def strided(x):
    """The same values, read through strides: every second channel of a wider tensor, NaN in between."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan if x.is_floating_point() else 0, dtype=x.dtype)
    wide = wide.to(x.device)
    wide[..., ::2] = x
    return wide[..., ::2]
