"""How much memory can be taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

__all__ = ["free_memory"]


def free_memory(device: Any = "cpu") -> int | None:
    """Free bytes of a device, None where it does not say."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines() if device.type == "cpu" else []
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
