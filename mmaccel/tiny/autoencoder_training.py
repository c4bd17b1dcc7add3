"""The autoencoders of the embedded generators learn to reconstruct rendered windows of the tiny world."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mmaccel.tiny.encoder_training import cosine
from mmaccel.tiny.progress import load_progress, save_progress
from mmaccel.tiny.stories import render_story, sample_story, stage

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["clip_frames", "normalise", "pixel_values", "prepare", "train_autoencoder", "train_decoder"]

logger = logging.getLogger(__name__)

_OBJECTS = 4.0
_FIRST_LOGVAR = -4.0


def clip_frames(indices: Iterable[int]) -> Tensor:
    """Training clips, uint8 [N, FRAMES, WINDOW, WINDOW, 3]."""
    return torch.from_numpy(np.stack([render_story(stage(sample_story(n, "train"), n)) for n in indices]))


def pixel_values(frames: Tensor) -> Tensor:
    """Frames uint8 [..., T, H, W, 3] to float32 [..., 3, T, H, W] in -1..1."""
    return frames.movedim(-1, -4).float() / 127.5 - 1.0


@torch.no_grad()
def prepare(vae: Any) -> None:
    """Start an autoencoder as a nearly linear map that loses little, or it learns shapes without colors for long.

    Orthogonal convolutions that look at one frame (or mix two), residual branches and the last layer at zero, and a
    posterior of one small width.
    """
    for name, module in vae.named_modules():
        if not isinstance(module, (nn.Conv2d, nn.Conv3d)):
            continue
        weight = module.weight
        frames = 2 if "downsample" in name or "down_blocks" in name else 1
        if weight.ndim == 4:
            nn.init.orthogonal_(weight)
        else:
            weight.zero_()
            for back in range(1, 1 + (frames if "time_conv" in name else 1)):
                part = torch.empty(weight.shape[0], weight[:, :, -1].numel() // weight.shape[0])
                weight[:, :, -back] = nn.init.orthogonal_(part).view_as(weight[:, :, -back]) / frames**0.5
        if module.bias is not None:
            module.bias.zero_()
        if name.endswith((".conv2", "mid_block.attentions.0.proj", "decoder.conv_out")):
            weight.zero_()
    half = vae.quant_conv.weight.shape[0] // 2
    vae.quant_conv.weight[half:] = 0
    vae.quant_conv.bias[half:] = _FIRST_LOGVAR


def _weight(pixels: Tensor) -> Tensor:
    spread = pixels.amax(1, keepdim=True) - pixels.amin(1, keepdim=True)
    return 1.0 + (_OBJECTS - 1.0) * ((spread > 0.35) | (pixels.mean(1, keepdim=True) > 0.5)).float()


def train_autoencoder(
    vae: Any,
    clips: Tensor,
    path: Path,
    *,
    steps: int,
    seed: int,
    frames: int,
    batch: int,
    sampled: bool,
    divergence: float = 2e-4,
    peak: float = 3e-3,
) -> None:
    """Train in place, resuming from `path`: absolute and squared error, colorful pixels counting more, and divergence.

    `clips` uint8 as `clip_frames` gives them; `frames` of each are taken at a random place. An autoencoder of images
    (4-D input) gets single frames. `sampled` draws latents from the posterior, otherwise its mean is taken.
    """
    flat = isinstance(vae.encoder.conv_in, nn.Conv2d)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=1e-4)
    parts = {"model": vae, "optimizer": optimizer}
    begun = load_progress(path, parts)
    vae.train()
    for step in range(begun, steps):
        cosine(optimizer, step, steps, peak, warmup=20)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        which = torch.randint(len(clips), (batch,), generator=generator)
        first = torch.randint(clips.shape[1] - frames + 1, (batch,), generator=generator)
        pixels = pixel_values(clips[which[:, None], first[:, None] + torch.arange(frames)])
        if flat:
            pixels = pixels[:, :, 0]
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            latents = posterior.sample(generator) if sampled else posterior.mode()
            image = vae.decode(latents.to(pixels.dtype)).sample.float()
        difference = image - pixels
        error = (_weight(pixels) * (difference.abs() + 0.5 * difference.square())).mean()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        apart = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
        optimizer.zero_grad()
        (error + divergence * apart).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0 or step + 1 == steps:
            ratio = 10 * torch.log10(4.0 / difference.detach().square().mean()).item()
            logger.info("%s %d error %.4f kl %.3f psnr %.2f", path.stem, step, error.item(), apart.item(), ratio)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            save_progress(path, step + 1, parts)
    vae.eval()


@torch.no_grad()
def normalise(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel of latents [N, C, ...], float32 [C] each."""
    flat = latents.float().transpose(0, 1).flatten(1)
    return flat.mean(1), flat.std(1)


def train_decoder(
    vae: Any, clips: Tensor, latents: Tensor, path: Path, *, steps: int, seed: int, batch: int = 4, peak: float = 2e-3
) -> None:
    """Train the decoder of a video autoencoder alone, on latents that do not change any more, resuming from `path`.

    `latents` [N, C, T, h, w] are those of `clips`, as the encoder gave them. The first 3 to 6 latent frames of a clip
    are decoded, with a little noise on them, so that colors do not drift and generated latents are met.
    """
    trained = [*vae.post_quant_conv.parameters(), *vae.decoder.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=peak, betas=(0.9, 0.95), weight_decay=1e-4)
    parts = {"model": vae, "optimizer": optimizer}
    begun = load_progress(path, parts)
    vae.train()
    for step in range(begun, steps):
        cosine(optimizer, step, steps, peak, warmup=20)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        which = torch.randint(len(latents), (batch,), generator=generator)
        depth = int(torch.randint(3, latents.shape[2] + 1, (), generator=generator))
        kept = latents[which, :, :depth].float()
        kept = kept + 0.1 * kept.std() * torch.randn(kept.shape, generator=generator)
        pixels = pixel_values(clips[which, : 4 * depth - 3])
        with torch.autocast("cpu", torch.bfloat16):
            image = vae.decode(kept).sample.float()
        difference = image - pixels
        error = (_weight(pixels) * (difference.abs() + 0.5 * difference.square())).mean()
        optimizer.zero_grad()
        error.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % 20 == 0 or step + 1 == steps:
            ratio = 10 * torch.log10(4.0 / difference.detach().square().mean()).item()
            logger.info("%s %d error %.4f psnr %.2f", path.stem, step, error.item(), ratio)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            save_progress(path, step + 1, parts)
    vae.eval()
