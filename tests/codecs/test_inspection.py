"""probe_video: what it says of a file is what decoding it shows, what it foretells is what reading it takes."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from clips import RECIPES, Recipe, encode, sequential

import mmaccel.codecs.index
from mmaccel.codecs import load_video, probe_video
from mmaccel.codecs.packets import PacketTable
from mmaccel.codecs.plan import structure_of
from mmaccel.errors import VideoError

Clip = Callable[[str], Path]

NUMBERED = [name for name in RECIPES if name not in ("vp8.webm", "no-times.h264")]
REQUESTS = [{"frames": 1}, {"frames": 7}, {"indices": [11, 40, 11, -1]}, {"fps": 0.7}, {"seconds": [2.1, 0.2]}]


@pytest.mark.parametrize("name", NUMBERED)
def test_the_plan_is_what_reading_takes(clip: Clip, name: str) -> None:
    for request in REQUESTS:
        plan = probe_video(clip(name), **request, threads=1).plan
        assert plan is not None
        video = load_video(clip(name), **request, threads=1)
        work = video.work
        assert (len(plan.groups), plan.decoded, plan.left_out) == (work.groups, work.decoded, work.skipped)
        assert (plan.wanted, plan.distinct) == (len(video), len(set(video.indices.tolist())))
        playing = load_video(clip(name), **request, threads=1, skip_nonref=False).work
        assert plan.played == playing.decoded
        snapped = load_video(clip(name), **request, threads=1, snap="keyframe")
        assert plan.snapping is not None
        assert plan.snapping.decoded == len(set(snapped.indices.tolist()))
        shifts = (snapped.pts - video.pts).abs()
        assert plan.snapping.mean_shift == pytest.approx(float(shifts.mean()))
        assert plan.snapping.largest_shift == pytest.approx(float(shifts.max()))


@pytest.mark.parametrize("name", NUMBERED)
def test_the_structure_is_what_decoding_shows(clip: Clip, name: str) -> None:
    found = probe_video(clip(name))
    with av.open(str(clip(name))) as container:
        stream = container.streams.video[0]
        packets = [(packet.pts, packet.is_keyframe, packet.size) for packet in container.demux(stream) if packet.size]
        facts = stream.codec_context
        assert (found.codec, found.profile, found.pixel_format) == (
            facts.codec.canonical_name,
            facts.profile,
            facts.pix_fmt,
        )
    shown = sorted(pts for pts, _, _ in packets)
    starts = [shown.index(pts) for pts, key, _ in packets if key]
    lengths = np.diff([*starts, len(shown)]).tolist()
    depth = max(sum(other > pts for other, _, _ in packets[:place]) for place, (pts, _, _) in enumerate(packets))
    of = found.structure
    assert of is not None
    assert found.frames == len(sequential(clip(name))) == 60
    assert (of.count, of.shortest, of.longest) == (len(starts), min(lengths), max(lengths))
    assert of.median == np.median(lengths)
    assert of.reorder_depth == depth
    early = [any(pts < packets[k][0] for pts, _, _ in packets[k:]) for k, packet in enumerate(packets) if packet[1]]
    assert of.leading == sum(early)
    assert of.keyframe_first
    assert found.bit_rate == pytest.approx(8 * sum(size for _, _, size in packets) / found.duration)
    video = load_video(clip(name), indices=[0])
    assert (found.duration, found.fps, found.frames) == (video.duration, video.fps, video.total)
    assert (found.height, found.width, found.rotation) == (video.height, video.width, video.rotation)
    assert found.rate_varies is name.startswith("jitter")
    assert (found.cut, found.numbered_by, found.interlaced) == (0, "scan", False)
    assert found.streams == (("video", found.codec),)


@pytest.mark.parametrize("name", ["b-frames.mp4", "one-gop.mp4", "hevc.mp4", "mpeg4.mp4", "mpeg2.mpg"])
def test_the_share_without_references_is_what_the_decoder_would_drop(clip: Clip, name: str) -> None:
    with av.open(str(clip(name))) as container:
        stream = container.streams.video[0]
        stream.codec_context.skip_frame = "NONREF"
        kept = sum(1 for _ in container.decode(stream))
    of = probe_video(clip(name)).structure
    assert of is not None
    assert of.disposable == pytest.approx((60 - kept) / 60)
    assert 0 < (of.disposable_bytes or 0) < of.disposable


@pytest.mark.parametrize("seed", range(20))
def test_the_structure_of_any_order(seed: int) -> None:
    draw = np.random.default_rng(seed)
    count, spread = 40, seed % 7
    # Frames are decoded in an order that is a bit off that of presentation.
    shown = np.argsort(np.arange(count) + draw.uniform(0, spread, count)).tolist()
    rank = np.argsort(shown)
    keys = draw.random(count) < 0.2
    times = np.arange(count) * 10
    table = PacketTable(
        codec="h264", total=count, slots=np.arange(count), pts=times, dts=times, rank=rank,
        sizes=np.full(count, 7), keys=keys, ends=(0, int(times[-1]), 10), tick=0.01, rate=10.0, exact=True,
    )  # fmt: skip
    of = structure_of(table, keys)
    starts = [slot for slot in range(count) if keys[slot] or slot == 0]
    lengths = [end - start for start, end in zip(starts, [*starts[1:], count], strict=True)]
    assert (of.count, of.shortest, of.longest, of.median) == (
        len(starts),
        min(lengths),
        max(lengths),
        np.median(lengths),
    )
    assert of.reorder_depth == max(
        sum(shown[before] > shown[place] for before in range(place)) for place in range(count)
    )
    assert of.leading == sum(any(rank[slot] > rank[key] for slot in range(key)) for key in np.flatnonzero(keys))
    assert of.keyframe_first == keys[0]
    assert of.disposable == of.disposable_bytes == pytest.approx(keys.mean())


def test_nothing_is_to_be_left_out_of_interlaced_video(tmp_path: Path) -> None:
    options = {"bf": "2", "g": "12", "q": "2", "flags": "+ildct+ilme"}
    path = encode(Recipe("fields.ts", "mpeg2video", options=options, rate=25), tmp_path)
    found = probe_video(path, 3)
    assert found.interlaced
    assert found.plan is not None
    assert found.structure is not None
    assert (found.structure.disposable or 0) > 0.5
    playing = load_video(path, 3, skip_nonref=False, threads=1).work
    assert (found.plan.decoded, found.plan.played, found.plan.left_out) == (playing.decoded, playing.decoded, 0)


def test_codecs_that_do_not_tell_have_no_share(clip: Clip) -> None:
    of = probe_video(clip("vp9.webm")).structure
    assert of is not None
    assert (of.disposable, of.disposable_bytes) == (None, None)


@pytest.mark.parametrize("name", ["vp8.webm", "no-times.h264"])
def test_where_only_decoding_numbers_the_frames_there_is_no_plan(clip: Clip, name: str) -> None:
    found = probe_video(clip(name))
    assert found.numbered_by == "decoding"
    assert (found.frames, found.structure, found.plan, found.bit_rate, found.rate_varies) == (None,) * 5
    assert (found.height, found.width) == (64, 128)


def test_the_bound_on_the_speed_up(clip: Clip) -> None:
    def bound(threads: int, indices: list[int]) -> float:
        plan = probe_video(clip("intra.mp4" if len(indices) > 8 else "vp9.webm"), indices=indices, threads=threads).plan
        assert plan is not None
        assert plan.threads == threads
        return plan.speedup_bound

    # Keyframes of vp9.webm are at 0, 15, 30, 45, and nothing is left out.
    assert bound(1, [14, 29, 44]) == 1
    assert bound(8, [14, 29, 44]) == 3
    assert bound(2, [14, 29, 44]) == 2
    assert bound(8, [14, 15]) == pytest.approx(16 / 15)
    assert bound(8, list(range(60))) == 8


def test_the_groups_of_a_plan_add_up(clip: Clip) -> None:
    plan = probe_video(clip("b-frames.mp4"), indices=[40, 13, 2]).plan
    assert plan is not None
    assert [(group.keyframe, group.length, group.wanted) for group in plan.groups] == [
        (0, 12, 1),
        (12, 12, 1),
        (36, 12, 1),
    ]
    assert [group.played for group in plan.groups] == [3, 2, 5]
    for whole, part in (("played", "played"), ("left_out", "left_out"), ("decoded", "decoded")):
        assert getattr(plan, whole) == sum(getattr(group, part) for group in plan.groups)


def test_the_index_numbers_the_frames_of_long_files(
    clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mmaccel.codecs.index, "_LEAST_FRAMES", 200)
    path = encode(Recipe("long.mp4", count=240, options={"g": "8", "bf": "2", "preset": "ultrafast"}), tmp_path)
    found = probe_video(path, indices=[100], threads=1)
    assert found.numbered_by == "index"
    work = load_video(path, indices=[100], threads=1).work
    assert not work.scanned
    assert found.plan is not None
    assert (found.plan.decoded, found.plan.left_out) == (work.decoded, work.skipped)
    assert probe_video(path, fps=0.1).numbered_by == "scan"
    assert probe_video(path, 200).numbered_by == "scan"


@pytest.mark.parametrize("size", [None, 32, (40, 92)])
def test_turned_recordings(clip: Clip, tmp_path: Path, size: int | tuple[int, int] | None) -> None:
    data = bytearray(clip("b-frames.mp4").read_bytes())
    # The matrix ends the track header 8 bytes before its own end: a quarter turn.
    place = data.index(b"tkhd") + 4 + 40
    struct.pack_into(">9i", data, place, 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    path = tmp_path / "turned.mp4"
    path.write_bytes(data)
    found, video = probe_video(path, 1, size=size), load_video(path, 1, size=size)
    assert found.rotation == video.rotation == 90
    assert (found.height, found.width) == (64, 128)
    assert found.output == tuple(video.frames.shape[2:])


def test_colours_and_other_streams(tmp_path: Path) -> None:
    path = tmp_path / "colours.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"x264-params": "colormatrix=bt709:range=pc"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = 1, 2
        sound = container.add_stream("pcm_s16le", rate=8000)
        for number in range(4):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 40 * number, dtype=np.uint8), format="rgb24")
            frame = frame.reformat(format="yuv420p")
            frame.pts = number
            container.mux(stream.encode(frame))
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 4000), dtype=np.int16), format="s16", layout="mono")
        samples.sample_rate = 8000
        container.mux(sound.encode(samples))
        for each in (stream, sound):
            container.mux(each.encode(None))
    found = probe_video(path)
    assert (found.matrix, found.range) == ("BT.709", "full")
    assert sorted(found.streams) == [("audio", "pcm_s16le"), ("video", "h264")]


def test_a_file_that_is_cut_off_says_how_many_frames_are_missing(clip: Clip, tmp_path: Path) -> None:
    data = clip("b-frames.mp4").read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(data[: len(data) * 3 // 5])
    found = probe_video(path, 3)
    with pytest.warns(UserWarning, match="lost"):
        video = load_video(path, 3)
    assert found.cut > 0
    assert found.frames == video.total
    assert found.frames + found.cut >= 60


def test_a_file_without_a_decodable_picture_is_described_all_the_same(clip: Clip, tmp_path: Path) -> None:
    data = bytearray(clip("one-gop.mp4").read_bytes())
    start, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    data[start:end] = bytes(end - start)
    path = tmp_path / "zeros.mp4"
    path.write_bytes(data)
    found = probe_video(path, 3)
    assert found.rotation is None
    assert (found.frames, found.height, found.width, found.output) == (60, 64, 128, (64, 128))
    with pytest.raises(VideoError, match="can be decoded"):
        load_video(path, 3)


def test_everything_can_be_said_in_json(clip: Clip) -> None:
    for name in ("b-frames.mp4", "vp8.webm"):
        said = json.loads(json.dumps(probe_video(clip(name), 3).as_dict(), allow_nan=False))
        assert said["name"] == str(clip(name))
        assert said["backends"]["pyav"] is None


def test_bytes_and_files(clip: Clip) -> None:
    path = clip("b-frames.mkv")
    whole = probe_video(path, 5).plan
    assert probe_video(path.read_bytes(), 5).plan == whole
    with path.open("rb") as file:
        assert probe_video(file, 5).plan == whole


def test_what_cannot_be_probed(clip: Clip, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    for src in (tmp_path / "missing.mp4", tmp_path / "text.mp4", tmp_path, b""):
        with pytest.raises(VideoError) as caught:
            probe_video(src)
        assert "\n" not in str(caught.value)
    for request in ({"frames": 61}, {"frames": 2, "fps": 1.0}, {"size": 0}, {"threads": 0}, {"indices": [60]}):
        with pytest.raises(VideoError):
            probe_video(clip("b-frames.mp4"), **request)
