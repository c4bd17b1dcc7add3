"""mmaccel probe says what the library says, to people and to programs."""

from __future__ import annotations

import dataclasses
import json

import pytest

from mmaccel.codecs import probe_video


def test_the_document_is_the_library_s(document, clip):
    found = document("probe", clip, "--frames", 5, "--size", "32x40", "--threads", 2)
    expected = probe_video(clip, 5, size=(32, 40), threads=2)
    assert found == json.loads(json.dumps(dataclasses.asdict(expected)))
    assert found["output"] == [32, 40]
    assert found["plan"]["wanted"] == 5


def test_frames_a_second_and_the_shorter_side(document, clip):
    found = document("probe", clip, "--fps", 1.5, "--size", 24)
    assert found["plan"]["wanted"] == probe_video(clip, fps=1.5).plan.wanted
    assert min(found["output"]) == 24


def test_for_people(cli, clip):
    code, out, _ = cli("probe", clip, "--frames", 3)
    found = probe_video(clip, 3)
    assert code == 0
    for word in ("h264", f"{found.height} x {found.width}", str(found.frames), "upright", "pyav", "can be used"):
        assert word in out
    assert f"{found.plan.decoded} frames; {found.plan.left_out} packets are left out" in out
    for group in found.plan.groups:
        assert f" {group.keyframe} " in out


def test_errors_are_one_line(refused, clip, tmp_path):
    assert "does not exist" in refused(1, "probe", tmp_path / "missing.mp4")
    assert "not frames and fps" in refused(1, "probe", clip, "--frames", 2, "--fps", 1)
    assert "--size 3x" in refused(1, "probe", clip, "--size", "3x")
    assert "asked for" in refused(1, "probe", clip, "--frames", 100_000)
    refused(2, "probe", clip, "--frames", 0)
    refused(2, "probe")


@pytest.mark.parametrize("size", ["", "x", "12.5", "1x2x3", "-4"])
def test_sizes_that_are_none(refused, clip, size):
    assert "--size" in refused(1, "probe", clip, f"--size={size}")
