"""Flow matching for the embedded generators: noise levels, the loss, two optimizers, averaged weights."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmaccel.tiny.encoder_training import cosine
from mmaccel.tiny.progress import load_progress, save_progress

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["Average", "Draw", "noise_levels", "optimizers", "train_flow"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Draw:
    """One training batch: clean latents float32 [B, C, ...], and `velocity(noisy, sigma)` that calls the model."""

    latents: Tensor
    velocity: Callable[[Tensor, Tensor], Tensor]


class Average:
    """An exponential average of a model's weights, that forgets its beginning: decay min(limit, (n + 1) / (n + 10))."""

    def __init__(self, model: Any, limit: float = 0.998) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(requires_grad=False)
        self.limit = limit
        self.seen = 0

    @torch.no_grad()
    def update(self, model: Any) -> None:
        """Take in the weights that the model has now."""
        decay = min(self.limit, (self.seen + 1) / (self.seen + 10))
        self.seen += 1
        for kept, new in zip(self.model.parameters(), model.parameters(), strict=True):
            kept.lerp_(new, 1.0 - decay)

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights and how many updates they stand on."""
        return {"model": self.model.state_dict(), "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state."""
        self.model.load_state_dict(state["model"])
        self.seen = state["seen"]


def noise_levels(count: int, generator: torch.Generator, shift: float) -> Tensor:
    """Sigmas float32 [count] in (0, 1): logistic-normal, every eighth uniform, moved to the noisy end by `shift`."""
    normal = torch.sigmoid(torch.randn(count, generator=generator))
    uniform = torch.rand(count, generator=generator).clamp(1e-3, 1.0 - 1e-3)
    level = torch.where(torch.rand(count, generator=generator) < 0.125, uniform, normal)
    return shift * level / (1.0 + (shift - 1.0) * level)


def optimizers(model: Any, peak: float) -> dict[str, torch.optim.Optimizer]:
    """Muon (momentum made orthogonal) for the matrices of the blocks, AdamW for the rest."""
    matrices, rest = [], []
    for name, weight in model.named_parameters():
        inside = "blocks." in name and weight.ndim == 2 and "embed" not in name and "emb." not in name
        (matrices if inside else rest).append(weight)
    return {
        "muon": torch.optim.Muon(matrices, lr=peak, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        "adamw": torch.optim.AdamW(rest, lr=peak, betas=(0.9, 0.98), weight_decay=0.0),
    }


def train_flow(
    model: Any,
    average: Average,
    draw: Callable[[int, torch.Generator], Draw],
    path: Path,
    *,
    steps: int,
    seed: int,
    peak: float = 2e-3,
    shift: float = 2.0,
    watch: Callable[[int], None] | None = None,
    every: int = 100,
) -> None:
    """Train in place: the model predicts `noise - latents` at `(1 - sigma) latents + sigma noise`.

    `draw(step, generator)` gives a batch; a step depends on its number alone, so a resumed run is the same run.
    `watch(step)` is called after every `every`-th step is saved.
    """
    parts = {"model": model, "average": average, **optimizers(model, peak)}
    begun = load_progress(path, parts)
    model.train()
    smooth: list[float] = []
    for step in range(begun, steps):
        for name in ("muon", "adamw"):
            cosine(parts[name], step, steps, peak)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        batch = draw(step, generator)
        latents = batch.latents
        sigma = noise_levels(len(latents), generator, shift)
        noise = torch.randn(latents.shape, generator=generator)
        level = sigma.view(-1, *[1] * (latents.ndim - 1))
        with torch.autocast("cpu", torch.bfloat16):
            velocity = batch.velocity(torch.lerp(latents, noise, level), sigma)
        loss = (velocity.float() - (noise - latents)).square().mean()
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for name in ("muon", "adamw"):
            parts[name].step()
        average.update(model)
        smooth.append(loss.item())
        if (step + 1) % 20 == 0:
            logger.info("%s %d loss %.4f", path.stem, step + 1, sum(smooth[-20:]) / len(smooth[-20:]))
        if (step + 1) % every == 0 or step + 1 == steps:
            save_progress(path, step + 1, parts)
            if watch:
                watch(step + 1)
                model.train()
    model.eval()
