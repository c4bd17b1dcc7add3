"""AV1 headers, written here field by field after the specification."""

from __future__ import annotations

import pytest

from mmaccel.codecs.av1 import FrameHeaders

SEQUENCE, DELIMITER, HEADER, TILES, METADATA, FRAME, LIST, PADDING = 1, 2, 3, 4, 5, 6, 8, 15
KEY, INTER, INTRA_ONLY, SWITCH = range(4)


class Writer:
    def __init__(self) -> None:
        self.bits = ""

    def put(self, *fields: tuple[int, int]) -> Writer:
        """Each field is (value, bits)."""
        for value, count in fields:
            assert 0 <= value < 1 << count
            self.bits += f"{value:0{count}b}" if count else ""
        return self

    def payload(self, tail: bytes = b"") -> bytes:
        bits = self.bits + "1" + "0" * (-(len(self.bits) + 1) % 8)
        return int(bits, 2).to_bytes(len(bits) // 8, "big") + tail


def obu(kind: int, payload: bytes, extension: int | None = None, sized: bool = True) -> bytes:
    head = bytes([kind << 3 | (extension is not None) << 2 | sized << 1])
    head += bytes([extension]) if extension is not None else b""
    # Sizes may be padded: three bytes hold any of these.
    size = len(payload)
    return head + (bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14]) if sized else b"") + payload


def sequence(
    timing: bool = False, even: bool = False, removal: bool = False, ids: bool = False, screen: int | None = None,
    integer: int | None = None, order: int = 7, points: int = 1, layers: int = 0, level: int = 8, still: bool = False,
) -> bytes:  # fmt: skip
    """A sequence header of 5.5.1; `screen` and `integer` are forced values, None leaves them to the frames."""
    w = Writer().put((0, 3), (still, 1), (still, 1))
    if still:
        return obu(SEQUENCE, w.put((level, 5), (7, 4), (7, 4), (127, 8), (63, 8)).payload())
    w.put((timing, 1))
    if timing:
        w.put((1001, 32), (30000, 32), (even, 1))
        if even:
            w.put((0, 2), (1, 1), (2, 2))  # uvlc: two zeros, a one, two bits
        w.put((removal, 1))
        if removal:
            w.put((11, 5), (5, 32), (9, 5), (13, 5))
    w.put((1, 1), (points - 1, 5))
    for _ in range(points):
        w.put((layers, 12), (level, 5))
        if level > 7:
            w.put((1, 1))
        if timing and removal:
            w.put((1, 1), (100, 12), (200, 12), (1, 1))
        w.put((1, 1), (3, 4))
    w.put((7, 4), (6, 4), (127, 8), (63, 7), (ids, 1))
    if ids:
        w.put((5, 4), (2, 3))
    w.put((0b1010101, 7), (order > 0, 1))
    if order:
        w.put((1, 1), (1, 1))
    w.put((screen is None, 1))
    if screen is not None:
        w.put((screen, 1))
    if screen is None or screen:
        w.put((integer is None, 1))
        if integer is not None:
            w.put((integer, 1))
    if order:
        w.put((order - 1, 3))
    return obu(SEQUENCE, w.put((0, 5)).payload())


def frame(
    kind: int = INTER, shown: bool = True, refresh: int = 0, tools: int = 1, resilient: bool = False,
    removed: bool = True, as_kind: int = FRAME, tail: bytes = b"\xff" * 200, sized: bool = True, **of: object,
) -> bytes:  # fmt: skip
    """A frame header of 5.9.2 in a stream whose sequence header was made with the arguments `of`."""
    w = Writer().put((0, 1), (kind, 2), (shown, 1))
    if shown and of.get("removal") and not of.get("even"):
        w.put((0x2AAA, 14))
    if not shown:
        w.put((1, 1))
    if kind != SWITCH and not (kind == KEY and shown):
        w.put((resilient, 1))
    resilient |= kind == SWITCH or (kind == KEY and shown)
    w.put((1, 1))
    if of.get("screen") is None:
        w.put((tools, 1))
    else:
        tools = int(str(of["screen"]))
    if tools and of.get("integer") is None:
        w.put((1, 1))
    if of.get("ids"):
        w.put((0x2BC, 10))
    if kind != SWITCH:
        w.put((0, 1))
    order = int(str(of.get("order", 7)))
    w.put(((1 << order) - 1, order))
    if kind in (INTER, SWITCH) and not resilient:
        w.put((7, 3))
    if of.get("removal"):
        w.put((removed, 1))
        if removed:
            w.put((0x3FF, 10))
    if kind != SWITCH and not (kind == KEY and shown):
        w.put((refresh, 8))
    return obu(as_kind, w.payload(tail), sized=sized)


# Read with any sequence header at all, the flags that stand behind these bits are zeros.
BLANK = obu(FRAME, b"\x30" + bytes(60))


def again(slot: int = 3) -> bytes:
    return obu(HEADER, Writer().put((1, 1), (slot, 3)).payload())


