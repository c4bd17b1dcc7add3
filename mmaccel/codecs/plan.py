"""What reading wanted frames would cost, foretold from the packets: nothing is decoded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from mmaccel.codecs.groups import groups_for

if TYPE_CHECKING:
    from mmaccel.codecs.groups import Group
    from mmaccel.codecs.packets import PacketTable

__all__ = ["DecodePlan", "GroupStructure", "PlannedGroup", "Snapping", "plan_for", "structure_of"]

# No codec lets more pictures be decoded before one that is shown earlier than 16; broken times may look like more.
_DEEPEST = 64


@dataclass(frozen=True)
class GroupStructure:
    """The groups of pictures of a whole video, from one keyframe to the next.

    count: how many. shortest, median, longest: frames in a group. keyframe_first: whether the video starts with a
    keyframe; else its first group cannot be decoded. leading: groups with pictures that are stored behind the keyframe
    and shown before it, as in open groups of pictures. gaps: groups with a hole in their times, where packets may be
    missing; nothing is left out in these. reorder_depth: how many frames are at most decoded before one that is shown
    earlier; 0 without B-frames (AV1 and VP9 reorder inside of their packets). disposable: share of the packets whose
    frame no other frame refers to, disposable_bytes: their share of the bytes; None for codecs that do not tell.
    """

    count: int
    shortest: int
    median: float
    longest: int
    keyframe_first: bool
    leading: int
    gaps: int
    reorder_depth: int
    disposable: float | None
    disposable_bytes: float | None


@dataclass(frozen=True)
class PlannedGroup:
    """One group that holds wanted frames.

    keyframe: the frame at which decoding starts. length: its frames up to the next keyframe. wanted: how many of them
    are wanted. played: frames decoded from the keyframe to the last wanted one. left_out: packets that are not decoded
    because no other frame needs them. decoded: frames that are decoded then.
    """

    keyframe: int
    length: int
    wanted: int
    played: int
    left_out: int
    decoded: int


@dataclass(frozen=True)
class Snapping:
    """What `snap="keyframe"` would do: frames decoded, and how far its frames are from the wanted ones, in seconds."""

    decoded: int
    mean_shift: float
    largest_shift: float


@dataclass(frozen=True)
class DecodePlan:
    """What reading the wanted frames would take, if the file is sound.

    wanted: rows asked for. distinct: different frames among them. groups: those that are needed, in presentation order;
    played, left_out, decoded: the sums over them. threads: how many would decode. speedup_bound: by how much these
    could be faster than one thread, as groups are not shared: min(threads, groups, all decoded frames / those of the
    largest group). snapping: the cost of keyframes instead; None where there is no keyframe.
    """

    wanted: int
    distinct: int
    played: int
    left_out: int
    decoded: int
    threads: int
    speedup_bound: float
    snapping: Snapping | None
    groups: tuple[PlannedGroup, ...] = field(repr=False)


def structure_of(table: PacketTable, disposable: np.ndarray | None) -> GroupStructure:
    """Describe the groups of a table that is whole; `disposable` bool [n] says for which slots nothing needs them."""
    groups = groups_for(table, table.slots)
    lengths = [len(group.slots) for group in groups]
    keys = np.flatnonzero(table.keys)
    keys = keys[keys > 0]
    # Shown earlier than the keyframe, and behind it in the file.
    leading = np.maximum.accumulate(table.rank)[keys - 1] > table.rank[keys]
    size = max(int(table.sizes.sum()), 1)
    return GroupStructure(
        count=len(groups),
        shortest=min(lengths),
        median=float(np.median(lengths)),
        longest=max(lengths),
        keyframe_first=bool(table.keys[0]),
        leading=int(leading.sum()),
        gaps=sum(not group.steady for group in groups[not table.keys[0] :]),
        reorder_depth=_reorder_depth(table.rank),
        disposable=None if disposable is None else float(disposable.mean()),
        disposable_bytes=None if disposable is None else float(table.sizes[disposable].sum() / size),
    )


def plan_for(
    table: PacketTable, numbers: np.ndarray, disposable: np.ndarray | None, threads: int, play: bool = False
) -> DecodePlan:
    """Plan the frames `numbers` int64 [N] of a table that is whole, as `load_video` reads them.

    `play` says that nothing may be left out.
    """
    bounds = np.append(np.union1d([0], np.flatnonzero(table.keys)), len(table.slots))
    needed = groups_for(table, numbers)
    groups = tuple(_planned(table, group, disposable, bounds, play or not group.steady) for group in needed)
    costs = [group.decoded for group in groups]
    return DecodePlan(
        wanted=len(numbers),
        distinct=len(np.unique(numbers)),
        played=sum(group.played for group in groups),
        left_out=sum(group.left_out for group in groups),
        decoded=sum(costs),
        threads=threads,
        speedup_bound=float(min(threads, len(groups), sum(costs) / max(costs))),
        snapping=_snapping(table, numbers) if table.keys.any() else None,
        groups=groups,
    )


def _planned(
    table: PacketTable, group: Group, disposable: np.ndarray | None, bounds: np.ndarray, play: bool
) -> PlannedGroup:
    end = int(bounds[np.searchsorted(bounds, group.key, side="right")])
    decoded, left_out = group.cost, 0
    if not play:
        # What a wanted frame needs is stored before it; what is shown before the keyframe is no part of the group.
        stored = (table.rank >= group.key_rank) & (table.rank <= group.until) & (table.slots >= group.key)
        spare = np.zeros(len(stored), dtype=bool) if disposable is None else stored & disposable
        spare[list(group.slots)] = False
        decoded, left_out = int((stored & ~spare).sum()), int(spare.sum())
    return PlannedGroup(group.key, end - group.key, len(group.slots), group.cost, left_out, decoded)


def _snapping(table: PacketTable, numbers: np.ndarray) -> Snapping:
    nearest = np.array([table.nearest_key(number) for number in numbers.tolist()])
    shifts = np.abs(table.pts[nearest] - table.pts[numbers]) * table.tick
    return Snapping(len(np.unique(nearest)), float(shifts.mean()), float(shifts.max()))


def _reorder_depth(rank: np.ndarray) -> int:
    """The most frames that are decoded before one that is shown earlier."""
    shown = np.argsort(rank)
    farthest = int(np.abs(shown - np.arange(len(shown))).max())
    before = np.zeros(len(shown), dtype=np.int64)
    # Two frames in the wrong order are at most twice as far apart as the farthest is from its place.
    for distance in range(1, min(2 * farthest, _DEEPEST, len(shown) - 1) + 1):
        before[distance:] += shown[:-distance] > shown[distance:]
    return int(before.max())
