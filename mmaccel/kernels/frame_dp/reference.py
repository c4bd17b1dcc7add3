"""The specification of `frame_dp`: every window of every end, one after the other."""

from __future__ import annotations

import torch

__all__ = ["frame_dp"]


def frame_dp(static: torch.Tensor, longest: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Starts int64 (B, T), tokens saved int64 (B) and window numbers int64 (B, T) for static bool (B, T - 1, S)."""
    B, T = static.shape[0], static.shape[1] + 1
    starts = torch.zeros(B, T, dtype=torch.int64)
    best = torch.zeros(B, T, dtype=torch.int64)
    window = torch.zeros(B, T, dtype=torch.int64)
    for b in range(B):
        for j in range(T):
            best[b, j] = -1
            # from the shortest window on, so that of equals the shortest stays
            for i in range(j, max(-1, j - longest), -1):
                gain = (j - i) * int(static[b, i:j].all(0).sum()) if i < j else 0
                total = gain + (int(best[b, i - 1]) if i else 0)
                if total > best[b, j]:
                    best[b, j], starts[b, j] = total, i
        j, found = T - 1, []
        while j >= 0:
            found.insert(0, (int(starts[b, j]), j + 1))
            j = int(starts[b, j]) - 1
        for number, (start, stop) in enumerate(found):
            window[b, start:stop] = number
    return starts.to(static.device), best[:, -1].to(static.device), window.to(static.device)
