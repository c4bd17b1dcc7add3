"""Train the embedded text-to-video model from nothing, on CPU.

Run `python -m mmaccel.tiny.train_text_to_video --out FOLDER --work SCRATCH`. Phases, each kept in the scratch folder
and resumed from there: frames and autoencoder (the autoencoder on single frames, then on clips), prompts (the text
encoder), latents, decoder (alone, on those latents), pictures (the transformer on single latent frames: many scenes
for little work), clips, scores.
"""

from __future__ import annotations

import argparse
import logging
import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmaccel.tiny import VIDEO_CALL
from mmaccel.tiny.autoencoder_training import (
    clip_frames,
    normalise,
    pixel_values,
    prepare,
    train_autoencoder,
    train_decoder,
)
from mmaccel.tiny.flow_training import Average, Draw, train_flow
from mmaccel.tiny.generation_card import video_card
from mmaccel.tiny.generation_scoring import generate_clips, video_scores
from mmaccel.tiny.generators import (
    TEXT_LENGTH,
    prompt_tokenizer,
    text_encoder,
    video_pipeline,
    video_transformer,
    video_vae,
)
from mmaccel.tiny.progress import export_pipeline, timed, versions
from mmaccel.tiny.prompt_training import embed, train_text_encoder
from mmaccel.tiny.stories import SPLITS, sample_story

__all__ = ["PaddedText", "main"]

logger = logging.getLogger(__name__)

COLUMNS = 16
_EMPTY = 0.1


class PaddedText(WanAttnProcessor):
    """Cross-attention that sees its last column as often as `bias` says: log of how many copies it stands for.

    The pipeline pads prompts with zeros that are attended to, up to 512 of them. Copies of one key are one key with
    the logarithm of their number added to its score, so training does not have to compute them.
    """

    bias: Tensor | None = None

    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, *_: Any) -> Any:
        """Run the attention with `bias` float32 [B, 1, 1, columns] added to the scores."""
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.bias, None)


