"""Hot tensor operations, one folder each: a short torch specification and the fast paths that must agree with it."""

from __future__ import annotations

from mmaccel.kernels.dispatch import Event, backend, recording, use

__all__ = ["Event", "backend", "recording", "use"]
