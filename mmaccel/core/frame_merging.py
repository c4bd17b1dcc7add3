"""Let whole frames disappear inside a vision tower, and bring its features back to full size behind it.

What follows the tower (pooling, projector, packing) reshapes by the number of frames that went in. So at the boundary
that the adapter names, features of living frames are put at their frames' places and zeros at the others, whose tokens
are dropped in front of the language model. In between, everything is computed for living frames only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mmaccel.core.encoder import Encoder
from mmaccel.core.encoding import encoding, received_in_parts
from mmaccel.core.flops import linear_weights
from mmaccel.core.layout import MERGED_SCORE
from mmaccel.core.patching import Patcher
from mmaccel.core.probe import probe_attention
from mmaccel.errors import NonFiniteError
from mmaccel.tokens.frames import FrameGroups, MergedFrames, frame_similarity

__all__ = ["merge_frames"]

# decide(similarities, what lives of this video) -> groups of living frames, and the threshold that made them
Passing = Callable[[], "_Passage | None"]
Decide = Callable[[list[list[float]], MergedFrames], tuple[FrameGroups, float]]
# cut(similarities, that threshold) -> segments
Cut = Callable[[list[list[float]], float], list[tuple[int, int]]]


@dataclass
class _Video:
    """A video in the tower: `rows` of dimension 0 a frame, what lives of it, and its frames' scores [living, tokens].

    tokens, width: tokens of a frame and channels, once a block has seen them.
    """

    rows: int
    merged: MergedFrames
    scores: torch.Tensor | None = None
    tokens: int = 0
    width: int = 0

    @property
    def length(self) -> int:
        return self.rows * len(self.merged)


@dataclass
class _Passage:
    """One call of the tower. alive: living frames in each block so far; levels: what lived at each boundary."""

    videos: list[_Video]
    merges: bool
    heard: list[torch.Tensor] = field(default_factory=list)
    alive: list[list[int]] = field(default_factory=list)
    levels: list[list[MergedFrames]] = field(default_factory=list)

    @property
    def changed(self) -> bool:
        return any(len(video.merged) < video.merged.T for video in self.videos)


def merge_frames(
    patcher: Patcher, site: Any, encoder: Encoder, layers: Sequence[int], reach: int | None, decide: Decide, cut: Cut,
    compute: Callable[[str, float, float], None],
) -> None:  # fmt: skip
    """Ask `decide` behind each block of `layers` (counted from 0) which frames of each video become one.

    The attention that each token of a frame receives in the last of these blocks (or the last before it that sees
    whole frames) is merged with the frames, and becomes the encoder call's score MERGED_SCORE; of images too,
    whose tiles never merge. Behind the last round `cut` is asked for the segments of what is left. `compute` is called
    once an encoder call with the stage, FLOPs, and FLOPs without merging.
    """

    def passage() -> _Passage | None:
        encoded = encoding(site)
        return None if encoded is None else encoded.passage

    def enter(_module: nn.Module, _args: Any, _kwargs: Any) -> None:
        encoded = encoding(site)
        if encoded is not None:
            encoded.passage = _Passage([], encoded.modality == "video")

    def leave(_module: nn.Module, _args: Any, _kwargs: Any, output: Any = None) -> None:
        encoded, done = encoding(site), passage()
        if encoded is None or done is None or output is None:
            return
        if done.merges:
            encoded.merged = [video.merged for video in done.videos]
        if scores := [_spread(video, video.scores) for video in done.videos if video.scores is not None]:
            encoded.scores[MERGED_SCORE] = scores
        features = getattr(output, "deepstack_features", None)
        if features and done.changed:
            for level, merged in enumerate(done.levels[: len(features)]):
                features[level] = _remixed(features[level], merged, done.videos)
        compute("encode", *_flops(encoder, done))

    score_at = site.sees_whole_frames(max(layers))
    patcher.before(encoder.module, enter)
    patcher.after(encoder.module, leave, always=True, first=True)
    for index, block in enumerate(encoder.blocks):
        patcher.before(block.module, _fit(site, passage, encoder.packed))
        if index == score_at:
            probe_attention(patcher, block.attention, _listen(passage))
        if index == score_at or index in layers:
            merging = (decide, cut if index == max(layers) else None) if index in layers else None
            hook = _behind(passage, encoder, index == score_at, reach, merging)
            # ahead of the library's own hooks, which record hidden states: these are then what the next block gets
            patcher.after(block.module, hook, first=True)
    for module in site.frame_boundary():
        if isinstance(module, tuple):
            owner, method = module
            patcher.wrap(owner, method, lambda call, *args, **kwargs: _restored(passage, call(*args, **kwargs)))
        else:
            patcher.after(module, lambda _module, _args, _kwargs, output: _restored(passage, output))


def _listen(passage: Passing) -> Callable[..., None]:
    @torch.no_grad()
    def listen(query: torch.Tensor, key: torch.Tensor, _mask: Any, call: dict[str, Any]) -> None:
        found = passage()
        if found is None:
            return
        found.heard += received_in_parts(query, key, call)

    return listen


def _fit(site: Any, passage: Passing, packed: bool) -> Callable[..., Any]:
    """Count the living frames, and give a block of a packed tower the rows of its tables that belong to them."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        here = passage()
        if here is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if not here.videos:
            # only now is it known whether somebody has made the frames smaller
            frames = site.video_frames(encoding(site)) or [(hidden.shape[0], 1)]  # a batch of images
            here.videos += [_Video(rows, MergedFrames.none(T)) for T, rows in frames]
        here.alive.append([len(video.merged) for video in here.videos])
        for video in here.videos:
            video.tokens, video.width = hidden.shape[1] if hidden.dim() == 3 else video.rows, hidden.shape[-1]
        if not packed or not here.changed:
            return None
        kwargs = dict(kwargs)
        kwargs["cu_seqlens"], rows = _living_rows(kwargs["cu_seqlens"], here.videos)
        kwargs["position_embeddings"] = tuple(table[rows.to(table.device)] for table in kwargs["position_embeddings"])
        return args, kwargs

    return hook


