"""Train the embedded class-to-image model from nothing, on CPU.

Run `python -m mmaccel.tiny.train_class_to_image --out FOLDER --work SCRATCH`. Phases, each kept in the scratch folder
and resumed from there: autoencoder, latents, images (the transformer), scores.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmaccel.tiny import IMAGE_CALL
from mmaccel.tiny.autoencoder_training import normalise, pixel_values, prepare, train_autoencoder
from mmaccel.tiny.flow_training import Average, Draw, train_flow
from mmaccel.tiny.generation_card import image_card
from mmaccel.tiny.generation_scoring import generate_images, image_scores, image_story
from mmaccel.tiny.generators import IMAGE_LABELS, image_pipeline, image_transformer, image_vae
from mmaccel.tiny.progress import export_pipeline, timed, versions
from mmaccel.tiny.stories import render_story, stage

__all__ = ["fold_scale", "label_frames", "main"]

logger = logging.getLogger(__name__)

_EMPTY, _NONE = 0.1, 1000


def label_frames(count: int) -> Tensor:
    """Training images uint8 [count, 1, WINDOW, WINDOW, 3]; image n has the class n modulo 24."""
    frames = [render_story(stage(image_story(IMAGE_LABELS[n % len(IMAGE_LABELS)]), n), 1) for n in range(count)]
    return torch.from_numpy(np.stack(frames))


@torch.no_grad()
def fold_scale(vae: Any, mean: Tensor, deviation: Tensor) -> None:
    """Change an `AutoencoderKL` so that its latents are `(old - mean) / deviation`, and its images are the same.

    The pipeline knows one scaling factor and no shift; the two 1 x 1 convolutions around the latents can hold both.
    """
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels] /= deviation.view(-1, 1, 1, 1)
    quant.bias[:channels] = (quant.bias[:channels] - mean) / deviation
    quant.bias[channels:] -= 2.0 * deviation.log()
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= deviation.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=1.0)


@torch.no_grad()
def _latents(vae: Any, frames: Tensor) -> Tensor:
    return torch.cat([vae.encode(pixel_values(part)[:, :, 0]).latent_dist.mode() for part in frames.split(50)])


def _draw(model: Any, latents: Tensor, batch: int) -> Any:
    for block in model.transformer_blocks:
        # The library empties classes in each block by itself; here one class is empty in all blocks or in none.
        block.norm1.emb.class_embedder.dropout_prob = 0.0

    def draw(_step: int, generator: torch.Generator) -> Draw:
        order = torch.randint(len(latents), (batch,), generator=generator)
        empty = torch.rand(batch, generator=generator) < _EMPTY
        labels = (order % len(IMAGE_LABELS)).masked_fill(empty, _NONE)

        def velocity(noisy: Tensor, sigma: Tensor) -> Tensor:
            return model(noisy, timestep=sigma * 1000, class_labels=labels).sample

        return Draw(latents[order].float(), velocity)

    return draw


def _scores(folder: Path, count: int) -> dict[str, Any]:
    library: Any = diffusers
    pipe = library.DiTPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    labels = [n % len(IMAGE_LABELS) for n in range(count)]
    names = [IMAGE_LABELS[label] for label in labels]
    return {
        "call": IMAGE_CALL,
        "rendered": image_scores(np.empty(0), names, real=True),
        "generated": image_scores(generate_images(pipe, labels, range(count)), names),
    }


def main(arguments: list[str] | None = None) -> None:
    """Run the phases and write the trained pipeline."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; replaced in one step")
    parser.add_argument("--work", type=Path, required=True, help="scratch folder, about 100 MB")
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--autoencoder-steps", type=int, default=400)
    parser.add_argument("--image-steps", type=int, default=800)
    parser.add_argument("--score-images", type=int, default=240)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, int] = {}

    torch.manual_seed(options.seed)
    vae, transformer = image_vae(), image_transformer()
    prepare(vae)
    frames = label_frames(options.images)
    with timed(seconds, "autoencoder"):
        train_autoencoder(
            vae,
            frames,
            options.work / "image-autoencoder.pt",
            steps=options.autoencoder_steps,
            seed=options.seed,
            frames=1,
            batch=16,
            sampled=True,
        )
    kept = options.work / "image-latents.safetensors"
    with timed(seconds, "latents"):
        if not kept.exists():
            latents = _latents(vae, frames)
            mean, deviation = normalise(latents)
            shape = (1, -1, 1, 1)
            scaled = (latents - mean.view(shape)) / deviation.view(shape)
            save_file({"latents": scaled.half().contiguous(), "mean": mean, "deviation": deviation}, kept)
        cached = load_file(kept)
    fold_scale(vae, cached["mean"], cached["deviation"])

    average = Average(transformer)
    pipe = image_pipeline(vae, average.model)
    pipe.set_progress_bar_config(disable=True)
    facts: dict[str, Any] = {
        "seed": options.seed,
        "threads": options.threads,
        "images": options.images,
        "parameters": f"{sum(p.numel() for part in (vae, transformer) for p in part.parameters()) / 1e6:.1f} M",
        "steps": {"autoencoder": options.autoencoder_steps, "images": options.image_steps},
        "seconds": seconds,
        "versions": versions(),
    }

    def watch(step: int) -> None:
        if step % 200 == 0:
            names = list(IMAGE_LABELS.values())
            found = image_scores(generate_images(pipe, list(IMAGE_LABELS), range(len(IMAGE_LABELS))), names)
            logger.info("read back at %d %s", step, found)

    with timed(seconds, "images"):
        train_flow(
            transformer,
            average,
            _draw(transformer, cached["latents"], 32),
            options.work / "images.pt",
            steps=options.image_steps,
            seed=options.seed,
            shift=1.0,
            watch=watch,
        )
    export_pipeline(pipe, options.out, facts, image_card(facts))
    facts["scores"] = _scores(options.out, options.score_images)
    export_pipeline(pipe, options.out, facts, image_card(facts))
    logger.info("scores %s", facts["scores"])


if __name__ == "__main__":
    main()
