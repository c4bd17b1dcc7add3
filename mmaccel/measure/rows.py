"""Results as JSON lines: each row says on which machine and with which versions it was made."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmaccel.errors import MMAccelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["append_rows", "cpu_name", "environment", "load", "read_rows"]

_PACKAGES = ("torch", "transformers", "diffusers", "accelerate", "av", "numpy", "triton")


def environment() -> dict[str, Any]:
    """The machine as it is now, and what runs on it: {"machine": {...}, "versions": {...}, "time": ISO 8601, UTC}.

    machine: cpu (model), cores (that this process may use), threads (of torch), load (mean over one minute), memory_gb,
    gpu (name or None).
    """
    from mmaccel import __version__

    cuda = torch.cuda.is_available()
    machine = {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": load(),
        "memory_gb": _memory(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
    }
    versions = {"mmaccel": __version__, "python": platform.python_version(), "system": platform.system()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if cuda and torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return {
        "machine": machine,
        "versions": versions,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def load() -> float | None:
    """The machine's load now, as a mean over one minute; None where the system does not tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def cpu_name() -> str:
    """The processor's model."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> float | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def append_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Append rows to a file, one JSON object a line; they are on disk when this returns. Gives how many were written.

    Raises:
        MMAccelError: a row holds NaN, infinity or an object that JSON cannot say; then nothing is written.
    """
    lines = []
    for row in rows:
        try:
            lines.append(json.dumps(dict(row), allow_nan=False) + "\n")
        except (TypeError, ValueError) as error:
            raise MMAccelError(f"a result row cannot be written as JSON ({error}): {row}") from error
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _end_last_line(path)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    return len(lines)


def _end_last_line(path: Path) -> None:
    """A line that was cut off by a crash must not swallow the next one; one that only lacks its end is a row."""
    whole = path.read_bytes() if path.exists() else b""
    start = whole.rfind(b"\n") + 1
    if start < len(whole):
        path.write_bytes(whole + b"\n" if _is_row(whole[start:]) else whole[:start])


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file; a last line that was cut off is left out, and a missing file has none.

    Raises:
        MMAccelError: a line is no JSON object.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    if not _is_row(lines[-1]):
        del lines[-1]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise MMAccelError(f"{path}, line {number}, is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise MMAccelError(f"{path}, line {number}, is no JSON object.")
        rows.append(row)
    return rows