def _living_rows(cuts: torch.Tensor, videos: list[_Video]) -> tuple[torch.Tensor, torch.Tensor]:
    """(cumulative lengths of what attends to each other, rows of the living frames): no attention crosses frames."""
    frames = torch.tensor([video.rows for video in videos for _ in range(video.merged.T)])
    lives = torch.zeros(len(frames), dtype=torch.bool)
    start = 0
    for video in videos:
        lives[torch.tensor(video.merged.places) + start] = True
        start += video.merged.T
    lengths = cuts.diff().cpu()
    first_rows = frames.cumsum(0) - frames
    frame = torch.searchsorted(first_rows, cuts[:-1].cpu().to(torch.int64), right=True) - 1
    left = lengths[lives[frame]]
    rows = lives.repeat_interleave(frames).nonzero().squeeze(1)
    return torch.nn.functional.pad(left.cumsum(0), (1, 0)).to(cuts.device, cuts.dtype), rows


def _behind(
    passage: Passing, encoder: Encoder, scored: bool, reach: int | None, merging: tuple[Decide, Cut | None] | None
) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
        here = passage()
        if here is None:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        if scored:
            flat = torch.cat([part.flatten() for part in here.heard])
            for video, part in zip(here.videos, flat.split(_tokens(here, hidden)), strict=True):
                video.scores = part.view(len(video.merged), -1)
            here.heard.clear()
        if merging is None or not here.merges:
            return None
        decide, cut = merging
        parts = list(hidden.split([video.length for video in here.videos]))
        for place, video in enumerate(here.videos):
            frames = parts[place].unflatten(0, (len(video.merged), video.rows)).flatten(1, -2)
            c = frame_similarity(frames[:, encoder.prefix :].detach(), reach)
            if not bool(torch.isfinite(c).all()):
                raise NonFiniteError(
                    f"{encoder.path} produced NaN or infinity inside; check its weights, dtype and input."
                )
            groups, threshold = decide(c.tolist(), video.merged)
            if len(groups) < len(video.merged):
                left = _mixed(frames, groups)
                parts[place] = left.reshape(-1, *parts[place].shape[1:])
                if video.scores is not None:
                    video.scores = _mixed(video.scores, groups)
                if cut is not None:
                    c = frame_similarity(left[:, encoder.prefix :].detach(), reach)
            cuts = video.merged.cuts if cut is None else cut(c.tolist(), threshold)
            video.merged = video.merged.then(groups, cuts)
        joined = torch.cat(parts)
        return (joined, *output[1:]) if isinstance(output, tuple) else joined

    return hook


