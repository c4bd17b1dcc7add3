"""Take visual tokens out of a language model's prefill, and keep every later step right.

Two places: before the first decoder layer, and between two decoder layers. Both go through `tokens.place`. What is
specific to transformers' decoders - which keyword carries what - is in `sequence` and `prefill_layers`. The hooks are
told by a `Site` where things are and know no model.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mmaccel.core.encoding import encoding, encoding_of, note_encoding, record_scores
from mmaccel.core.forward import Calls, Count, Forward, Grid, Reduce, calls_of
from mmaccel.core.layout import Encoded, GridLayout, ItemLayout, Site, VisualTokens
from mmaccel.core.patching import Patcher, shared
from mmaccel.core.prefill_layers import Queries, deepstack, fit_layer, record_attention, reduce_after
from mmaccel.core.probe import probe_attention
from mmaccel.core.prompt import map_tokens
from mmaccel.core.run import current, open_around_forward, open_around_method
from mmaccel.core.sequence import apply, go_on, prepare_cache, settle
from mmaccel.errors import NonFiniteError, NotApplicableError
from mmaccel.tokens.place import Reduction, TokenMap, place

__all__ = ["Encoded", "GridLayout", "ItemLayout", "PrefillHooks", "Site", "VisualTokens", "encoding"]

_BEFORE = "before the language model"


@dataclass(frozen=True, eq=False)
class _Reducer:
    """One method's reduction before the first layer; `order` sorts those of all handles."""

    order: tuple[int, int]
    name: str
    reduce: Reduce | None
    score: str | None
    positions: str
    count: Count
    note: Callable[..., None]


@dataclass
class _Together:
    """The reductions of all handles on a root: they work in the order of the pipeline, whichever was put on first."""

    before: list[_Reducer] = field(default_factory=list)
    inside: list[str] = field(default_factory=list)

    @property
    def active(self) -> str | None:
        """A method that is not switched off, if there is one."""
        return next(iter([*(r.name for r in self.before if r.reduce is not None), *self.inside]), None)


_serial = itertools.count()


