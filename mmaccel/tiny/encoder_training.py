"""First phase: the vision tower learns dense patch labels, attention that follows content, and a clean background."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmaccel.tiny.corpus import CROWD, GRID, MOST
from mmaccel.tiny.world import COLORS, FRAMES, SHAPES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import SiglipVisionModel

    from mmaccel.tiny.corpus import Corpus

__all__ = ["AttentionReceived", "augment", "cosine", "encode_corpus", "pixels", "train_encoder"]

logger = logging.getLogger(__name__)

FRESH, CROWDED, TWINS = 8, 18, 10


def cosine(optimizer: torch.optim.Optimizer, step: int, steps: int, peak: float, warmup: int = 60) -> None:
    """Set the learning rate of a linear warm-up and a cosine decay to 2 % of the peak."""
    ramp = min(1.0, (step + 1) / warmup)
    decay = 0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = peak * ramp * decay


def pixels(frames: Tensor) -> Tensor:
    """Frames uint8 or float [B, H, W, 3] in 0..255 to the processor's pixel values float32 [B, 3, H, W] in -1..1."""
    return frames.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def augment(values: Tensor, generator: torch.Generator) -> Tensor:
    """Imitate a lossy video codec on pixel values [B, 3, H, W]: halved chroma resolution, a little blur, noise."""
    batch = values.shape[0]

    def chance(p: float) -> Tensor:
        return (torch.rand(batch, 1, 1, 1, generator=generator) < p).to(values.dtype)

    luma = (values * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    chroma = values - luma
    coarse = F.interpolate(F.avg_pool2d(chroma, 2), scale_factor=2, mode="bilinear", align_corners=False)
    values = luma + torch.lerp(chroma, coarse, chance(0.6))
    blurred = F.avg_pool2d(F.pad(values, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    values = torch.lerp(values, blurred, 0.5 * torch.rand(batch, 1, 1, 1, generator=generator) * chance(0.5))
    strength = 0.05 * torch.rand(batch, 1, 1, 1, generator=generator) * chance(0.7)
    noise = torch.randn(values.shape, generator=generator)
    return (values + strength * noise).clamp(-1.0, 1.0)


class AttentionReceived:
    """Attention that each patch received in a SigLIP tower's last layer in its last call (mean over heads, queries)."""

    def __init__(self, tower: SiglipVisionModel) -> None:
        layers = [module for name, module in tower.named_modules() if name.endswith(".self_attn")]
        self.heads = tower.config.num_attention_heads
        self.scale = (tower.config.hidden_size // self.heads) ** -0.5
        self.seen: dict[str, Tensor] = {}
        self.handles = [
            getattr(layers[-1], f"{name}_proj").register_forward_hook(
                lambda _module, _args, output, name=name: self.seen.__setitem__(name, output)
            )
            for name in "qk"
        ]

    def __call__(self, stride: int = 1) -> Tensor:
        """Float32 [B, P], each row sums to 1; a `stride` above 1 is an estimate from every so-many-th query."""
        q, k = (self.seen[name].unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in "qk")
        return ((q[:, :, ::stride] @ k.transpose(-1, -2)).float() * self.scale).softmax(-1).mean(dim=(1, 2))

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()


def _batches(corpus: Corpus, steps: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Frames uint8 [CROWDED + FRESH + 2 TWINS, ...] with share, center, traits of all but the last TWINS.

    Those last ones are the TWINS before them without their objects.
    """
    clips = len(corpus.frames)
    for _ in range(steps):
        crowd = torch.randint(clips, (CROWDED,), generator=generator).numpy()
        which = torch.randint(clips, (FRESH + TWINS,), generator=generator).numpy()
        when = torch.randint(FRAMES, (FRESH + TWINS,), generator=generator).numpy()
        when[FRESH:] = corpus.empty_at[which[FRESH:]]
        extra = CROWD - MOST
        share = F.pad(torch.from_numpy(corpus.share[which, when]).float(), (0, 0, 0, extra))
        center = F.pad(torch.from_numpy(corpus.center[which, when]).float(), (0, 0, 0, extra))
        traits = F.pad(torch.from_numpy(corpus.traits[which]).long(), (0, 0, 0, extra), value=-1)
        yield (
            torch.from_numpy(
                np.concatenate([corpus.crowd[crowd], corpus.frames[which, when], corpus.empty[which[FRESH:]]])
            ),
            torch.cat([torch.from_numpy(corpus.crowd_share[crowd]).float(), share]),
            torch.cat([torch.from_numpy(corpus.crowd_center[crowd]).float(), center]),
            torch.cat([torch.from_numpy(corpus.crowd_traits[crowd]).long(), traits]),
        )


def train_encoder(
    tower: SiglipVisionModel, corpus: Corpus, steps: int, seed: int, peak: float = 1.5e-3
) -> dict[str, float]:
    """Train the tower in place and return its last running figures.

    Losses, all from linear heads on the last hidden state that are thrown away afterwards: object or background of
    each patch; color and shape of object patches; the object's centre (object patches) or the patch's own place
    (background); attention received in the last layer follows the objects' patches, each object the same mass, as it
    does in contrastively trained towers; background patches are the same with and without the objects, so they carry
    nothing about them.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    width = tower.config.hidden_size
    sizes = (1, len(COLORS), len(SHAPES), 2)
    head = nn.Linear(width, sum(sizes))
    received = AttentionReceived(tower)
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.05)
    axis = (torch.arange(GRID) + 0.5) / (GRID / 2) - 1.0
    place = torch.stack([axis.repeat(GRID), axis.repeat_interleave(GRID)], -1)
    figures: dict[str, float] = {}
    for step, (frames, share, center, traits) in enumerate(_batches(corpus, steps, generator)):
        cosine(optimizer, step, steps, peak)
        values = augment(pixels(frames), generator)
        real = len(share)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = tower(values, output_hidden_states=True).hidden_states[-1]
            attention = received(stride=3)[:real]
        hidden = hidden.float()
        objectness, color, shape, spot = head(hidden[:real]).split(sizes, dim=-1)
        most, owner = share.max(1)
        solid, bare = most > 0.35, most < 0.02
        chosen = torch.gather(traits, 1, owner[..., None].expand(-1, -1, 4).reshape(real, -1, 4))
        middle = torch.gather(center, 1, owner[..., None].expand(-1, -1, 2))
        clear = solid | bare
        loss_object = F.binary_cross_entropy_with_logits(
            objectness[..., 0][clear], solid[clear].float(), pos_weight=torch.tensor(4.0)
        )
        loss_color = F.cross_entropy(color[solid], chosen[..., 0][solid])
        loss_shape = F.cross_entropy(shape[solid], chosen[..., 1][solid])
        loss_spot = (spot[solid] - middle[solid]).square().mean() + 0.3 * (spot - place)[bare].square().mean()
        target = share.square()
        mass = target.sum(-1, keepdim=True)
        present = (mass > 0.3).float()
        target = (target / mass.clamp_min(1e-6) * present).sum(1) / present.sum(1).clamp_min(1)
        occupied = present.sum((1, 2)) > 0
        loss_attention = -(target * attention.clamp_min(1e-9).log()).sum(-1)[occupied].mean()
        twin, empty = hidden[real - TWINS : real], hidden[real:]
        gap = (twin - empty).square().mean(-1)[bare[-TWINS:]].mean()
        loss_leak = gap / hidden.detach().var(dim=(0, 1)).mean()
        loss = loss_object + loss_color + 2.0 * loss_shape + 4.0 * loss_spot + 0.3 * loss_attention + 2.0 * loss_leak
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        now = {
            "color": (color.argmax(-1) == chosen[..., 0])[solid].float().mean(),
            "shape": (shape.argmax(-1) == chosen[..., 1])[solid].float().mean(),
            "object": ((objectness[..., 0] > 0) == solid)[clear].float().mean(),
            "spot": loss_spot,
            "attention_on_objects": (attention * (share.sum(1) > 0.1))[occupied].sum(-1).mean(),
            "leak": loss_leak,
        }
        for name, value in now.items():
            figures[name] = 0.95 * figures.setdefault(name, value.item()) + 0.05 * value.item()
        if step % 50 == 0 or step == steps - 1:
            logger.info("encoder %d/%d %s", step, steps, " ".join(f"{n} {v:.4f}" for n, v in figures.items()))
    received.close()
    return figures


@torch.no_grad()
def encode_corpus(tower: SiglipVisionModel, corpus: Corpus, seed: int) -> tuple[Tensor, Tensor]:
    """Run the frozen tower over a corpus and keep what the language model needs.

    Returns features bfloat16 [N, FRAMES, 64, 4, D] (the four patches of each pooled cell) and attention received
    float32 [N, FRAMES, 64].
    Half of the clips are augmented, each with one draw, so that the language model meets codec noise too.
    """
    generator = torch.Generator().manual_seed(seed)
    received = AttentionReceived(tower)
    half = GRID // 2
    features, scores = [], []
    for n in range(len(corpus.frames)):
        values = pixels(torch.from_numpy(np.array(corpus.frames[n])))
        if n % 2:
            values = augment(values, generator)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = tower(values, output_hidden_states=True).hidden_states[-1]
            attention = received()
        cells = hidden.view(FRAMES, half, 2, half, 2, -1).permute(0, 1, 3, 2, 4, 5)
        features.append(cells.reshape(FRAMES, half * half, 4, -1).to(torch.bfloat16))
        pooled = attention.view(FRAMES, half, 2, half, 2).mean(dim=(2, 4))
        scores.append(pooled.reshape(FRAMES, half * half))
    received.close()
    return torch.stack(features), torch.stack(scores)