STREAMS = [
    {},
    {"timing": True},
    {"timing": True, "even": True},
    {"timing": True, "removal": True},
    {"timing": True, "removal": True, "even": True},
    {"ids": True},
    {"screen": 0},
    {"screen": 1},
    {"screen": 1, "integer": 0},
    {"integer": 1},
    {"order": 0},
    {"order": 3, "level": 5},
    {"timing": True, "removal": True, "ids": True, "screen": 1, "order": 8},
]


@pytest.mark.parametrize("of", STREAMS, ids=str)
@pytest.mark.parametrize("kind", [INTER, INTRA_ONLY])
def test_the_reference_flags_are_found(of, kind):
    start = sequence(**of)
    headers = FrameHeaders(b"\x81\x00\x00\x00" + start)
    for tools in (0, 1):
        for resilient in (False, True):
            for removed in (False, True):
                rest = {"kind": kind, "tools": tools, "resilient": resilient, "removed": removed, **of}
                assert headers(memoryview(frame(**rest)))
                for bit in range(8):
                    assert not headers(memoryview(frame(refresh=1 << bit, **rest)))


@pytest.mark.parametrize("extra", [b"", sequence(), b"\x81\x00\x00\x00", b"\x81\x00\x00\x00" + sequence()])
def test_the_sequence_header_comes_from_the_extradata_or_the_packets(extra):
    headers = FrameHeaders(extra)
    known = len(extra) > 4
    assert headers(memoryview(frame())) == known
    assert not headers(memoryview(obu(DELIMITER, b"") + sequence() + frame(KEY)))
    assert headers(memoryview(obu(DELIMITER, b"") + frame()))


def test_a_later_sequence_header_replaces_the_first():
    other = {"timing": True, "removal": True, "ids": True, "order": 4}
    headers = FrameHeaders(sequence())
    assert not headers(memoryview(sequence(**other) + frame(KEY, **other)))
    assert headers(memoryview(frame(**other)))
    assert not headers(memoryview(frame(refresh=8, **other)))


@pytest.mark.parametrize(
    "unit",
    [
        frame(KEY),
        frame(KEY, shown=False),
        frame(SWITCH),
        frame(shown=False),
        obu(FRAME, b"\x20" + bytes(60)),
        obu(FRAME, b"\x70" + bytes(60)),
        obu(FRAME, b"\x10" + bytes(60)),
        obu(FRAME, b"\xb0" + bytes(60)),
        again(),
        frame(shown=False, refresh=4) + frame(),
        frame() + again(),
        frame() + frame(),
        obu(LIST, b"\0" * 9) + frame(),
        obu(DELIMITER, b""),
        b"",
    ],
    ids=[
        "key", "hidden key", "switch", "hidden", "blank hidden", "blank switch", "blank key", "blank again",
        "shown again", "hidden and shown", "shown and again", "two", "tiles", "nothing", "empty",
    ],
)  # fmt: skip
def test_other_units_are_kept(unit):
    headers = FrameHeaders(sequence())
    assert not headers(memoryview(unit))
    assert headers(memoryview(frame()))


def test_what_stands_beside_the_frame_does_not_matter():
    headers = FrameHeaders(sequence())
    unit = obu(DELIMITER, b"") + obu(METADATA, b"\1\2") + frame(as_kind=HEADER, tail=b"") + obu(TILES, b"\0" * 50)
    assert headers(memoryview(unit + obu(PADDING, b"\0\0")))
    assert headers(memoryview(obu(DELIMITER, b"") + frame(sized=False)))


@pytest.mark.parametrize("of", [{"points": 2}, {"layers": 0x101}, {"still": True}], ids=str)
def test_layers_and_still_pictures_are_kept(of):
    assert FrameHeaders(sequence())(memoryview(BLANK))
    assert not FrameHeaders(sequence(**of))(memoryview(BLANK))


def test_units_of_a_layer_are_kept():
    headers = FrameHeaders(sequence())
    assert headers(memoryview(bytes([FRAME << 3, 0x30]) + bytes(60)))
    # The bit that says that a byte with the numbers of layers follows.
    assert not headers(memoryview(bytes([FRAME << 3 | 4, 0x30]) + bytes(60)))
    assert not headers(memoryview(obu(FRAME, frame()[4:], extension=0x20)))


def test_damaged_units_are_kept():
    whole = obu(DELIMITER, b"") + frame()
    headers = FrameHeaders(sequence())
    assert headers(memoryview(whole))
    assert not any(headers(memoryview(whole[:end])) for end in range(len(whole)))
    assert not headers(memoryview(obu(FRAME, b"\x30")))
    assert not headers(memoryview(bytes([whole[0] | 0x80]) + whole[1:]))
    assert not headers(memoryview(bytes([FRAME << 3 | 2]) + b"\x80" * 9 + frame()))
    payload = sequence()[4:]
    # The last byte holds nothing that is read.
    for end in range(len(payload) - 1):
        assert not FrameHeaders(obu(SEQUENCE, payload[:end]))(memoryview(BLANK))
