"""The autoencoders of the embedded generators learn to reconstruct rendered windows of the tiny world."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mmaccel.tiny.encoder_training import cosine
from mmaccel.tiny.progress import load_progress, save_progress
from mmaccel.tiny.stories import FRAMES, render_story, sample_story, stage

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["clip_pixels", "normalise", "train_autoencoder"]

logger = logging.getLogger(__name__)

_OBJECTS = 4.0


def clip_pixels(indices: list[int]) -> Tensor:
    """Training clips as pixel values float32 [B, 3, FRAMES, WINDOW, WINDOW] in -1..1."""
    frames = np.stack([render_story(stage(sample_story(index, "train"), index)) for index in indices])
    return torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0


def train_autoencoder(
    vae: Any, folder: Path, *, steps: int, seed: int, frames: int, batch: int = 8, kl: float = 2e-3, peak: float = 2e-3
) -> None:
    """Train in place, resuming from `folder`: absolute error, colorful pixels counting more, and a little divergence.

    `frames` of each clip are taken at a random place; 1 means images, for an autoencoder of images [B, 3, H, W].
    """
    optimizer = torch.optim.AdamW(vae.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=1e-4)
    parts = {"model": vae, "optimizer": optimizer}
    path = folder / "autoencoder.pt"
    begun = load_progress(path, parts)
    vae.train()
    for step in range(begun, steps):
        cosine(optimizer, step, steps, peak, warmup=30)
        rng = np.random.default_rng([seed, step])
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        first = int(rng.integers(FRAMES - frames + 1))
        pixels = clip_pixels(rng.integers(1_000_000, size=batch).tolist())[:, :, first : first + frames]
        if frames == 1:
            pixels = pixels[:, :, 0]
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            latents = posterior.sample(generator)
            image = vae.decode(latents.to(pixels.dtype)).sample.float()
        spread = pixels.amax(1, keepdim=True) - pixels.amin(1, keepdim=True)
        bright = pixels.mean(1, keepdim=True)
        weight = 1.0 + (_OBJECTS - 1.0) * ((spread > 0.35) | (bright > 0.5)).float()
        error = ((image - pixels).abs() * weight).mean()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
        optimizer.zero_grad()
        (error + kl * divergence).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0 or step + 1 == steps:
            with torch.no_grad():
                noise = (image - pixels).square().mean()
                peak_ratio = 10 * torch.log10(4.0 / noise)
            logger.info("vae %d error %.4f kl %.3f psnr %.2f", step, error, divergence, peak_ratio)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            save_progress(path, step + 1, parts)
    vae.eval()


@torch.no_grad()
def normalise(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel of latents [N, C, ...], float32 [C] each."""
    flat = latents.float().transpose(0, 1).flatten(1)
    return flat.mean(1), flat.std(1)
