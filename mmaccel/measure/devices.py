"""Devices and dtypes as benchmark options name them."""

from __future__ import annotations

import torch

from mmaccel.errors import MMAccelError

__all__ = ["device_named", "dtype_named"]


def device_named(name: str) -> torch.device:
    """The device called "cpu", "cuda", "cuda:1" or "auto" (CUDA where there is one).

    Raises:
        MMAccelError: CUDA was asked for and is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise MMAccelError("device cuda was asked for, but torch sees no GPU; use device=cpu.")
    return torch.device(name)


def dtype_named(name: str) -> torch.dtype:
    """The dtype that torch calls so.

    Raises:
        MMAccelError: torch has no dtype of this name.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise MMAccelError(f"dtype must be a torch dtype such as bfloat16, not {name!r}.")
    return dtype
