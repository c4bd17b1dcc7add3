"""Some hundred mutated files; `python tests/codecs/fuzz.py` runs any number of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from fuzz import fuzz, make_file, make_seeds, same
from mutations import BYTES, elements

from mmaccel.codecs import load_video

if TYPE_CHECKING:
    from pathlib import Path

SEEDS_EACH = 150


@pytest.fixture(scope="session")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seeds")
    make_seeds(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_damaged_files_give_frames_or_an_error(seeds: Path, tmp_path: Path, seed: int) -> None:
    verdicts = fuzz(seeds, tmp_path, seed, first=0, count=SEEDS_EACH, seconds=20.0, memory=2 << 30)
    assert [verdict.number for verdict in verdicts] == list(range(SEEDS_EACH))
    assert not [f"{v.number} {v.outcome} ({v.file}) {v.detail}" for v in verdicts if v.failed]
    outcomes = {verdict.outcome for verdict in verdicts}
    assert {"lost", "refused", "sound"} <= outcomes


def test_the_sound_files_are_sound(seeds: Path) -> None:
    for path in seeds.iterdir():
        one, many = (load_video(path, 6, threads=threads) for threads in (1, 3))
        assert same(one, many) == ""
        assert one.lost == 0
        assert one.total == (26 if path.name != "long.mp4" else 2054)


def test_the_long_file_is_read_by_its_index(seeds: Path) -> None:
    assert not load_video(seeds / "long.mp4", indices=[0, 1000, -1]).work.scanned
    assert load_video(seeds / "b-frames.mp4", indices=[0]).work.scanned


def test_a_number_stands_for_a_file(seeds: Path) -> None:
    first = [make_file(seeds, 3, number)[:2] for number in range(40)]
    assert first == [make_file(seeds, 3, number)[:2] for number in range(40)]
    assert len({data for data, _ in first}) == 40
    assert len({done for _, done in first}) > 30


def test_every_mutation_changes_something(seeds: Path) -> None:
    for mutation in BYTES:
        data = (seeds / "b-frames.mp4").read_bytes()
        assert any(mutation(data, np.random.default_rng(number)) != data for number in range(5)), mutation.__name__


@pytest.mark.parametrize(("name", "mark"), [("b-frames.mp4", b"stsz"), ("jitter.mkv", b"\xb0"), ("mjpeg.avi", b"strf")])
def test_elements_are_found(seeds: Path, name: str, mark: bytes) -> None:
    data = (seeds / name).read_bytes()
    found = elements(data)
    assert mark in {data[e.start + 4 * (mark == b"stsz") :][: len(mark)] for e in found}
    assert all(0 <= e.start <= e.size_at < e.body <= e.end <= len(data) for e in found)
