"""What a diffusion transformer is given at a step, seen as tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmaccel.core.token_rows import latent_tokens, token_grid, token_mask

__all__ = ["LatentInput"]


@dataclass
class LatentInput:
    """What a transformer was given: its latents, seen as tokens, and their time."""

    site: Any
    transformer: Any
    given: dict[str, Any]

    @property
    def latents(self) -> Tensor:
        """As the transformer takes them."""
        return self.given["hidden_states"]

    @property
    def time(self) -> Tensor:
        """Timesteps [B] or [B, N]."""
        return self.given["timestep"]

    @property
    def now(self) -> Tensor:
        """The time of the tokens that are not fixed, a scalar of float32."""
        return self.time.detach().float().max()

    @property
    def count(self) -> int:
        """The number N of tokens."""
        return math.prod(token_grid(self.latents, self._patch, self.site.layout.frames_first))

    @property
    def _patch(self) -> tuple[int, ...]:
        return self.site.patch(self.transformer, self.latents)

    def tokens(self, velocity: Tensor) -> Tensor:
        """A velocity as tokens, float32 [B, N, d]."""
        return latent_tokens(velocity.float(), self._patch, self.site.layout.frames_first)

    def mask(self, rows: Tensor, velocity: Tensor) -> Tensor:
        """Which numbers of a velocity belong to the rows, int64 [B or 1, m]."""
        chosen = torch.zeros(rows.shape[0], self.count, dtype=torch.bool, device=velocity.device)
        return token_mask(chosen.scatter_(1, rows, value=True), velocity, self._patch, self.site.layout.frames_first)
