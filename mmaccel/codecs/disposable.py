"""Packets that nothing else is predicted from, told by their headers: they may be left out.

Read after the bitstream specifications: ITU-T H.264 (7.4.1, nal_ref_idc), ITU-T H.265 (7.4.2.2, sub-layer non-reference
pictures), ISO/IEC 13818-2 and 14496-2 (picture types). AV1's headers have a file of their own. VP8 and VP9 have no such
packets, as every frame hands motion vectors and probabilities on to the next one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmaccel.codecs.av1 import FrameHeaders

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from av.video.codeccontext import VideoCodecContext

__all__ = ["disposable_test"]

_SPS = 33  # HEVC's NAL unit type


def disposable_test(context: VideoCodecContext) -> Callable[[memoryview], bool] | None:
    """Return what tells of a packet of this stream whether no other frame needs it; None for codecs that cannot say.

    It is to be given every packet from a keyframe on, in decoding order. A wrong "no" costs time only. There is no
    wrong "yes" in streams of whole pictures (interlaced ones may store the two fields of one frame apart).
    """
    name, extra = context.codec.canonical_name, bytes(context.extradata or b"")
    if name == "h264":
        prefix = (extra[4] & 3) + 1 if len(extra) > 6 and extra[0] == 1 else 0
        return lambda data: _h264(_units(data, prefix))
    if name == "hevc":
        # Annex B begins with zeros; anything else is a configuration record.
        record = len(extra) > 22 and (extra[0] == 1 or extra[:3] not in (b"\0\0\0", b"\0\0\1"))
        prefix = (extra[21] & 3) + 1 if record else 0
        layers = (extra[21] >> 3) & 7 if record else _sub_layers(memoryview(extra))
        return (lambda data: _hevc(_units(data, prefix), layers - 1)) if layers else None
    if name in ("mpeg1video", "mpeg2video"):
        return lambda data: _all_coded_as(data, b"\0\0\1\0", lambda head: (head[1] >> 3) & 7 == 3)
    if name == "mpeg4":
        return lambda data: _all_coded_as(data, b"\0\0\1\xb6", lambda head: head[0] >> 6 == 2)
    if name == "av1":
        return FrameHeaders(extra)
    return None


def _units(data: memoryview, prefix: int) -> Iterator[memoryview]:
    """The NAL units of a packet: behind lengths of `prefix` bytes each, or behind start codes if that is 0."""
    if prefix:
        start = 0
        while start + prefix < len(data):
            length = int.from_bytes(data[start : start + prefix], "big")
            yield data[start + prefix : start + prefix + length]
            start += prefix + length
        return
    whole = bytes(data)
    place = whole.find(b"\0\0\1")
    while place >= 0:
        following = whole.find(b"\0\0\1", place + 3)
        yield data[place + 3 : following if following >= 0 else len(data)]
        place = following


def _h264(units: Iterator[memoryview]) -> bool:
    """Whether there are slices, and all say that their picture is no reference."""
    found = False
    for unit in units:
        if len(unit) and unit[0] & 31 in (1, 2, 5, 20):
            if unit[0] & 0x60:
                return False
            found = True
    return found


def _hevc(units: Iterator[memoryview], highest: int) -> bool:
    """Whether there are slices, all of sub-layer non-reference pictures in the highest temporal sub-layer.

    In a lower one, pictures of higher sub-layers may refer to them.
    """
    found = False
    for unit in units:
        kind = (unit[0] >> 1) & 63 if len(unit) > 1 else 63
        if kind < 32:
            if kind > 14 or kind % 2 or (unit[1] & 7) - 1 < highest:
                return False
            found = True
    return found


def _sub_layers(extra: memoryview) -> int:
    """The number of temporal sub-layers that the sequence parameter sets allow; 0 if none is found."""
    found = [(unit[2] >> 1) & 7 for unit in _units(extra, 0) if len(unit) > 2 and (unit[0] >> 1) & 63 == _SPS]
    return max(found) + 1 if found else 0


def _all_coded_as(data: memoryview, code: bytes, wanted: Callable[[bytes], bool]) -> bool:
    """Whether there is a picture behind its start code, and all pictures are of the wanted kind."""
    whole = bytes(data)
    place, found = whole.find(code), False
    while place >= 0:
        head = whole[place + 4 : place + 6]
        if len(head) < 2 or not wanted(head):
            return False
        found = True
        place = whole.find(code, place + 4)
    return found
