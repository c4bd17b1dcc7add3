"""What a shorter sequence means for the language model: its keywords, and the book of its cache.

Masks: the caller's mask counts the tokens that were seen; a reduced cache holds fewer. transformers looks columns up by
the index that it gets from the cache as key offset, so as many columns as are hidden stand in front, of any value.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mmaccel.core.cache import Kept, Ledger, PrunedLayer, cache_keyword, ledger_of, pruned_cache
from mmaccel.core.forward import Forward
from mmaccel.core.layout import Site
from mmaccel.errors import NotApplicableError
from mmaccel.tokens.place import TEXT, Placement, compact_positions

__all__ = ["apply", "go_on", "prepare_cache", "settle"]


def go_on(forward: Forward, kwargs: dict[str, Any], site: Site) -> None:
    """Bring mask and positions of a call that goes on with a reduced cache in line with what the cache holds.

    Raises:
        NotApplicableError: the mask does not cover the sequence that was seen.
    """
    embeds, cache = kwargs["inputs_embeds"], kwargs.get(cache_keyword(site.language_model))
    B, S = embeds.shape[:2]
    forward.length = S
    ledger = ledger_of(cache)
    if ledger is None or cache is None:
        forward.seen = int(cache.get_seq_length()) if cache is not None and S > 1 else 0
        return
    first = cache.layers[0]
    forward.cache, forward.ledger = cache, ledger
    forward.seen, forward.hidden, forward.held = first.get_seq_length(), first.hidden, [first.held]
    ledger.served = True
    kwargs["attention_mask"] = _mask_of_held(forward, ledger, kwargs.get("attention_mask"), B)
    if ledger.shift is None:
        return
    position = kwargs.get("position_ids")
    if position is None:
        position = torch.arange(forward.seen, forward.seen + S, device=embeds.device).expand(B, S)
    kwargs["position_ids"] = position - ledger.shift.to(position.device)[:, None]


def _mask_of_held(forward: Forward, ledger: Ledger, mask: Any, B: int) -> torch.Tensor | None:
    kept, held, seen, S = ledger.groups[0], forward.held[0], forward.seen, forward.length
    later = held - kept.source.shape[1]
    if isinstance(mask, dict):
        raise NotApplicableError("the cache holds a reduced prompt; pass a 2-D attention_mask, not prepared masks.")
    if not ledger.moved or (mask is None and kept.full):
        return mask
    if mask is None:
        front = kept.valid.new_ones(B, forward.hidden)
        return torch.cat([front, kept.valid, kept.valid.new_ones(B, later + S)], 1).long()
    missing = seen + S - mask.shape[-1]
    if missing and (mask.dim() == 4 or missing != seen):
        raise NotApplicableError(
            f"attention_mask has {mask.shape[-1]} columns, but {seen} tokens were seen and {S} are new; give it "
            f"{seen + S} columns, or {S} if nothing before was padding."
        )
    source, valid = kept.source.to(mask.device), kept.valid.to(mask.device)
    if mask.dim() == 4:
        mask = mask.expand(B, *mask.shape[1:])
        old = mask.gather(3, source[:, None, None].expand(*mask.shape[:3], source.shape[1]))
        if not kept.full:
            old = old.masked_fill(~valid[:, None, None], _never(mask))
        return torch.cat([old, mask[..., ledger.seen :]], 3)
    if missing:
        mask = nn.functional.pad(mask, (missing, 0), value=1)
    mask = mask.expand(B, -1)
    old = mask.gather(1, source)
    return torch.cat([mask[:, : forward.hidden], old if kept.full else old * valid, mask[:, ledger.seen :]], 1)


def _never(mask: torch.Tensor) -> float | bool:
    return False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min


def prepare_cache(forward: Forward, kwargs: dict[str, Any], site: Site) -> None:
    """Have the cache of this call, if it uses one, made of layers that may be shorter than what was seen.

    Raises:
        NotApplicableError: the cache is of a kind that cannot be; it is as it was.
    """
    if forward.prepared:
        return
    forward.prepared = True
    name = cache_keyword(site.language_model)
    cache, use_cache = kwargs.get(name), kwargs.get("use_cache")
    config = site.language_model.config
    if cache is None and not (getattr(config, "use_cache", True) if use_cache is None else use_cache):
        return
    forward.cache = kwargs[name] = pruned_cache(cache, config, len(site.layers))
    layers = forward.cache.layers
    forward.seen, forward.hidden = layers[0].get_seq_length(), layers[0].hidden
    forward.held = [layer.held for layer in layers]
    mask, end = kwargs.get("attention_mask"), forward.hidden + forward.held[0]
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] > end:
        forward.old_valid = mask[:, forward.hidden : end].bool()


def apply(forward: Forward, kwargs: dict[str, Any], placement: Placement, positions: str) -> None:
    """Rewrite the keywords of the language model for the reduced sequence."""
    tokens = forward.tokens
    assert tokens is not None
    reduced, (kwargs["inputs_embeds"],) = placement.carry(tokens, kwargs["inputs_embeds"])
    if positions == "compact":
        position, shift = compact_positions(tokens, placement)
        forward.shift = shift if forward.shift is None else forward.shift + shift
        reduced = replace(reduced, position=position)
    kwargs["position_ids"] = reduced.position
    mask = kwargs.get("attention_mask")
    held = forward.held[0] if forward.held else 0
    if isinstance(mask, dict):
        kwargs["attention_mask"] = {k: m if m is None else placement.mask(m, held) for k, m in mask.items()}
    elif isinstance(mask, torch.Tensor) and mask.dim() == 4:
        kwargs["attention_mask"] = placement.mask(mask, held)
    else:
        # Always explicit: without a 2-D mask transformers takes gaps in the positions for packed sequences.
        front = _columns_before(forward, mask, placement.valid)
        kwargs["attention_mask"] = torch.cat([front, placement.valid.long()], 1)
    if kwargs.get("visual_pos_masks") is not None:
        _reduce_deepstack(kwargs, placement)
    forward.tokens = forward.first_tokens = reduced
    forward.reduced = True


def _columns_before(forward: Forward, mask: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """int64 [B, hidden + held]: the mask's columns before the tokens of this call."""
    width = forward.hidden + (forward.held[0] if forward.held else 0)
    if mask is None or mask.shape[1] <= width:
        return torch.ones(like.shape[0], width, dtype=torch.int64, device=like.device)
    return mask[:, :width].to(like.device).long().expand(like.shape[0], -1)


