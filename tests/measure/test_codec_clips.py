"""Files for the codec benchmarks: what they hold is known frame by frame, and numbers survive coding and resizing."""

from __future__ import annotations

import itertools

import av
import numpy as np
import pytest
from av.video.frame import PictureType
from PIL import Image

from mmaccel.errors import MMAccelError
from mmaccel.measure.codec_clips import RATE, Recipe, make_clip
from mmaccel.measure.codec_limit import Limit
from mmaccel.measure.codec_marks import BITS, draw_number, numbers_in

CODECS = ("h264", "hevc", "av1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("clips")


def pictures(path):
    with av.open(str(path)) as container:
        return [
            (PictureType(frame.pict_type).name, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)
        ]


def packets(path):
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


@pytest.mark.parametrize("size", [(96, 170), (384, 683), (31, 44)])
def test_a_number_is_read_back_at_any_size(size):
    numbers = [0, 1, 5, 341, 682, (1 << BITS) - 1]
    frames = []
    for number in numbers:
        luma = np.random.default_rng(number).integers(0, 256, (96, 170), dtype=np.uint8)
        draw_number(luma, number)
        small = Image.fromarray(luma).resize(size[::-1], Image.Resampling.BICUBIC)
        frames.append(np.repeat(np.asarray(small)[..., None], 3, axis=-1))
    assert numbers_in(np.stack(frames)) == numbers
    assert numbers_in(np.stack(frames).transpose(0, 3, 1, 2)) == numbers


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("seconds", "shuffle"), [(1, None), (3, None), (2, 5)])
def test_numbers_are_those_of_the_file(folder, codec, seconds, shuffle):
    clip = make_clip(folder, Recipe(codec, 96, 8, 1), seconds, shuffle)
    found = pictures(clip.path)
    assert clip.total == seconds * RATE == len(found)
    assert numbers_in(np.stack([picture for _, picture in found])) == clip.numbers.tolist()
    if shuffle is None:
        assert clip.numbers.tolist() == list(range(RATE)) * seconds
    else:
        assert sorted(clip.numbers.tolist()) == sorted(list(range(RATE)) * seconds)
        assert clip.numbers.tolist() != list(range(RATE)) * seconds
    keys = [place for place, packet in enumerate(packets(clip.path)) if packet.is_keyframe]
    assert len(keys) == seconds * 4  # 8 + 8 + 8 + 6 frames
    if codec != "av1":
        assert "B" in {kind for kind, _ in found}
    times = [packet.dts for packet in packets(clip.path)]
    assert all(earlier < later for earlier, later in itertools.pairwise(times))
    shown = sorted(packet.pts for packet in packets(clip.path))
    assert len({later - earlier for earlier, later in itertools.pairwise(shown)}) == 1


def test_one_group_and_files_that_are_kept(folder):
    recipe = Recipe("h264", 96, 0, 1)
    clip = make_clip(folder, recipe, 1)
    assert sum(packet.is_keyframe for packet in packets(clip.path)) == 1
    before = clip.path.stat().st_mtime_ns
    assert make_clip(folder, recipe, 1).path == clip.path
    assert clip.path.stat().st_mtime_ns == before
    assert make_clip(folder, Recipe("h264", 96, 4, 1), 1).path != clip.path


def test_no_half_of_a_file_stays(tmp_path, monkeypatch):
    monkeypatch.setattr("mmaccel.measure.codec_clips.draw_number", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_clip(tmp_path, Recipe("h264", 96, 8, 1), 1)
    assert list(tmp_path.iterdir()) == []


def test_pictures_that_the_encoder_spoils_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "mmaccel.measure.codec_clips.draw_number", lambda luma, number: draw_number(luma, number - (number == 7))
    )
    with pytest.raises(MMAccelError, match="spoilt the numbers"):
        make_clip(tmp_path, Recipe("h264", 96, 8, 1), 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"codec": "vp9"}, "h264, hevc, av1"),
        ({"rows": 63}, "even number"),
        ({"made": 0}, "seconds can be rendered"),
        ({"made": 35}, "seconds can be rendered"),
        ({"gop": -1}, "number of frames"),
    ],
)
def test_recipes_out_of_range(wrong, message):
    with pytest.raises(MMAccelError, match=message):
        Recipe(**({"codec": "h264", "rows": 96, "gop": 8, "made": 1} | wrong))


def test_requests_that_will_not_do(tmp_path):
    for seconds in (1, 3):
        with pytest.raises(MMAccelError, match="multiple"):
            make_clip(tmp_path, Recipe("h264", 96, 8, 2), seconds)
    (tmp_path / "file").touch()
    with pytest.raises(MMAccelError, match="cannot be kept"):
        make_clip(tmp_path / "file", Recipe("h264", 96, 8, 1), 1)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("wanted", [[0], [0, 8, 16], [5], [3, 4, 21], [29], list(range(30))])
def test_the_limit_decodes_what_is_needed(folder, codec, wanted):
    clip = make_clip(folder, Recipe(codec, 96, 8, 1), 1)
    found = Limit(str(clip.path), wanted).run()
    assert found["shown"] == len(wanted)
    assert len(found["groups"]) == len({number // 8 for number in wanted})
    # by brute force: all packets of those groups up to the last wanted one; without B-frames that is all of them
    held = packets(clip.path)
    times = sorted(packet.pts for packet in held)
    group = np.cumsum([packet.is_keyframe for packet in held])
    chosen = {times[number] for number in wanted}
    last = {number: place for place, number in enumerate(group) if held[place].pts in chosen}
    needed = sum(place <= last.get(number, -1) for place, number in enumerate(group))
    if found["skips"]:
        assert len(wanted) <= found["decoded"] <= needed
    else:
        assert found["decoded"] == needed
    if wanted == [29]:
        assert found["decoded"] < 6 or codec == "av1"
