"""ToMeSD: tokens of a latent that are alike merge in front of self-attention and part again behind it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mmaccel.diffusion.diffusers_caches import TOKENS
from mmaccel.diffusion.diffusers_hooks import holding
from mmaccel.errors import AdapterError, ConflictError, NotApplicableError
from mmaccel.method import Info, Method, Stage, Touch, knob

if TYPE_CHECKING:
    from mmaccel.install import Installer
    from mmaccel.report import Report
    from mmaccel.targets import Target


@dataclass(frozen=True)
class ToMeSD(Method):
    """Token merging for diffusion transformers: "Token Merging for Fast Stable Diffusion" (2023).

    Sentence: cosine of the tokens as they come into a block -> the same fraction of every clip -> the best pairs
    between one destination in each cell and all others -> merge into the mean -> give every token the output of the one
    that it went into. The residual beside the module keeps what is its own to each token.

    The paper merges inside U-Nets. Inferred for transformers: cells lie in each frame; a destination keeps its rotary
    position; tokens of a prompt that attends along do not merge; the place of destinations is drawn once for a size of
    latents and not at each step, so that calls can be repeated. `within=frame` looks for partners in a token's own
    frame only, which makes matching cheaper by the number of frames. `every` uses a match for several blocks
    (suggested by FastVGGT, "Training-Free Acceleration of Visual Geometry Transformer", 2025, whose matches are
    computed anew in each). Where blocks treat some tokens unlike others (LTX-2 with masked self-attention) nothing is
    merged, and the report says so. ratio 0 is the identity.
    """

    ratio: float = knob(
        0.5, "fraction of the tokens that merge into others; all but one of a cell at most", low=0.0, high=1.0
    )
    cell: int = knob(2, "side of the squares of tokens that have one destination each", low=2)
    within: Literal["clip", "frame"] = knob(
        "clip", "where a token looks for the one that it goes into", choices=("clip", "frame")
    )
    feed_forward: bool = knob(False, "tokens merge in front of feed-forward modules too")
    proportional: bool = knob(False, "merged tokens count in attention as often as they hold tokens")
    every: int = knob(1, "blocks from one match to the next", low=1)
    first: int = knob(0, "number of the first block that merges", low=0)
    seed: int | None = knob(0, "draws the place of each destination in its cell; None takes the first", low=0)

    info: ClassVar[Info] = Info(
        name="tomesd", verb="merge", stage=Stage.DIFFUSION,
        summary="merges tokens of a latent that are alike in front of self-attention",
        source="Token Merging for Fast Stable Diffusion", year=2023, targets=("diffusion",), slots=(TOKENS,),
        licence="MIT",
    )  # fmt: skip

    @property
    def neutral(self) -> bool:
        """Nothing merges."""
        return self.ratio == 0

    def plan(self, target: Target) -> list[Touch]:
        """Blocks, self-attentions and feed-forward modules.

        Raises:
            NotApplicableError: the layout of the family is not known, or no block is left to merge in.
        """
        site = target.site
        try:
            layout = site.layout
        except AdapterError as error:
            raise NotApplicableError(f"tomesd: {error}") from None
        touches = []
        for name, transformer in site.transformers.items():
            blocks = list(site.blocks(transformer).items())
            if self.first >= len(blocks):
                raise NotApplicableError(f"tomesd: first={self.first}, and {site.family} has {len(blocks)} blocks.")
            touches.append(Touch(name, "takes note of the grid of tokens"))
            for block, module in blocks[self.first :]:
                touches.append(Touch(f"{name}.{block}", "matches the tokens that come in"))
                modules = layout.attention + (layout.feed_forward if self.feed_forward else ())
                touches += [
                    Touch(f"{name}.{block}.{inside}", "sees merged tokens")
                    for inside in modules
                    if getattr(module, inside, None) is not None
                ]
        return touches

    def install(self, installer: Installer) -> None:
        """Put the hooks on.

        Raises:
            ConflictError: a cache of diffusers holds outputs of the modules, which would be those of other merges.
        """
        from mmaccel.core.block_merging import BlockMerging

        site, report = installer.target.site, installer.report
        most = 1 - 1 / self.cell**2
        if self.ratio > most:
            report.note(
                f"tomesd: ratio={self.ratio:g} is cut to {most:.3g}, as {self.cell} x {self.cell} cells keep one token"
            )
        inside = site.layout.attention + site.layout.feed_forward
        for transformer in site.transformers.values():
            for block in site.blocks(transformer).values():
                held = [name for part in inside for name in holding(getattr(block, part, None))]
                if held:
                    raise ConflictError(
                        f"tomesd: {held[0]} holds what modules return, merged as it was in another step; put tomesd on "
                        "first, so that whole outputs are held."
                    )
            merging = BlockMerging(
                site, transformer, report, self.info.name, partial(self._match, report), every=self.every,
                first=self.first, feed_forward=self.feed_forward, proportional=self.proportional,
            )  # fmt: skip
            merging.install(installer.patcher)

    def _match(self, report: Report, tokens: Any, grid: tuple[int, ...]) -> Any:
        """How tokens [B, N, C] on a grid merge; None if none do."""
        from mmaccel.tokens.cells import one_a_cell
        from mmaccel.tokens.reduce import bipartite, side_by_side

        (B, N, C), frames = tokens.shape, grid[0] if self.within == "frame" and len(grid) == 3 else 1
        destinations = one_a_cell(grid, self.cell, self.seed).to(tokens.device).view(frames, -1)
        kept = int(destinations[0].sum())
        count = min(int(self.ratio * (N // frames)), N // frames - kept)
        if not count:
            return None
        inside = tokens.unflatten(1, (frames, N // frames)).flatten(0, 1)
        report.compute("self-attention", 2.0 * B * frames * (N // frames - kept) * kept * C, 0.0)
        return side_by_side(bipartite(inside, count, destinations=destinations.repeat(B, 1)), frames)