class _Sampler:
    """Batches of cached latents with their prompts' embeddings, some of them without a prompt."""

    def __init__(self, model: Any, latents: Tensor, text: Tensor, lengths: Tensor, batch: int, pictures: bool) -> None:
        self.model, self.latents, self.text, self.lengths = model, latents, text, lengths
        self.batch, self.pictures = batch, pictures
        self.padded = PaddedText()
        for block in model.blocks:
            block.attn2.set_processor(self.padded)

    def __call__(self, step: int, generator: torch.Generator) -> Draw:
        count = len(self.latents)
        place = torch.arange(step * self.batch, (step + 1) * self.batch)
        rounds = (place // count).tolist()
        order = torch.stack(
            [
                torch.randperm(count, generator=torch.Generator().manual_seed(turn))[spot]
                for turn, spot in zip(rounds, place % count, strict=True)
            ]
        )
        latents = self.latents[order].float()
        if self.pictures:
            frame = torch.randint(latents.shape[2], (self.batch, 1, 1, 1, 1), generator=generator)
            latents = latents.take_along_dim(frame.expand(-1, latents.shape[1], 1, *latents.shape[3:]), 2)
        # The last row of text and lengths is the empty prompt.
        order = order.masked_fill(torch.rand(self.batch, generator=generator) < _EMPTY, len(self.text) - 1)
        text, lengths = self.text[order], self.lengths[order]
        padded = TEXT_LENGTH
        if torch.rand((), generator=generator) < 0.25:
            padded = int(math.exp(math.log(TEXT_LENGTH) + torch.rand((), generator=generator) * math.log(512 / 24)))
        copies = (padded - lengths).float() / (COLUMNS - lengths)
        bias = (torch.arange(COLUMNS) >= lengths[:, None]) * copies.log()[:, None]

        def velocity(noisy: Tensor, sigma: Tensor) -> Tensor:
            self.padded.bias = bias[:, None, None]
            return self.model(
                hidden_states=noisy, timestep=sigma * 1000, encoder_hidden_states=text, return_dict=False
            )[0]

        return Draw(latents, velocity)

    def close(self) -> None:
        """Give the model its own processors back."""
        for block in self.model.blocks:
            block.attn2.set_processor(WanAttnProcessor())


@torch.no_grad()
def _latents(vae: Any, count: int, path: Path) -> dict[str, Tensor]:
    """Normalised latents float16 [count, C, T, h, w] of training clips, with the mean and deviation of each channel."""
    if not path.exists():
        parts = [
            vae.encode(pixel_values(clip_frames(range(first, min(first + 20, count))))).latent_dist.mode()
            for first in range(0, count, 20)
        ]
        mean, deviation = normalise(torch.cat(parts))
        shape = (1, -1, 1, 1, 1)
        scaled = (torch.cat(parts) - mean.view(shape)) / deviation.view(shape)
        save_file({"latents": scaled.half(), "mean": mean, "deviation": deviation}, path)
    return load_file(path)


def _scores(folder: Path, count: int) -> dict[str, Any]:
    """Read-back on held-out and on trained combinations, the ceiling, and what steps and guidance do to it."""
    library: Any = diffusers
    pipe = library.WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    scores: dict[str, Any] = {"call": VIDEO_CALL}
    for split in SPLITS:
        stories = [sample_story(10_000_000 + index, split) for index in range(count)]
        scores[f"{split}, rendered"] = video_scores(np.empty(0), stories, real=True)
        scores[split] = video_scores(generate_clips(pipe, list(map(str, stories)), range(count)), stories)
    return scores


def main(arguments: list[str] | None = None) -> None:
    """Run the phases and write the trained pipeline."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; replaced in one step")
    parser.add_argument("--work", type=Path, required=True, help="scratch folder, about 200 MB for 6,000 clips")
    parser.add_argument("--clips", type=int, default=6000)
    parser.add_argument("--frames-steps", type=int, default=400)
    parser.add_argument("--autoencoder-steps", type=int, default=700)
    parser.add_argument("--decoder-steps", type=int, default=1500)
    parser.add_argument("--prompt-steps", type=int, default=400)
    parser.add_argument("--picture-steps", type=int, default=600)
    parser.add_argument("--clip-steps", type=int, default=1500)
    parser.add_argument("--watch-clips", type=int, default=6, help="held-out prompts read back every 300 steps")
    parser.add_argument("--score-clips", type=int, default=150)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, int] = {}

    torch.manual_seed(options.seed)
    vae, tokenizer, encoder, transformer = video_vae(), prompt_tokenizer(), text_encoder(), video_transformer()
    prepare(vae)
    with timed(seconds, "autoencoder"):
        clips = clip_frames(range(min(1000, options.clips)))
        for name, frames, batch, sampled, peak in (
            ("frames", 1, 16, False, 3e-3),
            ("autoencoder", 9, 6, True, 2e-3),
        ):
            train_autoencoder(
                vae,
                clips,
                options.work / f"{name}.pt",
                steps=getattr(options, f"{name}_steps"),
                seed=options.seed + sampled,
                frames=frames,
                batch=batch,
                sampled=sampled,
                peak=peak,
            )
        del clips
    with timed(seconds, "prompts"):
        read = train_text_encoder(encoder, tokenizer, steps=options.prompt_steps, seed=options.seed)
    with timed(seconds, "latents"):
        cached = _latents(vae, options.clips, options.work / "latents.safetensors")
    with timed(seconds, "decoder"):
        clips = clip_frames(range(min(1000, options.clips)))
        shape = (1, -1, 1, 1, 1)
        known = cached["latents"][: len(clips)].float() * cached["deviation"].view(shape) + cached["mean"].view(shape)
        path = options.work / "decoder.pt"
        train_decoder(vae, clips, known, path, steps=options.decoder_steps, seed=options.seed)
        del clips, known
    vae.register_to_config(latents_mean=cached["mean"].tolist(), latents_std=cached["deviation"].tolist())
    prompts = [str(sample_story(index, "train")) for index in range(options.clips)]
    text, lengths = embed(encoder, tokenizer, [*prompts, ""], COLUMNS)

    facts: dict[str, Any] = {
        "seed": options.seed,
        "threads": options.threads,
        "clips": options.clips,
        "steps": {
            "frames": options.frames_steps,
            "autoencoder": options.autoencoder_steps,
            "decoder": options.decoder_steps,
            "prompts": options.prompt_steps,
            "pictures": options.picture_steps,
            "clips": options.clip_steps,
        },
        "seconds": seconds,
        "versions": versions(),
        "words that tell their clause": read,
    }
    average = Average(transformer)
    pipe = video_pipeline(vae, tokenizer, encoder, average.model)
    pipe.set_progress_bar_config(disable=True)

    def watch(step: int) -> None:
        if step % 300 == 0 and options.watch_clips:
            stories = [sample_story(10_000 + index) for index in range(options.watch_clips)]
            frames = generate_clips(pipe, list(map(str, stories)), range(options.watch_clips), num_inference_steps=20)
            logger.info("held-out at %d %s", step, video_scores(frames, stories))

    for phase, batch, steps, peak in (
        ("pictures", 64, options.picture_steps, 3e-3),
        ("clips", 16, options.clip_steps, 2e-3),
    ):
        sampler = _Sampler(transformer, cached["latents"], text, lengths, batch, phase == "pictures")
        with timed(seconds, phase):
            train_flow(
                transformer,
                average,
                sampler,
                options.work / f"{phase}.pt",
                steps=steps,
                seed=options.seed,
                peak=peak,
                watch=watch if phase == "clips" else None,
            )
        sampler.close()
    export_pipeline(pipe, options.out, facts, video_card(facts))
    facts["scores"] = _scores(options.out, options.score_clips)
    export_pipeline(pipe, options.out, facts, video_card(facts))
    logger.info("scores %s", facts["scores"])


if __name__ == "__main__":
    main()
