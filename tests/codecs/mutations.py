"""Ways of damaging a video file: bytes, elements of its container, packets of its stream. All follow a generator."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import av
import numpy as np
from av.error import FFmpegError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from av.packet import Packet

    Rng = np.random.Generator

# What no writer stores, in every width: nothing, the ends of signed and unsigned numbers, and one off.
ABSURD = (0, 1, 0x7F, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF, 1 << 62, 1 << 63)
FORMATS = {
    "mp4": "mp4", "mkv": "matroska", "webm": "webm", "ts": "mpegts", "avi": "avi", "mpg": "mpeg", "h264": "h264",
    "gif": "gif",
}  # fmt: skip


@dataclass(frozen=True)
class Element:
    """A box, chunk or EBML element: where it starts, where its size is written, where its body is, in bytes."""

    start: int
    size_at: int
    body: int
    end: int


_BOXES = frozenset(b"moov trak mdia minf stbl edts dinf moof traf mvex udta".split())
# How much of a body comes before the first box in it.
_HEADS = {b"stsd": 8, b"avc1": 78, b"hev1": 78, b"hvc1": 78, b"mp4v": 78}
_MASTERS = frozenset(
    number.to_bytes((number.bit_length() + 7) // 8, "big")
    for number in (0x1A45DFA3, 0x18538067, 0x114D9B74, 0x1549A966, 0x1654AE6B, 0xAE, 0xE0, 0x1F43B675, 0xA0, 0x1C53BB6B,
                   0xBB, 0xB7, 0x1254C367)
)  # fmt: skip


def elements(data: bytes) -> list[Element]:
    """All elements of an MP4, AVI or Matroska file, those inside of others too; none for other containers."""
    if data[4:8] == b"ftyp":
        return list(_boxes(data, 0, len(data)))
    if data[:4] == b"RIFF":
        return list(_chunks(data, 0, len(data)))
    return list(_ebml(data, 0, len(data))) if data[:4] == b"\x1a\x45\xdf\xa3" else []


def _boxes(data: bytes, place: int, end: int) -> Iterator[Element]:
    while place + 8 <= end:
        size, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        stop = place + size if 8 <= size <= end - place else end
        yield Element(place, place, place + 8, stop)
        if kind in _BOXES or kind in _HEADS:
            yield from _boxes(data, place + 8 + _HEADS.get(kind, 0), stop)
        place = stop


def _chunks(data: bytes, place: int, end: int) -> Iterator[Element]:
    while place + 8 <= end:
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        stop = min(end, place + 8 + size + size % 2)
        yield Element(place, place + 4, place + 8, stop)
        if data[place : place + 4] in (b"RIFF", b"LIST"):
            yield from _chunks(data, place + 12, stop)
        place = stop


def _ebml(data: bytes, place: int, end: int) -> Iterator[Element]:
    while place < end and data[place]:
        size_at = place + 9 - data[place].bit_length()
        if size_at >= end or not data[size_at]:
            return
        width = 9 - data[size_at].bit_length()
        body = size_at + width
        size = int.from_bytes(data[size_at:body], "big") & ((1 << 7 * width) - 1)
        stop = min(end, body + size)
        yield Element(place, size_at, body, stop)
        if data[place:size_at] in _MASTERS:
            yield from _ebml(data, body, stop)
        place = max(stop, body)


def _span(data: bytes, rng: Rng, longest: int = 4096) -> tuple[int, int]:
    start = int(rng.integers(len(data)))
    return start, min(len(data), start + int(rng.integers(1, min(longest, len(data)) + 1)))


def _number(rng: Rng, width: int) -> bytes:
    return (ABSURD[rng.integers(len(ABSURD))] & ((1 << 8 * width) - 1)).to_bytes(width, rng.choice(["big", "little"]))


def _write(data: bytes, place: int, new: bytes) -> bytes:
    return data[:place] + new[: len(data) - place] + data[place + len(new) :]


def flipped_bits(data: bytes, rng: Rng) -> bytes:
    changed = bytearray(data)
    for place in rng.integers(len(data), size=rng.integers(1, 40)):
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def other_bytes(data: bytes, rng: Rng) -> bytes:
    changed = bytearray(data)
    for place in rng.integers(len(data), size=rng.integers(1, 40)):
        changed[place] = int(rng.integers(256))
    return bytes(changed)


def cut_tail(data: bytes, rng: Rng) -> bytes:
    return data[: rng.integers(1, len(data) + 1)]


def cut_head(data: bytes, rng: Rng) -> bytes:
    return data[int(rng.integers(len(data))) :]


def cut_middle(data: bytes, rng: Rng) -> bytes:
    start, end = _span(data, rng)
    return data[:start] + data[end:] or data


def repeated_range(data: bytes, rng: Rng) -> bytes:
    start, end = _span(data, rng)
    return data[:end] + data[start:end] * int(rng.integers(1, 4)) + data[end:]


def swapped_ranges(data: bytes, rng: Rng) -> bytes:
    a, b, c = sorted(rng.integers(len(data), size=3).tolist())
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def swapped_blocks(data: bytes, rng: Rng) -> bytes:
    """Transport packets and sectors change places."""
    size = int(rng.choice([188, 512, 2048]))
    blocks = [data[start : start + size] for start in range(0, len(data), size)]
    a, b = rng.integers(len(blocks), size=2)
    blocks[a], blocks[b] = blocks[b], blocks[a]
    return b"".join(blocks)


def zeroed(data: bytes, rng: Rng) -> bytes:
    start, end = _span(data, rng)
    return data[:start] + bytes([rng.choice([0, 0, 255])]) * (end - start) + data[end:]


def noise(data: bytes, rng: Rng) -> bytes:
    start, end = _span(data, rng, 512)
    return data[:start] + rng.bytes(end - start) + data[end if rng.integers(2) else start :]


def absurd_number(data: bytes, rng: Rng) -> bytes:
    """In the first or the last kilobyte, where headers and indexes are."""
    place = int(rng.integers(min(1024, len(data))))
    return _write(
        data, place if rng.integers(2) else len(data) - 1 - place, _number(rng, int(rng.choice([1, 2, 4, 8])))
    )


def _some_element(data: bytes, rng: Rng) -> Element | None:
    found = elements(data)
    return found[rng.integers(len(found))] if found else None


def absurd_size(data: bytes, rng: Rng) -> bytes:
    element = _some_element(data, rng)
    return _write(data, element.size_at, _number(rng, 4)) if element else absurd_number(data, rng)


def absurd_field(data: bytes, rng: Rng) -> bytes:
    """A count, time scale, duration, offset or side in a header; chunks of pictures are left alone."""
    found = [element for element in elements(data) if 0 < element.end - element.body <= 4096]
    if not found:
        return absurd_number(data, rng)
    element = found[rng.integers(len(found))]
    width = int(rng.choice([1, 2, 4, 4, 8]))
    place = element.body + width * int(rng.integers(max(1, (element.end - element.body) // width)))
    return _write(data, place, _number(rng, min(width, element.end - element.body)))


def renamed_element(data: bytes, rng: Rng) -> bytes:
    element = _some_element(data, rng)
    return _write(data, element.start + 4 * (data[4:8] == b"ftyp"), b"free") if element else other_bytes(data, rng)


def without_element(data: bytes, rng: Rng) -> bytes:
    element = _some_element(data, rng)
    return (element and data[: element.start] + data[element.end :]) or cut_middle(data, rng)


def repeated_element(data: bytes, rng: Rng) -> bytes:
    element = _some_element(data, rng)
    return data[: element.end] + data[element.start :] if element else repeated_range(data, rng)


# Where the sides of a picture follow a mark, and how many bytes later.
_SIDES = ((b"GIF89a", 6), (b"\0\0\1\xb3", 4), (b"\x9d\x01\x2a", 3), (b"\x49\x83\x42", 3), (b"\xff\xc0", 5),
          (b"avc1", 28), (b"hev1", 28), (b"mp4v", 28), (b"strf", 12), (b"\xb0\x81", 2), (b"\xba\x81", 2))  # fmt: skip


def other_sides(data: bytes, rng: Rng) -> bytes:
    """Another picture size in the headers, for the whole stream or from some picture on."""
    places = [at + skip for mark, skip in _SIDES for at in _all(data, mark)]
    if not places:
        return absurd_field(data, rng)
    place = places[rng.integers(len(places))]
    return _write(data, place, rng.bytes(4) if rng.integers(2) else _number(rng, 2) + _number(rng, 2))


def _all(data: bytes, mark: bytes) -> Iterator[int]:
    place = data.find(mark)
    while place >= 0:
        yield place
        place = data.find(mark, place + 1)


BYTES: tuple[Callable[[bytes, Rng], bytes], ...] = (
    flipped_bits, other_bytes, cut_tail, cut_head, cut_middle, repeated_range, swapped_ranges, swapped_blocks, zeroed,
    noise, absurd_number, absurd_size, absurd_field, absurd_field, renamed_element, without_element, repeated_element,
    other_sides,
)  # fmt: skip


def remuxed(data: bytes, suffix: str, rng: Rng) -> tuple[bytes, str]:
    """A stream copy in which packets are swapped, missing, there twice, damaged, or at other times; and what was done.

    Times stay in order, as muxers insist on that: what is swapped is what the packets hold.
    """
    kind = str(rng.choice(["swapped", "missing", "twice", "damaged", "late", "leap"]))
    with av.open(io.BytesIO(data)) as given:
        stream = given.streams.video[0]
        packets = [packet for packet in given.demux(stream) if packet.size]
        bodies = [bytes(packet) for packet in packets]
        for place in rng.integers(len(packets), size=rng.integers(1, 6)).tolist():
            other = int(rng.integers(len(packets)))
            if kind == "swapped":
                bodies[place], bodies[other] = bodies[other], bodies[place]
            elif kind == "missing":
                bodies[place] = b""
            elif kind == "twice":
                bodies[other] = bodies[place]
            elif kind == "damaged":
                bodies[place] = BYTES[rng.integers(10)](bodies[place] or b"\0", rng)
            elif kind == "late" and packets[place].dts is not None:
                packets[place].pts = packets[place].dts + int(rng.choice([0, 1, 512, 1 << 20, 1 << 32]))
            elif kind == "leap":
                leap = int(rng.choice([1, 1 << 12, 1 << 30, 1 << 33]))
                for packet in packets[place:]:
                    packet.pts, packet.dts = (None if t is None else t + leap for t in (packet.pts, packet.dts))
        target = io.BytesIO()
        try:
            with av.open(target, "w", format=FORMATS[suffix], container_options={"fflags": "+bitexact"}) as copy:
                out = copy.add_stream_from_template(stream, opaque=True)
                for packet, body in zip(packets, bodies, strict=True):
                    if body:
                        copy.mux(_packet(packet, body, out))
        except FFmpegError:
            return data, f"{kind} packets, which the muxer refuses"
    return target.getvalue(), f"{kind} packets"


def _packet(like: Packet, body: bytes, stream: object) -> Packet:
    packet = av.Packet(body)
    packet.pts, packet.dts, packet.time_base, packet.duration = like.pts, like.dts, like.time_base, like.duration
    packet.is_keyframe, packet.stream = like.is_keyframe, stream
    return packet


def mutated(data: bytes, suffix: str, other: bytes, rng: Rng) -> tuple[bytes, str]:
    """Damage a sound file in one to four ways; returns it, never empty, and what was done. `other` is a second file."""
    done = []
    if rng.integers(3) == 0:
        data, what = remuxed(data, suffix, rng)
        done.append(what)
    elif rng.integers(12) == 0:
        a, b = int(rng.integers(1, len(data))), int(rng.integers(len(other)))
        data = data[:a] + other[b:]
        done.append("joined")
    for _ in range(int(rng.integers(not done, 4))):
        mutation = BYTES[rng.integers(len(BYTES))]
        data = mutation(data, rng) or data
        done.append(mutation.__name__)
    return data, ", ".join(done)
