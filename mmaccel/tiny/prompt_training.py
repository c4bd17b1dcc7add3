"""The text encoder of the embedded text-to-video model learns what each word of a prompt belongs to, and is frozen."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmaccel.tiny.encoder_training import cosine
from mmaccel.tiny.generators import TEXT_LENGTH
from mmaccel.tiny.stories import sample_story
from mmaccel.tiny.world import COLORS, DIRECTIONS, SHAPES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mmaccel.tiny.stories import Story

__all__ = ["embed", "train_text_encoder", "word_targets"]

logger = logging.getLogger(__name__)

_TRAITS = (len(COLORS), len(SHAPES), len(DIRECTIONS), 4)
_IGNORED = -100


def word_targets(story: Story) -> Tensor:
    """Color, shape, direction and role of the clause of each word of a prompt, int64 [words, 4].

    Roles: 0 alone, 1 together with another, 2 the first of a `then`, 3 the second. Links have -100.
    """
    rows: list[list[int]] = []
    for number, clause in enumerate(story.clauses):
        if number:
            rows += [[_IGNORED] * 4] * (2 if story.link == "then" else 1)
        role = 0 if len(story.clauses) == 1 else 1 if story.link == "and" else 2 + number
        traits = [
            list(COLORS).index(clause.color),
            SHAPES.index(clause.shape),
            list(DIRECTIONS).index(clause.direction),
            role,
        ]
        rows += [traits] * len(str(clause).split())
    return torch.tensor(rows)


def _tokens(stories: list[Story], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    return dict(
        tokenizer(list(map(str, stories)), padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt").items()
    )


def train_text_encoder(
    encoder: Any, tokenizer: PreTrainedTokenizerBase, *, steps: int, seed: int, batch: int = 64
) -> float:
    """Train in place on stories of the split `train`; the share of right traits in the last batch.

    Every word must tell all traits of its own clause, so that cross-attention to one word finds them together.
    """
    torch.manual_seed(seed)
    heads = nn.Linear(encoder.config.d_model, sum(_TRAITS))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], lr=3e-3, weight_decay=1e-3)
    encoder.train()
    right = 0.0
    for step in range(steps):
        cosine(optimizer, step, steps, 3e-3)
        stories = [sample_story(step * batch + n, "train") for n in range(batch)]
        tokens = _tokens(stories, tokenizer)
        targets = torch.full((batch, TEXT_LENGTH, 4), _IGNORED)
        for row, story in zip(targets, stories, strict=True):
            known = word_targets(story)
            row[: len(known)] = known
        states = encoder(tokens["input_ids"], tokens["attention_mask"]).last_hidden_state
        scores = heads(states).split(_TRAITS, dim=-1)
        pairs = [(score.flatten(0, 1), targets[..., n].flatten()) for n, score in enumerate(scores)]
        loss = torch.stack([F.cross_entropy(score, target) for score, target in pairs]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step + 1 == steps:
            seen = [(score.argmax(-1) == target)[target >= 0] for score, target in pairs]
            right = torch.cat(seen).float().mean().item()
            logger.info("text %d loss %.4f right %.4f", step, loss.item(), right)
    encoder.eval().requires_grad_(requires_grad=False)
    return right


@torch.no_grad()
def embed(encoder: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[str], columns: int) -> tuple[Tensor, Tensor]:
    """Embeddings float32 [B, columns, D], zero behind the end as the pipeline makes them, and lengths int64 [B]."""
    tokens = tokenizer(prompts, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")
    mask = tokens["attention_mask"]
    states = encoder(tokens["input_ids"], mask).last_hidden_state.float() * mask[..., None]
    return states[:, :columns], mask.sum(1)
