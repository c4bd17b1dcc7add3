"""ToMe: in every block of the vision encoder the tokens that are most alike become one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from mmaccel.errors import MethodError, NotApplicableError
from mmaccel.method import Info, Method, Stage, Touch, knob
from mmaccel.reducer import INSIDE_ENCODER
from mmaccel.tokens.allocate import merged_per_block, resolve_keep

if TYPE_CHECKING:
    from mmaccel.core.encoder import Encoder
    from mmaccel.install import Installer
    from mmaccel.report import Report
    from mmaccel.targets import Target

_KEEP = 0.5


@dataclass(frozen=True)
class ToMe(Method):
    """Token Merging: Your ViT But Faster (2023).

    Sentence, in every block between attention and MLP: cosine of head-mean keys -> the same number from every image,
    by block -> the best pairs of two alternating sets -> merge into the mean, weighted by size -> order kept.

    The budget is `keep`, what is left of each image's patches behind the last block, or the paper's `r`, how many
    tokens merge in each block; a list of them says it block by block. Otherwise either is a total (r times the number
    of blocks) that `schedule` spreads over the blocks: "constant" evenly, "decreasing" linearly from twice the mean
    down to none, which saves more and loses more.
    A block merges at most half of its patches. What that forbids it is lost with r, as in the paper; with keep the
    other blocks make up for it, and the report notes a keep that halving in every block does not reach. keep=1.0 and
    r=0 are the unmodified model, bit for bit.

    Class and register tokens neither merge nor are merged into. A merged token counts in attention as often as it holds
    patches, by log(size) added to its scores, so SDPA stays on; padding has size 0. Images of a batch merge each by
    itself. Behind the last block whose output is used every patch is given the value of the token that it went into.
    So all that follows sees the whole grid, and pooling sees the sizes: the mean over patches is the size-weighted mean
    over tokens, and an attention-pooling head attends to them in proportion to their sizes. Padding comes back as
    zeros. In a vision-language model the number of visual tokens stays; what is saved is the encoder.

    Encoders that pack patches (those of the Qwen-VL kind) merge whole merge groups, patch by patch, each frame by
    itself; a group keeps its rotary positions and its window, `keep` and `r` count groups (inferred).

    Blocks that merge do not call their attention module: there are no `attentions` to record, attention dropout is not
    applied in training, and recorded hidden states of the blocks between are as short as these are. Gradients pass.
    Calls of single blocks outside of the encoder's forward, as for intermediate features, run dense.
    """

    keep: float | int = knob(_KEEP, "fraction in (0, 1] or number of patches of each image left behind the last block")
    r: int | tuple[int, ...] | str | None = knob(
        None, 'tokens merged in each block, in place of keep; (16, 8, 8) or "16/8/8" gives each block its own, 0 to '
        "blocks behind the list"
    )  # fmt: skip
    schedule: Literal["constant", "decreasing"] = knob(
        "constant", "how the merges are spread over the blocks", choices=("constant", "decreasing")
    )

    info: ClassVar[Info] = Info(
        name="tome", verb="merge", stage=Stage.ENCODER,
        summary="merges the most similar tokens in every block of the vision encoder",
        source="Token Merging: Your ViT But Faster", year=2023, targets=("vision-encoder", "video-lm"),
        slots=(INSIDE_ENCODER,), licence="CC-BY-NC-4.0",
    )  # fmt: skip
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "vit-large 384": {"r": 23, "source": "paper: ViT-L/16 at 384 pixels, top-1 86.92 to 86.14"}
    }

    streams: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.r, (tuple, list)):
            object.__setattr__(self, "r", "/".join(map(str, self.r)))
        super().__post_init__()
        listed = self._listed()
        if min(listed or (self.r or 0,)) < 0:  # type: ignore[type-var]
            raise MethodError(f'tome: r={self.r} is outside of its range; give numbers from 0, such as 16 or "16/8/8".')
        if listed is not None and self.schedule != "constant":
            raise MethodError(f"tome: r={self.r} says what each block merges, so there is no schedule to give.")
        if self.r is not None and self.keep != _KEEP:
            raise MethodError(f"tome: keep={self.keep} and r={self.r} both say how much is merged; give one of them.")

    def _listed(self) -> list[int] | None:
        """`r` of each block, where it is a list."""
        if not isinstance(self.r, str):
            return None
        try:
            return [int(part) for part in self.r.split("/")]
        except ValueError:
            return [-1]

    @property
    def neutral(self) -> bool:
        """keep=1.0, or r=0."""
        listed = self._listed()
        if listed is not None:
            return not any(listed)
        return super().neutral if self.r is None else self.r == 0

    def merges(self, n: int, blocks: int, report: Report | None = None) -> list[int]:
        """How many tokens each of the `blocks` merges of an image of n patches.

        Raises:
            MethodError: `keep` asks for more than n, or `r` lists more blocks than there are.
        """
        listed = self._listed()
        if listed is not None:
            if len(listed) > blocks:
                raise MethodError(f"tome: r={self.r} lists {len(listed)} blocks, and {blocks} are used; shorten it.")
            counts = []
            for count in [*listed, *[0] * (blocks - len(listed))]:
                counts.append(min(count, (n - sum(counts)) // 2))
            self._tell_capped(sum(listed), sum(counts), n, report)
            return counts
        assert not isinstance(self.r, (str, tuple))
        total = n - resolve_keep(self.keep, n) if self.r is None else self.r * blocks
        ramp = self.schedule == "decreasing" and blocks > 1
        weights = torch.arange(blocks, 0, -1) - 1 if ramp else torch.ones(blocks)
        counts = merged_per_block(total, n, weights, exact=self.r is None)
        missing = total - sum(counts)
        if report is not None and self.r is None and missing:
            report.note(
                f"tome: keep={self.keep} asks for {n - total} of {n} patches, and {blocks} blocks that merge at most "
                f"half of theirs leave {n - total + missing}"
            )
        if self.r is not None:
            self._tell_capped(total, sum(counts), n, report)
        return counts

    def _tell_capped(self, asked: int, merged: int, n: int, report: Report | None) -> None:
        if report is not None and merged < asked:
            report.note(
                f"tome: r={self.r} asks for {asked} merges of {n} patches, and blocks that merge at most half of "
                f"theirs make {merged}"
            )

    def plan(self, target: Target) -> list[Touch]:
        """The encoder and its blocks up to the last whose output is used.

        Raises:
            NotApplicableError: the model reads the features of several blocks.
        """
        encoder = _encoder(target)
        touches = [
            Touch(encoder.path, "keeps what one call has merged"),
            Touch(f"{encoder.path}, blocks 0-{encoder.last}", "merges the most similar tokens behind attention"),
        ]
        if target.kind == "video-lm":
            prefix = "" if target.site.root is target.site.target else "model."
            why = "looks at which block's features a call asks for"
            touches += [Touch(prefix + method, why) for method in target.site.encoders.values()]
        return touches

    def install(self, installer: Installer) -> None:
        """Wrap the blocks."""
        from mmaccel.core.token_merging import merge_tokens

        target, report = installer.target, installer.report
        encoder = _encoder(target)
        if self.neutral:
            report.note("tome merges nothing with these knobs")
            return
        merge_tokens(
            installer.patcher, encoder, lambda n, blocks: self.merges(n, blocks, report), self.info.name, report
        )
        if target.kind == "video-lm":
            for modality, method in target.site.encoders.items():
                installer.patcher.wrap(target.site.root, method, _same_block(target.site, modality, encoder.last))


def _encoder(target: Target) -> Encoder:
    encoder = target.site.encoder()
    if target.kind == "video-lm":
        _one_block(getattr(target.site.config, "vision_feature_layer", None))
    return encoder


def _one_block(layers: Any) -> None:
    if isinstance(layers, (list, tuple)) and len(layers) > 1:
        raise NotApplicableError(
            f"this model joins the features of several vision layers ({', '.join(map(str, layers))}), and tome leaves "
            "all patches to one; use a method that works behind the encoder."
        )


def _same_block(site: Any, modality: str, last: int) -> Any:
    """Refuse a call that takes its features from another block than the one behind which tokens are unmerged."""

    def around(call: Any, *args: Any, **kwargs: Any) -> Any:
        chosen = site.bind(modality, args, kwargs).get("vision_feature_layer")
        if chosen is not None:
            _one_block(chosen)
            wanted = site.score_layer(chosen)
            if wanted != last:
                raise NotApplicableError(
                    f"this call takes features of vision layer {wanted}, and tome was put on for layer {last}; set "
                    "config.vision_feature_layer before you put it on instead of passing it."
                )
        return call(*args, **kwargs)

    return around