def _reduce_deepstack(kwargs: dict[str, Any], placement: Placement) -> None:
    where = kwargs["visual_pos_masks"]
    new = placement.along(where, -1) & placement.valid
    features = []
    for feature in kwargs["deepstack_visual_embeds"]:
        dense = feature.new_zeros(*where.shape, feature.shape[-1])
        dense[where] = feature
        features.append(placement.values(dense)[new])
    kwargs["visual_pos_masks"], kwargs["deepstack_visual_embeds"] = new, features


def settle(forward: Forward) -> None:
    """After the forward: count as seen what was taken out, and write down which tokens each layer holds."""
    cache, tokens = forward.cache, forward.first_tokens
    if cache is None or tokens is None or not (forward.reduced or forward.levels):
        return
    old = forward.ledger
    firsts = {0, *(old.groups if old else ()), *(level.first for level in forward.levels)}
    groups = {first: _kept(forward, first) for first in sorted(firsts)}
    shift = forward.shift
    if old is not None and old.shift is not None:
        shift = old.shift if shift is None else old.shift + shift
    moved = forward.reduced or (old is not None and old.moved)
    text = (tokens.item == TEXT) & tokens.valid
    tail = int(text.flip(1).long().cumprod(1).sum(1).min())
    ledger = Ledger(groups, forward.seen + forward.length, tail, shift, moved)
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, PrunedLayer):
            layer.hidden += forward.length - (layer.held - forward.held[number])
            layer.ledger = ledger


def _kept(forward: Forward, first: int) -> Kept:
    level, old = forward.level_at(first), forward.kept_at(first)
    tokens = level.tokens if level is not None else forward.first_tokens
    assert tokens is not None
    B, device = len(tokens.valid), tokens.valid.device
    held = forward.held[0]
    source, valid, columns = old_keys(forward, first, B, device)
    if forward.old_valid is not None:
        valid = valid & forward.old_valid.to(device).expand(B, -1).gather(1, columns)
    index = torch.arange(tokens.valid.shape[1], device=device).expand(B, -1) if level is None else level.index
    valid = torch.cat([valid, tokens.valid], 1)
    separate = level is not None or (old is not None and old.columns is not None)
    return Kept(
        torch.cat([source, tokens.source + forward.seen], 1),
        valid,
        torch.cat([columns, index + held], 1) if separate else None,
        bool(valid.all()),
    )


def old_keys(
    forward: Forward, layer: int, B: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """source, valid and columns, as in `Kept`, of all keys that `layer` held before this call."""
    held, seen, old = forward.held[0] if forward.held else 0, forward.seen, forward.kept_at(layer)
    if old is None or forward.ledger is None:
        every = torch.arange(held, device=device).expand(B, held)
        return every, torch.ones_like(every, dtype=torch.bool), every
    later = torch.arange(forward.ledger.seen, seen, device=device).expand(B, -1)
    source = torch.cat([old.source.to(device), later], 1)
    valid = nn.functional.pad(old.valid.to(device), (0, later.shape[1]), value=True)
    every = torch.arange(held, device=device).expand(B, held)
    if old.columns is None:
        return source, valid, every
    return source, valid, torch.cat([old.columns.to(device), every[:, held - later.shape[1] :]], 1)
