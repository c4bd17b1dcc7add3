"""Decoding on NVIDIA GPUs by NVIDIA's own library, PyNvVideoCodec.

Its demuxer numbers frames from container headers and drops repeated ones, so packets come from PyAV, as for every other
backend, and frames are told apart by their pts.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any, cast

import torch
from av.bitstream import BitStreamFilterContext
from av.codec.context import CodecContext
from av.error import FFmpegError
from av.packet import Packet

from mmaccel.codecs.backends.picture import Colours, Picture, check_chroma, colours_of, torch_device
from mmaccel.errors import VideoError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from av.video.codeccontext import VideoCodecContext
    from av.video.stream import VideoStream

__all__ = ["NvDecoder", "probe"]

_CODECS = {"h264": "H264", "hevc": "HEVC", "vp8": "VP8", "vp9": "VP9", "av1": "AV1", "mpeg2video": "MPEG2"}
# The parser wants start codes, which MP4 and Matroska leave out, and headers in front of every keyframe.
_FILTERS = {
    "h264": "h264_mp4toannexb,dump_extra=freq=k",
    "hevc": "hevc_mp4toannexb,dump_extra=freq=k",
    "mpeg2video": "dump_extra=freq=k",
}


def probe(device: int = 0) -> str | None:
    """Why PyNvVideoCodec cannot decode on GPU number `device`, and what to install; None if it can."""
    if not torch.cuda.is_available():
        return "torch sees no GPU; install the NVIDIA driver and a torch that is built for CUDA"
    if device >= torch.cuda.device_count():
        return f"there is no GPU {device}: torch sees {torch.cuda.device_count()}"
    try:
        _library()
    except VideoError as error:
        return str(error)
    return None


def _library() -> Any:
    try:
        return importlib.import_module("PyNvVideoCodec")
    except ModuleNotFoundError as error:
        if error.name != "PyNvVideoCodec":
            raise
        raise VideoError("PyNvVideoCodec is not installed; pip install PyNvVideoCodec") from error
    except (ImportError, OSError, RuntimeError) as error:
        # it looks for the driver's libraries as it is imported, and answers with a page of advice
        reason = str(error).strip().split("\n")[0]
        raise VideoError(
            f"PyNvVideoCodec cannot be loaded ({reason}); install the NVIDIA driver with its video libraries (in a "
            "container, NVIDIA_DRIVER_CAPABILITIES must hold compute and video)"
        ) from error


class NvDecoder:
    """A decoding session of PyNvVideoCodec.

    stream: the video stream that the packets are from. device: the number of a GPU, or "cpu" for GPU 0 with pictures
    copied to the host's memory. `decoded` is the number of frames that the decoder has put out so far.

    Raises VideoError where the library, the GPU or its driver is missing, or the codec is not supported.
    """

    def __init__(self, stream: VideoStream, device: int | str = 0) -> None:
        self.device = torch_device(device)
        self.decoded = 0
        self._library = _library()
        self._stream = stream
        context = cast("VideoCodecContext", stream.codec_context)
        check_chroma(context)
        self._codec = context.codec.canonical_name
        if self._codec not in _CODECS:
            raise VideoError(f"PyNvVideoCodec does not decode {self._codec}; decode it on the CPU")
        self._size = context.height, context.width
        self._colours: Colours | None = None
        self._decoder: Any = None
        self._start()

    def _start(self) -> None:
        try:
            self._decoder = self._library.CreateDecoder(
                gpuid=self.device.index or 0,
                codec=getattr(self._library.cudaVideoCodec, _CODECS[self._codec]),
                usedevicememory=self.device.type == "cuda",
            )
        except self._failures as error:
            raise VideoError(
                f"PyNvVideoCodec cannot decode {self._codec} on GPU {self.device.index or 0} ({error}); decode it on "
                "the CPU"
            ) from error

    @property
    def _failures(self) -> tuple[type[Exception], ...]:
        return (self._library.PyNvVCException, self._library.PyNvVCExceptionUnsupported, RuntimeError)

    def decode(self, packets: Iterable[Packet], wanted: Collection[int]) -> Iterator[tuple[int, Picture]]:
        """Decode one group of pictures and yield (pts, picture) of its wanted frames, in presentation order.

        packets: from a keyframe on, in the order of the file, up to the one after which all wanted frames decode, or
        further; no more of them are taken than needed. wanted: pts in the stream's ticks. A picture is valid until
        the next one is asked for. Afterwards the decoder is ready for the next group; after an error, as a new session.

        Raises VideoError if the decoder fails, or ends without a wanted frame.
        """
        missing = set(wanted)
        if not missing:
            return
        if self._decoder is None:
            self._start()
        clean = ended = False
        try:
            for frame in self._frames(packets):
                self.decoded += 1
                pts = frame.getPTS()
                if pts in missing:
                    missing.discard(pts)
                    yield pts, self._picture(frame)
                    if self.device.type == "cuda":
                        # the next call writes over the frame, and does not wait for our kernels
                        torch.cuda.current_stream(self.device).synchronize()
                    if not missing:
                        break
            else:
                ended = True
            if not ended:
                self.decoded += len(self._end())
            clean = True
        except (*self._failures, FFmpegError) as error:
            raise VideoError(f"PyNvVideoCodec failed ({error}); decode this video on the CPU") from error
        finally:
            if not clean:
                # a session that has failed, or was left in the middle, keeps failing
                self._decoder = None
        if missing:
            raise VideoError(
                f"the decoder ended without {len(missing)} wanted frame(s), the first at pts {min(missing)}"
            )

    def _frames(self, packets: Iterable[Packet]) -> Iterator[Any]:
        name = _FILTERS.get(self._codec)
        # a filter remembers what it has inserted, so each group has its own
        filtered = None if name is None else BitStreamFilterContext(name, self._stream)
        for packet in packets:
            if not packet.size:
                continue
            if self._colours is None:
                self._colours = _colours(self._stream, packet)
            for part in (packet,) if filtered is None else filtered.filter(_copy(packet)):
                yield from self._decoder.Decode(self._data(part))
        yield from self._end()

    def _data(self, packet: Packet) -> Any:
        data = self._library.PacketData()
        data.bsl_data, data.bsl = packet.buffer_ptr, packet.buffer_size
        data.pts = 0 if packet.pts is None else packet.pts
        data.dts = data.pts if packet.dts is None else packet.dts
        data.key = int(packet.is_keyframe)
        return data

    def _end(self) -> list[Any]:
        """Tell the decoder that the group is over; the frames that it still held."""
        data = self._library.PacketData()
        data.decode_flag = self._library.VideoPacketFlag.ENDOFSTREAM
        return self._decoder.Decode(data)

    def _picture(self, frame: Any) -> Picture:
        if self.device.type == "cuda":
            self._decoder.WaitOnCUStream(torch.cuda.current_stream(self.device).cuda_stream)
        planes = torch.from_dlpack(frame)
        # luma over chroma in one array, of even sizes: what goes beyond the picture is cut
        luma, (H, W) = planes.shape[0] * 2 // 3, self._size
        if planes.ndim != 2 or planes.shape[1] % 2 or luma < H or planes.shape[1] < W:
            raise VideoError(
                f"PyNvVideoCodec gave a frame {tuple(planes.shape)} for a picture of {H} x {W}, which is not 4:2:0; "
                "decode this video on the CPU"
            )
        chroma = planes[luma:].unflatten(1, (-1, 2))
        return Picture(planes[:luma][:H, :W], chroma[: -(-H // 2), : -(-W // 2)], self._colours or Colours())

    def close(self) -> None:
        """Give the session back."""
        self._decoder = None


def _colours(stream: VideoStream, packet: Packet) -> Colours:
    """The colours that a keyframe states, or else its container: the library tells neither."""
    given = cast("VideoCodecContext", stream.codec_context)
    stated = colours_of(int(given.colorspace), int(given.color_range))
    context = cast("VideoCodecContext", CodecContext.create(given.codec.name, "r"))
    context.extradata = given.extradata
    try:
        frames = [*context.decode(_copy(packet)), *context.decode(None)]
    except FFmpegError:
        return stated  # what is wrong with it is for the hardware to say
    return colours_of(int(frames[0].colorspace), int(frames[0].color_range), stated) if frames else stated


def _copy(packet: Packet) -> Packet:
    """The same packet once more: a filter takes the data out of the one that it is given."""
    copy = Packet(bytes(packet))
    copy.pts, copy.dts, copy.time_base, copy.is_keyframe = packet.pts, packet.dts, packet.time_base, packet.is_keyframe
    return copy
