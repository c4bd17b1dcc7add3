"""The packets around the wanted frames, by the index of an MP4 file: long videos need not be read as a whole."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from av.error import FFmpegError

from mmaccel.codecs.packets import ONE_FRAME_A_PACKET, PacketTable, packs_frames

if TYPE_CHECKING:
    from collections.abc import Callable

    from av.container import InputContainer
    from av.video.stream import VideoStream

__all__ = ["look_up"]

_KEY, _DISCARD = 1, 2
# Below this a scan of the whole file costs next to nothing.
_LEAST_FRAMES = 2_000
# Reading three groups for each wanted frame must be much less than reading all.
_WORTH = 4


class _UnexpectedError(Exception):
    """The packets are not those that the index promises."""


def look_up(container: InputContainer, stream: VideoStream, choose: Callable[[int], np.ndarray]) -> PacketTable | None:
    """Return the table of what is needed for the frames `choose(total)`, int64 slots; None if the file must be scanned.

    For freshly opened MP4 and MOV files with a complete index, without edits that hide frames, whose packets hold one
    frame each. The index has the packets in decoding order and no presentation times. But pictures behind a keyframe in
    decoding order, other than its leading ones, are shown behind it, and all before it are shown before it: so a frame
    stands in the group of pictures where the index has its number, or in the one before. Both and the next are read.
    """
    codec = stream.codec_context.codec.canonical_name
    entries = stream.index_entries
    total = len(entries)
    if "mp4" not in container.format.name or codec not in ONE_FRAME_A_PACKET or codec == "vp9":
        return None
    if not total == stream.frames >= _LEAST_FRAMES:
        return None
    flags = np.fromiter((entry.flags for entry in entries), dtype=np.int64, count=total)
    last = entries[total - 1]
    starts = np.flatnonzero(flags & _KEY)
    if (flags & _DISCARD).any() or last.pos + last.size > container.size >= 0 or not len(starts) or starts[0]:
        return None
    wanted = np.unique(choose(total))
    groups = np.searchsorted(starts, wanted, side="right") - 1
    edge = len(starts) - 1
    needed = np.unique(np.clip([groups - 1, groups, groups + 1], 0, edge))
    needed = np.union1d(needed, [0, min(1, edge), edge])
    if len(needed) * _WORTH > len(starts):
        return None
    bounds = np.append(starts, total)
    try:
        head = next(container.demux(stream))
        delay = (head.pts or 0) - (head.dts or 0)
        rows = [
            row
            for run in np.split(needed, np.flatnonzero(np.diff(needed) > 1) + 1)
            for row in _read(container, stream, bounds[run[0] : run[-1] + 2], delay)
        ]
    except (_UnexpectedError, FFmpegError):
        rows = []
    columns = np.array(rows, dtype=np.int64).reshape(-1, 7).T
    slots, pts, dts, rank, sizes, keys, spans = columns
    if not rows or not np.isin(wanted, slots).all() or slots[0] or slots[-1] != total - 1 or (np.diff(pts) <= 0).any():
        container.seek(int(entries[0].timestamp), stream=stream)
        return None
    return PacketTable(
        codec=codec,
        total=total,
        slots=slots,
        pts=pts,
        dts=dts,
        rank=rank,
        sizes=sizes,
        keys=keys.astype(bool),
        ends=(int(pts[0]), int(pts[-1]), int(spans[-1])),
        tick=float(stream.time_base or 0),
        rate=float(stream.average_rate) if stream.average_rate else None,
        exact=True,
    )


def _read(container: InputContainer, stream: VideoStream, bounds: np.ndarray, delay: int) -> list[tuple[int, ...]]:
    """Read adjoining groups, whose first packets have the ranks `bounds[:-1]`; rows of the table, by slot.

    `delay` is by how much a keyframe is shown later than decoded, in ticks.

    Of the last group only the keyframe is among them, unless it is the last of the file: pictures of the next one may
    be shown between the others.
    """
    entries, codec = stream.index_entries, stream.codec_context.codec.canonical_name
    first, end = int(bounds[0]), int(bounds[-1])
    packets: list[tuple[int, int, int, bool, int]] = []
    # The file is sought by presentation times, the index has those of decoding.
    container.seek(int(entries[first].timestamp) + delay, stream=stream)
    for packet in container.demux(stream):
        if not packet.size or len(packets) == end - first:
            break
        if packet.dts != entries[first + len(packets)].timestamp or packet.is_corrupt or packet.is_discard:
            raise _UnexpectedError
        if packet.pts is None or packet.dts is None or packs_frames(codec, packet):
            raise _UnexpectedError
        packets.append((packet.pts, packet.dts, packet.size, packet.is_keyframe, packet.duration or 0))
    if len(packets) != end - first:
        raise _UnexpectedError
    times = np.array([packet[0] for packet in packets], dtype=np.int64)
    starts = bounds[:-1] - first
    for before, start in pairwise(starts):
        # What comes before a keyframe is shown before it.
        if times[before:start].max() >= times[start]:
            raise _UnexpectedError
    order = np.argsort(times)
    shown = times[order] >= times[0] if first else np.ones(len(order), dtype=bool)
    if end < len(entries):
        shown &= times[order] <= times[starts[-1]]
    rows = []
    for place in np.flatnonzero(shown).tolist():
        row = int(order[place])
        pts, dts, size, key, span = packets[row]
        rows.append((first + place, pts, dts, first + row, size, key, span))
    return rows
