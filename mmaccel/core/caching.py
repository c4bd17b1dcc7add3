"""Frames in a vision encoder: some are computed whole, the others renew a few rows of what a whole one has left.

Frames are taken apart from images before the encoder runs, and what happens to each is decided at its first block. The
whole frames go through the block's own forward, all at once, and hooks on its parts note what the branches added; the
others follow, all at once as well.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from mmaccel.core.block import Block, tokens_of
from mmaccel.core.cached_frames import Counts, Frames, Held, Rule
from mmaccel.core.encoder import Encoder
from mmaccel.core.given_changes import in_block_order, patch_grid
from mmaccel.core.partial import Seen, renew
from mmaccel.core.patching import Patcher
from mmaccel.core.probe import listeners
from mmaccel.core.stream import Stream, current_stream
from mmaccel.errors import NotApplicableError
from mmaccel.tokens.reuse import RowCache, reference_frames, row_similarity, rows_to_renew

__all__ = ["cache_frames"]

PARTS = ("key", "value", "attention", "mlp")
_HIDDEN = ("hidden_states", "x", "q_x")

_running: ContextVar[_Call | None] = ContextVar("mmaccel_caching", default=None)
_shown: ContextVar[dict[str, torch.Tensor] | None] = ContextVar("mmaccel_caching_shown", default=None)


def cache_frames(
    patcher: Patcher,
    encoder: Encoder,
    rule: Rule,
    videos: Callable[[], int | None],
    tell: Callable[[Counts], None],
    note: Callable[[str], None],
) -> None:
    """Put the hooks on every block of an encoder.

    videos: of how many videos, one behind the other and equally long, the frames of the call that begins are (packed
    encoders read it off their grids instead); None if they are no frames. tell: is given the counts of each call.
    """

    def around(call: Any, *args: Any, **kwargs: Any) -> Any:
        many = videos()
        config = getattr(encoder.module, "config", None)
        # attentions that are collected from the blocks would be those of whole frames only
        if many is None or kwargs.get("output_attentions", getattr(config, "output_attentions", False)):
            return call(*args, **kwargs)
        running = _Call(encoder, rule, many, args, kwargs, note)
        token = _running.set(running)
        try:
            output = call(*args, **kwargs)
        finally:
            _running.reset(token)
        tell(running.end())
        return output

    patcher.wrap(encoder.module, "forward", around)
    for index, block in enumerate(encoder.blocks):
        patcher.wrap(block.module, "forward", _around_block(encoder, index, block))
        for name, (module, shape) in block.taps.items():
            patcher.after(module, _show(name, shape))


def _around_block(encoder: Encoder, index: int, block: Block) -> Callable[..., Any]:
    def around(call: Any, *args: Any, **kwargs: Any) -> Any:
        running = _running.get()
        if running is None or running.encoder is not encoder:
            return call(*args, **kwargs)
        if args:
            hidden, args = args[0], args[1:]
        else:
            hidden = kwargs.pop(next(name for name in _HIDDEN if name in kwargs))
        return running.block(index, block, call, hidden, args, kwargs)

    return around


def _show(name: str, shape: Callable[[Any], torch.Tensor]) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        shown = _shown.get()
        if shown is not None:
            shown[name] = shape(output)

    return hook


class _Call:
    """One call of the encoder on frames."""

    def __init__(
        self, encoder: Encoder, rule: Rule, videos: int, args: tuple[Any, ...], kwargs: dict[str, Any], note: Any
    ) -> None:
        self.encoder, self.rule, self.videos, self.note = encoder, rule, videos, note
        pixels = args[0] if args else next(iter(kwargs.values()), None)
        self.size = tuple(getattr(pixels, "shape", ())[1:])
        self.grids: Any = kwargs.get("grid_thw", args[1] if encoder.packed and len(args) > 1 else None)
        # pictures of different shapes that are filled up to one number of patches
        shapes = kwargs.get("spatial_shapes", args[2] if len(args) > 2 else None)
        self.shapes = shapes if isinstance(shapes, torch.Tensor) and shapes.ndim == 2 else None
        self.stream: Stream | None = current_stream()
        self.held = self.stream.get(Held) if self.stream is not None else None
        self.kind: tuple[Any, ...] = ()
        self.groups: list[Frames] = []
        self.fresh: RowCache | None = None
        self.counts = Counts()
        self.off = False
        self.rows: torch.Tensor | None = None
        self.frames: torch.Tensor | None = None
        self.borders: dict[int, torch.Tensor] = {}
        self.windows: dict[tuple[int, int], Seen | None] = {}

    def block(
        self, index: int, block: Block, call: Any, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The output of one block."""
        if index == 0:
            self.begin(block, hidden)
        # a layer whose attention somebody reads computes all frames, so that they see all of it
        if (
            self.off
            or not self.groups
            or listeners(block.attention)
            or not self._held_at(index)
            or _padded(args, kwargs)
        ):
            return call(hidden, *args, **kwargs)
        if not any(group.reusing for group in self.groups):
            output, parts = self._whole(block, call, hidden, args, kwargs)
            self._keep(index, parts)
            return output
        width = hidden.shape[-1]
        flat = hidden.reshape(-1, width)
        out = torch.empty_like(flat)
        parts: dict[str, torch.Tensor] = {}
        wrap: Any = None
        if self.rows is not None:
            output, parts = self._whole(block, call, *self._some(hidden, args, kwargs))
            wrap = output if isinstance(output, tuple) else None
            made = output[0] if isinstance(output, tuple) else output
            out[self.rows] = made.reshape(-1, width)
            self._keep(index, parts)
        for number, group in enumerate(self.groups):
            if group.reusing:
                self._renew(index, number, block, flat, out, parts, args, kwargs)
        out = out.view(hidden.shape)
        return (out, *wrap[1:]) if wrap else out

    def begin(self, block: Block, hidden: torch.Tensor) -> None:
        """Decide what happens to each frame."""
        if torch.is_grad_enabled() and hidden.requires_grad:
            self.note("the call asked for gradients, so its frames were computed whole")
            self.off = True
            return
        self.groups = self._lay_out(hidden)
        if not self.groups:
            return
        if self.stream is not None and max(self.videos, len(self.groups)) > 1:
            raise NotApplicableError(
                "a stream is one video, and this call has several; make one call for each, inside `following` of a "
                "stream of its own."
            )
        self.kind = (self.groups[0].tokens, hidden.shape[-1], hidden.dtype, hidden.device)
        flat, before = hidden.reshape(-1, hidden.shape[-1]), 0
        for number, group in enumerate(self.groups):
            self._decide(number, group, block, group.of(flat))
            group.before, before = before, before + len(group.whole) * group.tokens
            group.settle(hidden.device)
        if any(group.reusing for group in self.groups):
            rows = [
                group.start + torch.tensor(group.whole)[:, None] * group.tokens + torch.arange(group.tokens)
                for group in self.groups
                if group.whole
            ]
            self.rows = torch.cat([part.flatten() for part in rows]).to(hidden.device) if rows else None
            self.frames = torch.tensor(self.groups[0].whole, device=hidden.device)
        elif self.stream is None:
            self.off = True
        if self.stream is not None and self.groups[0].whole:
            self.fresh = RowCache()

    def end(self) -> Counts:
        """Bring the stream up to date; a call that raises never comes here, and leaves the stream as it was."""
        if self.held is None:
            return self.counts
        if not self.groups or not self._finite():
            self.held.cache, self.held.kind = RowCache(), None
        else:
            self.held.change = self._change_held(self.groups[0], self.held)
            if self.fresh is not None:
                group = self.groups[0]
                self.held.cache, self.held.kind = self.fresh, self._kind(group.whole[-1])
                self.held.module = weakref.ref(self.encoder.module)
                self.held.age = group.frames - 1 - group.whole[-1]
            else:
                self.held.age += self.groups[0].frames
        self.counts.nbytes = self.held.cache.nbytes
        return self.counts

    def _change_held(self, group: Frames, held: Held) -> torch.Tensor | None:
        if self.rule.changes is None:
            return None
        if group.changed is None:  # one frame, the first of all
            return torch.zeros(group.tokens, dtype=torch.float64)
        last = group.changed[-1]
        if group.whole:
            return last - group.changed[group.whole[-1]]
        return last if held.change is None else last + held.change

    def _finite(self) -> bool:
        """Whether the next frames may reuse what this call leaves; what breaks in one block shows in the last."""
        if self.fresh is None or not len(self.fresh):
            return True
        return bool(torch.isfinite(self.fresh.full(list(self.fresh)[-1])).all())

    def _lay_out(self, hidden: torch.Tensor) -> list[Frames]:
        if not self.encoder.packed:
            frames, tokens = hidden.shape[:2]
            if frames == 0 or frames % self.videos:
                return []
            each, sizes = frames // self.videos, [self._kind(frame) for frame in range(frames)]
            first = [frame % each == 0 or sizes[frame] != sizes[frame - 1] for frame in range(frames)]
            return [Frames(0, frames, tokens, first)]
        found, start = [], 0
        for t, h, w in self.grids.tolist():
            found.append(Frames(start, t, h * w, [frame == 0 for frame in range(t)]))
            start += t * h * w
        return found if start == hidden.shape[0] else []

    def _kind(self, frame: int) -> tuple[Any, ...]:
        """What two frames must have in common if one is to reuse the other's results."""
        if self.encoder.packed:
            return (*self.grids[0, 1:].tolist(), *self.kind)
        return (self.size, None if self.shapes is None else tuple(self.shapes[frame].tolist()), *self.kind)

    def _decide(self, number: int, group: Frames, block: Block, hidden: torch.Tensor) -> None:
        rule = self.rule
        held = self.held if self.held is not None and self.held.fits(self.encoder.module, self._kind(0)) else None
        if held is not None and rule.changes is not None and held.change is None:
            held = None
        if rule.changes is not None and rule.interval != 1 and (group.frames > 1 or held is not None):
            group.changed = self._changes(number, group)
        like = None
        if rule.cut is not None and rule.interval != 1:
            if rule.changes is None:
                like = self._likeness(tokens_of(block.key(block.norm1(hidden))), rule.cut, held)
            else:
                like = self._given_likeness(group, rule.cut, held)
        first = group.first if held is None else [False, *group.first[1:]]
        references = reference_frames(first, rule.interval, held=held.age if held else None, like=like)
        group.whole = [frame for frame, reference in enumerate(references) if frame == reference]
        place = {frame: number for number, frame in enumerate(group.whole)} | {-1: -1}
        group.reusing = [frame for frame, reference in enumerate(references) if frame != reference]
        group.reference = [place[references[frame]] for frame in group.reusing]
        if group.changed is not None and group.reusing:
            likeness = torch.stack([group.likeness(frame, references[frame], held) for frame in group.reusing])
            likeness[:, : self.encoder.prefix] = -torch.inf
            group.renewed = self._renewed(likeness).to(hidden.device)
        self.counts.whole += len(group.whole)
        self.counts.reusing += len(group.reusing)

    def _changes(self, number: int, group: Frames) -> torch.Tensor:
        """The changes of the rows of these frames, added up."""
        changes = self.rule.changes
        assert changes is not None
        if self.encoder.packed:
            h, w = self.grids[number, 1:].tolist()
            maps = changes(number, group.frames, h, w)
        else:
            patches = group.tokens - self.encoder.prefix
            h, w = patch_grid(self.size, patches) if self.shapes is None else self.shapes[0].tolist()
            mixed = self.shapes is not None and bool((self.shapes != self.shapes[0]).any())
            if mixed or h * w != patches:
                raise NotApplicableError(
                    "changes cannot be laid over frames of different shapes, or filled up to a number of patches; use "
                    "temporal=features."
                )
            each = group.frames // self.videos
            maps = torch.cat([changes(video, each, h, w) for video in range(self.videos)])
        return in_block_order(self.encoder, maps.double(), (h, w), self.grids, number).cumsum(0)

    def _given_likeness(self, group: Frames, cut: float, held: Held | None) -> Callable[[int, int], bool]:
        def like(frame: int, reference: int) -> bool:
            return bool(group.likeness(frame, reference, held)[self.encoder.prefix :].clamp_min(0).mean() >= cut)

        return like

    def _renewed(self, similarity: torch.Tensor) -> torch.Tensor:
        rule = self.rule
        return rows_to_renew(similarity, share=rule.share, at_most=rule.similarity, unit=self.encoder.merge**2)

    def _likeness(self, keys: torch.Tensor, cut: float, held: Held | None) -> Callable[[int, int], bool]:
        """Whether a frame's keys [frames, tokens, C] of the first block are like those of a reference on the mean."""
        known = held.cache.full((0, "key")) if held is not None and (0, "key") in held.cache else None

        def like(frame: int, reference: int) -> bool:
            earlier = known if reference < 0 else keys[reference : reference + 1]
            # nothing is known of a frame that the first block computed for a listener
            return earlier is None or bool(row_similarity(keys[frame : frame + 1], earlier).mean() >= cut)

        return like

    def _held_at(self, index: int) -> bool:
        """Whether what this layer would reuse of the stream is there: it is not if its attention was read before."""
        needed = any(reference < 0 for group in self.groups for reference in group.reference)
        return not needed or (self.held is not None and (index, "mlp") in self.held.cache)

    def _some(
        self, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
        """The arguments of a block for whole frames only."""
        rows, total = (self.rows if self.encoder.packed else self.frames), hidden.shape[0]
        assert rows is not None

        def some(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(some(part) for part in value)
            if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[0] == total:
                return value[rows]
            return value

        kwargs = {name: some(value) for name, value in kwargs.items()}
        borders = kwargs.get("cu_seqlens")
        if borders is not None:
            if id(borders) not in self.borders:
                stays = torch.zeros(total, dtype=torch.bool, device=rows.device).index_fill_(0, rows, True)
                lengths = borders.diff()[stays[borders[:-1].long()]]
                self.borders[id(borders)] = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(borders.dtype)
            kwargs["cu_seqlens"] = self.borders[id(borders)]
        return hidden[rows], tuple(some(value) for value in args), kwargs

    def _whole(
        self, block: Block, call: Any, hidden: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        """The block's own output for frames, and its parts [rows, C] of these."""
        token = _shown.set({})
        try:
            output = call(hidden, *args, **kwargs)
            shown = _shown.get() or {}
        finally:
            _shown.reset(token)
        parts = {name: value.reshape(-1, value.shape[-1]) for name, value in shown.items()}
        if "key" not in parts or "value" not in parts:
            x = block.norm1(hidden.reshape(-1, hidden.shape[-1]))
            parts |= {"key": tokens_of(block.key(x)), "value": tokens_of(block.value(x))}
        return output, parts

    def _keep(self, index: int, parts: dict[str, torch.Tensor]) -> None:
        """Take what the stream's last whole frame leaves to the frames that follow."""
        if self.fresh is not None:
            for name in PARTS:
                self.fresh.store((index, name), parts[name][-self.groups[0].tokens :][None])

    def _reference(self, index: int, group: Frames, parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """[frames, tokens, C] of each part for the frames that reuse it; one frame where all reuse the held one."""
        found = {}
        if group.whole:
            first, shape = group.before, (len(group.whole), group.tokens)
            found = {name: parts[name][first : first + shape[0] * shape[1]].unflatten(0, shape) for name in PARTS}
        if group.order is None:
            return found
        if min(group.reference) >= 0:
            return {name: part[group.order] for name, part in found.items()}
        assert self.held is not None
        held = {name: self.held.cache.full((index, name)) for name in PARTS}
        if max(group.reference) < 0:
            return held
        return {name: torch.cat([held[name], found[name]])[group.order + 1] for name in PARTS}

    def _renew(
        self, index: int, number: int, block: Block, flat: torch.Tensor, out: torch.Tensor,
        parts: dict[str, torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any],
    ) -> None:  # fmt: skip
        """Write the frames of one group that are not computed whole into `out` [rows, C]."""
        group = self.groups[number]
        chosen = group.chosen
        rotary = None
        if block.rotate is not None:
            cos, sin = (group.of(table)[chosen] for table in kwargs["position_embeddings"])
            rotary = cos, sin

        def choose(keys: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
            return self._renewed(row_similarity(keys, reference)) if group.renewed is None else group.renewed

        seen = self._visible(number, args, kwargs)
        made, renewed = renew(block, group.of(flat)[chosen], self._reference(index, group, parts), choose, rotary, seen)
        group.of(out)[chosen] = made
        self.counts.renewed += renewed
        self.counts.rows += made.shape[0] * group.tokens

    def _visible(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Seen | None:
        """What the queries of one group see, where it is not the whole frame."""
        group, borders = self.groups[number], kwargs.get("cu_seqlens")
        if borders is None:
            mask = next((value for value in _masks(args, kwargs) if value.ndim == 4), None)
            if mask is None:
                return None
            return Seen(mask=mask[group.chosen] if mask.shape[0] == group.frames else mask)
        key = (number, id(borders))
        if key not in self.windows:
            place = torch.arange(group.start, group.start + group.tokens, device=borders.device)
            # frames of one size are cut into the same windows
            window = torch.searchsorted(borders.long(), place, right=True)
            self.windows[key] = None if bool((window == window[0]).all()) else Seen(windows=window)
        return self.windows[key]


def _masks(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    given = [*args, kwargs.get("attention_mask"), kwargs.get("attn_mask")]
    return [value for value in given if isinstance(value, torch.Tensor)]


def _padded(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether what is seen is said in a form that only the block's own attention reads."""
    return kwargs.get("cu_seqlens") is None and any(mask.ndim != 4 for mask in _masks(args, kwargs))
