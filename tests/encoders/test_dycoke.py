"""DyCoke against naive loops over windows of four frames."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from made import cosine, noise, scene, video

from mmaccel.encoders.dycoke import DyCoke
from mmaccel.errors import MethodError

BEFORE = {1: 0, 2: 0, 3: 2}


def naive(x, drops):
    """Kept tokens when frame t loses drops[t] of its tokens, window by window."""
    T, S = x.shape[:2]
    kept = []
    for first in range(0, T, 4):
        window = range(first, min(first + 4, T))
        for t in window:
            lost = []
            if t > first:
                steps = [round((1 - cosine(x[t, p], x[first + BEFORE[t - first], p])) * 4096) for p in range(S)]
                lost = sorted(range(S), key=lambda p, steps=steps: (steps[p], -p))[: drops[t]]
            kept += [t * S + p for p in range(S) if p not in lost]
    return kept


@pytest.mark.parametrize("k", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("T", [4, 8, 12])
def test_whole_windows_lose_the_share_k_of_three_frames(T, k):
    S = 16
    x = scene(T, S, still=0.5, seed=T)
    reduction = DyCoke(keep=1 - 0.75 * k).reduce(video(x))
    assert reduction.mix is None
    assert reduction.index.tolist() == naive(x, {t: int(k * S) for t in range(T) if t % 4})
    assert len(reduction.index) == T * S * (1 - 0.75 * k)


def test_the_default_is_the_k_of_the_paper():
    T, S = 8, 20
    x = scene(T, S, still=0.6, seed=2)
    assert DyCoke().reduce(video(x)).index.tolist() == naive(x, {t: 14 for t in range(T) if t % 4})


@pytest.mark.parametrize("T", range(2, 14))
@pytest.mark.parametrize("keep", [0.05, 0.3, 0.5, 0.777, 0.99, 31])
def test_any_number_of_frames_is_reduced_to_the_exact_number_or_to_the_floor(T, keep):
    S, notes = 16, []
    x = scene(T, S, still=0.5, seed=T)
    tokens = replace(video(x), note=lambda text, *_: notes.append(text))
    kept = DyCoke(keep=keep).reduce(tokens).index.tolist()
    wanted = keep if isinstance(keep, int) else max(1, int(keep * T * S + 0.5))
    floor = -(-T // 4) * S
    assert len(kept) == max(floor, wanted)
    assert bool(notes) == (wanted < floor)
    assert all(f"asks for {wanted} tokens" in text and f" {floor}, was kept" in text for text in notes)
    counts = [sum(k // S == t for k in kept) for t in range(T)]
    assert all(counts[t] == S for t in range(0, T, 4))
    later = [counts[t] for t in range(T) if t % 4]
    assert max(later) - min(later) <= 1
    assert kept == naive(x, {t: S - n for t, n in enumerate(counts)})


def test_a_last_window_of_one_frame_is_kept_whole():
    x = noise(1, 6, 8).expand(5, 6, 8)
    assert DyCoke(keep=1).reduce(video(x)).index.tolist() == [*range(6), *range(24, 30)]


def test_a_still_video_is_decided_by_position_and_not_by_noise():
    x = noise(1, 10, 32).expand(4, 10, 32)
    want = [*range(10), *(10 * t + p for t in (1, 2, 3) for p in range(5))]
    for seed in range(5):
        shaken = x * (1 + 1e-4 * noise(4, 10, 1, seed=seed))
        assert DyCoke(keep=0.625).reduce(video(shaken)).index.tolist() == want


def test_images_and_single_frames_pass():
    assert DyCoke(keep=0.5).reduce(video(noise(1, 9, 4), kind="image")) is None
    assert DyCoke(keep=0.5).reduce(video(noise(1, 9, 4))) is None


def test_more_than_there_are_names_the_nearest():
    with pytest.raises(MethodError, match="nearest number is 36"):
        DyCoke(keep=37).reduce(video(noise(4, 9, 4)))
    assert torch.equal(DyCoke(keep=36).reduce(video(noise(4, 9, 4))).index, torch.arange(36))
