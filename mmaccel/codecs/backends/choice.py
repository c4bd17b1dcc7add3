"""Which decoder reads a video, and on which devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch

from mmaccel.codecs.backends import HARDWARE, BackendError, probe
from mmaccel.errors import VideoError

__all__ = ["Backend", "Device", "choose", "places"]

Backend = Literal["auto", "pyav", "decord", "torchcodec", "cuda", "pynvvideocodec"]
Device = str | torch.device | Sequence[str | torch.device] | None


def choose(backend: Backend, device: Device) -> tuple[str, tuple[torch.device, ...], str]:
    """The decoder, the devices that it works on (none for the CPU), and why it is not one on the device asked for.

    "auto" is FFmpeg on the GPU for frames that are wanted there, if that can be had, and PyAV on the CPU else. Raises
    VideoError for what is unknown, and BackendError for hardware that is asked for by name and cannot be used.
    """
    if backend not in get_args(Backend):
        raise VideoError(f"backend must be one of {', '.join(get_args(Backend))}, not {backend!r}")
    devices = places(device, backend)
    on_gpu = all(place.type == "cuda" for place in devices)
    if len(devices) > 1 and not (on_gpu and backend in ("auto", *HARDWARE)):
        raise VideoError("several devices are for decoding on GPUs; pass one device")
    if backend not in ("auto", *HARDWARE) or (backend == "auto" and not on_gpu):
        return ("pyav" if backend == "auto" else backend), (), ""
    chosen = "cuda" if backend == "auto" else backend
    if not on_gpu:
        raise VideoError(f'backend="{chosen}" leaves frames on a GPU; pass device="cuda", or another backend')
    for place in devices:
        reason = probe(chosen, place.index or 0)
        if reason is not None and backend == "auto":
            return "pyav", (), f"decoded on the CPU: {reason}"
        if reason is not None:
            raise BackendError(f'backend="{chosen}" cannot be used: {reason}')
    return chosen, devices, ""


def places(device: Device, backend: Backend = "auto") -> tuple[torch.device, ...]:
    """The devices that an argument names; without it the CPU, or for a hardware decoder the GPU in use."""
    if device is None:
        device = "cuda" if backend in HARDWARE else "cpu"
    named = (device,) if isinstance(device, (str, torch.device)) else tuple(device)
    if not named:
        raise VideoError("device is empty; name at least one device")
    return tuple(_place(one) for one in named)


def _place(name: str | torch.device) -> torch.device:
    try:
        place = torch.device(name)
    except (RuntimeError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise VideoError(f"frames cannot be put on device {name!r} ({reason})") from error
    if place.type == "cuda" and place.index is None:
        return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
    return place
