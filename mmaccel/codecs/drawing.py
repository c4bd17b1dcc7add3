"""What decodes the groups of a video and puts their wanted frames into the canvas; here FFmpeg's software, by PyAV."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from mmaccel.codecs.groups import InterlacedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mmaccel.codecs.canvas import Canvas
    from mmaccel.codecs.groups import Group, GroupReader
    from mmaccel.codecs.picture import Painter

__all__ = ["Hand", "SoftwareHand"]


class Hand(Protocol):
    """Works on one open video, group by group; for one thread. `reader` counts what it has cost."""

    reader: GroupReader

    def draw(self, group: Group, canvas: Canvas, stopped: Callable[[], bool]) -> None:
        """Put the wanted frames of a group into the canvas, until `stopped()` says that nobody wants them any more."""
        ...

    def close(self) -> None:
        """Give the decoder back."""
        ...


class SoftwareHand:
    """Decodes with the reader's own container; raises FrameMismatchError and GeometryChangedError."""

    def __init__(self, reader: GroupReader, painter: Painter) -> None:
        self.reader, self._painter = reader, painter

    def draw(self, group: Group, canvas: Canvas, stopped: Callable[[], bool]) -> None:
        """See `Hand`."""
        try:
            self._read(group, canvas, stopped)
        except InterlacedError:
            self.reader.play()
            self._read(group, canvas, stopped)

    def _read(self, group: Group, canvas: Canvas, stopped: Callable[[], bool]) -> None:
        for slot, frame in self.reader.read(group):
            if stopped():
                return
            canvas.draw(slot, frame, self._painter)

    def close(self) -> None:
        """Its container is the reader's."""
