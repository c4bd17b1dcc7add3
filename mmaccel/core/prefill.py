"""Take visual tokens out of a language model's prefill, and keep every later step right.

Two places: before the first decoder layer, and between two decoder layers. Both go through `tokens.place`; what is
specific to transformers' decoders - which keyword carries what - is here and nowhere else. The module is told by a
`Site` where things are and knows no model.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import nn

from mmaccel.core.cache import PrunedLayer, first_pruned, pruned_cache
from mmaccel.core.patching import Patcher
from mmaccel.core.probe import probe_attention
from mmaccel.core.run import Run, current, open_around_forward, open_around_method
from mmaccel.errors import NonFiniteError, NotApplicableError
from mmaccel.kernels.attention_received import attention_received
from mmaccel.tokens.place import Mix, Placement, Reduction, TokenMap, compact_positions, place

__all__ = ["Encoded", "GridLayout", "ItemLayout", "PrefillHooks", "Site", "VisualTokens"]


@dataclass(frozen=True)
class GridLayout:
    """A grid of visual tokens: `offsets` int64 [T * H * W], where each cell, in raster order, is in its item's run."""

    shape: tuple[int, int, int]
    offsets: torch.Tensor


@dataclass(frozen=True)
class ItemLayout:
    """One image or video as the language model sees it: `tokens` placeholders, some of them cells of `grids`."""

    kind: str
    tokens: int
    grids: tuple[GridLayout, ...]


@dataclass
class Encoded:
    """One call of a vision encoder: its arguments, and the raw attention scores of the score layer, by kind."""

    modality: str
    arguments: dict[str, Any]
    output: Any = None
    scores: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    recorders: dict[str, object] = field(default_factory=dict)
    thinned: list[Any] = field(default_factory=list)
    finite: bool = True


