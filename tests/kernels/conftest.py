from __future__ import annotations

import pytest
import torch


@pytest.fixture
def nan_filled():
    """torch.empty is full of NaN (the largest number, for whole ones), so that what a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture
def on_triton(nan_filled):
    """Every op in the test runs its Triton path (in the interpreter where there is no GPU), or raises."""
    from mmaccel import kernels

    with kernels.use("triton"):
        yield
