"""Second phase: projector and language model learn to answer, with visual tokens dropped, merged or renumbered."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmaccel.tiny.corpus import GRID, MOST, TAIL
from mmaccel.tiny.encoder_training import cosine
from mmaccel.tiny.world import COLORS, DIRECTIONS, FRAMES, KINDS, SHAPES

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerBase

    from mmaccel.tiny.corpus import Corpus

__all__ = ["Memory", "Thinning", "evaluate", "fit_projector_to", "pack", "project", "thin", "train_language"]

logger = logging.getLogger(__name__)

CELLS = (GRID // 2) ** 2
ASKED = {"color": 2.0, "shape": 3.0, "direction": 4.0, "count": 1.0, "order": 3.0, "last": 1.5}
PER_CLIP = 12
TRAITS = (len(COLORS), len(SHAPES), len(DIRECTIONS), FRAMES)


@dataclass
class Memory:
    """Cached encoder output of N clips with their labels and questions.

    features bfloat16 [N, FRAMES, CELLS, 4, D]; attention float32 [N, FRAMES, CELLS]; owner int8 [N, FRAMES, CELLS]
    (object that covers most of the cell, -1 none, -2 hardly any); traits int8 [N, MOST, 4]; rows / kinds: one array
    of questions a clip.
    """

    features: Tensor
    attention: Tensor
    owner: Tensor
    traits: Tensor
    rows: list[np.ndarray]
    kinds: list[np.ndarray]

    @classmethod
    def build(
        cls, features: Tensor, attention: Tensor, corpus: Corpus, questions: list[tuple[np.ndarray, np.ndarray]]
    ) -> Memory:
        """Join cached features with the corpus they come from."""
        half = GRID // 2
        share = (
            np.asarray(corpus.share).reshape(-1, FRAMES, MOST, half, 2, half, 2).astype(np.float32).mean(axis=(4, 6))
        )
        share = share.reshape(-1, FRAMES, MOST, CELLS)
        most = share.max(2)
        owner = np.where(most > 0.12, share.argmax(2), np.where(most > 0.01, -2, -1)).astype(np.int8)
        rows, kinds = zip(*questions, strict=True)
        return cls(
            features,
            attention,
            torch.from_numpy(owner),
            torch.from_numpy(np.array(corpus.traits)),
            list(rows),
            list(kinds),
        )


@dataclass(frozen=True)
class Thinning:
    """What happens to the visual tokens of one batch: frames, share kept and how, merging over time, numbering."""

    frames: int = FRAMES
    keep: float = 1.0
    by_attention: bool = False
    merge: bool = False
    compact: bool = False

    @classmethod
    def draw(cls, rng: np.random.Generator, focus: bool) -> Thinning:
        """`focus` keeps few tokens, those with most attention: cheap steps in which the questions are understood."""
        if focus:
            return cls(keep=float(rng.uniform(0.08, 0.3)), by_attention=True, compact=bool(rng.random() < 0.5))
        dense = rng.random() < 0.2
        return cls(
            frames=FRAMES if rng.random() < 0.9 else int(rng.integers(4, FRAMES)),
            keep=1.0 if dense else float(rng.uniform(0.08, 0.5)),
            by_attention=bool(rng.random() < 0.5),
            merge=bool(rng.random() < (0.2 if dense else 0.4)),
            compact=bool(rng.random() < 0.5),
        )


def project(model: LlavaOnevisionForConditionalGeneration, features: Tensor) -> Tensor:
    """Project the four patches of each cell and average them, as LlavaOnevision pools: [..., 4, D] to [..., E]."""
    return model.model.multi_modal_projector(features).mean(-2)


def _merge_still(cells: Tensor, alive: Tensor, rank: Tensor, rng: np.random.Generator) -> Tensor:
    """Average cells that hardly change over random windows; the mean comes first in the window's first frame."""
    frames = cells.shape[1]
    similar = F.cosine_similarity(cells[:, 1:], cells[:, :-1], dim=-1) > 0.8
    start = 0
    out = list(cells.unbind(1))
    while start < frames - 1:
        stop = int(rng.integers(start, frames))
        if stop > start:
            still = similar[:, start:stop].all(1)
            mean = cells[:, start : stop + 1].mean(1)
            out[start] = torch.where(still[..., None], mean, out[start])
            alive[:, start + 1 : stop + 1] &= ~still[:, None]
            rank[:, start] = torch.where(still, rank[:, start] - CELLS, rank[:, start])
        start = stop + 1
    return torch.stack(out, 1)


