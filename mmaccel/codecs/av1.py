"""AV1's frame headers, read as far as it takes to learn whether a later frame may refer to a frame.

Read after the AV1 Bitstream & Decoding Process Specification (Alliance for Open Media, version 1.0.0 with errata 1):
5.3.2 (OBU header), 5.5 (sequence header), 5.9.2 (uncompressed header). What a frame hands on (pixels, motion vectors,
probabilities, segmentation, loop filter and film grain parameters) is handed on through the reference slots that it
refreshes, and through nothing else (7.20): one that refreshes none leaves no trace.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["FrameHeaders"]

_SEQUENCE_HEADER, _FRAME_HEADER, _FRAME = 1, 3, 6
_TILE_LIST = 8
_KEY, _INTRA_ONLY, _SWITCH = 0, 2, 3
_SELECT = 2  # the frame header says it, not the sequence header
# More than the fields before the reference flags can take where there is one operating point.
_HEADER_BYTES = 32


class FrameHeaders:
    """Tells of the packets of one stream, in decoding order from a keyframe on, whether nothing refers to them.

    `extra` is the extradata of the stream: an av1C record, OBUs, or nothing. The sequence header comes from there or
    from the packets, so every packet must be passed that is decoded and may hold one.
    """

    def __init__(self, extra: bytes) -> None:
        self._read: bytes | None = None
        self._sequence: _Sequence | None = None
        # The record begins with a marker and version 1, which no OBU header does: its first bit is 0.
        record = len(extra) >= 4 and extra[0] == 0x81
        self(memoryview(extra[4:] if record else extra))

    def __call__(self, data: memoryview) -> bool:
        """Whether this temporal unit holds one frame, which is shown and which no other frame can refer to.

        False where that is not certain: for streams in layers, for units with hidden frames, for what is damaged, and
        for a frame that is shown again (as it may be a keyframe, which then refreshes everything; it costs no work).
        """
        frames, alone, place, end = 0, True, 0, len(data)
        while place < end:
            header = data[place]
            kind = (header >> 3) & 15
            # Only OBUs of streams in layers have the second byte of the header.
            if header & 0x84:
                return False
            place += 1
            size = end - place
            if header & 2:
                size, place = _leb128(data, place)
            if size < 0 or place + size > end:
                return False
            if kind == _SEQUENCE_HEADER:
                self._adopt(bytes(data[place : place + size]))
            elif kind in (_FRAME_HEADER, _FRAME):
                frames += 1
                if alone and self._sequence is not None:
                    alone = self._sequence.unreferenced(bytes(data[place : place + min(size, _HEADER_BYTES)]))
                else:
                    alone = False
            elif kind == _TILE_LIST:
                return False
            place += size
        return frames == 1 and alone

    def _adopt(self, payload: bytes) -> None:
        """Read a sequence header, unless it is the last one again."""
        if payload != self._read:
            self._read, self._sequence = payload, _sequence(payload)


class _Bits:
    """The bits of some bytes from the first one on; zeros follow after the end, where `over` turns true."""

    def __init__(self, data: bytes) -> None:
        self._value = int.from_bytes(data, "big")
        self._left = 8 * len(data)

    def __call__(self, count: int) -> int:
        self._left -= count
        shifted = self._value >> self._left if self._left >= 0 else self._value << -self._left
        return shifted & ((1 << count) - 1)

    @property
    def over(self) -> bool:
        return self._left < 0


class _Sequence(NamedTuple):
    """What of a sequence header decides where in a frame header the reference flags stand; sizes are in bits.

    time: the presentation time of a shown frame; removal: the time at which it leaves the buffer, None if there is
    never one; removal_told: whether this operating point has one; screen, integer: `_SELECT` if frames say whether they
    use screen content tools and whole motion vectors; frame_id, order: the number of a frame in decoding and in
    presentation order.
    """

    time: int
    removal: int | None
    removal_told: bool
    frame_id: int
    screen: int
    integer: int
    order: int

    def unreferenced(self, head: bytes) -> bool:
        """Whether a frame header begins that shows a new frame and refreshes no reference slot."""
        bits = _Bits(head)
        if bits(1):
            return False
        kind, shown = bits(2), bits(1)
        if kind in (_KEY, _SWITCH) or not shown:
            return False
        bits(self.time)
        resilient = bits(1)
        bits(1)  # disable_cdf_update
        screen = bits(1) if self.screen == _SELECT else self.screen
        if screen and self.integer == _SELECT:
            bits(1)
        bits(self.frame_id)
        bits(1)  # frame_size_override_flag
        bits(self.order)
        if kind != _INTRA_ONLY and not resilient:
            bits(3)  # primary_ref_frame
        if self.removal is not None and bits(1) and self.removal_told:
            bits(self.removal)
        return bits(8) == 0 and not bits.over


def _leb128(data: memoryview, place: int) -> tuple[int, int]:
    """The number that stands at `place`, -1 if there is none, and the place behind it."""
    value = 0
    for count, byte in enumerate(data[place : place + 8]):
        value |= (byte & 127) << (7 * count)
        if byte < 128:
            return value, place + count + 1
    return -1, place


def _sequence(payload: bytes) -> _Sequence | None:
    """Read a sequence header; None for still pictures, for streams in layers, and if it ends early."""
    bits = _Bits(payload)
    bits(3)  # seq_profile
    bits(1)  # still_picture
    if bits(1):  # reduced_still_picture_header
        return None
    time, removal, removal_told, delay, even = 0, None, False, 0, False
    if bits(1):  # timing_info_present_flag
        bits(64)  # num_units_in_display_tick, time_scale
        even = bool(bits(1))  # equal_picture_interval
        if even:
            _uvlc(bits)
        if bits(1):  # decoder_model_info_present_flag
            delay = bits(5) + 1
            bits(32)  # num_units_in_decoding_tick
            removal = bits(5) + 1
            time = bits(5) + 1
    delays = bits(1)  # initial_display_delay_present_flag
    points, layers = bits(5) + 1, bits(12)
    if points > 1 or layers:
        return None
    if bits(5) > 7:  # seq_level_idx
        bits(1)  # seq_tier
    if removal is not None and bits(1):  # decoder_model_present_for_this_op
        removal_told = True
        bits(2 * delay + 1)
    if delays and bits(1):
        bits(4)
    width, height = bits(4) + 1, bits(4) + 1
    bits(width)
    bits(height)
    frame_id = 0
    if bits(1):  # frame_id_numbers_present_flag
        frame_id = bits(4) + bits(3) + 3
    bits(7)  # use_128x128_superblock ... enable_dual_filter
    order = bits(1)  # enable_order_hint
    if order:
        bits(2)
    screen = _SELECT if bits(1) else bits(1)
    integer = _SELECT
    if screen and not bits(1):
        integer = bits(1)
    order = bits(3) + 1 if order else 0
    if bits.over:
        return None
    return _Sequence(0 if even else time, removal, removal_told, frame_id, screen, integer, order)


def _uvlc(bits: _Bits) -> None:
    """Pass over a number in variable length code (4.10.3)."""
    zeros = 0
    while not bits.over and not bits(1):
        zeros += 1
    bits(zeros)
