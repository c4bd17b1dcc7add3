"""Groups of pictures: which ones hold wanted frames, and how one of them is decoded with the least work.

After 'Enabling Disaggregated Multi-Stage MLLM Inference via GPU-Internal Scheduling and Resource Sharing' (FlashCodec):
a group from one keyframe to the next can be decoded without the others. What is inferred, not read there: that the last
wanted frame of a group ends its decoding, and the order of the work. Leaving out the frames that nothing refers to is
ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from av.error import FFmpegError
from av.video.frame import PictureType

from mmaccel.codecs.disposable import disposable_test

if TYPE_CHECKING:
    from collections.abc import Iterator

    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

    from mmaccel.codecs.packets import PacketTable

__all__ = [
    "INVENTS",
    "REPORT_LOSS",
    "THREADS_HIDE_LOSS",
    "FrameMismatchError",
    "Group",
    "GroupReader",
    "InterlacedError",
    "groups_for",
]

# Decoders that report every picture that a lost piece of its packet has spoiled.
REPORT_LOSS = frozenset({"h264", "hevc"})
# Decoders that put a grey picture in for a missing reference.
INVENTS = frozenset(
    {"flv1", "h263", "mpeg1video", "mpeg2video", "mpeg4", "msmpeg4v1", "msmpeg4v2", "msmpeg4v3", "wmv1", "wmv2"}
)
# Decoders whose threads patch up damage without a word: the same ones.
THREADS_HIDE_LOSS = INVENTS
# Film shown as video repeats every other frame half as long again.
_HOLE = 1.75
# As many packets are read and thrown away rather than sought over.
_READ_ON = 128


class FrameMismatchError(Exception):
    """The decoder delivered other frames than the packets promise."""


class InterlacedError(Exception):
    """A stream of interlaced pictures, in which packets may hold one field of two."""


@dataclass(frozen=True)
class Group:
    """A group of pictures and the wanted frames in it.

    `key` is the slot at which decoding starts, `key_rank` the place of its packet in the file, `slots` the wanted
    frames in ascending order, `until` the place of the last packet that they need, `cost` how many frames a decoder
    delivers up to the last wanted one if none is left out. `steady` says that there is a keyframe to start from and no
    hole in the times: else packets may be missing, and what a decoder makes of that depends on all that it is given.
    """

    key: int
    key_rank: int
    slots: tuple[int, ...]
    until: int
    cost: int
    steady: bool

    def opening(self) -> Group:
        """The keyframe of the group alone."""
        return replace(self, slots=(self.key,), until=self.key_rank, cost=1, steady=True)


def groups_for(table: PacketTable, slots: np.ndarray) -> list[Group]:
    """Sort wanted slots into the groups that must be decoded for them, in presentation order.

    Leading pictures of an open group belong to the group before, which ends with them: only the keyframe between is
    decoded twice, where both are needed.
    """
    rows = np.searchsorted(table.slots, np.unique(slots))
    keys = np.flatnonzero(table.keys)
    starts = keys[np.maximum(np.searchsorted(keys, rows, side="right") - 1, 0)] if len(keys) else np.zeros_like(rows)
    # Before the first keyframe there is nothing to start from but the beginning.
    starts = np.where(starts > rows, 0, starts)
    steps = np.diff(table.pts, append=table.ends[1])
    hole = steps > _HOLE * max(float(np.median(steps)), 1.0)
    # Between the runs of packets of a table that is not whole there is nothing missing.
    hole[:-1] &= np.diff(table.slots) == 1
    holes = np.concatenate(([0], np.cumsum(hole)))
    found: list[Group] = []
    for start in np.unique(starts):
        members = rows[starts == start]
        end = keys[np.searchsorted(keys, start, side="right") :][:1]
        key, last = int(table.slots[start]), int(table.slots[members[-1]])
        group = Group(
            key=key,
            key_rank=int(table.rank[start]),
            slots=tuple(table.slots[members].tolist()),
            until=int(table.rank[members].max()),
            cost=last - key + 1,
            steady=bool(table.keys[start]) and holes[end[0] if len(end) else len(table.slots)] == holes[start],
        )
        found.append(group)
    return found


class GroupReader:
    """Decodes groups of one open video, one after another, in any order. For one thread.

    `skip` leaves out packets that no other frame needs, where their frame is not wanted, and stops at the last packet
    that a wanted frame needs; without it every frame from the keyframe to the last wanted one is decoded, as in
    playing. `decoded`, `skipped`, `seeks` count frames delivered, packets left out and jumps, over all groups.
    """

    def __init__(self, container: InputContainer, stream: VideoStream, table: PacketTable, skip: bool = True) -> None:
        self._container, self._stream, self._table, self._skip = container, stream, table, skip
        codec = stream.codec_context.codec.canonical_name
        self._disposable = disposable_test(stream.codec_context)
        self._invents = codec in INVENTS
        # At the seam of two joined streams MPEG-TS counts a loss where nothing is lost.
        self._lenient = container.format.name == "mpegts" and codec in REPORT_LOSS
        self._packets: Iterator[Packet] | None = None
        self._rank = 0
        self.decoded = self.skipped = self.seeks = 0

    def play(self) -> None:
        """Leave nothing out from now on."""
        self._skip = False

    def read(self, group: Group) -> Iterator[tuple[int, VideoFrame]]:
        """Yield each wanted slot and its frame, in presentation order.

        Raises FrameMismatchError as soon as the frames that arrive are not, one by one, those of the table, or are
        damaged, and InterlacedError where leaving packets out is not safe; what was yielded before is void then.
        """
        table = self._table
        wanted = {int(table.pts[table.row(slot)]): slot for slot in group.slots}
        start, end = int(table.pts[table.row(group.key)]), max(wanted)
        # What the last group has left in the decoder, and the end that it was told of.
        self._stream.codec_context.flush_buffers()
        missing, awaited, last, delivered = set(wanted), set[int](), start - 1, 0
        skip = self._skip and group.steady
        for packet in self._needed(group, missing, awaited):
            for frame in self._decode(packet):
                if frame.pts is not None and frame.pts < start:
                    continue  # stored behind the keyframe but shown before it: it cannot be decoded from here
                if frame.pts is None or frame.pts not in awaited or frame.pts <= last or not self._sound(frame):
                    raise FrameMismatchError
                if skip and self._disposable and frame.interlaced_frame:
                    raise InterlacedError
                # In playing, nothing may be left out between two frames.
                if not skip and table.slot_at[frame.pts] != group.key + delivered:
                    raise FrameMismatchError
                last = frame.pts
                awaited.discard(last)
                delivered += 1
                self.decoded += 1
                if last in wanted:
                    yield wanted[last], frame
                if not skip and last == end:
                    return
        if missing or awaited:
            raise FrameMismatchError

    def packets(self, group: Group) -> Iterator[Packet]:
        """The packets that `read` would decode, for a decoder that tells frames apart and stops by itself.

        Raises FrameMismatchError where the packets are damaged, or other ones than the table says.
        """
        wanted = {int(self._table.pts[self._table.row(slot)]) for slot in group.slots}
        for packet in self._needed(group, wanted, set()):
            if packet is not None:
                yield packet

    def _needed(self, group: Group, missing: set[int], awaited: set[int]) -> Iterator[Packet | None]:
        """The packets to be decoded, then None.

        Takes the pts of wanted frames out of `missing`, and puts those of all frames to come into `awaited`.
        """
        table, wanted, start = self._table, frozenset(missing), int(self._table.pts[self._table.row(group.key)])
        skip = self._skip and group.steady
        disposable = self._disposable if skip else None
        for packet in self._packets_of(group, start, missing if skip else {start}):
            time = None if packet is None or packet.pts is None else packet.pts
            if packet is not None and time in table.slot_at and time >= start:
                # Wanted packets are looked at too: they may bring headers that later ones are read by.
                if disposable and disposable(memoryview(packet)) and time not in wanted:
                    self.skipped += 1
                    continue
                awaited.add(time)
                missing.discard(time)
            yield packet

    def _packets_of(self, group: Group, start: int, missing: set[int]) -> Iterator[Packet | None]:
        """Packets from the keyframe on, as long as any is missing, then None."""
        packet: Packet | None = self._enter(group, start)
        while packet is not None and packet.size:
            if packet.is_corrupt and not self._lenient:
                raise FrameMismatchError
            self._rank += packet.pts in self._table.slot_at
            yield packet
            if not missing:
                break
            packet = self._next()
        yield None

    def _enter(self, group: Group, start: int) -> Packet:
        """Go to the keyframe and return its packet."""
        row = self._table.row(group.key)
        earlier = np.flatnonzero(self._table.keys[:row])[-1:]
        aims: list[int | None] = [start, int(self._table.dts[row]), *self._table.dts[earlier].tolist()]
        if self._packets is not None and 0 <= group.key_rank - self._rank <= _READ_ON:
            aims.insert(0, None)
        # Most containers seek by pts, and land a group of pictures early if asked for the dts; MPEG-TS seeks by dts,
        # and lands behind the keyframe if asked for the pts. Program streams may land behind it in both cases.
        for aim in aims:
            try:
                if aim is not None:
                    self.seeks += 1
                    self._container.seek(aim, stream=self._stream)
                    self._packets = self._container.demux(self._stream)
                packet = self._next()
                # What comes before a keyframe in the file is shown before it.
                while packet is not None and packet.size and (packet.pts is None or packet.pts < start):
                    packet = self._next()
            except FFmpegError:
                continue
            # After a jump the parser of program streams may hand a packet the time of another.
            if packet is not None and packet.pts == start and packet.size == self._table.sizes[row]:
                self._rank = group.key_rank
                return packet
        raise FrameMismatchError

    def _next(self) -> Packet | None:
        assert self._packets is not None
        return next(self._packets, None)

    def _decode(self, packet: Packet | None) -> list[VideoFrame]:
        try:
            return self._stream.decode(packet)
        except FFmpegError as error:
            raise FrameMismatchError from error

    def _sound(self, frame: VideoFrame) -> bool:
        return not (frame.is_corrupt or (self._invents and frame.pict_type == PictureType.NONE))
