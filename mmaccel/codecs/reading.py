"""The reading of one video: plan, groups for several threads, and other ways where the packets mislead."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mmaccel.codecs.backends import HARDWARE, RGB, unsuitable
from mmaccel.codecs.backends.gpu import GpuHand
from mmaccel.codecs.backends.rgb import open_rgb
from mmaccel.codecs.canvas import Canvas, GeometryChangedError
from mmaccel.codecs.decode import decode_in_order, decode_slots, survey
from mmaccel.codecs.drawing import SoftwareHand
from mmaccel.codecs.groups import THREADS_HIDE_LOSS, FrameMismatchError, Group, GroupReader, groups_for
from mmaccel.codecs.index import look_up
from mmaccel.codecs.packets import PacketTable, scan
from mmaccel.codecs.picture import Interpolation, Painter
from mmaccel.codecs.sampling import Facts
from mmaccel.errors import VideoError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from av.container import InputContainer
    from av.video.stream import VideoStream

    from mmaccel.codecs.drawing import Hand
    from mmaccel.codecs.sampling import Request, Size
    from mmaccel.codecs.source import Source

__all__ = ["Clock", "Options", "Outcome", "Reading", "Work"]

# Opening a video once more costs about as much as decoding a few frames.
_WORTH_OPENING = 8


@dataclass(frozen=True)
class Options:
    """How pictures are made of frames, which frames may be left out, and what decodes.

    backend: "pyav", or what stands in its place. devices: those that a hardware decoder works on; frames come to lie on
    the first one. spare: whether PyAV takes over where the backend fails. note: why it has.
    """

    size: Size = None
    interpolation: Interpolation = "BICUBIC"
    skip: bool = True
    snap: bool = False
    backend: str = "pyav"
    devices: tuple[torch.device, ...] = ()
    spare: bool = False
    note: str = ""


@dataclass(frozen=True)
class Work:
    """What reading a video has taken.

    backend: what decoded it. groups: the groups of pictures that held wanted frames. decoded: frames that the decoder
    delivered. skipped: packets that were left out because no other frame needs them. seeks: jumps in the file. opened:
    how often the file was opened. threads: how many threads decoded. way: "groups" (only what is needed), "sequential"
    (from the start to the last wanted frame) or "survey" (all of it first, to learn which frames exist). scanned:
    whether all packets were read to number the frames; else the file's index did. approximate: whether keyframes stand
    in for the wanted frames (`snap`). note: why another backend than the wanted one decoded, "" if none was.
    """

    backend: str = "pyav"
    way: str = "groups"
    groups: int = 0
    decoded: int = 0
    skipped: int = 0
    seeks: int = 0
    opened: int = 0
    threads: int = 1
    scanned: bool = True
    approximate: bool = False
    note: str = ""


@dataclass(frozen=True)
class Clock:
    """Times of all frames that are known, in seconds after the first: mean frame rate, duration."""

    fps: float
    duration: float

    @staticmethod
    def of(table: PacketTable, total: int, ends: tuple[int, int, int] | None) -> Clock:
        """`ends`: pts of the first and the last frame and its display time, in ticks; None where frames have no pts."""
        rate = table.rate or 1.0
        if ends is None:
            return Clock(rate, total / rate)
        shown = (ends[1] - ends[0]) * table.tick
        # The header's rate is the exact one where the container rounds times to ticks; where it disagrees, it is wrong.
        if shown > 0 and abs((total - 1) / rate - shown) > 2 * table.tick:
            rate = (total - 1) / shown
        return Clock(rate, shown + (ends[2] * table.tick or 1 / rate))


@dataclass(frozen=True)
class Outcome:
    """What a video has yielded: rows in the order of the request.

    numbers int64 [N]: the frames shown; seconds float64 [N]: when, after the first frame; canvas: the pictures. total,
    lost, everything: frames that the video has, those of them that are missing, and both with those that are cut off.
    replaced: wanted frames that show a neighbour instead.
    """

    canvas: Canvas
    numbers: np.ndarray
    seconds: np.ndarray
    clock: Clock
    total: int
    lost: int
    everything: int
    replaced: tuple[int, ...]
    work: Work


class Reading:
    """One video on its way to an Outcome; a task of the crew.

    `in_time` works through the groups in presentation order, and not the longest first. `numbers` int64 [N], the frame
    of each row, and `seconds` float64 [N], when it is shown, are known from the plan on; `drawn(group)` is called when
    a group is in the canvas.
    """

    def __init__(
        self,
        source: Source,
        request: Request,
        options: Options,
        in_time: bool = False,
        drawn: Callable[[Group], None] | None = None,
    ) -> None:
        self.source, self.request, self.options = source, request, options
        self._in_time, self._drawn = in_time, drawn
        self._lock = threading.Lock()
        self._groups: deque[Group] = deque()
        self._left = 0
        self._stop = False
        self._misled: Exception | None = None
        self._each = 1
        self._hands = 0
        self._work = Work(backend=options.backend, note=options.note)
        self._table: PacketTable | None = None
        self.numbers = np.empty(0, dtype=np.int64)
        self.seconds = np.empty(0)
        self.canvas = self._drawing = Canvas(self.numbers)

    def lead(self, hands: int, shared: Callable[[], None]) -> None:
        """Read what the packets say, plan, and work."""
        with self.source.open() as (container, stream):
            self._plan(container, stream)
            if self._table is not None and self._groups:
                # Cores that no group is left for help inside of the groups.
                if self._alone:
                    self._each = hands
                elif self.options.backend not in HARDWARE and self._sound(self._table):
                    self._each = max(1, hands // len(self._groups))
                shared()
                self._draw_groups(container, stream)

    def assist(self) -> None:
        """Open the video once more and work."""
        with self.source.open() as (container, stream):
            self._draw_groups(container, stream)

    def spare(self) -> bool:
        """Whether enough is left for one more thread."""
        return self._left > _WORTH_OPENING and not self._over and not self.source.remote and not self._alone

    @property
    def _alone(self) -> bool:
        """Whether the backend shares out the work itself."""
        return self.options.backend in RGB

    def _sound(self, table: PacketTable) -> bool:
        """Whether FFmpeg's threads may be used: they tell of damage late, or not at all."""
        return table.codec not in THREADS_HIDE_LOSS and all(group.steady for group in self._groups)

    def abandon(self) -> None:
        """Let all threads stop after the frame that they are at."""
        self._stop = True

    @property
    def _place(self) -> torch.device | None:
        """Where the canvas lies; None for the CPU."""
        return self.options.devices[0] if self.options.devices else None

    @property
    def _over(self) -> bool:
        return self._stop or self._misled is not None

    def finish(self) -> Outcome:
        """Assemble the outcome; where decoding by groups has failed, get the frames in another way."""
        table = self._table
        assert table is not None
        if self._misled is not None and self._each > 1 and self.options.backend == "pyav":
            self._once_more(table)
        if table.exact and not table.guessed and self._misled is None:
            return self._outcome(table, self.numbers, self._drawing, self._work)
        return self._otherwise(table)

    def _plan(self, container: InputContainer, stream: VideoStream) -> None:
        def choose(total: int) -> np.ndarray:
            return self.request.slots(total, self.source.name)

        table = None if self.request.timed else look_up(container, stream, choose)
        self._work = replace(self._work, scanned=table is None)
        self._table = table = table or scan(container, stream)
        if not table.exact or table.guessed:
            if self.options.backend != "pyav":
                raise unsuitable(self.options.backend, "the packets of this video do not number its frames")
            return
        self.numbers = self._snapped(table, self._numbers(table, table.total, table.pts))
        self.seconds = _seconds(table, self.numbers)
        self.canvas = self._drawing = Canvas(self.numbers, device=self._place)
        groups = groups_for(table, self.numbers)
        self._left = sum(group.cost for group in groups)
        self._work = replace(self._work, groups=len(groups), approximate=self.options.snap)
        self._groups.extend(groups if self._in_time or self._alone else sorted(groups, key=lambda group: -group.cost))

    def _once_more(self, table: PacketTable) -> None:
        """Decode the groups again, without FFmpeg's threads: what is lost shall not depend on them."""
        self._each, self._misled, self._drawn = 1, None, None
        # What has been given in parts stays as it is.
        self._drawing = Canvas(self.numbers)
        self._groups = deque(groups_for(table, self.numbers))
        with self.source.open() as (container, stream):
            self._draw_groups(container, stream)

    def _numbers(self, table: PacketTable, total: int, times: np.ndarray | None) -> np.ndarray:
        """The frame for each row, of `total` frames at `times` ticks."""
        name, cut = self.source.name, table.cut
        if not self.request.timed:
            return self.request.slots(total, name, cut)
        if times is None:
            clock = Clock.of(table, total, None)
            starts = np.arange(total) / clock.fps - 1e-6
        else:
            clock = Clock.of(table, total, table.ends if table.exact else _ends(times))
            starts = (times - times[0] - 0.5) * table.tick
        return self.request.slots(
            total,
            name,
            cut,
            starts,
            clock.duration,
            lambda: Facts(total, clock.fps, clock.duration, *self._native(table)),
        )

    def _native(self, table: PacketTable) -> tuple[int, int]:
        """Height and width of the upright video; what a file says of a turn is seen on its frames only."""
        painter = Painter(exif=table.exif)
        with self.source.open() as (container, stream):
            for frame in container.decode(stream):
                return painter.shape(frame.height, frame.width, painter.layout(frame))[0]
        raise VideoError(f"no frame of {self.source.name} can be decoded; is it complete, and undamaged?")

    def _snapped(self, table: PacketTable, numbers: np.ndarray) -> np.ndarray:
        """The keyframes nearest to the wanted frames if those are wanted instead, and the packets tell of them."""
        if not self.options.snap or not table.exact:
            return numbers
        return np.array([table.nearest_key(slot) for slot in numbers.tolist()])

    def _draw_groups(self, container: InputContainer, stream: VideoStream) -> None:
        threads = self._each if self.options.backend == "pyav" else 1
        stream.codec_context.thread_count = threads
        if threads > 1:
            # FFmpeg's threads hand a picture out before they know of damage in it: only an error tells.
            stream.codec_context.options = {**stream.codec_context.options, "err_detect": "explode"}
        hand = self._hand(container, stream)
        try:
            while (group := self._take()) is not None:
                hand.draw(group, self._drawing, lambda: self._over)
                if self._drawn and not self._over:
                    self._drawn(group)
        except (FrameMismatchError, GeometryChangedError) as error:
            self._misled = error
        finally:
            hand.close()
            with self._lock:
                work = self._work
                self._work = replace(
                    work,
                    decoded=work.decoded + hand.reader.decoded,
                    skipped=work.skipped + hand.reader.skipped,
                    seeks=work.seeks + hand.reader.seeks,
                    opened=work.opened + 1,
                    threads=(work.opened + 1) * self._each,
                )

    def _hand(self, container: InputContainer, stream: VideoStream) -> Hand:
        table, options = self._table, self.options
        assert table is not None
        painter = Painter(options.size, options.interpolation, table.exif)
        if self._alone:
            return open_rgb(options.backend, self.source, (container, stream), table, painter, self._each)
        reader = GroupReader(container, stream, table, options.skip)
        if options.backend in HARDWARE:
            with self._lock:
                device = options.devices[self._hands % len(options.devices)]
                self._hands += 1
            return GpuHand(options.backend, device, stream, table, reader, painter)
        return SoftwareHand(reader, painter)

    def _take(self) -> Group | None:
        with self._lock:
            if self._over or not self._groups:
                return None
            group = self._groups.popleft()
            self._left -= group.cost
            return group

    def _otherwise(self, table: PacketTable) -> Outcome:
        """Decode from the start of the file on, and all of it if even that does not give what the packets promise."""
        options, source = self.options, self.source
        if not table.whole:
            with source.open() as (container, stream):
                table = scan(container, stream)
        painter = Painter(options.size, options.interpolation, table.exif)
        approximate = self.options.snap and table.exact
        work = Work(
            way="sequential", note=options.note, groups=self._work.groups, opened=self._work.opened + 1,
            approximate=approximate,
        )  # fmt: skip
        if table.exact:
            numbers = self._snapped(table, self._numbers(table, table.total, table.pts))
            canvas = Canvas(numbers, steady=False)
            try:
                decoded = decode_slots(source, table, canvas, painter, max(1, self._each))
                return self._outcome(table, numbers, canvas, replace(work, decoded=self._work.decoded + decoded))
            except FrameMismatchError:
                work = replace(work, opened=work.opened + 1)
        found = survey(source, table)
        numbers = self._snapped(table, self._numbers(table, found.total, found.times))
        shown = found.nearest(numbers)
        canvas = Canvas(np.array([found.number[slot] for slot in shown.tolist()]), steady=False)
        decoded = found.decoded + decode_in_order(source, canvas, painter)
        ends = None if found.times is None else table.ends if table.exact else _ends(found.times)
        clock = Clock.of(table, found.total, ends)
        return Outcome(
            canvas=canvas,
            numbers=numbers,
            seconds=numbers / clock.fps
            if found.times is None
            else (found.times[numbers] - found.times[0]) * table.tick,
            clock=clock,
            total=found.total,
            lost=found.lost + table.cut,
            everything=found.total + found.unplaced + table.cut,
            replaced=tuple(sorted(set(numbers[shown != numbers].tolist()) - found.held)),
            work=replace(work, way="survey", decoded=decoded, opened=work.opened + 2),
        )

    def _outcome(self, table: PacketTable, numbers: np.ndarray, canvas: Canvas, work: Work) -> Outcome:
        return Outcome(
            canvas=canvas,
            numbers=numbers,
            seconds=_seconds(table, numbers),
            clock=Clock.of(table, table.total, table.ends),
            total=table.total,
            lost=table.cut,
            everything=table.total + table.cut,
            replaced=(),
            work=work,
        )


def _ends(times: np.ndarray) -> tuple[int, int, int]:
    return int(times[0]), int(times[-1]), 0


def _seconds(table: PacketTable, numbers: np.ndarray) -> np.ndarray:
    return (table.pts[np.searchsorted(table.slots, numbers)] - table.ends[0]) * table.tick
