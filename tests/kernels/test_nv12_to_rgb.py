from __future__ import annotations

import platform

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import VideoReformatter
from harness import DEVICE, covering, describe, gpu_only

from mmaccel import kernels
from mmaccel.errors import MethodError
from mmaccel.kernels.nv12_to_rgb import nv12_to_rgb
from mmaccel.kernels.nv12_to_rgb.taps import ACROSS_BITS, DOWN_BITS, INTERPOLATIONS, MATRICES, filter_taps

# AVColorSpace, as frames name their matrix
SPACES = {"bt709": 1, "fcc": 4, "bt601": 6, "smpte240m": 7, "bt2020": 9}
# libswscale rounds vertical sums otherwise where it has no assembly for x86
EXACT = platform.machine().lower() in ("x86_64", "amd64")


def planes(B, H, W, seed=0, dtype=torch.uint8, most=256):
    """Noise as B pictures in NV12; for uint16 in P010, ten bits in the upper part."""
    g = torch.Generator().manual_seed(seed)
    shapes = (B, H, W), (B, -(-H // 2), -(-W // 2), 2)
    if dtype == torch.uint8:
        return [torch.randint(0, most, shape, generator=g, dtype=dtype) for shape in shapes]
    return [(torch.randint(0, 1024, shape, generator=g, dtype=torch.int32) << 6).to(dtype) for shape in shapes]


def av_frame(y, uv, matrix, full_range):
    """One picture as yuv420p, as a software decoder gives it."""
    H, W = y.shape
    frame = av.VideoFrame(W, H, "yuv420p")
    for plane, values in zip(frame.planes, (y, uv[..., 0], uv[..., 1]), strict=True):
        padded = np.zeros((plane.height, plane.line_size), dtype=np.uint8)
        padded[:, : plane.width] = values.numpy()
        plane.update(padded)
    frame.colorspace, frame.color_range = SPACES[matrix], 2 if full_range else 1
    return frame


def by_libswscale(y, uv, size, matrix="bt709", full_range=False, interpolation="BICUBIC"):
    """RGB at full size, then each colour resized as a gray picture: uint8 [3, h, w]."""
    native = VideoReformatter().reformat(av_frame(y, uv, matrix, full_range), format="rgb24", threads=1).to_ndarray()
    colours = []
    for colour in range(3):
        gray = av.VideoFrame.from_ndarray(np.ascontiguousarray(native[..., colour]), format="gray")
        height, width = size or y.shape
        resized = VideoReformatter().reformat(gray, width, height, "gray", interpolation=interpolation, threads=1)
        colours.append(torch.from_numpy(resized.to_ndarray().copy()))
    return torch.stack(colours)


def naive(y, uv, size, matrix, full_range, how):
    """The definition in loops: BT matrix in whole numbers, taps across, taps down, for a single picture."""
    red, blue = MATRICES[matrix]
    green = 1 - red - blue
    stretch = 1 if full_range else 255 / 224
    factor = [round(8192 * stretch * f) for f in (2 - 2 * red, 2 - 2 * blue, -2 * blue * (1 - blue) / green)]
    factor.append(round(8192 * stretch * -2 * red * (1 - red) / green))
    luma, black = (8192, 0) if full_range else (round(8192 * 255 / 219), 16)
    (H, W), (h, w) = y.shape, size
    rgb = [[[0] * W for _ in range(H)] for _ in range(3)]
    for i in range(H):
        for j in range(W):
            light = (8 * (int(y[i, j]) - black) * luma) // 65536
            u, v = (8 * (int(c) - 128) for c in uv[i // 2, j // 2])
            values = (
                light + v * factor[0] // 65536,
                light + u * factor[2] // 65536 + v * factor[3] // 65536,
                light + u * factor[1] // 65536,
            )
            for colour, value in enumerate(values):
                rgb[colour][i][j] = min(max(value, 0), 255)
    (columns, across), (rows, down) = filter_taps(W, w, how, ACROSS_BITS), filter_taps(H, h, how, DOWN_BITS)
    out = torch.empty(3, h, w, dtype=torch.uint8)
    for colour in range(3):
        wide = [
            [
                min(32767, sum(int(t) * row[min(int(at) + k, W - 1)] for k, t in enumerate(taps)) >> 7)
                for at, taps in zip(columns, across, strict=True)
            ]
            for row in rgb[colour]
        ]
        for i, (at, taps) in enumerate(zip(rows, down, strict=True)):
            for j in range(w):
                products = [int(t) * wide[min(int(at) + k, H - 1)][j] for k, t in enumerate(taps)]
                if i >= h - 2:
                    level = (sum(products) + 2**18) >> 19
                else:
                    level = (sum(p >> 16 for p in products) + ((64 + 8 * (len(taps) - 1)) >> 4)) >> 3
                out[colour, i, j] = min(max(level, 0), 255)
    return out


@pytest.mark.parametrize("how", INTERPOLATIONS)
@pytest.mark.parametrize(("H", "W", "h", "w"), [(6, 9, 4, 5), (5, 4, 8, 11), (7, 8, 7, 3)])
def test_equals_the_loops(how, H, W, h, w):
    y, uv = planes(1, H, W)
    for matrix, full_range in (("bt709", False), ("bt601", True)):
        got = nv12_to_rgb(y, uv, size=(h, w), matrix=matrix, full_range=full_range, interpolation=how)
        assert torch.equal(got[0], naive(y[0], uv[0], (h, w), matrix, full_range, how))


@pytest.mark.parametrize("matrix", SPACES)
@pytest.mark.parametrize("full_range", [False, True])
def test_colours_equal_libswscale(matrix, full_range):
    for H, W in ((2, 2), (64, 96), (38, 51)):
        y, uv = planes(1, H, W, seed=H)
        got = nv12_to_rgb(y, uv, matrix=matrix, full_range=full_range)
        assert (got[0].int() - by_libswscale(y[0], uv[0], None, matrix, full_range)).abs().max() <= (0 if EXACT else 2)


def test_colours_from_all_over_the_cube_equal_libswscale():
    levels = torch.arange(0, 256, dtype=torch.uint8)
    for start in range(0, 256, 64):
        # each luma of a band with each pair of every eighth chroma
        y = levels[start : start + 64].repeat_interleave(2).repeat(2, 32 * 32)[None]
        u, v = torch.meshgrid(levels[7::8], levels[7::8], indexing="ij")
        uv = torch.stack([u.flatten(), v.flatten()], -1).repeat_interleave(64, 0)[None, None]
        got = nv12_to_rgb(y, uv)[0]
        assert (got.int() - by_libswscale(y[0], uv[0], None)).abs().max() <= (0 if EXACT else 2)


SIZES = [(72, 128, 28, 56), (64, 36, 23, 37), (40, 40, 97, 55), (36, 52, 36, 20), (36, 52, 21, 52), (540, 30, 40, 9)]


@pytest.mark.parametrize("how", INTERPOLATIONS)
@pytest.mark.parametrize(("H", "W", "h", "w"), SIZES)
def test_resizing_equals_libswscale(how, H, W, h, w):
    # black and white noise makes the filters overshoot
    for most in (256, 2):
        y, uv = planes(1, H, W, seed=h, most=most)
        y, uv = (y, uv) if most == 256 else (y * 219 + 16, uv * 224 + 16)
        got = nv12_to_rgb(y, uv, size=(h, w), interpolation=how)
        difference = (got[0].int() - by_libswscale(y[0], uv[0], (h, w), interpolation=how)).abs().max()
        assert difference <= (0 if EXACT else 2)


@pytest.mark.parametrize("seed", range(25))
def test_any_size_equals_libswscale(seed):
    draw = np.random.default_rng(seed)
    H, W, h, w = (int(n) for n in draw.integers(2, 150, 4))
    how, y, uv = INTERPOLATIONS[seed % 5], *planes(1, H + H % 2, W, seed)
    got = nv12_to_rgb(y, uv, size=(h, w), interpolation=how)
    assert (got[0].int() - by_libswscale(y[0], uv[0], (h, w), interpolation=how)).abs().max() <= (0 if EXACT else 2)


def test_ten_bits_are_close_to_libswscale():
    # flat chroma: where it varies, libswscale smooths the chroma of ten-bit pictures and only of these
    y, uv = planes(1, 48, 64, dtype=torch.uint16)
    for u, v in ((512, 512), (300, 700), (900, 200)):
        uv = torch.tensor([u << 6, v << 6], dtype=torch.int32).to(torch.uint16).expand(1, 24, 32, 2)
        frame = av.VideoFrame(64, 48, "yuv420p10le")
        for plane, values in zip(frame.planes, (y[0], uv[0, ..., 0], uv[0, ..., 1]), strict=True):
            padded = np.zeros((plane.height, plane.line_size // 2), dtype=np.uint16)
            padded[:, : plane.width] = values.int().numpy() >> 6
            plane.update(padded)
        frame.colorspace, frame.color_range = SPACES["bt709"], 1
        want = torch.from_numpy(frame.reformat(format="rgb24").to_ndarray()).permute(2, 0, 1)
        assert (nv12_to_rgb(y, uv)[0].int() - want.int()).abs().max() <= 3


def test_ten_bits_of_eight_are_eight():
    y, uv = planes(2, 10, 12)
    wide = [(plane.int() << 8).to(torch.uint16) for plane in (y, uv)]
    assert torch.equal(nv12_to_rgb(*wide, size=(7, 9)), nv12_to_rgb(y, uv, size=(7, 9)))


def upright(picture, rotation, mirror):
    """[3, h, w] turned clockwise, then mirrored, by numpy."""
    turned = np.rot90(picture.numpy(), -rotation // 90, axes=(1, 2))
    return torch.from_numpy((turned[..., ::-1] if mirror else turned).copy())


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("mirror", [False, True])
def test_turned_after_resizing(rotation, mirror):
    y, uv = planes(2, 12, 20)
    size = (9, 6) if rotation % 180 else (6, 9)
    plain = nv12_to_rgb(y, uv, size=(6, 9))
    got = nv12_to_rgb(y, uv, size=size, rotation=rotation, mirror=mirror)
    assert torch.equal(got, torch.stack([upright(picture, rotation, mirror) for picture in plain]))


MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_normalised(dtype):
    y, uv = planes(2, 12, 20)
    levels = nv12_to_rgb(y, uv, size=(6, 9)).double()
    tolerance = torch.finfo(dtype).eps * 4
    got = nv12_to_rgb(y, uv, size=(6, 9), dtype=dtype)
    torch.testing.assert_close(got.double(), levels / 255, atol=tolerance, rtol=tolerance)
    got = nv12_to_rgb(y, uv, size=(6, 9), dtype=dtype, mean=MEAN, std=STD)
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), (levels / 255 - mean) / std, atol=tolerance, rtol=tolerance)


def pitched(x, seed=1):
    """The same values in rows that are longer than the picture, with noise in between, as decoders lay them out."""
    wide = torch.randint(0, 255, (x.shape[0], x.shape[1] + 3, x.shape[2] + 13, *x.shape[3:]), dtype=torch.uint8)
    wide = wide.to(x.dtype)
    wide[:, : x.shape[1], : x.shape[2]] = x
    return wide[:, : x.shape[1], : x.shape[2]]


def test_pitched_planes_and_slots():
    y, uv = planes(3, 10, 14)
    want = nv12_to_rgb(y, uv, size=(6, 5))
    assert torch.equal(nv12_to_rgb(pitched(y), pitched(uv), size=(6, 5)), want)
    assert torch.equal(nv12_to_rgb(y[0], uv[0], size=(6, 5)), want[:1])
    out = torch.full((5, 3, 6, 5), 7, dtype=torch.uint8)
    assert nv12_to_rgb(y, uv, out=out, slots=[4, -1, 1]) is out
    assert torch.equal(out[[4, 1]], want[[0, 2]])
    assert out[[0, 2, 3]].eq(7).all()
    # channels last, as some vision towers take it
    out = torch.zeros(3, 6, 5, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    assert torch.equal(nv12_to_rgb(y, uv, out=out), want)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_pictures(nan_filled, backend):
    y, uv = (plane.to(DEVICE) for plane in planes(0, 6, 8))
    with kernels.use(backend):
        assert nv12_to_rgb(y, uv, size=(3, 4)).shape == (0, 3, 3, 4)
        out = torch.ones(2, 3, 3, 4, dtype=torch.uint8, device=DEVICE)
        assert nv12_to_rgb(y, uv, out=out).eq(1).all()


CASES = covering(
    H_W=[(6, 7), (5, 9), (2, 3)],
    h_w=[(3, 4), (7, 6), None],
    B=[1, 2],
    how=INTERPOLATIONS,
    turn=[(0, False), (90, False), (180, True), (270, True)],
    dtype=[torch.uint8, torch.float32, torch.float16, torch.bfloat16],
    layout=["plain", "pitched", "p010"],
)


@pytest.mark.parametrize("case", CASES, ids=describe)
def test_triton_equals_torch_bit_for_bit(nan_filled, case):
    y, uv = planes(case["B"], *case["H_W"], dtype=torch.uint16 if case["layout"] == "p010" else torch.uint8)
    if case["layout"] == "pitched":
        y, uv = pitched(y), pitched(uv)
    y, uv = y.to(DEVICE), uv.to(DEVICE)
    rotation, mirror = case["turn"]
    options = {"size": case["h_w"], "interpolation": case["how"], "rotation": rotation, "mirror": mirror}
    options |= {"matrix": "bt601", "full_range": case["B"] == 2, "dtype": case["dtype"]}
    if case["dtype"] != torch.uint8:
        options |= {"mean": MEAN, "std": STD}
    got, want = [], []
    for results, backend in ((got, "triton"), (want, "torch")):
        with kernels.use(backend):
            results.append(nv12_to_rgb(y, uv, **options))
    assert got[0].dtype == case["dtype"]
    assert torch.equal(got[0], want[0])


def test_triton_over_several_tiles_and_slots(nan_filled):
    from mmaccel.kernels.nv12_to_rgb import triton

    y, uv = (plane.to(DEVICE) for plane in planes(2, 14, 3))
    h, w = 2 * triton._ROWS + 1, triton._COLUMNS + 2
    results = []
    for backend in ("torch", "triton"):
        out = torch.full((4, 3, h, w), 9, dtype=torch.uint8, device=DEVICE)
        with kernels.use(backend):
            nv12_to_rgb(y, uv, out=out, slots=[3, -1], interpolation="BILINEAR")
        results.append(out)
    assert torch.equal(*results)
    assert results[0][:3].eq(9).all()


def test_wrong_arguments():
    y, uv = planes(2, 6, 8)
    out = torch.empty(2, 3, 3, 4, dtype=torch.uint8)
    wrong = [
        {"matrix": "bt470"},
        {"interpolation": "SINC"},
        {"rotation": 45},
        {"size": (0, 4)},
        {"dtype": torch.float64},
        {"mean": MEAN},
        {"dtype": torch.float32, "mean": (0.5, 0.5)},
        {"dtype": torch.float32, "std": (0.5, 0.5, 0.0)},
        {"dtype": torch.float32, "mean": (0.5, 0.5, float("nan"))},
        {"out": out[0]},
        {"out": out.long()},
        {"out": out, "size": (4, 4)},
        {"out": out[:1].expand(2, 3, 3, 4)},
        {"out": out, "slots": [0, 2]},
        {"out": out, "slots": [0]},
        {"out": out, "slots": torch.zeros(2)},
    ]
    for arguments in wrong:
        with pytest.raises(MethodError):
            nv12_to_rgb(y, uv, **arguments)
    for bad in ((y, uv[:, :2]), (y.int(), uv.int()), (y, uv.to(torch.uint16)), (y[..., :0], uv[:, :, :0]), (y[0], uv)):
        with pytest.raises(MethodError, match="y "):
            nv12_to_rgb(*bad)
    with pytest.raises(MethodError, match="resize twice"):
        nv12_to_rgb(*planes(1, 600, 2), size=(4, 2))


def test_opcheck():
    from mmaccel.kernels.nv12_to_rgb.taps import colour, tables

    y, uv = planes(2, 6, 8)
    across = tables(8, 5, "BICUBIC", ACROSS_BITS, y.device)
    down = tables(6, 4, "BICUBIC", DOWN_BITS, y.device)
    out, slots = torch.zeros(3, 3, 4, 5), torch.tensor([2, 0])
    rest = (colour("bt709", False), 0, torch.zeros(3), torch.ones(3))
    torch.library.opcheck(torch.ops.mmaccel.nv12_to_rgb.default, (y, uv, out, slots, *across, *down, *rest))


def test_the_record():
    y, uv = (plane.to(DEVICE) for plane in planes(1, 4, 4))
    with kernels.recording() as events:
        for backend in ("triton", "torch"):
            with kernels.use(backend):
                nv12_to_rgb(y, uv, size=(2, 2), interpolation="POINT")
    assert [(event.op, event.backend) for event in events] == [("nv12_to_rgb", "triton"), ("nv12_to_rgb", "torch")]


@pytest.mark.gpu
@pytest.mark.parametrize(("H", "W", "size"), [(1080, 1920, (392, 700)), (720, 1280, (728, 1288)), (2160, 3840, None)])
def test_full_shapes_on_a_gpu(nan_filled, H, W, size):
    gpu_only()
    y, uv = (plane.to(DEVICE) for plane in planes(2, H, W))
    for options in ({}, {"dtype": torch.bfloat16, "mean": MEAN, "std": STD}):
        with kernels.use("triton"):
            got = nv12_to_rgb(y, uv, size=size, **options)
        with kernels.use("torch"):
            assert torch.equal(got, nv12_to_rgb(y, uv, size=size, **options))
