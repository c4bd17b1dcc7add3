"""Say what every token of a prompt is: text, padding, or which cell of which image or video."""

from __future__ import annotations

from typing import Any

import torch

from mmaccel.core.forward import Forward, Grid
from mmaccel.core.layout import Encoded, ItemLayout, Site
from mmaccel.errors import NotApplicableError
from mmaccel.tokens.place import TokenMap

__all__ = ["map_tokens"]


def map_tokens(site: Site, forward: Forward, kwargs: dict[str, Any], *, strict: bool = True) -> None:
    """Fill in `forward.tokens` and `forward.grids`; leaves them empty when no token is visual.

    Raises:
        NotApplicableError: encoder and prompt disagree about the number of visual tokens. Without `strict`, when
            nothing will be reduced, that is no error, and they stay empty.
    """
    embeds = kwargs["inputs_embeds"]
    B, S = embeds.shape[:2]
    if not forward.encoded:
        return
    ids, prompt = forward.input_ids, forward.inputs_embeds
    places = site.placeholders(ids, embeds if prompt is None else prompt)
    item = torch.full((B, S), -1, dtype=torch.int64, device=embeds.device)
    grid, cell = item.clone(), item.clone()
    base = 0
    for modality, encoded in forward.encoded.items():
        where = places[modality].to(embeds.device)
        if not bool(where.any()):
            continue
        encoded.prompt = ids if prompt is None else prompt
        items = site.layout(encoded, where)
        if not _write_items(forward, encoded, items, where, base, item, grid, cell, strict):
            forward.grids.clear()
            return
        base += len(items)
    if not forward.grids:
        return
    mask = kwargs.get("attention_mask")
    flat = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
    valid = embeds.new_ones(B, S, dtype=torch.bool) if flat is None else flat[:, -S:].to(embeds.device).bool()
    forward.pad_left = bool(valid[:, -1].all())
    position = kwargs.get("position_ids")
    if position is None:
        position = torch.arange(S, device=embeds.device) + forward.seen
    position = position.expand(*position.shape[:-2], B, S)
    size = torch.ones(B, S, device=embeds.device)
    source = torch.arange(S, device=embeds.device).expand(B, S)
    forward.tokens = forward.first_tokens = TokenMap(item, grid, cell, position, size, valid, source)


def _write_items(
    forward: Forward, encoded: Encoded, items: list[ItemLayout], where: torch.Tensor, base: int,
    item: torch.Tensor, grid: torch.Tensor, cell: torch.Tensor, strict: bool,
) -> bool:  # fmt: skip
    per_row = where.sum(1).tolist()
    total, placed = sum(entry.tokens for entry in items), sum(per_row)
    repeats = placed // total if total else 0
    if repeats == 0 or repeats * total != placed or where.shape[0] % repeats:
        if not strict:
            return False
        raise NotApplicableError(
            f"the prompt holds {placed} {encoded.modality} tokens but the encoder made {total}; a prompt can only be "
            "reduced as a whole (no prefill_chunk_size)."
        )
    # beam search repeats each prompt in consecutive rows, after its images were encoded once
    start, queue = 0, iter(enumerate(items))
    for row in range(0, where.shape[0], repeats):
        rows = range(row, row + repeats)
        places = where[row].nonzero().squeeze(1)
        used = 0
        while used < per_row[row]:
            number, entry = next(queue)
            mine = places[used : used + entry.tokens]
            used += entry.tokens
            item[row : row + repeats, mine] = base + number
            for index, layout in enumerate(entry.grids):
                at = mine[layout.offsets.to(mine.device)]
                grid[row : row + repeats, at] = index
                cell[row : row + repeats, at] = torch.arange(at.numel(), device=at.device)
                span = slice(start, start + entry.tokens)
                forward.grids[base + number, index] = Grid(layout, entry.kind, encoded, span, rows)
            start += entry.tokens
    return True
