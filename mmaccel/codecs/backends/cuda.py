"""Decoding on NVIDIA GPUs by FFmpeg, through PyAV: nothing to install but a driver.

Pictures stay on the GPU and come as DLPack tensors. The same class decodes in software for device="cpu".
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, cast

import torch
from av.codec.context import CodecContext
from av.codec.hwaccel import HWAccel, hwdevices_available
from av.error import FFmpegError

from mmaccel.codecs.backends.picture import Picture, check_chroma, colours_of, torch_device
from mmaccel.errors import VideoError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from av.packet import Packet
    from av.video.codeccontext import VideoCodecContext
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

__all__ = ["CudaDecoder", "hwaccel", "probe"]

_DRIVER = (
    "install the NVIDIA driver with its video libraries (in a container, NVIDIA_DRIVER_CAPABILITIES must hold compute "
    "and video)"
)


def hwaccel(device: int = 0) -> HWAccel:
    """What `av.open` and decoders are given to decode on GPU number `device` and nowhere else."""
    # PyAV reads a device of 0 as "the default one", which CUDA_VISIBLE_DEVICES makes the same.
    return HWAccel("cuda", device=str(device), allow_software_fallback=False, is_hw_owned=True)


def probe(device: int = 0) -> str | None:
    """Why FFmpeg cannot decode on GPU number `device`, and what to install; None if it can."""
    if "cuda" not in hwdevices_available():
        return "this PyAV is built without CUDA; install its wheel (pip install -U av)"
    if not torch.cuda.is_available():
        return f"torch sees no GPU; {_DRIVER}, and a torch that is built for CUDA"
    if device >= torch.cuda.device_count():
        return f"there is no GPU {device}: torch sees {torch.cuda.device_count()}"
    try:
        ctypes.CDLL("libnvcuvid.so.1")
    except OSError as error:
        return f"the decoding library of the driver cannot be loaded ({error}); {_DRIVER}"
    try:
        CodecContext.create("h264", "r", hwaccel=hwaccel(device))
    except (FFmpegError, NotImplementedError) as error:
        return f"FFmpeg cannot open GPU {device} ({error}); {_DRIVER}"
    return None


class CudaDecoder:
    """A decoding session of FFmpeg on a GPU, or in software.

    stream: the video stream that the packets are from; a container that was opened with `hwaccel` decodes with its own
    context, any other one with a new context of the same settings. device: the number of a GPU, or "cpu". `decoded` is
    the number of frames that the decoder has put out so far.

    Raises VideoError where the GPU or its driver is missing or does not take the codec.
    """

    def __init__(self, stream: VideoStream, device: int | str = 0) -> None:
        self.device = torch_device(device)
        self.decoded = 0
        self._first = 0
        given = cast("VideoCodecContext", stream.codec_context)
        check_chroma(given)
        self._stated = colours_of(int(given.colorspace), int(given.color_range))
        self._hardware = self.device.type == "cuda"
        if self._hardware and given.is_hwaccel:
            self._context = given
            return
        options: dict[str, Any] = {"hwaccel": hwaccel(self.device.index or 0)} if self._hardware else {}
        # the decoder that FFmpeg prefers for a stream may be another library, which knows no GPU (AV1)
        name = given.codec.canonical_name if self._hardware else given.codec.name
        try:
            self._context = cast("VideoCodecContext", CodecContext.create(name, "r", **options))
        except (FFmpegError, NotImplementedError) as error:
            raise VideoError(
                f"{given.codec.canonical_name} cannot be decoded on GPU {self.device.index} "
                f"({probe(self.device.index or 0) or error}); decode it on the CPU"
            ) from error
        self._context.extradata = given.extradata

    def decode(self, packets: Iterable[Packet], wanted: Collection[int]) -> Iterator[tuple[int, Picture]]:
        """Decode one group of pictures and yield (pts, picture) of its wanted frames, in presentation order.

        packets: from a keyframe on, in the order of the file, up to the one after which all wanted frames decode, or
        further; no more of them are taken than needed. wanted: pts in the stream's ticks. A picture is valid until
        the next one is asked for. Afterwards the decoder is ready for the next group, whatever happened.

        Raises VideoError if the decoder fails, reports damage, or ends without a wanted frame.
        """
        missing = set(wanted)
        if not missing:
            return
        try:
            for frame in self._frames(packets):
                self.decoded += 1
                # leading pictures of an open group lack what they refer to
                if frame.is_corrupt and frame.pts is not None and frame.pts >= self._first:
                    raise VideoError(f"the frame at pts {frame.pts} is damaged; decode this video on the CPU")
                if frame.pts in missing:
                    missing.discard(frame.pts)
                    yield frame.pts, self._picture(frame)
                    if self._hardware:
                        # the surface goes back to the decoder, which does not wait for our kernels
                        torch.cuda.current_stream(self.device).synchronize()
                    if not missing:
                        return
        except FFmpegError as error:
            where = f"GPU {self.device.index}" if self._hardware else "the CPU"
            raise VideoError(f"the decoder on {where} failed ({error}); decode this video on the CPU") from error
        finally:
            self._context.flush_buffers()
        raise VideoError(f"the decoder ended without {len(missing)} wanted frame(s), the first at pts {min(missing)}")

    def _frames(self, packets: Iterable[Packet]) -> Iterator[VideoFrame]:
        started = False
        for packet in packets:
            if not started and packet.pts is not None:
                self._first, started = packet.pts, True
            # an empty packet would tell the decoder that the video is over
            if packet.size:
                yield from self._context.decode(packet)
        yield from self._context.decode(None)

    def _picture(self, frame: VideoFrame) -> Picture:
        colours = colours_of(int(frame.colorspace), int(frame.color_range), self._stated)
        if self._hardware:
            if frame.format.name != "cuda":
                raise VideoError(f"the GPU does not decode this stream (FFmpeg gave {frame.format.name}); use the CPU")
            # FFmpeg works on the default stream, and exports planes to no other
            torch.cuda.current_stream(self.device).wait_stream(torch.cuda.default_stream(self.device))
        else:
            name = "p010le" if len(frame.format.components) and frame.format.components[0].bits > 8 else "nv12"
            frame = frame.reformat(format=name, dst_color_range=frame.color_range)
        # torch.from_dlpack(plane) would name a stream, which PyAV refuses; a capsule names none
        y, uv = (torch.from_dlpack(cast("Any", plane).__dlpack__()) for plane in frame.planes[:2])
        return Picture(y, _whole(uv, *y.shape), colours)

    def close(self) -> None:
        """Give the session back."""
        del self._context


def _whole(uv: torch.Tensor, H: int, W: int) -> torch.Tensor:
    """Chroma of every pixel: PyAV leaves the last row and column of odd sizes out, so the one before stands in."""
    for axis, length in ((0, -(-H // 2)), (1, -(-W // 2))):
        if uv.shape[axis] < length:
            uv = torch.cat([uv, uv.narrow(axis, uv.shape[axis] - 1, 1)], axis)
    return uv
