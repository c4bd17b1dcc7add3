"""VisionZip against naive loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from made import cosine, noise, video

from mmaccel.encoders.visionzip import VisionZip


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 7, 29, 60])
def test_budget_is_exact_and_even_over_frames(keep):
    T, S = 5, 12
    reduction = VisionZip(keep=keep).reduce(video(noise(T, S, 8), noise(T, S, seed=1)))
    want = keep if isinstance(keep, int) else int(keep * T * S + 0.5)
    counts = torch.bincount(reduction.index // S, minlength=T).tolist()
    assert sum(counts) == want
    assert max(counts) - min(counts) <= 1
    assert reduction.index.tolist() == sorted(set(reduction.index.tolist()))


def test_a_constant_field_stays_what_it_is():
    x = noise(1, 1, 8).expand(3, 16, 8)
    out = VisionZip(keep=0.4, contextual=0.5).reduce(video(x, noise(3, 16, seed=1))).apply(x.reshape(48, 8))
    torch.testing.assert_close(out, x[0, :1].expand_as(out))


def test_dominant_tokens_stay_and_the_rest_is_averaged_into_evenly_spaced_targets():
    T, S, keep = 3, 20, 8
    x, score = noise(T, S, 6), noise(T, S, seed=1)
    reduction = VisionZip(keep=T * keep, contextual=0.5).reduce(video(x, score))
    kept, out = reduction.index.tolist(), reduction.apply(x.view(T * S, 6))
    for t in range(T):
        mine = [k - t * S for k in kept if k // S == t]
        dominant = sorted(sorted(range(S), key=lambda p, t=t: -float(score[t, p]))[:4])
        targets = [p for p in mine if p not in dominant]
        assert [p for p in mine if p in dominant] == dominant
        rest = [p for p in range(S) if p not in dominant]
        gaps = [b - a for a, b in itertools.pairwise(map(rest.index, targets))]
        assert len(targets) == 4
        assert max(gaps) - min(gaps) <= 1
        groups = {p: [x[t, p]] for p in mine}
        for p in rest:
            if p not in targets:
                groups[max(targets, key=lambda c, p=p: cosine(x[t, p], x[t, c]))].append(x[t, p])
        want = torch.stack([torch.stack(groups[p]).mean(0) for p in mine])
        torch.testing.assert_close(out[[i for i, k in enumerate(kept) if k // S == t]], want)


def test_without_context_tokens_are_only_dropped():
    assert VisionZip(keep=0.3, contextual=0.0).reduce(video(noise(2, 9, 4), noise(2, 9))).mix is None
