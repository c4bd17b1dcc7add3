"""Which implementation of an op runs, and the record of what ran and why.

The wish is `MMACCEL_KERNELS=auto|torch|triton` for a process, or `with use("torch"):` for a block. `auto` takes the
fastest path that the device has and says why it fell back; `triton` raises instead of falling back.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Literal, NamedTuple, cast, get_args

from mmaccel.errors import MethodError, NotApplicableError
from mmaccel.kernels.tiles import interpreted

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

__all__ = ["Backend", "Event", "backend", "choose", "no_triton", "record", "recording", "use"]

Backend = Literal["auto", "torch", "triton"]


class Event(NamedTuple):
    """One run of an op: the path that ran and, where a faster one was wished for, why it did not run."""

    op: str
    backend: str
    reason: str | None = None


_wished: ContextVar[Backend | None] = ContextVar("mmaccel_kernels_wished", default=None)
_recorders: ContextVar[tuple[list[Event], ...]] = ContextVar("mmaccel_kernels_recorders", default=())


def _checked(name: str, source: str) -> Backend:
    if name not in get_args(Backend):
        raise MethodError(f"{source} is {name!r}; it must be one of {', '.join(get_args(Backend))}")
    return cast("Backend", name)


def backend() -> Backend:
    """Return the wished backend: the innermost `use`, else `MMACCEL_KERNELS`, else `auto`."""
    return _wished.get() or _checked(os.environ.get("MMACCEL_KERNELS") or "auto", "MMACCEL_KERNELS")


@contextmanager
def use(name: str) -> Iterator[None]:
    """Wish for one backend (`auto`, `torch` or `triton`) inside a `with` block."""
    token = _wished.set(_checked(name, "the kernel backend"))
    try:
        yield
    finally:
        _wished.reset(token)


@contextmanager
def recording() -> Iterator[list[Event]]:
    """Collect an `Event` for each op that runs inside a `with` block, in order; blocks may be nested."""
    events: list[Event] = []
    token = _recorders.set((*_recorders.get(), events))
    try:
        yield events
    finally:
        _recorders.reset(token)


def record(op: str, backend: str, reason: str | None = None) -> None:
    """Tell every open `recording` that `op` ran on `backend`, and the reason if that was a fallback."""
    for events in _recorders.get():
        events.append(Event(op, backend, reason))


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def no_triton(*tensors: torch.Tensor | None) -> str | None:
    """Say why no Triton kernel can take these tensors, None if one can."""
    if not _installed():
        return "triton is not installed"
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cuda" and not (tensor.device.type == "cpu" and interpreted()):
            return f"the tensors are on the {tensor.device.type}, and TRITON_INTERPRET is not set"
        if tensor.is_floating_point() and tensor.element_size() == 8:
            return "float64 has no Triton path"
    return None


def choose(op: str, device: torch.device, *, triton_missing: str | None) -> Literal["torch", "triton"]:
    """Choose the path of one run of `op` and record it.

    `triton_missing` is None where the Triton path can take this input, else the reason why it cannot. Raises
    NotApplicableError when Triton was asked for by name and cannot run.
    """
    wish = backend()
    if wish == "triton" and triton_missing is not None:
        raise NotApplicableError(
            f"the triton backend was asked for, but {op} cannot use it: {triton_missing}; choose auto or torch"
        )
    if wish == "triton" or (wish == "auto" and device.type == "cuda" and triton_missing is None):
        record(op, "triton")
        return "triton"
    record(op, "torch", triton_missing if wish == "auto" and device.type != "cpu" else None)
    return "torch"
