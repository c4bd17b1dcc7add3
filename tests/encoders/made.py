"""Grids of visual tokens made by hand, as a method is shown them."""

from __future__ import annotations

import torch

from mmaccel.core.prefill import VisualTokens

# a fraction of 50 tokens is rounded half up, and never below one
OF_50 = {0.01: 1, 0.1: 5, 0.29: 15, 0.5: 25, 0.97: 49, 1: 1, 3: 3, 7: 7, 49: 49, 50: 50}


def video(features, score=None, kind="video", contiguous=True):
    """features [T, S, D] (or [T, H, W, D]) of one video; score [T, S]."""
    x = features if features.ndim == 4 else features.unsqueeze(1)
    T, H, W = x.shape[:3]
    flat = x.reshape(T * H * W, -1)
    score = None if score is None else score.reshape(-1)
    return VisualTokens(flat, torch.arange(len(flat)), (T, H, W), score, kind, 0, contiguous)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scene(T, S, D=16, *, still=0.5, cuts=(), seed=0):
    """A video of which the share `still` of the positions stays nearly the same from cut to cut."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(S, D, generator=generator)
    frames = []
    for t in range(T):
        if t in cuts:
            base = torch.randn(S, D, generator=generator)
        moving = (torch.rand(S, generator=generator) > still)[:, None]
        frame = base + 0.05 * torch.randn(S, D, generator=generator)
        frames.append(torch.where(moving, torch.randn(S, D, generator=generator), frame))
    return torch.stack(frames)


def cosine(a, b):
    return float((a @ b) / (a.norm() * b.norm()))
