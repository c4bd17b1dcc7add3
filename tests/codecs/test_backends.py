from __future__ import annotations

import sys
from types import ModuleType

import av
import fake_nvvideocodec as fake
import numpy as np
import pytest
import torch
from av.video.reformatter import VideoReformatter
from clips import Recipe, encode, number_in

from mmaccel import kernels
from mmaccel.codecs import backends
from mmaccel.codecs.backends import cuda, pynvvideocodec
from mmaccel.codecs.backends.picture import Colours, Picture, colours_of
from mmaccel.codecs.priority import kept_priority
from mmaccel.errors import VideoError

CLIPS = ("b-frames.mp4", "open-gop.mp4", "b-frames.ts", "jitter.mkv", "hevc.mp4", "vp9.webm", "av1.mkv", "mpeg2.mpg")


@pytest.fixture
def nv(monkeypatch):
    """PyNvVideoCodec is the stand-in."""
    monkeypatch.setitem(sys.modules, "PyNvVideoCodec", fake)
    fake.sessions.clear()
    fake.failures.clear()
    return fake


@pytest.fixture(params=["cuda", "pynvvideocodec"])
def decoder(request, nv):
    """Both decoders, with pictures in the host's memory."""
    return {"cuda": cuda.CudaDecoder, "pynvvideocodec": pynvvideocodec.NvDecoder}[request.param]


def groups(container, stream):
    """The packets in lists, each beginning with a keyframe."""
    found = []
    for packet in container.demux(stream):
        if packet.size and (packet.is_keyframe or not found):
            found.append([])
        if packet.size:
            found[-1].append(packet)
    return found


def by_libswscale(frame, size=None):
    """A software decoder's frame as RGB, then each colour resized as a gray picture: uint8 [3, h, w]."""
    native = VideoReformatter().reformat(frame, format="rgb24", threads=1).to_ndarray()
    height, width = size or native.shape[:2]
    colours = []
    for colour in range(3):
        gray = av.VideoFrame.from_ndarray(np.ascontiguousarray(native[..., colour]), format="gray")
        resized = VideoReformatter().reformat(gray, width, height, "gray", interpolation="BICUBIC", threads=1)
        colours.append(torch.from_numpy(resized.to_ndarray().copy()))
    return torch.stack(colours)


def sequential(path):
    """Every frame by its pts, as plain PyAV decodes the file from start to end."""
    with av.open(str(path)) as container:
        return {frame.pts: frame for frame in container.decode(video=0)}


def drawn(picture, size=(64, 128), **options):
    out = torch.zeros(1, 3, *size, dtype=torch.uint8)
    picture.draw(out, [0], **options)
    return out[0]


@pytest.mark.parametrize("name", CLIPS)
def test_wanted_frames_of_every_group_equal_a_sequential_decode(clip, decoder, name):
    frames = sequential(clip(name))
    order = {pts: number for number, pts in enumerate(sorted(frames))}
    with av.open(str(clip(name))) as container:
        stream = container.streams.video[0]
        session, seen = decoder(stream, "cpu"), []
        for packets in groups(container, stream):
            # leading pictures of an open group need the group before; a planner asks for them there
            times = sorted(packet.pts for packet in packets if packet.pts >= packets[0].pts)
            wanted = times[::3]
            for pts, picture in session.decode(packets, wanted):
                seen.append(pts)
                got = drawn(picture)
                assert number_in(got.permute(1, 2, 0).numpy()) == order[pts]
                assert torch.equal(got, by_libswscale(frames[pts]))
            assert seen[-len(wanted) :] == wanted
        session.close()
    assert len(seen) >= 15