class Site(Protocol):
    """Where things are in a model; adapters implement it."""

    target: nn.Module
    root: nn.Module
    language_model: nn.Module
    encoders: dict[str, str]

    @property
    def layers(self) -> Any:
        """The decoder layers."""
        ...

    def decoder_attention(self, layer: int) -> nn.Module:
        """The attention module of one decoder layer."""
        ...

    def score_attention(self) -> nn.Module:
        """The attention module of the vision layer whose output the language model gets."""
        ...

    def bind(self, modality: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of an encoder call by name."""
        ...

    def placeholders(self, input_ids: torch.Tensor | None, embeds: torch.Tensor) -> dict[str, torch.Tensor]:
        """bool [B, S] by modality: where the visual tokens stand."""
        ...

    def layout(self, encoded: Encoded, where: torch.Tensor) -> list[ItemLayout]:
        """The items of one encoder call, in the order of their features."""
        ...

    def token_scores(self, encoded: Encoded, kind: str) -> torch.Tensor:
        """float32 [tokens of all items]: the raw scores brought to the language model's tokens."""
        ...

    def module_paths(self) -> tuple[str, str]:
        """The names of the vision tower and of the projector, for messages."""
        ...


@dataclass(frozen=True)
class VisualTokens:
    """What a method sees: N living visual tokens of one grid, or of a whole prompt.

    features: [N, D]. cell: int64 [N], raster index t * H * W + y * W + x. shape: (T, H, W), (0, 0, 0) for a prompt.
    score: float32 [N] or None. kind: "image", "video" or "prompt". number: which of the prompt's grids this is.
    """

    features: torch.Tensor
    cell: torch.Tensor
    shape: tuple[int, int, int]
    score: torch.Tensor | None
    kind: str
    number: int
    contiguous: bool = True

    def __len__(self) -> int:
        return self.features.shape[0]

    @property
    def time(self) -> torch.Tensor:
        """int64 [N]: the frame of each token."""
        return self.cell // max(1, self.shape[1] * self.shape[2])

    def frames(self) -> tuple[int, int]:
        """(frames, tokens per frame) of the living tokens.

        Raises:
            NotApplicableError: an earlier method has left frames of different sizes.
        """
        _, counts = self.time.unique_consecutive(return_counts=True)
        if len(counts) == 0 or bool((counts != counts[0]).any()):
            raise NotApplicableError(
                "frames hold different numbers of tokens; put this method before the one that drops."
            )
        return len(counts), int(counts[0])


Reduce = Callable[[VisualTokens], "Reduction | None"]
Count = Callable[..., None]

_BEFORE = "before the language model"


@dataclass(frozen=True, eq=False)
class _Reducer:
    """One method's reduction before the first layer; `order` sorts those of all handles."""

    order: tuple[int, int]
    name: str
    reduce: Reduce
    score: str | None
    positions: str
    count: Count


# Of all handles on a root: they work in the order of the pipeline, whichever was put on or resumed first.
_reducers: weakref.WeakKeyDictionary[nn.Module, list[_Reducer]] = weakref.WeakKeyDictionary()
_serial = itertools.count()


@dataclass
class _Forward:
    """What is known of the forward that is running: reset at the start of each."""

    input_ids: torch.Tensor | None = None
    encoded: dict[str, Encoded] = field(default_factory=dict)
    tokens: TokenMap | None = None
    grids: dict[tuple[int, int], tuple[GridLayout, str, Encoded, slice]] = field(default_factory=dict)
    mapped: bool = False
    settled: bool = False
    pad_left: bool = True
    length: int = 0
    held: int = 0
    hidden: int = 0
    before: dict[int, int] = field(default_factory=dict)
    old_valid: torch.Tensor | None = None
    cache: Any = None
    deepstack: bool = False
    levels: list[tuple[int, Placement]] = field(default_factory=list)
    converted: set[int] = field(default_factory=set)
    shared: dict[Any, Any] = field(default_factory=dict)
    inner_scores: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass
class _Calls:
    """What a run remembers over its forwards: generate encodes first and calls the model later."""

    encoded: dict[str, Encoded] = field(default_factory=dict)
    encoding: Encoded | None = None
    forward: _Forward = field(default_factory=_Forward)


class PrefillHooks:
    """The hooks of one handle on one model. Reducers are added before `install`."""

    def __init__(self, site: Site, patcher: Patcher, count: Count) -> None:
        self.site, self.patcher, self.count = site, patcher, count
        self._before: list[_Reducer] = []
        self._inside: list[tuple[str, int, Reduce]] = []

    def reduce_before(
        self, name: str, reduce: Reduce, *, score: str | None, positions: str, stage: int, count: Count | None = None
    ) -> None:
        """Reduce each grid before the first decoder layer; `score` is "received", "cls" or None."""
        order = (stage, next(_serial))
        self._before.append(_Reducer(order, name, reduce, score, positions, count or self.count))

    def reduce_inside(self, name: str, layer: int, reduce: Reduce) -> None:
        """Reduce each prompt's visual tokens before decoder layer `layer`, by the last token's attention one earlier.

        The rotary table is gathered with the tokens, so positions stay the original ones.

        Raises:
            NotApplicableError: the model has no such layer.
        """
        depth = len(self.site.layers)
        if not 1 <= layer < depth:
            raise NotApplicableError(
                f"{name}: layer must be in 1..{depth - 1} for this model of {depth} layers, not {layer}."
            )
        self._inside.append((name, layer, reduce))

    def install(self) -> None:
        """Put all hooks on the model."""
        site, patcher = self.site, self.patcher
        if hasattr(site.target, "generate"):
            open_around_method(patcher, site.target, "generate", site.root)
        open_around_forward(patcher, site.root)
        patcher.before(site.root, self._begin)
        for modality, method in site.encoders.items():
            patcher.wrap(site.root, method, _encode(site, modality))
        kinds = {reducer.score for reducer in self._before if reducer.score}
        for kind in sorted(kinds):
            probe_attention(patcher, site.score_attention(), _record_scores(site, kind))
        here = _reducers.setdefault(site.root, [])
        for reducer in self._before:
            here.append(reducer)
            patcher.on_undo(functools.partial(here.remove, reducer))
        patcher.before(site.language_model, self._before_language_model)
        patcher.after(site.language_model, self._after_language_model)
        for index, layer in enumerate(site.layers):
            patcher.before(layer, _before_layer(site, index))
        for number, (name, layer, reduce) in enumerate(self._inside):
            key = id(self) + number
            probe_attention(patcher, site.decoder_attention(layer - 1), _record_last_token(site, key))
            patcher.after(site.layers[layer - 1], self._after_layer(name, layer, reduce, key))
        if hasattr(site.language_model, "_deepstack_process"):
            patcher.wrap(site.language_model, "_deepstack_process", _deepstack(site))

    # -- before the first layer -----------------------------------------------------------------------------------

    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls = _calls(self.site)
        if calls is None:
            return
        calls.forward = _Forward(input_ids=kwargs.get("input_ids", args[0] if args else None))
        given = kwargs.get("mm_encoder_outputs") or {}
        for modality in self.site.encoders:
            if given.get(modality) is not None:
                encoded = getattr(given[modality], "_mmaccel_encoded", None) or calls.encoded.get(modality)
                if encoded is not None:
                    calls.forward.encoded[modality] = encoded

    def _before_language_model(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        calls = _calls(self.site)
        embeds = kwargs.get("inputs_embeds")
        if calls is None or embeds is None or calls.forward.mapped:
            return None  # called by itself, or the hook of another handle has done the work of all
        forward = calls.forward
        forward.mapped = True
        kwargs = dict(kwargs)
        _continue(forward, kwargs)
        _map_tokens(self.site, forward, kwargs)
        reducers = sorted(_reducers.get(self.site.root, ()), key=lambda reducer: reducer.order)
        if forward.tokens is None:
            for reducer in reducers if embeds.shape[1] > 1 else ():
                reducer.count(reducer.name, _BEFORE, 0, 0)
            return args, kwargs
        _prepare_cache(forward, kwargs, self.site)
        for reducer in reducers:
            reductions = self._grid_reductions(reducer, forward, kwargs["inputs_embeds"])
            placement = place(forward.tokens, reductions, pad_left=forward.pad_left)
            counts = _counts(forward.tokens, placement)
            if reductions and not placement.identity:
                _apply_before(forward, kwargs, placement, reducer.positions)
            reducer.count(reducer.name, _BEFORE, *counts, forward.tokens)
        return args, kwargs

    def _grid_reductions(
        self, reducer: _Reducer, forward: _Forward, embeds: torch.Tensor
    ) -> list[tuple[int, torch.Tensor, Reduction]]:
        tokens, name, score = forward.tokens, reducer.name, reducer.score
        assert tokens is not None
        found: list[tuple[int, torch.Tensor, Reduction]] = []
        token_scores: dict[tuple[int, str], torch.Tensor] = {}
        done: dict[tuple[int, int], Reduction | None] = {}
        for row in range(tokens.valid.shape[0]):
            number = 0
            for (item, grid), (layout, kind, encoded, span) in forward.grids.items():
                cells = tokens.cells(row, item, grid)
                if cells.numel() == 0:
                    continue
                features = embeds[row, cells]
                if not bool(torch.isfinite(features).all()):
                    tower, projector = self.site.module_paths()
                    source = projector if encoded.finite else tower
                    raise NonFiniteError(
                        f"{name}: {source} produced NaN or infinity; check its weights, dtype and input."
                    )
                cell = tokens.cell[row, cells]
                values = None
                if score is not None:
                    key = (id(encoded), score)
                    if key not in token_scores:
                        token_scores[key] = self._scores(name, encoded, score)
                    offsets = layout.offsets.to(cell.device)[cell]
                    values = token_scores[key].to(cell.device)[span][offsets]
                contiguous = bool((cells[1:] - cells[:-1] == 1).all()) if cells.numel() > 1 else True
                visual = VisualTokens(features, cell, layout.shape, values, kind, number, contiguous)
                number += 1
                # beams repeat their row: same features, same decision
                repeated = (item, grid) if (item, grid) in done and _is_repeat(found, row, cells) else None
                reduction = done[item, grid] if repeated else reducer.reduce(visual)
                done[item, grid] = reduction
                if reduction is not None:
                    found.append((row, cells, reduction))
        return found

    def _scores(self, name: str, encoded: Encoded, kind: str) -> torch.Tensor:
        if not encoded.scores.get(kind):
            raise NotApplicableError(
                f"{name} needs the vision encoder's attention, but the features were computed outside of the accelerated "
                "call; pass pixel values instead of mm_encoder_outputs."
            )
        scores = self.site.token_scores(encoded, kind).float()
        if not bool(torch.isfinite(scores).all()):
            raise NonFiniteError(f"{name}: attention scores of {self.site.module_paths()[0]} are NaN or infinite.")
        return scores

    def _after_language_model(self, _module: nn.Module, _args: Any, _kwargs: Any, _output: Any) -> None:
        calls = _calls(self.site)
        if calls is None or calls.forward.settled:
            return
        calls.forward.settled = True
        _settle_cache(calls.forward)

    # -- between layers -------------------------------------------------------------------------------------------

    def _after_layer(self, name: str, layer: int, reduce: Reduce, key: int) -> Callable[..., Any]:
        def hook(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
            calls = _calls(self.site)
            if calls is None:
                return None
            forward = calls.forward
            tokens = forward.tokens
            if tokens is None:
                if forward.length > 1:
                    self.count(name, f"layer {layer}", 0, 0)
                return None
            hidden = output[0] if isinstance(output, tuple) else output
            scores = forward.inner_scores[key]
            reductions = []
            for row in range(tokens.valid.shape[0]):
                cells = tokens.visual[row].nonzero().squeeze(1)
                if cells.numel() == 0:
                    continue
                visual = VisualTokens(
                    hidden[row, cells], torch.arange(cells.numel(), device=cells.device), (0, 0, 0),
                    scores[row].to(cells.device)[cells], "prompt", row,
                )  # fmt: skip
                reduction = reduce(visual)
                if reduction is not None:
                    reductions.append((row, cells, reduction))
            placement = place(tokens, reductions, pad_left=forward.pad_left)
            counts = _counts(tokens, placement)
            if not reductions or placement.identity:
                self.count(name, f"layer {layer}", *counts, tokens)
                return None
            forward.levels.append((layer, placement))
            forward.tokens = tokens.at(placement)
            self.count(name, f"layer {layer}", *counts, forward.tokens)
            hidden = placement.values(hidden)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook


# -- pieces ---------------------------------------------------------------------------------------------------------


def _calls(site: Site) -> _Calls | None:
    run: Run | None = current(site.root)
    return run.get(_Calls) if run is not None else None


def _encode(site: Site, modality: str) -> Callable[..., Any]:
    def around(call: Any, *args: Any, **kwargs: Any) -> Any:
        run = current(site.root)
        if run is None:
            return call(*args, **kwargs)
        calls = run.get(_Calls)
        if calls.encoding is not None:  # another handle of ours is already recording this call
            return call(*args, **kwargs)
        calls.encoding = Encoded(modality, site.bind(modality, args, kwargs))
        try:
            output = call(*args, **kwargs)
            calls.encoding.output = output
            last = getattr(output, "last_hidden_state", None)
            calls.encoding.finite = last is None or bool(torch.isfinite(last).all())
            calls.encoded[modality] = calls.forward.encoded[modality] = calls.encoding
            if hasattr(output, "__dict__"):
                object.__setattr__(output, "_mmaccel_encoded", calls.encoding)
            return output
        finally:
            calls.encoding = None

    return around


def _record_scores(site: Site, kind: str) -> Callable[..., None]:
    recorder = object()

    def listen(query: torch.Tensor, key: torch.Tensor, _mask: Any, call: dict[str, Any]) -> None:
        calls = _calls(site)
        if calls is None or calls.encoding is None:
            return
        if calls.encoding.recorders.setdefault(kind, recorder) is not recorder:
            return  # another handle records the same scores
        chosen: Any = "all" if kind == "received" else (0, 1)
        lengths = call.get("cu_seq_lens_q")
        parts = [(query, key)]
        if lengths is not None:
            sizes = (lengths[1:] - lengths[:-1]).tolist()
            parts = list(zip(query.split(sizes, 2), key.split(sizes, 2), strict=True))
        for q, k in parts:
            received = attention_received(q, k, queries=chosen, scale=call.get("scaling"))
            recorded = calls.encoding.scores.setdefault(kind, [])
            recorded.append(received)

    return listen


def _record_last_token(site: Site, key: int) -> Callable[..., None]:
    def listen(query: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None, call: dict[str, Any]) -> None:
        calls = _calls(site)
        if calls is None or calls.forward.tokens is None:
            return
        valid = calls.forward.tokens.valid
        S = valid.shape[1]
        last = S - 1 - valid.flip(1).int().argmax(1)
        rows = torch.arange(len(last), device=query.device)
        row_query = query[rows, :, last.to(query.device)].unsqueeze(2)
        visible = torch.ones(keys.shape[0], keys.shape[2], dtype=torch.bool, device=keys.device)
        visible[:, -S:] &= valid.to(keys.device)
        visible[:, -S:] &= torch.arange(S, device=keys.device) <= last.to(keys.device)[:, None]
        if mask is not None and mask.dim() == 4:
            seen = mask[rows, 0, last.to(mask.device)] if mask.shape[0] > 1 else mask[0, 0, last.to(mask.device)]
            visible &= seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
        received = attention_received(row_query, keys, key_padding=visible, scale=call.get("scaling"))
        calls.forward.inner_scores[key] = received[:, -S:]

    return listen


def _counts(tokens: TokenMap, placement: Placement) -> tuple[int, int]:
    cell = placement.along(tokens.cell, -1)
    return int(tokens.visual.sum()), int(((cell >= 0) & placement.valid).sum())


def _is_repeat(found: list[tuple[int, torch.Tensor, Reduction]], row: int, cells: torch.Tensor) -> bool:
    return any(owner == row - 1 and torch.equal(before, cells) for owner, before, _ in found)


def _continue(forward: _Forward, kwargs: dict[str, Any]) -> bool:
    """Bring mask and positions of a call that goes on with a shortened cache in line with what the cache holds."""
    embeds, cache = kwargs["inputs_embeds"], kwargs.get("past_key_values")
    B, S = embeds.shape[:2]
    forward.length = S
    first = first_pruned(cache)
    if first is None:
        return False
    forward.cache = cache
    forward.held, forward.hidden = first.held, first.hidden
    forward.before = {index: layer.held for index, layer in enumerate(cache.layers)}
    mask = kwargs.get("attention_mask")
    if isinstance(mask, dict) or (mask is not None and mask.dim() == 4):
        raise NotApplicableError(
            "the cache holds a reduced prompt, so a 4-D mask cannot fit it; pass a 2-D attention_mask."
        )
    new = embeds.new_ones(B, S, dtype=torch.bool) if mask is None else mask[:, -S:].bool()
    forward.old_valid = _extended(first.valid, B, first.held, embeds.device)
    kwargs["attention_mask"] = _mask_2d(forward, torch.cat([forward.old_valid, new], 1))
    first.valid = torch.cat([forward.old_valid, new], 1)
    if first.shift is not None and bool(first.shift.any()):
        position = kwargs.get("position_ids")
        if position is None:
            start = first.get_seq_length()
            position = torch.arange(start, start + S, device=embeds.device).expand(B, S)
        position = position.clone()
        part = position if position.dim() == 2 else position[-3:]
        part -= first.shift.to(position.device)[:, None]
        kwargs["position_ids"] = position
    return True


def _extended(valid: torch.Tensor | None, batch: int, held: int, device: torch.device) -> torch.Tensor:
    if valid is None:
        return torch.ones(batch, held, dtype=torch.bool, device=device)
    missing = held - valid.shape[1]
    return nn.functional.pad(valid, (0, missing), value=True) if missing else valid


def _mask_2d(forward: _Forward, valid: torch.Tensor) -> torch.Tensor:
    # transformers looks columns up by the index in the sequence that was seen, so the hidden ones stand in front
    return nn.functional.pad(valid, (forward.hidden, 0), value=True).long()


def _map_tokens(site: Site, forward: _Forward, kwargs: dict[str, Any]) -> None:
    """Say what every token of this call is; leaves `forward.tokens` None when none is visual."""
    embeds = kwargs["inputs_embeds"]
    B, S = embeds.shape[:2]
    if S == 1 or not forward.encoded:
        return
    ids = forward.input_ids
    if ids is not None and ids.shape[:2] != embeds.shape[:2]:
        return
    places = site.placeholders(ids, embeds)
    item = torch.full((B, S), -1, dtype=torch.int64, device=embeds.device)
    grid, cell = item.clone(), item.clone()
    base = 0
    for modality, encoded in forward.encoded.items():
        where = places[modality].to(embeds.device)
        if not bool(where.any()):
            continue
        items = site.layout(encoded, where)
        _write_items(forward, encoded, items, where, base, item, grid, cell)
        base += len(items)
    if not forward.grids:
        return
    mask = kwargs.get("attention_mask")
    flat = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
    valid = embeds.new_ones(B, S, dtype=torch.bool) if flat is None else flat[:, -S:].bool()
    forward.pad_left = bool(valid[:, -1].all())
    position = kwargs.get("position_ids")
    if position is None:
        position = torch.arange(S, device=embeds.device) + forward.held + forward.hidden
        cache = kwargs.get("past_key_values")
        if cache is not None and forward.cache is None:
            position = position + cache.get_seq_length()
        position = position.expand(B, S)
    position = position.expand(*position.shape[:-2], B, S)
    size = torch.ones(B, S, device=embeds.device)
    source = torch.arange(S, device=embeds.device).expand(B, S)
    forward.tokens = TokenMap(item, grid, cell, position, size, valid, source)


def _write_items(
    forward: _Forward, encoded: Encoded, items: list[ItemLayout], where: torch.Tensor, base: int,
    item: torch.Tensor, grid: torch.Tensor, cell: torch.Tensor,
) -> None:  # fmt: skip
    total, placed = sum(entry.tokens for entry in items), int(where.sum())
    repeats = placed // total if total else 0
    if repeats == 0 or repeats * total != placed or where.shape[0] % repeats:
        raise NotApplicableError(
            f"the prompt holds {placed} {encoded.modality} tokens but the encoder made {total}; chunked prefill and partial "
            "prompts cannot be reduced."
        )
    # beam search repeats each prompt in consecutive rows, after its images were encoded once
    start, queue = 0, list(enumerate(items))
    for row in range(0, where.shape[0], repeats):
        places = where[row].nonzero().squeeze(1)
        used = 0
        while used < places.numel():
            number, entry = queue.pop(0)
            mine = places[used : used + entry.tokens]
            used += entry.tokens
            for index, layout in enumerate(entry.grids):
                offsets = layout.offsets.to(mine.device)
                for beam in range(row, row + repeats):
                    item[beam, mine] = base + number
                    grid[beam, mine[offsets]] = index
                    cell[beam, mine[offsets]] = torch.arange(offsets.numel(), device=mine.device)
                forward.grids[base + number, index] = (layout, entry.kind, encoded, slice(start, start + entry.tokens))
            start += entry.tokens


def _apply_before(forward: _Forward, kwargs: dict[str, Any], placement: Placement, positions: str) -> None:
    """Rewrite the keywords of the language model for the reduced sequence."""
    tokens = forward.tokens
    assert tokens is not None
    embeds = kwargs["inputs_embeds"]
    if positions == "compact":
        position, shift = compact_positions(tokens, placement)
        first = first_pruned(forward.cache)
        if first is not None:
            first.shift = shift if first.shift is None else first.shift + shift
    else:
        position = placement.along(tokens.position, -1)
    kwargs["inputs_embeds"] = placement.values(embeds)
    kwargs["position_ids"] = position
    mask = kwargs.get("attention_mask")
    held = 0 if forward.old_valid is None else forward.old_valid.shape[1]
    valid = placement.valid if forward.old_valid is None else torch.cat([forward.old_valid, placement.valid], 1)
    first = first_pruned(forward.cache)
    if first is not None:
        first.valid = valid
    if isinstance(mask, dict):
        kwargs["attention_mask"] = {k: m if m is None else placement.mask(m, held) for k, m in mask.items()}
    elif isinstance(mask, torch.Tensor) and mask.dim() == 4:
        kwargs["attention_mask"] = placement.mask(mask, held)
    else:
        # Always explicit: without a 2-D mask transformers takes gaps in the positions for packed sequences.
        kwargs["attention_mask"] = _mask_2d(forward, valid)
    if kwargs.get("visual_pos_masks") is not None:
        _reduce_deepstack(kwargs, placement)
    forward.tokens = replace(tokens.at(placement), position=position)


def _reduce_deepstack(kwargs: dict[str, Any], placement: Placement) -> None:
    where = kwargs["visual_pos_masks"]
    new = placement.along(where, -1) & placement.valid
    features = []
    for feature in kwargs["deepstack_visual_embeds"]:
        dense = feature.new_zeros(*where.shape, feature.shape[-1])
        dense[where] = feature
        features.append(placement.values(dense)[new])
    kwargs["visual_pos_masks"], kwargs["deepstack_visual_embeds"] = new, features


def _prepare_cache(forward: _Forward, kwargs: dict[str, Any], site: Site) -> bool:
    """Have the cache of this call made of layers that may be shorter than what was seen; False without a cache."""
    cache, tokens = kwargs.get("past_key_values"), forward.tokens
    config = site.language_model.config
    use_cache = kwargs.get("use_cache")
    if cache is None and not (getattr(config, "use_cache", True) if use_cache is None else use_cache):
        return False
    assert tokens is not None
    B, device = tokens.valid.shape[0], tokens.valid.device
    before = {i: layer.get_seq_length() for i, layer in enumerate(cache.layers)} if cache is not None else {}
    forward.cache = kwargs["past_key_values"] = pruned_cache(cache, config, len(site.layers))
    forward.before, forward.held = before, before.get(0, 0)
    first = forward.cache.layers[0]
    if forward.held:
        forward.old_valid = _extended(first.valid, B, forward.held, device)
        first.valid = torch.cat([forward.old_valid, tokens.valid], 1)
    else:
        first.valid = tokens.valid
    return True


def _settle_cache(forward: _Forward) -> None:
    """After the forward: count as seen what was taken out, and note for each layer which keys it holds."""
    if forward.cache is None:
        return
    composed: torch.Tensor | None = None
    valid = forward.cache.layers[0].valid
    start = forward.before.get(0, 0)
    levels = sorted(forward.levels, key=lambda level: level[0])
    for number, layer in enumerate(forward.cache.layers):
        if not isinstance(layer, PrunedLayer):
            continue
        while levels and levels[0][0] <= number:
            placement = levels.pop(0)[1]
            composed = placement.index if composed is None else composed.gather(1, placement.index)
            valid = placement.valid
        appended = layer.held - forward.before.get(number, 0)
        layer.hidden += forward.length - appended
        B = layer.keys.shape[0] if layer.keys is not None else 0
        if composed is None and layer.columns is None:
            continue
        new = torch.arange(appended, device=layer.keys.device).expand(B, appended) if composed is None else composed
        old = layer.columns
        if old is None:
            old = torch.arange(start, device=new.device).expand(B, start)
        layer.columns = torch.cat([old, new.to(old.device) + start], 1)
        old_valid = layer.valid if layer.valid is not None else torch.ones(B, old.shape[1], dtype=torch.bool)
        fresh = valid[:, -appended:] if valid is not None else torch.ones(B, appended, dtype=torch.bool)
        layer.valid = torch.cat([old_valid.to(new.device), fresh.to(new.device)], 1)


# -- the layers behind a reduction ------------------------------------------------------------------------------------


def _before_layer(site: Site, number: int) -> Callable[..., Any]:
    """Bring the keywords of decoder layer `number` in line with the tokens and keys that are alive there."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        calls = _calls(site)
        if calls is None or calls.forward.cache is None and not calls.forward.levels:
            return None
        forward = calls.forward
        placements = [placement for layer, placement in sorted(forward.levels, key=lambda x: x[0]) if layer <= number]
        layer = forward.cache.layers[number] if forward.cache is not None else None
        columns = layer.columns if isinstance(layer, PrunedLayer) else None
        if number in forward.converted or (not placements and columns is None):
            return None
        forward.converted.add(number)
        key = (len(placements), number if columns is not None else -1)
        if key not in forward.shared:
            forward.shared[key] = _layer_keywords(site, forward, kwargs, placements, layer)
        return args, {**kwargs, **forward.shared[key]}

    return hook


def _layer_keywords(
    site: Site, forward: _Forward, kwargs: dict[str, Any], placements: list[Placement], layer: PrunedLayer | None
) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    cos, sin = kwargs["position_embeddings"]
    position_ids = kwargs.get("position_ids")
    for placement in placements:
        cos, sin = placement.along(cos, 1), placement.along(sin, 1)
        position_ids = None if position_ids is None else placement.along(position_ids, -1)
    if placements:
        changed = {"position_embeddings": (cos, sin), "position_ids": position_ids}
    composed = None
    for placement in placements:
        composed = placement.index if composed is None else composed.gather(1, placement.index)
    mask = kwargs.get("attention_mask")
    B = cos.shape[0] if composed is None else composed.shape[0]
    start = forward.before.get(0, 0)
    old = layer.columns if layer is not None and layer.columns is not None else None
    if old is None:
        old = torch.arange(start, device=cos.device).expand(B, start)
    old_valid = layer.valid if layer is not None and layer.columns is not None else forward.old_valid
    length = forward.length if composed is None else composed.shape[1]
    new = torch.arange(length, device=cos.device).expand(old.shape[0], length) if composed is None else composed
    fresh = (
        placements[-1].valid if placements else torch.ones(old.shape[0], length, dtype=torch.bool, device=cos.device)
    )
    columns = torch.cat([old.to(new.device), new + start], 1)
    if old_valid is None:
        old_valid = torch.ones(old.shape, dtype=torch.bool, device=new.device)
    valid = torch.cat([_extended(old_valid, len(old), old.shape[1], new.device).to(new.device), fresh], 1)
    changed["attention_mask"] = _layer_mask(site, mask, composed, columns, valid, cos, length)
    return changed


def _layer_mask(
    site: Site, mask: torch.Tensor | None, rows: torch.Tensor | None, columns: torch.Tensor, valid: torch.Tensor,
    like: torch.Tensor, length: int,
) -> torch.Tensor | None:  # fmt: skip
    if mask is None:
        if bool(valid.all()):
            return None
        q, kv = length, columns.shape[1]
        seen = torch.ones(q, kv, dtype=torch.bool, device=valid.device).tril(kv - q)
        allowed = seen & valid[:, None, None, :]
        implementation = site.language_model.config._attn_implementation or "eager"
        if "flash" in implementation:
            return valid
        if implementation == "eager":
            return torch.zeros_like(allowed, dtype=like.dtype).masked_fill(~allowed, torch.finfo(like.dtype).min)
        return allowed
    columns, valid = columns.to(mask.device), valid.to(mask.device)
    mask = mask.expand(columns.shape[0], *mask.shape[1:])
    if mask.dim() == 2:
        return mask.gather(1, columns + (mask.shape[1] - int(columns.max()) - 1)) * valid
    if rows is not None:
        rows = rows.to(mask.device)
        mask = mask.gather(2, rows[:, None, :, None].expand(mask.shape[0], mask.shape[1], rows.shape[1], mask.shape[3]))
    mask = mask.gather(3, columns[:, None, None, :].expand(*mask.shape[:3], columns.shape[1]))
    never = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return mask.masked_fill(~valid[:, None, None, :], never)


def _deepstack(site: Site) -> Callable[..., Any]:
    def around(call: Any, hidden: torch.Tensor, where: torch.Tensor, features: torch.Tensor) -> Any:
        calls = _calls(site)
        if calls is None or not calls.forward.levels or calls.forward.deepstack:
            return call(hidden, where, features)
        forward = calls.forward
        dense = features.new_zeros(*where.shape, features.shape[-1])
        dense[where] = features
        for _, placement in sorted(forward.levels, key=lambda x: x[0]):
            where = placement.along(where, -1) & placement.valid
            dense = placement.values(dense)
        forward.deepstack = True
        try:
            return call(hidden, where, dense[where])
        finally:
            forward.deepstack = False

    return around


def encoding(site: Site) -> Encoded | None:
    """The encoder call that is running in this context, for those that change what the tower is given."""
    calls = _calls(site)
    return calls.encoding if calls is not None else None
