"""A group of frames on its way to the language model: encoded, reduced, and given its places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from mmaccel.core.encoding import encoding_of
from mmaccel.core.layout import Encoded, GridLayout, VisualTokens
from mmaccel.core.rolling import Block
from mmaccel.core.run import opened
from mmaccel.core.stream import Stream, following
from mmaccel.errors import NonFiniteError, StreamError
from mmaccel.method import Method
from mmaccel.reducer import GridReducer
from mmaccel.report import Report
from mmaccel.session.frames import Feeder, Item, Picture

__all__ = ["Group", "Groups", "Place"]


class Place(NamedTuple):
    """Where a group is in its stream: its number, the time since the first, and the clock of the one before it."""

    number: int
    seconds: float
    clock: float


@dataclass(frozen=True, eq=False)
class Group:
    """A group as a block.

    closing: [n, D], what the model puts behind a video. made: tokens before any reduction. counts: for each method that
    reduced them its name, and how many went in and came out.
    """

    block: Block
    closing: torch.Tensor
    made: int
    clock: float
    counts: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, eq=False)
class _Cells:
    """Tokens of one grid: features [M, D], which cells they stand for, and deep-stack features [M, D] of each level."""

    features: torch.Tensor
    cell: torch.Tensor
    deep: list[torch.Tensor]
    shape: tuple[int, int, int]


class Groups:
    """Makes blocks of frames and of text."""

    def __init__(self, site: Any, feeder: Feeder, methods: Sequence[Method], report: Report) -> None:
        self._site, self._feeder, self._report = site, feeder, report
        reducers = [method for method in methods if isinstance(method, GridReducer)]
        self._reducers = [method for method in reducers if not method.neutral]
        self._compact = all(method.positions == "compact" for method in reducers)

    @property
    def _table(self) -> Any:
        return self._site.root.get_input_embeddings()

    def text(self, ids: list[int]) -> Block:
        """Token ids as a block."""
        table = self._table
        return self.plain(table(torch.tensor(ids, dtype=torch.int64, device=table.weight.device)))

    def plain(self, embeds: torch.Tensor) -> Block:
        """Embeddings [n, D] that show nothing, as a block."""
        n, device = len(embeds), embeds.device
        offset = torch.arange(n, device=device).expand(self._site.rotary_axes, n)
        nothing = torch.zeros(n, dtype=torch.bool, device=device)
        return Block(embeds.detach(), offset, n, nothing, torch.zeros(n, device=device))

    @torch.no_grad()
    def group(self, frames: list[tuple[Picture, float]], place: Place, remembered: Stream) -> Group:
        """Encode and reduce one full group; `remembered` is what methods know of the frames before it.

        Raises:
            StreamError: the processor cannot prepare the frames, or does not belong to the model.
            NonFiniteError: NaN or infinity came out of the encoder.
        """
        item = self._feeder.item([picture for picture, _ in frames], [time for _, time in frames])
        with following(remembered), opened(self._site.root):
            output = self._feeder.encode(item.arguments)
            encoded = encoding_of(output)
            if encoded is None:
                encoded = Encoded("video", self._site.bind("video", (), item.arguments), output=output)
            features = torch.cat(tuple(output.pooler_output)).to(self._table.weight.dtype)
            if not bool(torch.isfinite(features).all()):
                raise NonFiniteError("the vision encoder made NaN or infinity of a frame; check its weights and dtype.")
            grid = self._grid(encoded, item, len(features))
            offsets = grid.offsets.to(features.device)
            levels = getattr(output, "deepstack_features", None) or []
            deep = [torch.cat(tuple(level)).to(features.dtype)[offsets] for level in levels]
            every = torch.arange(len(offsets), device=features.device)
            whole = _Cells(features[offsets], every, deep, grid.shape)
            cells, counts = self._reduced(encoded, whole, offsets, place.number)
        clock = self._site.clock(place.number, place.seconds)
        gap = None if clock is None else clock - place.clock
        closing = features[int(offsets[-1]) + 1 :]
        return Group(self._block(item, cells, gap), closing, len(offsets), clock or 0.0, tuple(counts))

    def _grid(self, encoded: Encoded, item: Item, made: int) -> GridLayout:
        room = int(item.placeholders.sum())
        layouts = self._site.layout(encoded, item.placeholders[None])
        if len(layouts) != 1 or len(layouts[0].grids) != 1 or not layouts[0].tokens == made == room:
            raise StreamError(
                f"the processor makes room for {room} tokens, and the encoder makes {made}; this processor does not "
                "belong to this model."
            )
        return layouts[0].grids[0]

    def _reduced(
        self, encoded: Encoded, cells: _Cells, offsets: torch.Tensor, number: int
    ) -> tuple[_Cells, list[tuple[str, int, int]]]:
        counts = []
        for method in self._reducers:
            x, cell, deep = cells.features, cells.cell, cells.deep
            score = None
            if method.needs_scores:
                scores = self._site.token_scores(encoded, self._site.score_kind()).float().to(x.device)
                score = scores[offsets[cell]]
                if not bool(torch.isfinite(score).all()):
                    raise NonFiniteError(f"{method.info.name}: attention scores of a frame are NaN or infinite.")
            seen = VisualTokens(x, cell, cells.shape, score, "video", number, note=self._report.note)
            reduction = method.reduce(seen)
            if reduction is not None:
                deep = [reduction.apply(level) for level in deep]
                cells = _Cells(reduction.apply(x), cell[reduction.index.to(cell.device)], deep, cells.shape)
            counts.append((method.info.name, len(x), len(cells.cell)))
        return cells, counts

    def _block(self, item: Item, cells: _Cells, gap: float | None) -> Block:
        """The tokens of a group and the text around them, such as a time stamp."""
        where = item.placeholders.nonzero().squeeze(1)
        lead, trail = item.ids[: int(where[0])], item.ids[int(where[-1]) + 1 :]
        axes, M, device = self._site.rotary_axes, len(cells.cell), cells.features.device
        _, H, W = cells.shape
        if axes == 1:
            inside = (torch.arange(M, device=device) if self._compact else cells.cell)[None]
            extent = M if self._compact else H * W
        else:
            y, x = cells.cell // W % H, cells.cell % W
            inside = torch.stack([cells.cell // (H * W), y, x])
            extent = max(H, W)
            if self._compact:
                extent = int(torch.maximum(y, x).max()) + 1 if M else 0
        words = torch.arange(len(lead) + len(trail), device=device).expand(axes, -1)
        offset = torch.cat([words[:, : len(lead)], inside + len(lead), words[:, len(lead) :] + extent], 1)
        embeds = torch.cat([self._table(lead), cells.features, self._table(trail)])
        visual = torch.zeros(len(embeds), dtype=torch.bool, device=device)
        visual[len(lead) : len(lead) + M] = True
        salience = torch.zeros(len(embeds), device=device)
        advance = len(lead) + len(trail) + extent
        return Block(embeds, offset, advance, visual, salience, tuple(cells.deep), gap, self._compact)