def thin(
    model: LlavaOnevisionForConditionalGeneration,
    features: Tensor,
    attention: Tensor,
    plan: Thinning,
    rng: np.random.Generator,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Visual embeddings [B, K, E] left by a thinning, and their places `frame * CELLS + cell` int64 [B, K]."""
    batch, frames = features.shape[:2]
    total = frames * CELLS
    alive = torch.ones(batch, frames, CELLS, dtype=torch.bool)
    # Twice as fine as the place, so that merged cells can stand before the frame that they start in.
    rank = (2 * torch.arange(frames)[:, None] * CELLS + CELLS + torch.arange(CELLS)).repeat(batch, 1, 1)
    cells = None
    if plan.merge:
        cells = _merge_still(project(model, features), alive, rank, rng).flatten(1, 2)
    elif plan.keep == 1.0:
        return project(model, features).flatten(1, 2), torch.arange(total).expand(batch, -1)
    score = -torch.rand(batch, total, generator=generator).clamp_min(1e-9).log().neg().log()
    if plan.by_attention:
        score = score + 1.5 * attention.flatten(1).clamp_min(1e-7).log()
    score = score.masked_fill(~alive.flatten(1), -torch.inf)
    count = max(1, min(round(plan.keep * total), int(alive.flatten(1).sum(1).min())))
    chosen = score.topk(count, dim=1).indices
    chosen = torch.gather(chosen, 1, torch.gather(rank.flatten(1), 1, chosen).argsort(1))
    if cells is None:
        picked = features.flatten(1, 2)[torch.arange(batch)[:, None], chosen]
        return project(model, picked), chosen
    return cells[torch.arange(batch)[:, None], chosen], chosen


def pack(
    model: LlavaOnevisionForConditionalGeneration,
    visual: Tensor,
    place: Tensor,
    rows: Tensor,
    user: int,
    end_place: int | None,
    chain: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pack each clip with all its questions into one sequence; returns inputs, position ids and mask [1, 1, L, L].

    A sequence is `<|user|>`, the visual tokens, the newline token, and the questions one behind the other.
    Questions (rows int64 [B, Q, TAIL]) see the clip and, in runs of `chain`, those before them in the run, nothing
    else, and positions start anew behind the clip for each run. `end_place` is the newline's place when tokens keep
    their original positions, None to renumber.
    """
    batch, kept = visual.shape[:2]
    tails = rows.shape[1] * TAIL
    embed = model.get_input_embeddings()
    opening = embed(torch.full((batch, 1), user))
    newline = model.model.image_newline.expand(batch, 1, -1)
    inputs = torch.cat([opening, visual, newline, embed(rows.flatten(1))], dim=1)
    body = torch.arange(kept).expand(batch, -1) if end_place is None else place
    end = kept if end_place is None else end_place
    offset = torch.arange(tails) % (chain * TAIL)
    positions = torch.cat(
        [
            torch.zeros(batch, 1, dtype=torch.long),
            body + 1,
            torch.full((batch, 1), end + 1),
            (end + 2 + offset).expand(batch, -1),
        ],
        dim=1,
    )
    prefix = kept + 2
    group = torch.cat([torch.full((prefix,), -1), torch.arange(tails) // (chain * TAIL)])
    length = prefix + tails
    mask = torch.ones(length, length, dtype=torch.bool).tril() & ((group[None] == -1) | (group[None] == group[:, None]))
    return inputs, positions, mask[None, None]


def fit_projector_to(model: LlavaOnevisionForConditionalGeneration, features: Tensor) -> None:
    """Start the projector with standardised inputs: raw hidden states have channels of very different scale."""
    sample = features.flatten(0, -2)[::97].float()
    mean, spread = sample.mean(0), sample.std(0).clamp_min(0.05)
    first, second = model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2
    with torch.no_grad():
        nn.init.normal_(first.weight, std=sample.shape[1] ** -0.5)
        first.weight /= spread
        first.bias.copy_(-first.weight @ mean)
        nn.init.normal_(second.weight, std=first.weight.shape[0] ** -0.5)
        nn.init.zeros_(second.bias)
        nn.init.normal_(model.model.language_model.embed_tokens.weight, std=0.5)
        nn.init.normal_(model.model.image_newline, std=0.5)


def _trait_loss(hidden: Tensor, head: nn.Linear, owner: Tensor, traits: Tensor, frame: Tensor) -> Tensor:
    """Visual tokens name their object's traits, its direction only from the second frame that shows it."""
    taken = owner >= 0
    if not taken.any():
        return hidden.sum() * 0.0
    batch = torch.arange(len(owner))[:, None].expand_as(owner)[taken]
    truth = traits[batch, owner[taken]]
    parts = head(hidden[taken]).split(TRAITS, dim=-1)
    losses = [F.cross_entropy(part, truth[:, n], reduction="none") for n, part in enumerate(parts)]
    known = (frame[taken] > truth[:, 3]).float()
    return losses[0].mean() + losses[1].mean() + (losses[2] * known).mean() + 0.5 * losses[3].mean()


def _apartness(cells: Tensor, owner: Tensor) -> Tensor:
    """Hinge: a cell that an object enters or leaves is unlike what was there a frame before (cosine under 0.5)."""
    similar = F.cosine_similarity(cells[:, 1:].float(), cells[:, :-1].float(), dim=-1)
    changed = (owner[:, 1:] >= 0) & (owner[:, :-1] == -1) | (owner[:, :-1] >= 0) & (owner[:, 1:] == -1)
    return (similar[changed] - 0.5).clamp_min(0).mean() if changed.any() else similar.sum() * 0.0


def train_language(
    model: LlavaOnevisionForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    memory: Memory,
    steps: int,
    seed: int,
    focus: bool,
    batch: int = 32,
    peak: float = 2e-3,
    checkpoint: Callable[[int], None] | None = None,
) -> None:
    """Train projector, newline and language model in place on packed questions; the tower stays as it is.

    `checkpoint(step)` is called every 300 steps. Loss: answer and `<|end|>`; visual tokens' traits at half depth (a
    linear head that is thrown away); `_apartness`.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    layers = model.model.language_model.layers
    head = nn.Linear(model.lm_head.in_features, sum(TRAITS))
    model.model.vision_tower.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad] + list(head.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.05)
    middle: dict[str, Tensor] = {}
    handle = layers[len(layers) // 2 - 1].register_forward_hook(
        lambda _module, _args, output: middle.__setitem__("hidden", output[0] if isinstance(output, tuple) else output)
    )
    user, assistant = (tokenizer.get_vocab()[token] for token in ("<|user|>", "<|assistant|>"))
    weights = []
    for kinds in memory.kinds:
        share = np.array([ASKED[KINDS[kind]] / (kinds == kind).sum() for kind in kinds])
        weights.append(share / share.sum())
    running: dict[str, float] = {}
    clips = len(memory.features)
    for step in range(steps):
        # The first phase only warms up for the second: its rate stays near the peak.
        cosine(optimizer, step, 5 * steps if focus else steps, peak)
        plan = Thinning.draw(rng, focus)
        which = rng.integers(clips, size=batch)
        used = np.linspace(0, FRAMES - 1, plan.frames).round().astype(int)
        asked = [rng.choice(len(weights[n]), PER_CLIP, p=weights[n]) for n in which]
        rows = torch.from_numpy(np.stack([memory.rows[n][pick] for n, pick in zip(which, asked, strict=True)])).long()
        kinds = torch.from_numpy(np.stack([memory.kinds[n][pick] for n, pick in zip(which, asked, strict=True)]))
        index = torch.from_numpy(which)[:, None], torch.from_numpy(used)[None]
        features, attention, owner = memory.features[index], memory.attention[index], memory.owner[index].long()
        with torch.autocast("cpu", torch.bfloat16):
            visual, place = thin(model, features, attention, plan, rng, generator)
            end = None if plan.compact else plan.frames * CELLS
            chain = 2 if rng.random() < 0.1 else 1
            inputs, positions, mask = pack(model, visual, place, rows, user, end, chain)
            states = model.model.language_model(
                inputs_embeds=inputs,
                position_ids=positions,
                attention_mask=mask.expand(batch, -1, -1, -1),
                use_cache=False,
            ).last_hidden_state
        prefix = visual.shape[1] + 2
        turn = (rows == assistant).long().argmax(-1)
        spot = prefix + torch.arange(PER_CLIP) * TAIL + turn
        picked = torch.stack([spot, spot + 1], -1).flatten(1)
        logits = model.lm_head(states[torch.arange(batch)[:, None], picked].float())
        truth = torch.stack([rows.gather(2, turn[..., None] + 1), rows.gather(2, turn[..., None] + 2)], 2).flatten(1)
        losses = F.cross_entropy(logits.flatten(0, 1), truth.flatten(), reduction="none").view(batch, PER_CLIP, 2)
        frame = torch.from_numpy(used)[place // CELLS]
        loss_trait = _trait_loss(
            middle["hidden"][:, 1 : prefix - 1].float(),
            head,
            owner.flatten(1).gather(1, place),
            memory.traits[which].long(),
            frame,
        )
        loss = losses[..., 0].mean() + 0.1 * losses[..., 1].mean() + 0.2 * loss_trait
        if plan.keep == 1.0 and not plan.merge and plan.frames == FRAMES:
            loss = loss + _apartness(visual.view(batch, FRAMES, CELLS, -1), owner)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        right = (
            logits.view(batch, PER_CLIP, 2, -1)[:, :, 0].argmax(-1) == truth.view(batch, PER_CLIP, 2)[..., 0]
        ).float()
        now = {kind: right[kinds == n].mean() for n, kind in enumerate(KINDS) if (kinds == n).any()}
        now |= {"answer": losses[..., 0].mean().detach(), "trait": loss_trait.detach()}
        for name, value in now.items():
            running[name] = 0.97 * running.setdefault(name, value.item()) + 0.03 * value.item()
        if step % 50 == 0 or step == steps - 1:
            logger.info("language %d/%d %s", step, steps, " ".join(f"{n} {v:.3f}" for n, v in running.items()))
        if checkpoint is not None and step and step % 300 == 0:
            checkpoint(step)
    handle.remove()
    model.model.vision_tower.requires_grad_(True)


@torch.no_grad()
def evaluate(
    model: LlavaOnevisionForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, memory: Memory
) -> dict[str, float]:
    """Dense accuracy per kind and over all questions on cached features; quick, for watching a run."""
    user, assistant = (tokenizer.get_vocab()[token] for token in ("<|user|>", "<|assistant|>"))
    hits: dict[str, list[bool]] = {}
    for n, (raw, kinds) in enumerate(zip(memory.rows, memory.kinds, strict=True)):
        rows = torch.from_numpy(raw)[None].long()
        with torch.autocast("cpu", torch.bfloat16):
            visual = project(model, memory.features[n][None]).flatten(1, 2)
            place = torch.arange(visual.shape[1])[None]
            inputs, positions, mask = pack(model, visual, place, rows, user, None)
            states = model.model.language_model(
                inputs_embeds=inputs, position_ids=positions, attention_mask=mask, use_cache=False
            ).last_hidden_state
        turn = (rows[0] == assistant).long().argmax(-1)
        spot = visual.shape[1] + 2 + torch.arange(len(turn)) * TAIL + turn
        guess = model.lm_head(states[0, spot].float()).argmax(-1)
        truth = rows[0].gather(1, turn[:, None] + 1)[:, 0]
        for kind, hit in zip(kinds, (guess == truth).tolist(), strict=True):
            hits.setdefault(KINDS[kind], []).append(hit)
    scores = {kind: float(np.mean(values)) for kind, values in hits.items()}
    return scores | {"all": float(np.mean([hit for values in hits.values() for hit in values]))}
