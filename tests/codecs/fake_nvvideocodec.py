"""A stand-in for PyNvVideoCodec 2.2 with its call signatures, which decodes in software into the host's memory.

It is given what the library is given, bytes by their address, and knows no container.
"""

from __future__ import annotations

import ctypes
import enum
from fractions import Fraction

import av
import numpy as np
from av.codec.context import CodecContext

PyNvVCException = type("PyNvVCException", (Exception,), {})
PyNvVCExceptionUnsupported = type("PyNvVCExceptionUnsupported", (Exception,), {})

cudaVideoCodec = enum.Enum(  # noqa: N816
    "cudaVideoCodec", {"MPEG2": 1, "H264": 4, "HEVC": 8, "VP8": 9, "VP9": 10, "AV1": 11}
)
VideoPacketFlag = enum.IntEnum(
    "VideoPacketFlag", {"ENDOFSTREAM": 1, "TIMESTAMP": 2, "DISCONTINUITY": 4, "ENDOFPICTURE": 8, "NOTIFY_EOS": 16}
)
_CODECS = {"MPEG2": "mpeg2video", "H264": "h264", "HEVC": "hevc", "VP8": "vp8", "VP9": "vp9", "AV1": "libdav1d"}

sessions: list[PyNvDecoder] = []
# what the next call of Decode raises, once
failures: list[Exception] = []


class PacketData:
    def __init__(self):
        self.key = self.pts = self.dts = self.pos = self.bsl = self.bsl_data = self.duration = 0
        self.decode_flag = 0


class DecodedFrame:
    def __init__(self, array, pts):
        self._array, self._pts = array, pts
        self.shape = list(array.shape)

    def getPTS(self):
        return self._pts

    def __dlpack__(self, stream=0):
        return self._array.__dlpack__()

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


class PyNvDecoder:
    """Frames are in one buffer that the next call writes over, as on the GPU."""

    def __init__(self, codec, usedevicememory):
        self.codec, self.usedevicememory = codec, usedevicememory
        self.packets = 0
        self._buffers = []
        self._restart()

    def _restart(self):
        self._context = CodecContext.create(_CODECS[self.codec.name], "r")

    def Decode(self, packet):
        if failures:
            raise failures.pop()
        for buffer in self._buffers:
            buffer.fill(7)
        self._buffers = []
        if packet.bsl == 0:
            assert packet.decode_flag & VideoPacketFlag.ENDOFSTREAM
            frames = self._context.decode(None)
            self._restart()
        else:
            self.packets += 1
            given = av.Packet(ctypes.string_at(packet.bsl_data, packet.bsl))
            given.pts, given.dts, given.time_base = packet.pts, packet.dts, Fraction(1, 1000)
            frames = self._context.decode(given)
        return [self._output(frame) for frame in frames]

    def _output(self, frame):
        wide = frame.format.components[0].bits > 8
        frame = frame.reformat(format="p010le" if wide else "nv12", dst_color_range=frame.color_range)
        kind, planes = np.uint16 if wide else np.uint8, []
        for plane in frame.planes:
            rows = np.frombuffer(plane, kind).reshape(-1, plane.line_size // kind().itemsize)
            planes.append(rows[: plane.height, : 2 * -(-frame.width // 2)])
        self._buffers.append(np.concatenate(planes))
        return DecodedFrame(self._buffers[-1], frame.pts)

    def WaitOnCUStream(self, stream):
        raise AssertionError("frames in the host's memory need no stream")


def CreateDecoder(
    gpuid=0,
    codec=cudaVideoCodec.H264,
    cudacontext=0,
    cudastream=0,
    usedevicememory=False,
    maxwidth=0,
    maxheight=0,
):
    if gpuid > 0:
        raise PyNvVCExceptionUnsupported(f"no GPU {gpuid}")
    sessions.append(PyNvDecoder(codec, usedevicememory))
    return sessions[-1]
