"""Place: put a reduced set of tokens back into the sequence, with right positions, masks and per-token features.

`Reduction` is what a method decides about one grid of visual tokens; `TokenMap` says what every token of a batch of
sequences is; `Placement` is the one object that carries hidden states, rotary tables, position ids, 2-D and 4-D masks
and every other per-token tensor from the old sequence to the new one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from mmaccel.kernels.gather_compact import gather_compact
from mmaccel.kernels.scatter_merge import scatter_merge

__all__ = ["TEXT", "Mix", "Placement", "Reduction", "TokenMap", "compact_positions", "place"]

TEXT = -1


@dataclass(frozen=True)
class Mix:
    """A sparse linear map from tokens to tokens: `out[rows[i]] += weights[i] * x[cols[i]]`, out rows listed in `rows`.

    rows, cols: int64 [n]; weights: float32 [n]. Rows that do not occur are left as they are.
    """

    rows: torch.Tensor
    cols: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class Reduction:
    """Which of N tokens survive, in output order, and what is merged into them.

    index: int64 [M], the surviving tokens (distinct). mix: what replaces their values, rows counted in 0..M-1 and
    columns in 0..N-1; None when tokens are only dropped.
    """

    index: torch.Tensor
    mix: Mix | None = None

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """The reduced tokens: x [N, D] -> [M, D], summed in float32 or wider, in the dtype of x."""
        return _mixed(x[self.index], x, self.mix)


@dataclass(frozen=True)
class TokenMap:
    """What every token of a batch of sequences is. All tensors are [B, S] but `position`, which may be [P, B, S].

    item: index of the image or video that the token belongs to, -1 for text. grid: which grid of the item, -1 for
    text. cell: raster index in that grid, -1 for structure tokens (newlines) and text. position: the ids that the
    rotary embedding gets. size: number of original tokens merged into this one. valid: False for padding.
    source: index in the original sequence.
    """

    item: torch.Tensor
    grid: torch.Tensor
    cell: torch.Tensor
    position: torch.Tensor
    size: torch.Tensor
    valid: torch.Tensor
    source: torch.Tensor

    @property
    def visual(self) -> torch.Tensor:
        """bool [B, S], True where a token shows a part of an image or video (newlines excluded)."""
        return (self.cell >= 0) & self.valid

    def cells(self, row: int, item: int, grid: int) -> torch.Tensor:
        """int64 [n]: where in row `row` the living tokens of one grid stand, in sequence order."""
        mine = (self.item[row] == item) & (self.grid[row] == grid) & (self.cell[row] >= 0) & self.valid[row]
        return mine.nonzero().squeeze(1)

    def at(self, placement: Placement) -> TokenMap:
        """The map of the reduced sequence."""
        return placement.carry(self)[0]


@dataclass(frozen=True)
class Placement:
    """How each row of a new sequence of length L is made from the old one of length S.

    index: int64 [B, L], the old place of each new token. valid: bool [B, L], False for padding that only fills the
    batch up. mixes: for a row, what replaces the values of its merged tokens (rows in 0..L-1, columns in 0..S-1).
    """

    index: torch.Tensor
    valid: torch.Tensor
    mixes: dict[int, Mix] = field(default_factory=dict)
    length: int = 0

    @property
    def identity(self) -> bool:
        """Whether nothing is dropped, merged or moved."""
        L = self.index.shape[1]
        same = self.length == L and not self.mixes and bool(self.valid.all())
        return same and bool((self.index == torch.arange(L, device=self.index.device)).all())

    def along(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Gather the sequence dimension `dim` of x: [B, ..., S, ...] or, with dim == -1, [..., B, S]."""
        if dim == -1:
            return self.together(columns=[x])[0]
        if dim == 1:
            return self.together(rows=[x])[0]
        index = self.index.to(x.device)
        if x.shape[0] != index.shape[0]:
            x = x.expand(index.shape[0], *x.shape[1:])
        shape = [1] * x.dim()
        shape[0], shape[dim] = index.shape
        target = list(x.shape)
        target[dim] = index.shape[1]
        return x.gather(dim, index.view(shape).expand(target))

    def together(
        self, *, rows: Sequence[torch.Tensor] = (), columns: Sequence[torch.Tensor] = ()
    ) -> tuple[torch.Tensor, ...]:
        """Gather several tensors at once: rows are [B, S, ...], columns [..., B, S]; the results in that order."""
        devices = {x.device for x in (*rows, *columns)}
        if len(devices) != 1:
            return *(self.along(x, 1) for x in rows), *(self.along(x, -1) for x in columns)
        return gather_compact(self.index.to(devices.pop()), rows=rows, columns=columns)

    def values(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, S, D] -> [B, L, D]: gathered, and mixed where tokens were merged."""
        return self._merged(self.along(x, 1), x)

    def carry(self, tokens: TokenMap, *hidden: torch.Tensor) -> tuple[TokenMap, tuple[torch.Tensor, ...]]:
        """The map of the reduced sequence, and any hidden states [B, S, D] as `values` gives them, moved together."""
        names = ("item", "grid", "cell", "position", "source", "size")
        moved = self.together(rows=hidden, columns=[getattr(tokens, name) for name in names])
        columns = dict(zip(names, moved[len(hidden) :], strict=True))
        for row, mix in self.mixes.items():
            columns["size"][row, mix.rows] = 0
            columns["size"][row].index_add_(0, mix.rows, tokens.size[row, mix.cols])
        values = tuple(self._merged(out, x) for out, x in zip(moved, hidden, strict=False))
        return replace(tokens, **columns, valid=self.valid), values

    def _merged(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """`out`, gathered from x, with the merged tokens of all items mixed in at once."""
        mixes = [(row, mix) for row, mix in self.mixes.items() if mix.rows.numel()]
        if not mixes:
            return out
        L, S = out.shape[1], x.shape[1]
        every = Mix(
            torch.cat([mix.rows + row * L for row, mix in mixes]),
            torch.cat([mix.cols + row * S for row, mix in mixes]),
            torch.cat([mix.weights for _, mix in mixes]),
        )
        return _mixed(out.flatten(0, 1), x.flatten(0, 1), every).view_as(out)

    def columns(self, held: int) -> torch.Tensor:
        """int64 [B, held + L]: where each key stands when `held` older keys precede the old sequence."""
        old = torch.arange(held, device=self.index.device).expand(self.index.shape[0], held)
        return torch.cat([old, self.index + held], dim=1)

    def mask(self, mask: torch.Tensor, held: int) -> torch.Tensor:
        """A 4-D mask [B, h, S, held + S], boolean or additive, -> [B, h, L, held + L]; padding is seen by nobody."""
        mask = mask.expand(self.index.shape[0], *mask.shape[1:])
        rows = self.along(mask, 2)
        columns = self.columns(held).to(mask.device)
        rows = rows.gather(3, columns[:, None, None, :].expand(*rows.shape[:3], columns.shape[1]))
        seen = torch.cat([self.valid.new_ones(self.valid.shape[0], held), self.valid], dim=1).to(mask.device)
        never = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return rows.masked_fill(~seen[:, None, None, :], never)


def _mixed(kept: torch.Tensor, x: torch.Tensor, mix: Mix | None) -> torch.Tensor:
    if mix is None or mix.rows.numel() == 0:
        return kept
    rows = mix.rows.to(x.device)
    tokens, weights = x.index_select(0, mix.cols.to(x.device)), mix.weights.to(x.device)
    merged = scatter_merge(tokens[None], rows[None], weights[None], len(kept))[0]
    replaced = torch.zeros(len(kept), dtype=torch.bool, device=x.device).index_fill_(0, rows, True)
    return torch.where(replaced[:, None], merged, kept)


def place(
    tokens: TokenMap, reductions: list[tuple[int, torch.Tensor, Reduction]], *, pad_left: bool = True
) -> Placement:
    """Combine the reductions of groups of tokens to one placement of the whole batch.

    Args:
        tokens: the map of the present sequence.
        reductions: (row, cells, reduction): in row `row` the tokens at the places `cells` (int64 [N], ascending,
            groups disjoint) are reduced as `reduction` says, whose indices count within `cells`.
        pad_left: where rows that keep fewer tokens than others are filled up.

    All other valid tokens stay. The survivors of a group take the places of the surviving tokens in sequence order,
    so a reduction may also reorder. Padding that no row needs any more is dropped.
    """
    B, S = tokens.valid.shape
    device = tokens.valid.device
    kept_rows: list[torch.Tensor] = []
    mixes: dict[int, Mix] = {}
    for row in range(B):
        taken = tokens.valid[row].clone()
        order = torch.arange(S, device=device)
        mixed: list[tuple[torch.Tensor, torch.Tensor, Mix]] = []
        for owner, cells, reduction in reductions:
            if owner != row:
                continue
            survivors = cells[reduction.index.to(device)]
            slots = survivors.sort().values
            taken[cells] = False
            taken[slots] = True
            order[slots] = survivors
            if reduction.mix is not None and reduction.mix.rows.numel():
                mixed.append((slots, cells, reduction.mix))
        slots = taken.nonzero().squeeze(1)
        kept_rows.append(order[slots])
        if mixed:
            new_place = torch.full((S,), -1, dtype=torch.int64, device=device)
            new_place[slots] = torch.arange(slots.numel(), device=device)
            parts = [(new_place[s[m.rows.to(device)]], c[m.cols.to(device)], m.weights.to(device)) for s, c, m in mixed]
            mixes[row] = Mix(*(torch.cat([part[i] for part in parts]) for i in range(3)))
    L = max(kept.numel() for kept in kept_rows)
    index = torch.zeros(B, L, dtype=torch.int64, device=device)
    valid = torch.zeros(B, L, dtype=torch.bool, device=device)
    for row, kept in enumerate(kept_rows):
        start = L - kept.numel() if pad_left else 0
        index[row, start : start + kept.numel()] = kept
        valid[row, start : start + kept.numel()] = True
        if row in mixes and start:
            mixes[row] = replace(mixes[row], rows=mixes[row].rows + start)
    return Placement(index, valid, mixes, length=S)


def compact_positions(tokens: TokenMap, placement: Placement) -> tuple[torch.Tensor, torch.Tensor]:
    """Renumber the positions so that the gaps left by dropped visual tokens close.

    One-dimensional ids become consecutive. Multi-axis ids ([P, B, S], M-RoPE): a run is an unbroken stretch of tokens
    of one image or video (a whole item, or one frame of it where time stamps stand between the frames). Inside a run
    every survivor keeps its (t, y, x) offset; what follows moves up by as much as the largest y or x that survives in
    the run is smaller than before, and by the whole extent of a run of which nothing is left. That is the library's
    rule that a run takes max(height, width) positions, applied to what is left (inferred; EVS shifts the text behind a
    pruned video likewise).

    Returns:
        position ids of the new sequence, like `tokens.position` with length L, and int64 [B], by how much the
        position after the last token is smaller than before.
    """
    if tokens.position.dim() == 2:
        return _consecutive(tokens, placement)
    return _moved_up(tokens, placement)


def _consecutive(tokens: TokenMap, placement: Placement) -> tuple[torch.Tensor, torch.Tensor]:
    far = torch.iinfo(torch.int64).max
    first = tokens.position.masked_fill(~tokens.valid, far).amin(1, keepdim=True)
    last = tokens.position.masked_fill(~tokens.valid, -far).amax(1, keepdim=True)
    order = placement.valid.cumsum(1) - 1
    positions = (first + order).masked_fill(~placement.valid, 0)
    return positions, (last - first - order[:, -1:]).squeeze(1)


def _moved_up(tokens: TokenMap, placement: Placement) -> tuple[torch.Tensor, torch.Tensor]:
    visual = (tokens.item != TEXT) & tokens.valid
    begins = visual.clone()
    begins[:, 1:] &= ~visual[:, :-1] | (tokens.item[:, 1:] != tokens.item[:, :-1])
    number = begins.cumsum(1)  # runs begun so far, so that run 0 stands for "before any"
    run = number * visual
    alive = torch.zeros_like(number).scatter_add_(1, placement.index, placement.valid.long()) > 0

    # with four axes the first one counts text tokens; the last two are y and x
    high, low = tokens.position[-2:].amax(0), tokens.position[-2:].amin(0)
    slots = torch.zeros(len(run), run.shape[1] + 1, dtype=high.dtype, device=high.device)
    top = slots.scatter_reduce(1, run, high, "amax", include_self=False)
    none_left = slots.scatter_reduce(1, run, low, "amin", include_self=False) - 1
    survivors = torch.where(alive, high, none_left.gather(1, run))
    moved = top - slots.scatter_reduce(1, run, survivors, "amax", include_self=False)
    moved[:, 0] = 0
    moved = moved.cumsum(1)

    positions = tokens.position.clone()
    positions[-3:] -= moved.gather(1, number - visual.long())
    return placement.along(positions, -1), moved[:, -1]