def test_resized_turned_and_normalised_in_one_go(clip, decoder):
    frames = sequential(clip("b-frames.mp4"))
    with av.open(str(clip("b-frames.mp4"))) as container:
        stream = container.streams.video[0]
        packets = groups(container, stream)[1]
        out = torch.zeros(3, 3, 42, 28)
        for pts, picture in decoder(stream, "cpu").decode(packets, [packets[0].pts]):
            picture.draw(out, [2, 0], transpose=True, flip_right=True, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
            levels = by_libswscale(frames[pts], (28, 42)).rot90(-1, (1, 2)).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    torch.testing.assert_close(out[2], (levels - mean) / std, atol=1e-5, rtol=1e-5)
    assert torch.equal(out[0], out[2])
    assert out[1].eq(0).all()


def test_every_orientation_is_the_one_that_numpy_makes():
    g = torch.Generator().manual_seed(0)
    y, uv = (torch.randint(0, 256, shape, generator=g, dtype=torch.uint8) for shape in ((6, 10), (3, 5, 2)))
    picture = Picture(y, uv, Colours())
    plain = drawn(picture, (6, 10)).numpy()
    for transpose in (False, True):
        for right in (False, True):
            for down in (False, True):
                want = plain.transpose(0, 2, 1) if transpose else plain
                want = want[:, :, ::-1] if right else want
                want = want[:, ::-1] if down else want
                size = (10, 6) if transpose else (6, 10)
                got = drawn(picture, size, transpose=transpose, flip_right=right, flip_down=down)
                assert np.array_equal(got.numpy(), want)


def test_through_triton(clip, decoder):
    frames = sequential(clip("b-frames.mp4"))
    with av.open(str(clip("b-frames.mp4"))) as container:
        stream = container.streams.video[0]
        packets = groups(container, stream)[0]
        with kernels.use("triton"):
            for pts, picture in decoder(stream, "cpu").decode(packets, [packets[0].pts]):
                # nearest, so that the interpreter takes a second
                assert torch.equal(
                    drawn(picture, (8, 16), interpolation="POINT"),
                    by_libswscale(frames[pts])[:, 4::8, 4::8],
                )


class OnTheGpu:
    """A frame as PyAV gives it from a GPU: planes go out by DLPack, and to no named stream."""

    def __init__(self, frame, name="cuda"):
        self.is_corrupt = frame.is_corrupt
        self.pts, self.colorspace, self.color_range = frame.pts, frame.colorspace, frame.color_range
        self.format = type("Format", (), {"name": name})
        self._frame = frame.reformat(format="nv12", dst_color_range=frame.color_range)
        self.planes = [self, self]
        self._next = iter(self._frame.planes)

    def __dlpack__(self, stream=None):
        if stream is not None:
            raise NotImplementedError("CUDA stream synchronization is not supported")
        return next(self._next).__dlpack__()


@pytest.mark.parametrize("name", ["cuda", "yuv420p"])
def test_the_way_of_a_frame_from_a_gpu(clip, monkeypatch, name):
    path, calls, create = clip("b-frames.mp4"), [], cuda.CodecContext.create

    class Context:
        def __init__(self, codec, mode, hwaccel):
            assert (codec, mode, hwaccel.is_hw_owned, hwaccel.device_id) == ("h264", "r", True, 1)
            self._context = create(codec, mode)

        def decode(self, packet):
            self._context.extradata = self.extradata
            return [OnTheGpu(frame, name) for frame in self._context.decode(packet)]

        def flush_buffers(self):
            calls.append("flushed")
            self._context.flush_buffers()

    class Stream:
        def wait_stream(self, other):
            calls.append("waits")

        def synchronize(self):
            calls.append("done")

    monkeypatch.setattr(cuda, "CodecContext", type("CodecContext", (), {"create": Context}))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())
    frames = sequential(path)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        packets = groups(container, stream)[0]
        wanted = sorted(packet.pts for packet in packets)[:2]
        session = cuda.CudaDecoder(stream, 1)
        if name != "cuda":
            with pytest.raises(VideoError, match=r"does not decode this stream \(FFmpeg gave yuv420p\)"):
                list(session.decode(packets, wanted))
            return
        for pts, picture in session.decode(packets, wanted):
            assert torch.equal(drawn(picture), by_libswscale(frames[pts]))
    assert calls == ["waits", "done", "waits", "done", "flushed"]


