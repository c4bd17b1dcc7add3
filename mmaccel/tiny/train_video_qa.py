"""Train the embedded video-QA model from nothing, on CPU.

Run `python -m mmaccel.tiny.train_video_qa --out FOLDER --work SCRATCH`. Phases, each kept in the scratch folder and
skipped when it is there: render (corpus), encoder (dense labels), features, focus (the language model on few tokens),
language (the language model on all tokens, and on thinned ones).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from mmaccel.tiny.card import card
from mmaccel.tiny.corpus import Corpus, build_corpus, question_rows
from mmaccel.tiny.encoder_training import encode_corpus, train_encoder
from mmaccel.tiny.language_training import Memory, evaluate, fit_projector_to, train_language
from mmaccel.tiny.processing import PATCH, WORDS, build_processor, build_tokenizer
from mmaccel.tiny.progress import timed
from mmaccel.tiny.scoring import score_folder
from mmaccel.tiny.world import SIZE

if TYPE_CHECKING:
    from transformers import LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerBase, SiglipVisionModel

__all__ = ["build_model", "export", "main"]

logger = logging.getLogger(__name__)


def build_model(seed: int, tokenizer: PreTrainedTokenizerBase) -> LlavaOnevisionForConditionalGeneration:
    """The untrained model: SigLIP 4 x 96 on 8-pixel patches, Qwen2 4 x 128, about 1.4 M parameters."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    ids = tokenizer.get_vocab()
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=96,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=3,
            image_size=SIZE,
            patch_size=PATCH,
            vision_use_head=False,
        ),
        text_config=Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=4096,
            initializer_range=0.05,
            bos_token_id=None,
            eos_token_id=ids["<|end|>"],
            pad_token_id=ids["<pad>"],
        ),
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=[[SIZE, SIZE]],
        vision_feature_layer=-1,
    )
    torch.manual_seed(seed)
    model = LlavaOnevisionForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids["<|end|>"]
    model.generation_config.pad_token_id = ids["<pad>"]
    model.generation_config.max_new_tokens = 4
    return model


def export(model: LlavaOnevisionForConditionalGeneration, folder: Path, facts: dict[str, Any]) -> None:
    """Write model (float32), processor, scores and card into `folder`, replacing what is there in one step."""
    fresh = folder.with_name(folder.name + ".new")
    old = folder.with_name(folder.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    model.save_pretrained(fresh)
    build_processor().save_pretrained(fresh)
    (fresh / "scores.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (fresh / "README.md").write_text(card(facts, len(WORDS)), encoding="utf-8")
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _versions() -> dict[str, str]:
    import numpy
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
    }


def _memory(tower: SiglipVisionModel, corpus: Corpus, split: str, seed: int, sampled: bool, kept: Path) -> Memory:
    tokenizer = build_tokenizer()
    if not kept.exists():
        features, attention = encode_corpus(tower, corpus, seed)
        save_file({"features": features, "attention": attention}, kept)
    cached = load_file(kept)
    questions = [question_rows(split, index, tokenizer, sampled) for index in range(len(corpus.frames))]
    return Memory.build(cached["features"], cached["attention"], corpus, questions)


def main(arguments: list[str] | None = None) -> None:
    """Run the phases and write the trained folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; replaced in one step")
    parser.add_argument("--work", type=Path, required=True, help="scratch folder, about 6 GB for 6,000 clips")
    parser.add_argument("--clips", type=int, default=6000)
    parser.add_argument("--encoder-steps", type=int, default=700)
    parser.add_argument("--focus-steps", type=int, default=600)
    parser.add_argument("--language-steps", type=int, default=800)
    parser.add_argument("--watch-clips", type=int, default=150, help="validation clips looked at every 300 steps")
    parser.add_argument("--score-clips", type=int, default=300)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = build_model(options.seed, tokenizer)
    tower = model.model.vision_tower
    seconds: dict[str, int] = {}

    folder = options.work / "corpus"
    if not folder.exists():
        with timed(seconds, "render"):
            build_corpus("train", options.clips, options.threads).save(folder)
    corpus = Corpus.load(folder)
    weights = options.work / "encoder.safetensors"
    if weights.exists():
        tower.load_state_dict(load_file(weights))
    else:
        with timed(seconds, "encoder"):
            figures = train_encoder(tower, corpus, options.encoder_steps, options.seed)
        save_file(tower.state_dict(), weights, {name: f"{value:.4f}" for name, value in figures.items()})
    with timed(seconds, "features"):
        memory = _memory(tower, corpus, "train", options.seed, False, options.work / "train.safetensors")
        unseen = build_corpus("validation", options.watch_clips, options.threads)
        watch = _memory(tower, unseen, "validation", options.seed, True, options.work / "validation.safetensors")
    torch.manual_seed(options.seed)
    fit_projector_to(model, memory.features[:200])

    facts: dict[str, Any] = {
        "seed": options.seed,
        "threads": options.threads,
        "clips": len(corpus.frames),
        "steps": {"encoder": options.encoder_steps, "focus": options.focus_steps, "language": options.language_steps},
        "seconds": seconds,
        "versions": _versions(),
    }

    def checkpoint(step: int) -> None:
        scores = evaluate(model, tokenizer, watch)
        logger.info("validation at %d %s", step, " ".join(f"{name} {value:.3f}" for name, value in scores.items()))
        export(model, options.work / "checkpoint", {"step": step, "validation": scores, **facts})

    weights = options.work / "focus.safetensors"
    if weights.exists():
        model.load_state_dict(load_file(weights))
    else:
        with timed(seconds, "focus"):
            train_language(model, tokenizer, memory, options.focus_steps, options.seed, True, checkpoint=checkpoint)
        save_file(model.state_dict(), weights)
    with timed(seconds, "language"):
        train_language(model, tokenizer, memory, options.language_steps, options.seed + 1, False, checkpoint=checkpoint)
    export(model, options.out, facts)
    facts["held-out"] = score_folder(options.out, "held-out", options.score_clips)
    export(model, options.out, facts)
    logger.info("held-out %s", facts["held-out"])


if __name__ == "__main__":
    main()