def _tokens(here: _Passage, hidden: torch.Tensor) -> list[int]:
    width = hidden.shape[1] if hidden.dim() == 3 else 1
    return [video.length * width for video in here.videos]


def _mixed(frames: torch.Tensor, groups: FrameGroups) -> torch.Tensor:
    """[n, ...] to [len(groups), ...]; a frame by itself passes bit for bit."""
    out = []
    for group in groups:
        alone = len(group) == 1
        mixed: Any = frames[group[0][0]] if alone else sum(frames[old].float() * weight for old, weight in group)
        out.append(mixed.to(frames.dtype))
    return torch.stack(out)


def _spread(video: _Video, living: torch.Tensor) -> torch.Tensor:
    """[living, ...] to [T, ...], zeros for the frames that are gone."""
    out = living.new_zeros(video.merged.T, *living.shape[1:])
    out[torch.tensor(video.merged.places, device=living.device)] = living
    return out


def _restored(passage: Passing, features: torch.Tensor) -> torch.Tensor:
    here = passage()
    if here is None:
        return features
    here.levels.append([video.merged for video in here.videos])
    if not here.changed:
        return features
    total = sum(video.length for video in here.videos)
    joined = total // features.shape[0]  # patches that a merger has made one
    parts = features.split([video.length // joined for video in here.videos])
    return torch.cat(
        [
            _spread(video, part.unflatten(0, (len(video.merged), -1))).flatten(0, 1)
            for video, part in zip(here.videos, parts, strict=True)
        ]
    )


def _remixed(features: torch.Tensor, merged: list[MergedFrames], videos: list[_Video]) -> torch.Tensor:
    """Deep-stack features of an inner level [rows, D]: frames that became one later on become one here as well."""
    unit = features.shape[0] / sum(video.merged.T * video.rows for video in videos)
    parts = features.split([round(video.merged.T * video.rows * unit) for video in videos])
    out = []
    for part, then, video in zip(parts, merged, videos, strict=True):
        frames = part.unflatten(0, (then.T, -1))
        holder = {t: place for group, place in zip(then.groups, then.places, strict=True) for t, _ in group}
        groups: FrameGroups = []
        for group in video.merged.groups:
            shares: dict[int, float] = {}
            for t, weight in group:
                if t in holder:
                    shares[holder[t]] = shares.get(holder[t], 0.0) + weight
            whole = sum(shares.values())
            groups.append([(place, share / whole) for place, share in sorted(shares.items())])
        out.append(_spread(video, _mixed(frames, groups)).flatten(0, 1))
    return torch.cat(out)


def _flops(encoder: Encoder, here: _Passage) -> tuple[float, float]:
    """FLOPs of the blocks for the living frames and for all, 2 a multiply-accumulate."""
    spent = dense = 0.0
    for block, alive in zip(encoder.blocks, here.alive, strict=False):
        weight = linear_weights(block.module)
        for video, living in zip(here.videos, alive, strict=True):
            frame = 2 * video.tokens * weight + 4 * video.tokens**2 * video.width
            spent, dense = spent + living * frame, dense + video.merged.T * frame
    return spent, dense
