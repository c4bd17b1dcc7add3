"""Codec signals of rendered clips whose motion is known, against naive loops and plain demuxing."""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING

import av
import numpy as np
import pytest
import torch

from mmaccel.codecs import codec_signals, load_video, pixel_change, select_frames, using_signals, write_video
from mmaccel.codecs.signals import CodecSignals, changes_of, overlap
from mmaccel.codecs.vectors import PITCH, Trace, block_field, unlike
from mmaccel.errors import MethodError, NotApplicableError, VideoError

if TYPE_CHECKING:
    from pathlib import Path

HEIGHT, WIDTH, SIDE, TOP = 96, 192, 48, 32
GRID = (HEIGHT // 16, WIDTH // 16)
PLAIN = {"bf": "0", "refs": "1", "g": "250", "me_range": "32"}
B_FRAMES = {"bf": "3", "b_strategy": "0", "refs": "1", "g": "250", "x264-params": "b-pyramid=none"}
PYRAMID = {"bf": "3", "b_strategy": "0", "g": "250", "x264-params": "b-pyramid=normal:ref=2"}


def texture(height: int, width: int, seed: int) -> np.ndarray:
    """A random picture without any period, smooth enough for an encoder to follow."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(30, 226, (height // 4 + 2, width // 4 + 2, 1)).repeat(3, 2)
    y, x = np.arange(height) / 4, np.arange(width) / 4
    rows = coarse[y.astype(int)] * (1 - y % 1)[:, None, None] + coarse[y.astype(int) + 1] * (y % 1)[:, None, None]
    left, part = x.astype(int), (x % 1)[None, :, None]
    return (rows[:, left] * (1 - part) + rows[:, left + 1] * part).astype(np.uint8)


def moving(count: int, speed: int, start: int = 16) -> np.ndarray:
    """A square of 48 pixels that moves to the right by `speed` pixels a frame, on a still ground."""
    frames = np.repeat(texture(HEIGHT, WIDTH, 1)[None], count, 0)
    square = texture(SIDE, SIDE, 2)
    for number, frame in enumerate(frames):
        frame[TOP : TOP + SIDE, start + speed * number : start + speed * number + SIDE] = square
    return frames


def inside(number: int, speed: int, margin: int, start: int = 16) -> np.ndarray:
    """bool [rows, columns]: the cells of 16 pixels that lie in the square by a margin."""
    cells = np.zeros(GRID, dtype=bool)
    left = start + speed * number
    for row in range(GRID[0]):
        for column in range(GRID[1]):
            x, y = 16 * column, 16 * row
            across = left + margin <= x and x + 16 <= left + SIDE - margin
            cells[row, column] = across and y >= TOP and y + 16 <= TOP + SIDE
    return cells


def never(numbers: range, speed: int, start: int = 16) -> np.ndarray:
    """bool [rows, columns]: the cells that the square does not come near in any of these frames."""
    cells = np.ones(GRID, dtype=bool)
    left, right = start + speed * numbers[0], start + speed * numbers[-1] + SIDE
    cells[TOP // 16 - 1 : (TOP + SIDE) // 16 + 1, max(0, left // 16 - 1) : right // 16 + 2] = False
    return cells


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory):
    """film(name, frames, **options) -> path of an H.264 file, encoded once."""
    folder = tmp_path_factory.mktemp("films")

    def make(name: str, frames: np.ndarray, options: dict[str, str], **more) -> Path:
        path = folder / name
        return path if path.exists() else write_video(path, frames, options=options, **more)

    return make


@pytest.mark.parametrize(
    ("name", "options", "more"),
    [
        ("plain.mp4", PLAIN, {}),
        ("b.mp4", B_FRAMES, {}),
        ("pyramid.mp4", PYRAMID, {}),
        ("gops.mp4", {**PLAIN, "g": "6", "keyint_min": "6", "sc_threshold": "0"}, {}),
        ("mpeg4.mp4", {"bf": "0", "q": "2", "g": "100"}, {"codec": "mpeg4", "crf": None}),
        ("mpeg2.mpg", {"bf": "2", "q": "2", "g": "100"}, {"codec": "mpeg2video", "crf": None, "fps": 25}),
    ],
)
def test_a_square_moves_by_its_speed_and_the_ground_stays(film, name, options, more):
    speed, count = 3, 20
    path = film(name, moving(count, speed), options, **more)
    found = codec_signals(path, grid=GRID)
    assert len(found) == count
    assert not found.cuts[1:].any()
    kinds = set(found.types[1:])
    assert kinds == {"b.mp4": {"P", "B"}, "pyramid.mp4": {"P", "B"}, "gops.mp4": {"I", "P"}}.get(
        name, {"P", "B"} if "mpeg2" in name else {"P"}
    )
    steps = [found.motion[n][torch.from_numpy(inside(n, speed, 4))] for n in range(1, count)]
    # opposite signs of the two directions of a B frame would cancel out
    assert float(torch.cat(steps).median()) == pytest.approx(speed, abs=0.25)
    ground = torch.from_numpy(never(range(count), speed))
    assert found.motion[1:, ground].max() == 0
    assert found.still[1:, ground].min() == 1
    assert found.fresh[1:, ground].max() == 0
    assert found.bits[1:, ground].max() == 0
    assert found.change[1:, ground].max() == 0


@pytest.mark.parametrize(("name", "options"), [("plain.mp4", PLAIN), ("b.mp4", B_FRAMES), ("pyramid.mp4", PYRAMID)])
def test_motion_adds_up_over_the_frames_in_between(film, name, options):
    speed = 3
    wanted = [0, 4, 10, 19]
    found = codec_signals(film(name, moving(20, speed), options), indices=wanted, grid=GRID)
    for place in range(1, 4):
        gap = wanted[place] - wanted[place - 1]
        # at the front of the square a cell takes on the square's history only by and by
        cells = inside(wanted[place], speed, 0)
        rear = cells & (np.cumsum(cells, axis=1) <= 2)
        assert rear.any()
        assert float(found.motion[place][torch.from_numpy(rear)].median()) == pytest.approx(speed * gap, rel=0.25)
        assert found.motion[place][torch.from_numpy(never(range(20), speed))].max() == 0


def test_what_swings_back_has_not_moved():
    trace = Trace(4, 6)
    right = torch.zeros(2, 4, 6)
    right[0] = -4.0
    still = torch.zeros(4, 6)
    for step in (right, right, -right):
        trace.move(step, still + 1, still, 0, 1)
    torch.testing.assert_close(trace.motion, torch.full((4, 6), 4.0))
    trace.move(-right, still + 1, still, 0, 1)
    assert trace.motion.max() == 0
    assert trace.still.max() == 0


def test_the_trace_against_loops():
    generator = torch.Generator().manual_seed(0)
    rows, columns = 5, 7
    trace = Trace(rows, columns)
    state = np.zeros((3, rows, columns))
    still = np.ones((rows, columns))
    for _ in range(6):
        step = 20 * torch.randn(2, rows, columns, generator=generator)
        step[:, torch.rand(rows, columns, generator=generator) < 0.4] = 0
        fresh = (torch.rand(rows, columns, generator=generator) < 0.2).float()
        moved = (step != 0).any(0).float() * (1 - fresh)
        trace.move(step, moved, fresh, 0, 1)
        new = np.zeros_like(state)
        for y in range(rows):
            for x in range(columns):
                sx = min(max(x + float(step[0, y, x]) / PITCH, 0), columns - 1)
                sy = min(max(y + float(step[1, y, x]) / PITCH, 0), rows - 1)
                x0, y0 = min(int(sx), columns - 2), min(int(sy), rows - 2)
                fx, fy = sx - x0, sy - y0
                corners = state[:, y0 : y0 + 2, x0 : x0 + 2]
                new[:, y, x] = (
                    corners * np.array([[(1 - fy) * (1 - fx), (1 - fy) * fx], [fy * (1 - fx), fy * fx]])
                ).sum((1, 2))
                new[:2, y, x] = (new[:2, y, x] + step[:, y, x].numpy()) * (1 - float(fresh[y, x]))
                new[2, y, x] = max(new[2, y, x], float(fresh[y, x]))
                still[y, x] *= 1 - min(1.0, float(moved[y, x] + fresh[y, x]))
        state = new
    np.testing.assert_allclose(trace.motion.numpy(), np.hypot(state[0], state[1]), atol=1e-3)
    np.testing.assert_allclose(trace.fresh.numpy(), state[2], atol=1e-5)
    np.testing.assert_allclose(trace.still.numpy(), still, atol=1e-6)


VECTOR = np.dtype(
    [("source", "i4"), ("w", "u1"), ("h", "u1"), ("dst_x", "i2"), ("dst_y", "i2"), ("motion_x", "i4"),
     ("motion_y", "i4"), ("motion_scale", "u2")]
)  # fmt: skip


def test_vectors_against_a_loop_over_pixels():
    rng = np.random.default_rng(5)
    rows, columns, before, after = 3, 4, 2, 3
    total = np.zeros((2, rows * 16, columns * 16))
    count, past, moved = (np.zeros((rows * 16, columns * 16)) for _ in range(3))
    made = []
    for row in range(rows):
        for column in range(columns):
            kind = rng.integers(0, 4)  # nothing, past, future, both
            for source in {1: (-1,), 2: (1,), 3: (-1, 1)}.get(int(kind), ()):
                w, h = [(16, 16), (8, 16), (16, 8), (8, 8)][rng.integers(0, 4)]
                for top in range(0, 16, h):
                    for left in range(0, 16, w):
                        mx, my = rng.integers(-40, 41, 2) * rng.integers(0, 2)
                        x, y = 16 * column + left, 16 * row + top
                        made.append((source, w, h, x + w // 2, y + h // 2, mx, my, 4))
                        area = (slice(y, y + h), slice(x, x + w))
                        total[(slice(None), *area)] += (
                            np.array([mx, my])[:, None, None] / 4 / (before if source < 0 else -after)
                        )
                        count[area] += 1
                        moved[area] += bool(mx or my)
                        past[area] += source < 0

    def cells(values):
        return values.reshape(*values.shape[:-2], rows, 16, columns, 16).mean((-3, -1))

    field = block_field(np.array(made, dtype=VECTOR), rows, columns, before, after)
    tied = cells(np.minimum(count, 1))
    np.testing.assert_allclose(field.fresh.numpy(), 1 - tied, atol=1e-6)
    np.testing.assert_allclose(field.backward.numpy(), tied - cells(past), atol=1e-6)
    np.testing.assert_allclose(field.step.numpy(), cells(total) / np.maximum(cells(count), 1e-9), atol=1e-5)
    np.testing.assert_allclose(field.moving.numpy(), cells(moved) / np.maximum(cells(count), 1e-9) * tied, atol=1e-6)
    assert 0 < field.fresh.mean() < 1


def test_what_motion_foretells_is_not_new():
    then = torch.from_numpy(texture(70, 90, 3)[..., 0].copy())
    now = torch.roll(then, (0, 5), (0, 1))
    step = torch.zeros(2, 5, 6)
    assert unlike(then, then, step).max() == 0
    step[0] = -5
    changed = unlike(now, then, step)
    assert changed[:, 1:].max() == 0
    assert unlike(now, then, torch.zeros(2, 5, 6)).mean() > 0.8
    # the last block is 10 pixels wide and 6 high: darker there by 11 levels, it is another, by 9 it is not
    for levels, expected in ((9, 0), (11, 1)):
        dark = (then.int().clamp_min(20)).clone()
        light = dark.clone()
        dark[64:, 80:] -= levels
        off = unlike(dark.to(torch.uint8), light.to(torch.uint8), torch.zeros(2, 5, 6))
        assert off.sum() == off[-1, -1] == expected


@pytest.mark.parametrize("options", [PLAIN, B_FRAMES, {**PLAIN, "g": "4"}, {"g": "1"}])
def test_a_still_clip_is_all_copies(tmp_path, options):
    path = write_video(tmp_path / "still.mp4", moving(1, 0).repeat(14, 0), options=options)
    found = codec_signals(path)
    assert found.motion.max() == 0
    assert found.fresh[1:].max() == 0
    assert found.still[1:].min() == 1
    assert found.change[1:].max() == 0
    assert found.change[0].min() == 1
    assert not found.cuts.any()


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (PLAIN, "I"),
        ({**PLAIN, "sc_threshold": "0"}, "P"),
        ({**B_FRAMES, "sc_threshold": "0"}, "BP"),
        ({"g": "1"}, "I"),
    ],
)
def test_a_hard_cut_is_flagged_and_nothing_else_is(tmp_path, options, kind):
    frames = np.concatenate([moving(13, 3), np.repeat(texture(HEIGHT, WIDTH, 9)[None], 12, 0)])
    path = write_video(tmp_path / "cut.mp4", frames, options=options)
    every = codec_signals(path, grid=GRID)
    assert every.cuts.nonzero().flatten().tolist() == [13]
    assert every.types[13] in kind
    assert every.change[13].mean() > 0.8
    some = codec_signals(path, indices=[2, 10, 16, 24], grid=GRID)
    assert some.cuts.tolist() == [False, False, True, False]
    assert some.fresh[2].mean() > 0.8
    assert some.fresh[3].max() == 0


def test_packets_are_those_of_the_file(film):
    path = film("b.mp4", moving(20, 3), B_FRAMES)
    with av.open(str(path)) as container:
        sizes = [packet.size for packet in sorted(container.demux(video=0), key=lambda p: p.pts or 0) if packet.size]
    assert codec_signals(path).packet_bytes.tolist() == sizes
    wanted = [3, 4, 9, 19]
    found = codec_signals(path, indices=wanted)
    ends = np.cumsum([0, *sizes])
    assert found.packet_bytes.tolist() == [
        ends[b + 1] - ends[a + 1] for a, b in zip([-1, *wanted], wanted, strict=False)
    ]
    # the packets of an interval are spread over the picture, and lost nowhere
    spread = found.bits[1:].mean((1, 2)) * HEIGHT * WIDTH / 8
    torch.testing.assert_close(spread, found.packet_bytes[1:].float(), rtol=1e-4, atol=0.5)


def test_frames_are_those_that_the_reader_takes(film):
    path = film("b.mp4", moving(20, 3), B_FRAMES)
    video = load_video(path, frames=6)
    found = codec_signals(path, frames=6)
    assert found.indices.tolist() == video.indices.tolist()
    again = codec_signals(path.read_bytes(), indices=video.indices, threads=1)
    for name in ("motion", "fresh", "still", "bits", "packet_bytes", "cuts"):
        assert torch.equal(getattr(found, name), getattr(again, name)), name
    assert found.types == again.types


def test_a_frame_wanted_twice_is_a_copy_of_itself(film):
    found = codec_signals(film("plain.mp4", moving(20, 3), PLAIN), indices=[5, 9, 9])
    assert found.still[2].min() == 1
    assert (found.motion[2].max(), found.bits[2].max(), found.packet_bytes[2].item()) == (0, 0, 0)


def test_cells_against_pixels():
    rng = np.random.default_rng(0)
    for sides, cells in (((80,), (3,)), ((70,), (5,)), ((50,), (9,)), ((33,), (1,))):
        blocks = -(-sides[0] // 16)
        values = rng.random(blocks)
        fine = np.repeat(np.repeat(values, 16)[: sides[0]], cells[0])  # every pixel in as many parts as there are cells
        expected = fine.reshape(cells[0], sides[0]).mean(1)
        shares = overlap((torch.arange(blocks + 1) * 16).clamp_max(sides[0]), cells[0])
        np.testing.assert_allclose(shares.numpy() @ values, expected, atol=1e-6)
        np.testing.assert_allclose(shares.sum(1), 1, atol=1e-6)


@pytest.mark.parametrize("grid", [(5, 7), (40, 80), (1, 1)])
def test_grids_that_do_not_divide_the_frame_or_are_finer_than_blocks(film, grid):
    path = film("plain.mp4", moving(20, 3), PLAIN)
    coarse = codec_signals(path, indices=[0, 6], grid=GRID)
    found = codec_signals(path, indices=[0, 6], grid=grid)
    rows, columns = np.lcm(grid[0], GRID[0]), np.lcm(grid[1], GRID[1])
    for name in ("motion", "fresh", "still", "bits"):
        fine = getattr(coarse, name).numpy().repeat(rows // GRID[0], 1).repeat(columns // GRID[1], 2)
        expected = fine.reshape(2, grid[0], rows // grid[0], grid[1], columns // grid[1]).mean((2, 4))
        np.testing.assert_allclose(getattr(found, name).numpy(), expected, atol=1e-4)
        np.testing.assert_allclose(getattr(coarse.on_grid(*grid), name).numpy(), expected, atol=1e-4)
    assert found.grid == grid


@pytest.mark.parametrize("matrix", [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0), (-1, 0, 0, 1)])
def test_the_grid_is_that_of_the_upright_picture(film, tmp_path, matrix):
    stored = film("plain.mp4", moving(20, 3), PLAIN)
    a, b, c, d = matrix
    data = bytearray(stored.read_bytes())
    offset = data.index(b"tkhd") + 44
    one = 1 << 16
    shift = (WIDTH * (a < 0) + HEIGHT * (c < 0), WIDTH * (b < 0) + HEIGHT * (d < 0))
    data[offset : offset + 36] = struct.pack(
        ">9i", a * one, b * one, 0, c * one, d * one, 0, shift[0] * one, shift[1] * one, 1 << 30
    )
    turned = tmp_path / "turned.mp4"
    turned.write_bytes(data)
    found = codec_signals(turned, indices=[0, 5])
    plain = codec_signals(stored, indices=[0, 5])
    rows, columns = plain.grid
    for y in range(rows):
        for x in range(columns):
            right = a * x + c * y + (columns - 1) * (a < 0) + (rows - 1) * (c < 0)
            down = b * x + d * y + (columns - 1) * (b < 0) + (rows - 1) * (d < 0)
            assert float(found.motion[1, down, right]) == pytest.approx(float(plain.motion[1, y, x]), abs=1e-5)
    # where the upright pictures differ is where the signals say so
    frames = load_video(turned, indices=[0, 5]).frames
    assert pixel_change(frames, found.grid)[1][found.change[1] == 0].max() < 0.2
    assert plain.motion[1].max() > 5


@pytest.mark.parametrize("name", ["hevc.mp4", "vp9.webm", "vp8.webm", "av1.mkv", "mjpeg.avi", "lossless.mkv"])
def test_codecs_without_vectors_are_refused_or_told_by_their_packets(clip, name):
    with pytest.raises(VideoError, match="no motion vectors") as error:
        codec_signals(clip(name))
    assert 'fallback="packets"' in str(error.value)
    found = codec_signals(clip(name), fallback="packets", grid=(2, 3))
    assert not found.vectors
    assert len(found) == 60
    with av.open(str(clip(name))) as container:
        sizes = {packet.pts: packet.size for packet in container.demux(video=0) if packet.size}
    assert found.packet_bytes.tolist() == [sizes[pts] for pts in pts_shown(clip(name))]
    assert found.fresh.isnan().all()
    assert torch.equal(found.bits, found.bits[:, :1, :1].expand(-1, 2, 3))
    assert ((found.change >= 0) & (found.change <= 1)).all()


@pytest.mark.parametrize(
    "name",
    ["b-frames.mp4", "open-gop.mp4", "intra.mp4", "fragments.mp4", "b-frames.mkv", "b-frames.ts", "no-times.h264",
     "jitter.mkv", "mpeg4.avi", "mpeg4.mp4", "mpeg2.mpg"],
)  # fmt: skip
def test_every_container_gives_the_frames_that_are_decoded(clip, name):
    found = codec_signals(clip(name), grid=(4, 8))
    with av.open(str(clip(name))) as container:
        types = [av.video.frame.PictureType(frame.pict_type).name for frame in container.decode(video=0)]
    assert list(found.types) == types
    assert found.indices.tolist() == list(range(60))
    with av.open(str(clip(name))) as container:
        assert int(found.packet_bytes.sum()) == sum(packet.size for packet in container.demux(video=0))
    assert ((found.change >= 0) & (found.change <= 1)).all()
    assert codec_signals(clip(name), indices=[-1]).types == (types[-1],)


def test_a_file_that_begins_within_a_group_of_pictures(film, tmp_path):
    """Frames shown before the first keyframe that can be decoded have no picture."""
    path = tmp_path / "late.mkv"
    options = {"bf": "3", "b_strategy": "0", "g": "8", "x264-params": "open-gop=1:bframes=3", "sc_threshold": "0"}
    with av.open(str(film("open.mp4", moving(20, 3), options))) as source, av.open(str(path), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        packets = [packet for packet in source.demux(stream) if packet.size]
        second = [n for n, packet in enumerate(packets) if packet.is_keyframe][1]
        for packet in packets[second:]:
            packet.stream = copy
            target.mux(packet)
    found = codec_signals(path)
    with av.open(str(path)) as container:
        shown = [frame.pts for frame in container.decode(video=0)]
    lost = len(packets) - second - len(shown)
    assert lost > 0
    assert found.still[1 : 1 + lost].min() == 1
    assert found.motion[1 + lost :].max() > 2


def pts_shown(path: Path) -> list[int]:
    with av.open(str(path)) as container:
        return [frame.pts for frame in container.decode(video=0)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frames": 3, "indices": [1]}, "give one of frames"),
        ({"indices": [4, 2]}, "ascending"),
        ({"indices": [0, 99]}, "outside"),
        ({"frames": 99}, "at most 20"),
        ({"grid": (0, 3)}, "1 to 4096"),
        ({"grid": 3}, "rows, columns"),
        ({"grid": (2.5, 3)}, "whole number"),
        ({"fallback": "motion"}, "fallback"),
        ({"threads": 0}, "threads"),
    ],
)
def test_wrong_requests(film, arguments, message):
    with pytest.raises(VideoError, match=message):
        codec_signals(film("plain.mp4", moving(20, 3), PLAIN), **arguments)


def test_damaged_and_missing_videos(film, tmp_path):
    with pytest.raises(VideoError, match="does not exist"):
        codec_signals(tmp_path / "none.mp4")
    path = film("plain.mp4", moving(20, 3), PLAIN)
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][10]
    data[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    with pytest.raises(VideoError, match="damaged at frame"):
        codec_signals(bytes(data))


def naive_selection(worth: list[float], keep: int) -> list[int]:
    left = list(range(len(worth)))
    worth = [value + 1e-6 for value in worth]
    if keep == 1:
        passed = 0.0
        for place in left[1:]:
            passed += worth[place]
            if passed >= sum(worth[1:]) / 2:
                return [place]
    while len(left) > keep:
        least = min(left[1:], key=lambda place: (worth[place], place))
        at = left.index(least)
        if at + 1 < len(left):
            worth[left[at + 1]] += worth[least]
        left.remove(least)
    return left


@pytest.mark.parametrize("seed", range(6))
def test_frames_are_dropped_one_by_one(seed):
    change = torch.rand(23, 2, 3, generator=torch.Generator().manual_seed(seed)) ** 4
    worth = change.double().mean((1, 2)).tolist()
    for keep in (1, 2, 7, 0.5, 22, 1.0):
        count = keep if isinstance(keep, int) else round(keep * 23 + 1e-9)
        assert select_frames(change, keep) == naive_selection(worth, count)


def test_copies_go_first_and_what_does_not_move_is_thinned_evenly(tmp_path):
    frames = moving(8, 6).repeat([1, 3, 1, 4, 1, 1, 2, 1], 0)
    found = codec_signals(write_video(tmp_path / "held.mp4", frames, options=PLAIN))
    assert select_frames(found, 8) == [0, 1, 4, 5, 9, 10, 11, 13]
    assert select_frames(torch.zeros(9, 1, 1), 1) == [4]
    assert select_frames(torch.zeros(1, 1, 1), 1) == [0]
    gaps = np.diff([*select_frames(torch.zeros(32, 1, 1), 8), 32])
    assert set(gaps) == {4}
    with pytest.raises(MethodError, match="33 tokens cannot be kept"):
        select_frames(torch.zeros(32, 1, 1), 33)


def test_change_of_pixels():
    frames = torch.randint(0, 256, (4, 3, 12, 15), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    frames[2] = frames[1]
    found = pixel_change(frames, (3, 5))
    assert (found[0] == 1).all()
    assert (found[2] == 0).all()
    cell = np.abs(frames[1, :, 4:8, 3:6].int() - frames[0, :, 4:8, 3:6].int()).double().mean().item()
    assert float(found[1, 1, 1]) == pytest.approx(1 - np.exp(-cell / 16), abs=1e-6)


def test_signals_are_given_for_a_block_and_a_thread():
    first, second = torch.zeros(4, 2, 2), torch.ones(6, 1, 1)
    with using_signals(first, second):
        assert torch.equal(changes_of("m", 1, 6), second)
        with using_signals(second):
            assert torch.equal(changes_of("m", 0, 6), second)
        assert torch.equal(changes_of("m", 0, 4), first)
        # groups: the sum over the frames of each, 1 at most
        assert torch.equal(changes_of("m", 1, 3), torch.ones(3, 1, 1))
        with pytest.raises(NotApplicableError, match="of 4 frames for a video that the model sees as 3"):
            changes_of("m", 0, 3)
        with pytest.raises(NotApplicableError, match="of video 3 of this call, and 2 were given"):
            changes_of("m", 2, 4)
        elsewhere: list[Exception] = []

        def ask() -> None:
            try:
                changes_of("m", 0, 4)
            except NotApplicableError as error:
                elsewhere.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        assert len(elsewhere) == 1
    with pytest.raises(NotApplicableError, match="0 were given"):
        changes_of("m", 0, 4)


@pytest.mark.parametrize("wrong", [[0.1, 0.2], torch.zeros(3, 4), torch.full((2, 2, 2), 1.5), torch.empty(0, 2, 2)])
def test_what_are_no_signals(wrong):
    with pytest.raises(VideoError), using_signals(wrong):
        pass


def test_change_counts_motion_by_how_far():
    quiet = torch.zeros(2, 1, 4)
    signals = CodecSignals(
        indices=torch.arange(2), motion=torch.tensor([[[0, 0, 4, 2]]]).repeat(2, 1, 1).float(),
        fresh=torch.tensor([[[0, 1, 0, 0.0]]]).repeat(2, 1, 1), still=torch.tensor([[[1, 0, 0, 0.5]]]).repeat(2, 1, 1),
        bits=quiet, packet_bytes=torch.zeros(2), types=("I", "P"), cuts=torch.zeros(2, dtype=torch.bool), pixels=1,
    )  # fmt: skip
    moved = 1 - np.exp(-1)
    np.testing.assert_allclose(signals.change[1, 0], [0, 1, moved, moved / 2], atol=1e-6)
    assert (signals.change[0] == 1).all()
