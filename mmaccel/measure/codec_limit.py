"""The time below which no exact reader can get: decoding the packets that the wanted frames depend on, nothing else."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import av
from av.codec.context import CodecContext

from mmaccel.errors import MMAccelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from av.packet import Packet

__all__ = ["Limit"]


class Limit:
    """The packets of the groups of pictures that hold a wanted frame, up to the last wanted one, kept in memory.

    `run` decodes them on one thread, group by group, without converting a frame. Pictures that no other depends on are
    left out unless they are wanted, where the decoder can do that.
    """

    def __init__(self, path: str, wanted: Sequence[int]) -> None:
        with av.open(path) as container:
            stream = container.streams.video[0]
            self._codec, self._extra = stream.codec_context.codec.name, stream.codec_context.extradata
            groups: list[list[Packet]] = []
            for packet in container.demux(stream):
                if packet.size and packet.is_keyframe:
                    groups.append([])
                if packet.size:
                    groups[-1].append(packet)
            times = sorted(packet.pts or 0 for group in groups for packet in group)
            self._wanted = {times[number] for number in wanted}
        self._groups = [cut for group in groups if (cut := self._needed(group))]
        self._skip = True
        # dav1d leaves wanted pictures out with the others.
        self._skip = self.run()["shown"] == len(self._wanted)
        if not self._skip and self.run()["shown"] != len(self._wanted):
            raise MMAccelError(f"the wanted frames of {path} do not come out of a bare decoder.")

    def _needed(self, group: list[Packet]) -> list[Packet]:
        last = max((place for place, packet in enumerate(group) if packet.pts in self._wanted), default=-1)
        return group[: last + 1]

    def run(self) -> dict[str, Any]:
        """{"decoded": frames, "shown": how many of the wanted came out, "groups": seconds of each group, in order}.

        "skips" says whether pictures that no other depends on were left out.
        """
        decoded, shown, seconds = 0, 0, []
        for group in self._groups:
            start = time.perf_counter()
            decoder: Any = CodecContext.create(self._codec, "r")
            decoder.extradata, decoder.thread_count = self._extra, 1
            for packet in (*group, None):
                if self._skip:
                    wanted = packet is not None and packet.pts in self._wanted
                    decoder.skip_frame = "DEFAULT" if wanted else "NONREF"
                for frame in decoder.decode(packet):
                    decoded += 1
                    shown += frame.pts in self._wanted
            seconds.append(time.perf_counter() - start)
        return {"decoded": decoded, "shown": shown, "groups": seconds, "skips": self._skip}
