"""EVS against naive loops."""

from __future__ import annotations

import pytest
import torch
from made import cosine, noise, scene, video

from mmaccel.encoders.evs import EVS


@pytest.mark.parametrize("keep", [0.05, 0.2, 0.25, 0.333, 0.7, 0.99, 13, 40])
def test_keeps_the_first_frame_and_what_differs_most_from_the_frame_before(keep):
    T, S = 6, 11
    x = scene(T, S, still=0.5, seed=5)
    kept = EVS(keep=keep).reduce(video(x)).index.tolist()
    number = max(S, keep if isinstance(keep, int) else int(T * S * keep))
    change = {t * S + p: 1 - cosine(x[t, p], x[t - 1, p]) for t in range(1, T) for p in range(S)}
    best = sorted(change, key=lambda i: -change[i])[: number - S]
    assert kept == sorted([*range(S), *best])


def test_a_still_video_is_decided_by_position_and_not_by_noise():
    x = noise(1, 10, 32).expand(4, 10, 32)
    for seed in range(5):
        shaken = x * (1 + 1e-4 * noise(4, 10, 1, seed=seed))
        assert EVS(keep=0.5).reduce(video(shaken)).index.tolist() == list(range(20))


def test_images_and_single_frames_pass():
    assert EVS(keep=0.5).reduce(video(noise(1, 9, 4), kind="image")) is None
    assert EVS(keep=0.5).reduce(video(noise(1, 9, 4))).index.tolist() == list(range(9))


def test_the_number_kept_depends_on_shapes_alone():
    sizes = {len(EVS(keep=0.4).reduce(video(scene(7, 9, still=s, seed=n))).index) for n, s in enumerate((0, 0.5, 1))}
    assert sizes == {int(63 * 0.4)}
    assert torch.equal(EVS(keep=1).reduce(video(noise(2, 3, 4))).index, torch.arange(3))


@pytest.mark.parametrize(("n", "keep", "number"), [(100, 0.29, 29), (100, 0.57, 57), (63, 0.4, 25), (50, 0.999, 49)])
def test_the_fraction_is_taken_as_it_is_written(n, keep, number):
    assert len(EVS(keep=keep).reduce(video(scene(n, 1, still=0.2, seed=2))).index) == number
