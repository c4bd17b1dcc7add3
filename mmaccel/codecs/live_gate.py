"""Which frames of a live stream are whole: what a loss, or a start between two keyframes, has spoilt is not shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from av.video.frame import PictureType

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.frame import VideoFrame

__all__ = ["Gate"]

# Decoders that put a grey picture in for a missing reference.
_INVENTS = frozenset({"flv1", "h263", "mpeg1video", "mpeg2video", "mpeg4", "msmpeg4v3", "wmv1", "wmv2"})


class Gate:
    """Follows the packets and frames of one connection, and counts in `damaged` what must not be shown.

    From a loss up to the next keyframe, and before the first one, pictures are built upon what was never there. A loss
    is what the demuxer (a gap in MPEG-TS counters) or the decoder reports. A packet is counted when it is fed, for many
    of them give no frame.
    """

    def __init__(self, codec: str) -> None:
        self._invents = codec in _INVENTS
        self._founded = self._keyed = self._broken = self._marked = False
        self._floor: int | None = None
        self._counted: set[int] = set()
        self._hidden: set[int] = set()
        self.damaged = 0

    def feed(self, packet: Packet) -> None:
        """Note a packet that the decoder is about to get."""
        pts = packet.pts
        early = not self._keyed and not packet.is_keyframe
        # FFmpeg's parsers put the mark of a torn packet on the one before it, whose end they find in it.
        torn, self._marked = self._marked or packet.is_corrupt, packet.is_corrupt
        if torn:
            self._broken = True
        elif packet.is_keyframe:
            # Pictures stored behind the keyframe but shown before it need the pictures in front of it too.
            self._floor = pts if self._broken else None
            self._broken, self._keyed = False, True
        hidden = self._broken or (pts is not None and self._floor is not None and pts < self._floor)
        if early or hidden:
            self.damaged += 1
            if pts is not None:
                self._counted.add(pts)
        if hidden and pts is not None:
            self._hidden.add(pts)

    def fail(self, packet: Packet | None) -> None:
        """Note that the decoder has failed on a packet."""
        self.damaged += packet is None or packet.pts not in self._counted
        # Without marked keyframes no packet would end the break.
        self._broken |= self._keyed
        self._founded &= self._keyed

    def shows(self, frame: VideoFrame) -> bool:
        """Whether a frame may be shown; to be asked once a frame, in the order in which they come."""
        pts = frame.pts
        counted, hidden = pts in self._counted, pts in self._hidden
        if frame.is_corrupt or (self._invents and frame.pict_type == PictureType.NONE):
            self._founded = False
        elif frame.key_frame and not hidden:
            self._founded = True
        shown = self._founded and not hidden
        # A decoder knows better than a demuxer where the first keyframe is.
        self.damaged += (not shown) - counted
        if pts is not None and self._counted:
            self._counted = {other for other in self._counted if other > pts}
            self._hidden &= self._counted
        return shown
