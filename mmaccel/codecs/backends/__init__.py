"""Hardware decoders: packets in, pictures that stay in the memory of a GPU out.

Each backend has `probe()`, which says in words why it cannot be used here (None if it can), and a decoder with one
method, `decode(packets, wanted)`, which decodes one group of pictures and yields the wanted ones as `Picture`s. Whoever
calls it finds the groups and seeks; a `Picture` turns itself into upright, resized, normalised RGB.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Protocol

from mmaccel.errors import VideoError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from av.packet import Packet
    from av.video.stream import VideoStream

    from mmaccel.codecs.backends.picture import Picture

__all__ = ["BACKENDS", "Decoder", "open_decoder", "probe"]

# In the order in which one would choose: the first needs nothing but PyAV.
_HOMES = {"cuda": ("cuda", "CudaDecoder"), "pynvvideocodec": ("pynvvideocodec", "NvDecoder")}
BACKENDS = tuple(_HOMES)


class Decoder(Protocol):
    """One decoding session; any number of groups of one stream, one after the other. Not for several threads."""

    decoded: int

    def decode(self, packets: Iterable[Packet], wanted: Collection[int]) -> Iterator[tuple[int, Picture]]:
        """Yield (pts, picture) of the wanted frames, in presentation order; see the classes."""
        ...

    def close(self) -> None:
        """Give the session back."""
        ...


def _home(backend: str) -> tuple[str, str]:
    if backend not in _HOMES:
        raise VideoError(f"backend={backend!r} is no hardware decoder; choose {', '.join(BACKENDS)}")
    home, name = _HOMES[backend]
    return f"{__name__}.{home}", name


def probe(backend: str, device: int = 0) -> str | None:
    """Why a backend cannot decode on GPU number `device`, and what to install; None if it can."""
    return importlib.import_module(_home(backend)[0]).probe(device)


def open_decoder(backend: str, stream: VideoStream, device: int = 0) -> Decoder:
    """A decoder for a stream on GPU number `device`; VideoError says why there can be none."""
    home, name = _home(backend)
    reason = probe(backend, device)
    if reason is not None:
        raise VideoError(f"backend={backend!r} cannot be used: {reason}")
    return getattr(importlib.import_module(home), name)(stream, device)
