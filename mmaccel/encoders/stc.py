"""STC: frames of a stream are encoded where they changed, and of their tokens those are kept that are new."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from mmaccel.codecs.signals import changes_on_grid
from mmaccel.core.stream import current_stream
from mmaccel.method import Info, Stage, Touch, knob
from mmaccel.reducer import BEFORE_LLM, INSIDE_ENCODER, GridReducer, prefill_touches
from mmaccel.tokens import allocate, reduce, select, signals
from mmaccel.tokens.place import Reduction

if TYPE_CHECKING:
    from collections.abc import Callable

    from mmaccel.core.cached_frames import Counts
    from mmaccel.core.prefill import VisualTokens
    from mmaccel.install import Installer
    from mmaccel.targets import Target


@dataclass
class _History:
    """Mean of the frames of a stream, full width: their sum, float64 [D], and their number."""

    total: torch.Tensor | None = None
    frames: int = 0

    def followed_by(self, means: torch.Tensor) -> tuple[torch.Tensor, _History]:
        """For each of the frames that come next, of `means` float64 [T, D], the mean so far; and the history then."""
        before, sums = 0, means.cumsum(0)
        if self.total is not None and self.total.shape == means.shape[1:] and self.total.device == means.device:
            before, sums = self.frames, sums + self.total
        counts = before + torch.arange(1, len(means) + 1, device=means.device)
        return sums / counts[:, None], _History(sums[-1], before + len(means))


@dataclass(frozen=True)
class STC(GridReducer):
    """STC: Accelerating Streaming Video Large Language Models via Hierarchical Token Compression (2025).

    Sentence, cacher: cosine of a token's key to that of the reference frame -> each frame and block by itself ->
    lowest -> computed anew, all others reuse what attention and MLP added to them in the reference frame. Pruner:
    Gaussian similarity, in the channels that vary least in the frame, to the mean of the frame plus that to the mean of
    all frames so far -> evenly over frames -> lowest -> drop -> place.

    Every `interval`-th frame is the reference of those behind it and is encoded by the blocks' own forward. In the
    others all keys are computed, and queries, values, projections and MLP of the chosen rows only; the residual stream
    is always that of the frame. A video that is given as a whole is taken in its order; with a stream open
    (`mmaccel.core.stream`) both parts go on where the calls before have ended, and what they remember is in the
    stream: four tensors of a frame's hidden states a block, which the report counts in bytes. Another resolution,
    dtype or encoder starts anew. Images pass the cacher; families that are given the frames of a video as images
    (InternVL) have it on streams only. A vision encoder by itself has the cacher alone, and takes a batch for the
    frames of one video.

    Rule "fixed" renews the share `refresh` of the rows, rounded down but at least one, the least similar first, ties to
    the lower row; "similarity" renews those whose cosine is not above `similarity`, which the authors' README states
    and their code does not have. Rows that a later module merges (Qwen-VL) are renewed together, by their mean
    similarity; with windows a row sees its own. Keys are compared before rotary embedding, which changes no cosine, as
    both keys stand at the same place. A block whose attention another method reads computes all rows.

    With temporal="codec" the cacher takes 1 - the change since the reference in the place of the cosine, from what the
    codec of the file says (`mmaccel.codecs.using_signals`): known before the encoder runs, and the same rows in every
    block; class and register tokens always come first. On a stream the signals are those of the frames of a call, and
    the first entry is the change since the frame that the stream was given before (codec signals of a file have 1
    there, so give changes [frames, rows, columns]). The pruner goes by features in any case. In
    `benchmarks/codecs/reuse.toml` the codec's choice of rows is no better than chance, and keys are far ahead.

    Differs from the authors' code: keys are projected once where theirs are twice; the reference's age counts from
    the last whole frame, so that a frame renewed by `scene_cut` (off by default, inferred) starts a new interval; the
    history is one running mean of full width, of which each frame takes its own channels, where theirs mixes the
    channels of different chunks; a chunk is always one frame, however many come in one call. That the history is a mean
    of features before they are normalised is inferred. The pruner's budget is met exactly: a call keeps
    `keep` of its tokens, spread evenly over its frames, the first ones one more if it does not come out even; an int is
    the number for each call.
    """

    refresh: float = knob(
        0.25, "share of a frame's rows that the encoder computes anew; 1.0 switches the cacher off", above=0.0, high=1.0
    )
    interval: int | None = knob(
        2, "every so many frames one is encoded whole; 1 switches the cacher off, None: the first only", low=1
    )
    rule: Literal["fixed", "similarity"] = knob(
        "fixed", "which rows are computed anew: the share `refresh`, or those not above `similarity`",
        choices=("fixed", "similarity"),
    )  # fmt: skip
    similarity: float = knob(
        0.85, "cosine of keys above which a row is reused, under rule=similarity", low=-1.0, high=1.0
    )
    scene_cut: float | None = knob(
        None, "mean cosine of a frame's keys in the first block below which it is encoded whole", low=-1.0, high=1.0
    )
    temporal: Literal["features", "codec"] = knob(
        "features", "where the cacher takes the change of a row from; codec: see codecs.using_signals",
        choices=("features", "codec"),
    )  # fmt: skip
    channels: float = knob(
        0.5, "share of the channels, those that vary least, that the pruner compares tokens in", above=0.0, high=1.0
    )

    info: ClassVar[Info] = Info(
        name="stc", verb="reuse", stage=Stage.ENCODER,
        summary="encodes what changed since an earlier frame, keeps what is unlike frame and past",
        source="Accelerating Streaming Video Large Language Models via Hierarchical Token Compression", year=2025,
        targets=("video-lm", "vision-encoder"), slots=(INSIDE_ENCODER, BEFORE_LLM),
    )  # fmt: skip
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "llava-onevision": {
            "keep": 0.306, "refresh": 0.25, "interval": 2, "source": "authors' code: 60 of 196 tokens a frame, SigLIP",
        }
    }  # fmt: skip

    streams: ClassVar[bool] = True

    @property
    def caches(self) -> bool:
        """Whether the cacher is on."""
        return self.refresh < 1.0 and self.interval != 1

    @property
    def prunes(self) -> bool:
        """Whether the pruner is on."""
        return not super().neutral

    @property
    def neutral(self) -> bool:
        """Both parts are off."""
        return not self.prunes and not self.caches

    @property
    def slots(self) -> tuple[str, ...]:
        """A part that is off leaves its place to another method."""
        return (INSIDE_ENCODER,) * self.caches + (BEFORE_LLM,) * self.prunes

    def plan(self, target: Target) -> list[Touch]:
        """The blocks of the encoder, and the prefill of a language model."""
        touches = [] if target.kind == "vision-encoder" else prefill_touches(target.site, neutral=not self.prunes)
        encoder = target.site.encoder() if self.caches or target.kind == "vision-encoder" else None
        if encoder is not None:
            touches.insert(0, Touch(encoder.path, "tells which frames are encoded whole"))
            blocks = f"{encoder.path}: blocks 0-{len(encoder.blocks) - 1}"
            touches.insert(1, Touch(blocks, "computes the rows that changed, takes the others from an earlier frame"))
        return touches

    def install(self, installer: Installer) -> None:
        """Hand `reduce` to the prefill hooks, and the rule to the encoder's blocks."""
        name, target, note = self.info.name, installer.target, installer.report.note
        alone = target.kind == "vision-encoder"
        if alone:
            note(f"{name}: a vision encoder by itself gives no tokens to a language model, so keep is not used")
        else:
            installer.prefill.reduce_before(
                name, self.reduce if self.prunes else None, score=None, positions=self.positions,
                stage=Stage.BEFORE_LLM,
            )  # fmt: skip
            if self.caches and "video" not in target.site.encoders:
                note(
                    f"{name}: {target.family} is given frames as images, so they are encoded whole outside of a stream"
                )
        if self.caches:
            from mmaccel.core.cached_frames import Rule
            from mmaccel.core.caching import cache_frames

            share = self.refresh if self.rule == "fixed" else None
            changes = partial(changes_on_grid, name) if self.temporal == "codec" else None
            rule = Rule(self.interval, self.scene_cut, share, self.similarity, changes)
            cache_frames(
                installer.patcher, target.site.encoder(), rule, (lambda: 1) if alone else _videos_of(target.site),
                _telling(installer.report), lambda text: note(f"{name}: {text}"),
            )  # fmt: skip

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Drop of every frame what looks like the rest of it and like what has been seen."""
        T, S = tokens.frames()
        x = tokens.features.view(T, S, -1)
        stream = current_stream() if tokens.kind == "video" else None
        held = _History() if stream is None else stream.get(_History)
        past, after = held.followed_by(x.double().mean(1))
        channels = signals.low_variance_channels(x, self.channels)
        unit = torch.nn.functional.normalize(x.gather(2, channels[:, None].expand(-1, S, -1)).float(), dim=-1)
        history = torch.nn.functional.normalize(past.gather(1, channels).float(), dim=-1)
        likeness = signals.gaussian_similarity(unit, unit.mean(1, keepdim=True))
        likeness = likeness + signals.gaussian_similarity(unit, history[:, None])
        budgets = allocate.per_frame(self.budget(len(tokens)), torch.ones(T), S)
        chosen = select.top_k(-likeness, budgets.to(x.device))
        held.total, held.frames = after.total, after.frames
        return reduce.joined([Reduction(row[row >= 0]) for row in chosen], [S] * T)


def _videos_of(site: Any) -> Callable[[], int | None]:
    from mmaccel.core.forward import calls_of

    def videos() -> int | None:
        calls = calls_of(site)
        encoded = calls.encoding if calls is not None else None
        if encoded is None:
            return None
        if encoded.modality != "video":
            # where videos come as images, what a stream is given are its frames
            return 1 if current_stream() is not None and "video" not in site.encoders else None
        pixels = encoded.arguments.get("pixel_values_videos")
        return pixels.shape[0] if isinstance(pixels, torch.Tensor) and pixels.ndim == 5 else 1

    return videos


def _telling(report: Any) -> Callable[[Counts], None]:
    """Add up the counts of calls in the report."""
    from mmaccel.core.cached_frames import Counts

    total = Counts()

    def tell(counts: Counts) -> None:
        for name in ("whole", "reusing", "renewed", "rows"):
            setattr(total, name, getattr(total, name) + getattr(counts, name))
        report.events["stc frames encoded whole"] = total.whole
        report.events["stc frames reusing another"] = total.reusing
        if total.rows:
            report.events["stc rows computed in these"] = f"{total.renewed / total.rows:.1%}"
        if counts.nbytes:
            report.events["stc bytes held by the stream"] = counts.nbytes

    return tell