class PrefillHooks:
    """The hooks of one handle on one model. Reducers are added before `install`.

    `reduce` is called with the living tokens of one grid (or prompt) and says which survive; None in its place is a
    method whose knobs switch it off: it is only counted.
    """

    def __init__(self, site: Site, patcher: Patcher, count: Count, note: Callable[..., None]) -> None:
        self.site, self.patcher, self.count, self.note = site, patcher, count, note
        self._before: list[_Reducer] = []
        self._inside: list[tuple[str, int, Reduce | None, Queries]] = []
        self._fitting: set[int] = set()

    def reduce_before(
        self,
        name: str,
        reduce: Reduce | None,
        *,
        score: str | None,
        positions: str,
        stage: int,
        count: Count | None = None,
    ) -> None:
        """Reduce each grid before the first decoder layer.

        score: "received" or "cls", which are read at the score layer, None, or scores that the method's own hooks put
        into the encoder call.
        """
        order = (stage, next(_serial))
        self._before.append(_Reducer(order, name, reduce, score, positions, count or self.count, self.note))

    def reduce_inside(self, name: str, layer: int, reduce: Reduce | None, *, queries: Queries = "last") -> None:
        """Reduce each prompt's visual tokens before decoder layer `layer`, by the attention one layer earlier.

        queries: whose attention, that of the last token, or the largest of the text behind the last image or video.
        The rotary table is gathered with the tokens, so positions stay the original ones.

        Raises:
            NotApplicableError: the model has no such layer.
        """
        depth = len(self.site.layers)
        if reduce is None:  # switched off: any place to count at will do
            layer = min(layer, depth - 1)
            if layer < 1:
                return
        if not 1 <= layer < depth:
            raise NotApplicableError(
                f"{name}: layer must be in 1..{depth - 1} for this model of {depth} layers, not {layer}."
            )
        self._inside.append((name, layer, reduce, queries))

    def install(self) -> None:
        """Put all hooks on the model."""
        site, patcher = self.site, self.patcher
        if hasattr(site.target, "generate"):
            open_around_method(patcher, site.target, "generate", site.root)
            patcher.wrap(site.target, "generate", self._refuse_chunks)
        if site.target is not site.root:
            open_around_forward(patcher, site.target, site.root)
            patcher.before(site.target, self._note_arguments)
        open_around_forward(patcher, site.root)
        patcher.before(site.root, self._begin)
        for modality, method in site.encoders.items():
            patcher.wrap(site.root, method, note_encoding(site, modality))
        for kind in sorted({reducer.score for reducer in self._before if reducer.score in ("received", "cls")}):
            probe_attention(patcher, site.score_attention(), record_scores(site, kind))
        together = patcher.share(site.root, _Together)
        for reducer in self._before:
            together.before.append(reducer)
            patcher.on_undo(functools.partial(together.before.remove, reducer))
        patcher.before(site.language_model, self._before_language_model)
        patcher.after(site.language_model, self._after_language_model, always=True)
        for index, layer in enumerate(site.layers):
            patcher.before(layer, fit_layer(site, index, self._fitting))
        for name, layer, reduce, queries in self._inside:
            key = object()
            if reduce is not None:
                probe_attention(patcher, site.decoder_attention(layer - 1), record_attention(site, key, queries))
                together.inside.append(name)
                patcher.on_undo(functools.partial(together.inside.remove, name))
            # ahead of the library's own hooks, which record hidden states: these are then what the next layer gets
            hook = reduce_after(site, name, layer, reduce, key, self.count)
            patcher.after(site.layers[layer - 1], hook, first=True)
        if hasattr(site.language_model, "_deepstack_process"):
            patcher.wrap(site.language_model, "_deepstack_process", deepstack(site))

    def _refuse_chunks(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        # The encoder's count of tokens tells only of chunks that cut the visual ones in two.
        config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        config = config or getattr(self.site.target, "generation_config", None)
        size = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
        together = shared(self.site.root, _Together)
        if size and together is not None and together.active:
            raise NotApplicableError(
                f"{together.active} reduces a prompt as a whole; leave prefill_chunk_size out, or make this call "
                "inside `with handle.paused():`."
            )
        return call(*args, **kwargs)

    def _note_arguments(self, _module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run = current(self.site.root)
        if run is None:
            return
        calls, wanted = run.get(Calls), kwargs.get("logits_to_keep")
        calls.per_token = "labels" if kwargs.get("labels") is not None else None
        if isinstance(wanted, torch.Tensor):
            calls.per_token = "a tensor logits_to_keep"
        # generate asks for the logits of the last token, and of every guess that it has put behind it
        calls.guessed = max(0, wanted - 1) if run.methods and isinstance(wanted, int) else 0

    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls = calls_of(self.site)
        if calls is None:
            return
        forward = calls.forward = Forward(kwargs.get("input_ids", args[0] if args else None))
        forward.inputs_embeds = kwargs.get("inputs_embeds")
        given = kwargs.get("mm_encoder_outputs") or {}
        for modality in self.site.encoders:
            if given.get(modality) is None:
                continue
            # chunked prefill cuts the output into pieces that bear no note
            encoded = encoding_of(given[modality]) or calls.encoded.get(modality)
            if encoded is not None:
                forward.encoded[modality] = encoded
            else:
                forward.foreign = modality

    def _before_language_model(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        calls = calls_of(self.site)
        if calls is None or kwargs.get("inputs_embeds") is None or calls.forward.mapped:
            return None  # called by itself, or the hook of another handle has done the work of all
        forward = calls.forward
        forward.mapped = True
        kwargs = dict(kwargs)
        go_on(forward, kwargs, self.site)
        together = shared(self.site.root, _Together) or _Together()
        if together.inside or (forward.ledger is not None and len(forward.ledger.groups) > 1):
            self._fitting.add(id(forward))
        reducers = sorted(together.before, key=lambda reducer: reducer.order)
        active = together.active
        if forward.foreign and active:
            raise NotApplicableError(
                f"{active} does not know which token shows what, because the {forward.foreign} features were computed "
                "before it was put on; pass pixel values instead of mm_encoder_outputs."
            )
        map_tokens(self.site, forward, kwargs, strict=active is not None)
        if forward.tokens is None:
            fresh = forward.length > 1 and not forward.seen and not forward.encoded and not forward.foreign
            for reducer in reducers if fresh else ():
                reducer.count(reducer.name, _BEFORE, 0, 0)
            return args, kwargs
        if active:
            self._check_finite(active, forward, kwargs["inputs_embeds"])
        if together.inside:
            self._shortens(calls, kwargs)
        for reducer in reducers:
            tokens = forward.tokens
            n = int(tokens.visual.sum())
            found = [] if reducer.reduce is None else self._decide(reducer, forward, kwargs["inputs_embeds"])
            placement = place(tokens, found, pad_left=forward.pad_left) if found else None
            if placement is not None and not placement.identity:
                self._shortens(calls, kwargs)
                apply(forward, kwargs, placement, reducer.positions)
                self._fitting.add(id(forward))
            left = n if forward.tokens is tokens else int(forward.tokens.visual.sum())
            reducer.count(reducer.name, _BEFORE, n, left, forward.tokens)
        return args, kwargs

    def _shortens(self, calls: Calls, kwargs: dict[str, Any]) -> None:
        if calls.per_token is not None:
            raise NotApplicableError(
                f"{calls.per_token} count the prompt's tokens one by one, but the output is shorter than the prompt; "
                "make this call inside `with handle.paused():`."
            )
        prepare_cache(calls.forward, kwargs, self.site)

    @torch.no_grad()
    def _decide(
        self, reducer: _Reducer, forward: Forward, embeds: torch.Tensor
    ) -> list[tuple[int, torch.Tensor, Reduction]]:
        tokens, reduce = forward.tokens, reducer.reduce
        assert tokens is not None
        assert reduce is not None
        found: list[tuple[int, torch.Tensor, Reduction]] = []
        scores: dict[int, torch.Tensor] = {}
        numbers = dict.fromkeys(range(len(tokens.valid)), 0)
        videos = itertools.count()
        for (item, index), grid in forward.grids.items():
            row = grid.rows[0]
            video = next(videos) if grid.kind == "video" else 0
            cells = tokens.cells(row, item, index)
            if cells.numel() == 0:
                continue
            features = embeds[row, cells]
            if reducer.score is not None and id(grid.encoded) not in scores:
                scores[id(grid.encoded)] = self._scores(reducer.name, grid.encoded, reducer.score)
            values = scores.get(id(grid.encoded))
            visual = _visual(tokens, row, cells, features, grid, values, numbers[row], reducer.note, video)
            reduction = reduce(visual)
            for beam in grid.rows:
                numbers[beam] += 1
                if reduction is not None:
                    # beams repeat their row: same features, same decision
                    found.append((beam, cells if beam == row else tokens.cells(beam, item, index), reduction))
        return found

    def _check_finite(self, name: str, forward: Forward, embeds: torch.Tensor) -> None:
        # one pass that propagates NaN and infinity; where it only overflowed, the passes below find nothing
        if bool(torch.isfinite(embeds.sum(dtype=torch.float32))):
            return
        assert forward.tokens is not None
        for (item, index), grid in forward.grids.items():
            row = grid.rows[0]
            if not bool(torch.isfinite(embeds[row, forward.tokens.cells(row, item, index)]).all()):
                tower, projector = self.site.module_paths()
                raise NonFiniteError(
                    f"{name}: {projector if grid.encoded.finite else tower} produced NaN or infinity; check its "
                    "weights, dtype and input."
                )

    def _scores(self, name: str, encoded: Encoded, kind: str) -> torch.Tensor:
        if not encoded.scores.get(kind):
            raise NotApplicableError(
                f"{name} needs the vision encoder's attention, but its score layer did not run in this call; pass "
                "pixel values."
            )
        scores = self.site.token_scores(encoded, kind).float()
        if not bool(torch.isfinite(scores).all()):
            raise NonFiniteError(f"{name}: attention scores of {self.site.module_paths()[0]} are NaN or infinite.")
        return scores

    def _after_language_model(self, _module: nn.Module, _args: Any, _kwargs: Any, output: Any = None) -> None:
        calls = calls_of(self.site)
        forward = calls.forward if calls is not None else None
        self._fitting.discard(id(forward))
        if forward is None or forward.settled:
            return
        forward.settled = True
        if forward.ledger is not None:
            forward.ledger.served = False
        if output is not None:
            settle(forward)


def _visual(
    tokens: TokenMap, row: int, cells: torch.Tensor, features: torch.Tensor, grid: Grid, scores: torch.Tensor | None,
    number: int, note: Callable[..., None], video: int,
) -> VisualTokens:  # fmt: skip
    cell = tokens.cell[row, cells]
    if scores is not None:
        scores = scores.to(cell.device)[grid.span][grid.layout.offsets.to(cell.device)[cell]]
    contiguous = int(cells[-1] - cells[0]) == cells.numel() - 1
    merged = grid.encoded.merged[video] if grid.encoded.merged is not None and grid.kind == "video" else None
    return VisualTokens(features, cell, grid.layout.shape, scores, grid.kind, number, contiguous, note, video, merged)
