"""What may decode in PyAV's place: hardware, and other libraries.

Each backend has `probe()`, which says in words why it cannot be used here (None if it can). Hardware decoders take
packets and leave pictures in the memory of a GPU: their one method, `decode(packets, wanted)`, decodes one group of
pictures and yields the wanted ones as `Picture`s, which turn themselves into upright, resized, normalised RGB; whoever
calls it finds the groups and seeks. The other libraries open the file themselves and deliver RGB (`rgb.Pictures`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Protocol

from mmaccel.errors import VideoError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from av.packet import Packet
    from av.video.stream import VideoStream

    from mmaccel.codecs.backends.picture import Picture

__all__ = [
    "BACKENDS",
    "HARDWARE",
    "RGB",
    "BackendError",
    "Decoder",
    "decoder_class",
    "load",
    "open_decoder",
    "probe",
    "unsuitable",
]

_HOMES = {
    "decord": ("decord", "DecordPictures"),
    "torchcodec": ("torchcodec", "TorchcodecPictures"),
    "cuda": ("cuda", "CudaDecoder"),
    "pynvvideocodec": ("pynvvideocodec", "NvDecoder"),
}
RGB = ("decord", "torchcodec")
# In the order in which one would choose: the first needs nothing but PyAV.
HARDWARE = ("cuda", "pynvvideocodec")
BACKENDS = ("pyav", *RGB, *HARDWARE)


class BackendError(VideoError):
    """A backend cannot be used on this machine, or cannot give the frames of this video that PyAV gives."""


def unsuitable(backend: str, reason: str) -> BackendError:
    """The error that says why a backend is not used for a video, and what to do."""
    return BackendError(f'backend="{backend}" cannot be used: {reason}; use backend="pyav"')


class Decoder(Protocol):
    """One decoding session; any number of groups of one stream, one after the other. Not for several threads."""

    decoded: int

    def decode(self, packets: Iterable[Packet], wanted: Collection[int]) -> Iterator[tuple[int, Picture]]:
        """Yield (pts, picture) of the wanted frames, in presentation order; see the classes."""
        ...

    def close(self) -> None:
        """Give the session back."""
        ...


def probe(backend: str, device: int = 0) -> str | None:
    """Why a backend cannot decode (on GPU number `device`, if it is hardware), and what to install; None if it can."""
    if backend not in BACKENDS:
        raise VideoError(f"backend={backend!r} is not known; choose {', '.join(BACKENDS)}")
    if backend == "pyav":
        return None
    module = importlib.import_module(f"{__name__}.{_HOMES[backend][0]}")
    if backend in HARDWARE:
        return module.probe(device)
    try:
        module.library()
    except VideoError as error:
        return str(error)
    return None


def decoder_class(backend: str) -> Any:
    """The class that decodes, whether it can be used here or not."""
    home, name = _HOMES[backend]
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def load(backend: str, device: int = 0) -> Any:
    """The class that decodes; BackendError says why there is none here."""
    reason = probe(backend, device)
    if reason is not None:
        raise BackendError(f"backend={backend!r} cannot be used: {reason}")
    return decoder_class(backend)


def open_decoder(backend: str, stream: VideoStream, device: int = 0) -> Decoder:
    """A hardware decoder for a stream on GPU number `device`; VideoError says why there can be none."""
    if backend not in HARDWARE:
        raise VideoError(f"backend={backend!r} is no hardware decoder; choose {', '.join(HARDWARE)}")
    return load(backend, device)(stream, device)