@pytest.mark.parametrize(("range_", "space"), [(1, 1), (2, 1), (2, 6), (1, 9)])
def test_colours_of_the_stream(tmp_path, decoder, range_, space):
    path = tmp_path / "colours.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = space, range_
        noise = np.random.default_rng(0).integers(0, 256, (48 * 3 // 2, 64), dtype=np.uint8)
        frame = av.VideoFrame.from_ndarray(noise, format="yuv420p")
        frame.colorspace, frame.color_range, frame.pts = space, range_, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    (frame,) = sequential(path).values()
    assert (int(frame.colorspace), int(frame.color_range)) == (space, range_)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        decoded = decoder(stream, "cpu").decode(container.demux(stream), [frame.pts])
        (got,) = [drawn(picture, (48, 64)) for _, picture in decoded]
        assert torch.equal(got, by_libswscale(frame))


def test_ten_bits(tmp_path, decoder):
    path = encode(Recipe("ten.mp4", codec="libx265", count=3, pix_fmt="yuv420p10le", options={}), tmp_path)
    frames = sequential(path)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        got = {}
        for pts, picture in decoder(stream, "cpu").decode(container.demux(stream), frames):
            assert picture.y.dtype == torch.uint16
            got[pts] = drawn(picture)
    assert set(got) == set(frames)
    for number, pts in enumerate(sorted(got)):
        assert number_in(got[pts].permute(1, 2, 0).numpy()) == number
        # libswscale smooths the chroma of ten bits
        assert (got[pts].int() - by_libswscale(frames[pts]).int()).abs().float().mean() < 4


@pytest.mark.parametrize("codec", ["libvpx-vp9", "libsvtav1"])
def test_odd_sizes(tmp_path, decoder, codec):
    path = tmp_path / "odd.mkv"
    with kept_priority(), av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8, options={"svtav1-params": "lp=1", "preset": "12"})
        stream.width, stream.height, stream.pix_fmt = 75, 66, "yuv420p"
        image = np.random.default_rng(0).integers(0, 256, (5, 5, 3), dtype=np.uint8).repeat(15, 0).repeat(15, 1)[:66]
        container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    (frame,) = sequential(path).values()
    assert frame.width == 75
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        decoded = decoder(stream, "cpu").decode(container.demux(stream), [frame.pts])
        (got,) = [drawn(picture, (66, 75)) for _, picture in decoded]
    assert torch.equal(got[..., :74], by_libswscale(frame)[..., :74])


def test_no_more_packets_than_needed_and_again(clip, decoder):
    with av.open(str(clip("b-frames.mp4"))) as container:
        stream = container.streams.video[0]
        first, second = groups(container, stream)[:2]
        session, taken = decoder(stream, "cpu"), []

        def feed(packets):
            for packet in packets:
                taken.append(packet)
                yield packet

        assert [pts for pts, _ in session.decode(feed(first), [first[0].pts])] == [first[0].pts]
        assert len(taken) < len(first)
        assert 1 <= session.decoded <= len(taken)
        assert [pts for pts, _ in session.decode([], [])] == []
        # the same packets once more, others, and packets after a loop that was left
        for packets in (first, second, first):
            assert len(list(session.decode(packets, [p.pts for p in packets if p.pts >= packets[0].pts]))) > 3
        for _ in session.decode(first, [packet.pts for packet in first]):
            break
        assert [pts for pts, _ in session.decode(second, [second[0].pts])] == [second[0].pts]


def test_a_wanted_frame_that_does_not_come(clip, decoder):
    with av.open(str(clip("b-frames.mp4"))) as container:
        stream = container.streams.video[0]
        packets = groups(container, stream)[0]
        session = decoder(stream, "cpu")
        with pytest.raises(VideoError, match=r"without 1 wanted frame\(s\), the first at pts 999999"):
            list(session.decode(packets, [packets[0].pts, 999_999]))
        assert len(list(session.decode(packets, [packets[0].pts]))) == 1


def test_pictures_that_gpus_do_not_decode(tmp_path, decoder):
    path = encode(Recipe("full-chroma.mp4", count=1, pix_fmt="yuv444p"), tmp_path)
    with av.open(str(path)) as container, pytest.raises(VideoError, match="yuv444p are decoded on the CPU only"):
        decoder(container.streams.video[0], "cpu")


def test_broken_packets(clip):
    with av.open(str(clip("av1.mkv"))) as container:
        stream = container.streams.video[0]
        session = cuda.CudaDecoder(stream, "cpu")
        packets = groups(container, stream)[0]
        broken = av.Packet(b"\xff" * 50)
        broken.pts = packets[0].pts
        with pytest.raises(VideoError, match="decoder on the CPU failed"):
            list(session.decode([broken], [packets[0].pts]))
        assert len(list(session.decode(packets, [packets[0].pts]))) == 1


def test_nv_session_is_made_anew_after_an_error(clip, nv):
    with av.open(str(clip("b-frames.mp4"))) as container:
        stream = container.streams.video[0]
        packets = groups(container, stream)[0]
        session = pynvvideocodec.NvDecoder(stream, "cpu")
        wanted = [packets[0].pts]
        assert len(list(session.decode(packets, wanted))) == len(list(session.decode(packets, wanted))) == 1
        assert len(nv.sessions) == 1
        nv.failures.append(nv.PyNvVCException("CUDA_ERROR_UNKNOWN"))
        with pytest.raises(VideoError, match=r"failed \(CUDA_ERROR_UNKNOWN\); decode this video on the CPU"):
            list(session.decode(packets, wanted))
        assert len(list(session.decode(packets, wanted))) == 1
        assert len(nv.sessions) == 2
        assert not nv.sessions[0].usedevicememory
        # the packets are the caller's, and still hold their data
        assert all(packet.size for packet in packets)


def test_nv_refuses_what_it_cannot_decode(clip, nv):
    with av.open(str(clip("mpeg4.mp4"))) as container, pytest.raises(VideoError, match="does not decode mpeg4"):
        pynvvideocodec.NvDecoder(container.streams.video[0], "cpu")
    with av.open(str(clip("b-frames.mp4"))) as container, pytest.raises(VideoError, match=r"on GPU 1 \(no GPU 1\)"):
        pynvvideocodec.NvDecoder(container.streams.video[0], 1)


def test_why_there_is_no_gpu(clip, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    for backend in backends.HARDWARE:
        reason = backends.probe(backend)
        assert "torch sees no GPU; install the NVIDIA driver" in reason
        with (
            av.open(str(clip("b-frames.mp4"))) as container,
            pytest.raises(VideoError, match=f"'{backend}' cannot be used: torch sees no GPU"),
        ):
            backends.open_decoder(backend, container.streams.video[0])
    with (
        av.open(str(clip("b-frames.mp4"))) as container,
        pytest.raises(VideoError, match="h264 cannot be decoded on GPU 0 "),
    ):
        cuda.CudaDecoder(container.streams.video[0], 0)
    with pytest.raises(VideoError, match="choose pyav, decord, torchcodec, cuda, pynvvideocodec"):
        backends.probe("vdpau")
    # a machine whose GPU torch sees, and whose driver has no video libraries
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "decoding library of the driver cannot be loaded" in backends.probe("cuda")
    assert "there is no GPU 3: torch sees 1" in backends.probe("cuda", 3)
    assert "there is no GPU 3: torch sees 1" in backends.probe("pynvvideocodec", 3)
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: None)
    assert "FFmpeg cannot open GPU 0" in backends.probe("cuda")
    monkeypatch.setattr(cuda, "hwdevices_available", list)
    assert "built without CUDA" in backends.probe("cuda")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("no", name="PyNvVideoCodec"), "pip install PyNvVideoCodec"),
        (ImportError("libcuda.so.1: cannot open\nTROUBLESHOOTING"), r"cannot be loaded \(libcuda.so.1: cannot open\)"),
        (RuntimeError("Driver version is too old"), r"cannot be loaded \(Driver version is too old\)"),
    ],
)
def test_why_pynvvideocodec_is_not_there(clip, monkeypatch, error, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delitem(sys.modules, "PyNvVideoCodec", raising=False)

    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "PyNvVideoCodec":
                raise error

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with av.open(str(clip("b-frames.mp4"))) as container, pytest.raises(VideoError, match=reason):
        pynvvideocodec.NvDecoder(container.streams.video[0], "cpu")
    monkeypatch.setitem(sys.modules, "PyNvVideoCodec", ModuleType("PyNvVideoCodec"))
    assert backends.probe("pynvvideocodec") is None


def test_colours_by_number():
    assert colours_of(2, 0) == Colours("bt601", False)
    assert colours_of(2, 0, Colours("bt709", True)) == Colours("bt709", True)
    assert colours_of(1, 1, Colours("bt2020", True)) == Colours("bt709", False)
    assert colours_of(8, 2) == Colours("bt601", True)
