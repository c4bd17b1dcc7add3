"""Merge tokens inside a vision encoder, block by block, and give every patch its value back at the end.

Each block that merges is computed from its parts: attention, in which a merged token counts as often as it holds
patches, then the merge, then the MLP on what is left. Behind the last block the tokens are unmerged, so that nothing
that follows has to know.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mmaccel.core.block import Block, heads_of, tokens_of
from mmaccel.core.encoder import Encoder
from mmaccel.core.flops import matrix_weights
from mmaccel.core.patching import Patcher, shared
from mmaccel.core.probe import listeners
from mmaccel.core.run import current, opened
from mmaccel.errors import ConflictError, MMAccelError, NotApplicableError
from mmaccel.kernels.dispatch import recording
from mmaccel.tokens.reduce import Merge, bipartite

__all__ = ["Merger", "MergingCall", "identity", "merge_tokens", "some"]

# n patches, L blocks -> how many tokens each block merges away
Plan = Callable[[int, int], list[int]]


@dataclass
class MergingCall:
    """What one call of an encoder has merged so far.

    arguments: those of the encoder's forward. counts: for each block how many tokens merge, one int or int64 [images].
    merge: from the tokens that went in to those of now, None while these are the same and all are valid. patches: how
    many went in. tokens: of each block, over all images, those in attention, those in the MLP, and pairs of queries and
    keys, now and in the dense model. whole: (tokens, C) of what went in. Where patches are packed: `held` is what a
    block made, if it had to hand out the whole grid, `first` the number of each frame's first group.
    """

    inside: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    counts: list[int | torch.Tensor] = field(default_factory=list)
    merge: Merge | None = None
    merged: bool = False
    images: int = 0
    patches: int = 0
    whole: tuple[int, int] = (0, 0)
    tokens: list[tuple[int, int, int, int]] = field(default_factory=list)
    held: torch.Tensor | None = None
    first: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))


class _Present:
    """Stands in an encoder in which tokens merge."""


def merge_tokens(patcher: Patcher, encoder: Encoder, plan: Plan, name: str, report: Any) -> None:
    """Merge in every block up to `encoder.last`: as many tokens of n patches as `plan(n, blocks)` says for each block.

    Pairs are those of ToMe's bipartite matching by head-mean keys, means and attention are weighted by size. Calls of
    the encoder, their time and FLOPs are entered in `report` under `name`.

    Raises:
        ConflictError: this was done to the encoder already, as by a handle on a model around it.
    """
    from mmaccel.core.packed_merging import PackedMerger

    if shared(encoder.module, _Present) is not None:
        raise ConflictError(
            f"tokens merge inside {encoder.path} already, by a method that was put on it or on a model around it; "
            "remove that first."
        )
    patcher.share(encoder.module, _Present)
    merger = (PackedMerger if encoder.packed else Merger)(encoder, plan, name, report)
    # timm's users call the second one by itself
    for method in ("forward", "forward_features"):
        if callable(getattr(encoder.module, method, None)):
            signature = inspect.signature(getattr(encoder.module, method))
            patcher.wrap(encoder.module, method, merger.around_call(signature))
    for number in range(encoder.last + 1):
        block = encoder.blocks[number].module
        patcher.wrap(block, "forward", merger.around_block(number, inspect.signature(block.forward)))


class Merger:
    """The wrappers of one encoder that takes images as a batch [images, tokens, C]."""

    def __init__(self, encoder: Encoder, plan: Plan, name: str, report: Any) -> None:
        self.encoder, self.plan, self.name, self.report = encoder, plan, name, report
        self.plans: dict[int, list[int]] = {}
        self.weights = [
            (matrix_weights(block.attention), matrix_weights(block.module) - matrix_weights(block.attention))
            for block in encoder.blocks[: encoder.last + 1]
        ]

    def around_call(self, signature: inspect.Signature) -> Callable[..., Any]:
        """A wrapper of the encoder's forward that keeps the state of one call."""

        def around(call: Any, *args: Any, **kwargs: Any) -> Any:
            with opened(self.encoder.module) as run:
                state = run.get(MergingCall)
                if state.inside:
                    return call(*args, **kwargs)
                state.inside, state.arguments = True, signature.bind(*args, **kwargs).arguments
                start = time.perf_counter()
                try:
                    _refuse_checkpoints(self.encoder.module)
                    with recording() as events:
                        output = call(*args, **kwargs)
                finally:
                    run.drop(MergingCall)
                self.report.spend("vision encoder", time.perf_counter() - start)
                for event in events:
                    self.report.kernel(event.op, event.backend, event.reason)
                return output

        return around

    def around_block(self, number: int, signature: inspect.Signature) -> Callable[..., Any]:
        """A wrapper of the forward of block `number`."""
        block, last = self.encoder.blocks[number], self.encoder.last

        def around(call: Any, *args: Any, **kwargs: Any) -> Any:
            run = current(self.encoder.module)
            state = run.get(MergingCall) if run is not None else None
            if state is None or not state.inside:
                self.report.note(
                    f"{self.name}: a block ran outside of the encoder's forward, where nothing says which tokens "
                    "belong together; it merged nothing"
                )
                return call(*args, **kwargs)
            given = signature.bind(*args, **kwargs).arguments
            x = next(iter(given.values()))
            if number == 0:
                self.start(state, x, given)
            if not (state.merged or some(state.counts[number])):
                output = call(*args, **kwargs)
                n, pairs = state.whole[0], self.pairs(state, given)
                state.tokens.append((n, n, pairs, pairs))
            else:
                output = self.compute(block, x, state, number, given)
            if number == last:
                self.finish(state)
            return output

        return around

    def start(self, state: MergingCall, x: torch.Tensor, given: dict[str, Any]) -> None:
        """Look at what comes into the first block, and decide how many tokens each block merges."""
        if given.get("is_causal"):
            raise NotApplicableError(f"{self.name} merges tokens that see each other; this call asks for is_causal.")
        B, N = x.shape[:2]
        valid = self.valid(given.get("attention_mask", given.get("attn_mask")), B, N)
        prefix = self.encoder.prefix
        self.begin(state, x, [N - prefix] * B if valid is None else valid[:, prefix:].sum(1).tolist())
        state.merge = None if valid is None else identity(valid)
        state.whole = B * N, x.shape[2]

    def begin(self, state: MergingCall, x: torch.Tensor, patches: list[int]) -> None:
        """Plan the merges of images with so many patches."""
        for n in set(patches) - self.plans.keys():
            self.plans[n] = self.plan(n, self.encoder.last + 1)
        plans = [self.plans[n] for n in patches] or [[0] * (self.encoder.last + 1)]
        alike = all(plan == plans[0] for plan in plans)
        state.counts = list(plans[0]) if alike else list(torch.tensor(plans, device=x.device).T)
        state.merged, state.patches, state.tokens, state.held = False, sum(patches), [], None
        state.images = len(patches)

    def pairs(self, state: MergingCall, given: Mapping[str, Any]) -> int:  # noqa: ARG002
        """How many pairs of a query and a key the dense block computes."""
        return state.whole[0] ** 2 // max(1, state.images)

    def valid(self, mask: Any, B: int, N: int) -> torch.Tensor | None:
        """bool [B, N] of an attention mask that hides padding, None if there is no padding."""
        if mask is None:
            return None
        if isinstance(mask, torch.Tensor):
            # masks to be added are 0 where something is seen
            seen = mask if mask.dtype == torch.bool else mask >= 0 if mask.is_floating_point() else mask > 0
            if seen.ndim == 4 and bool((seen == seen[:, :1, :1]).all()):
                seen = seen[:, 0, 0].expand(B, N)
            if seen.shape == (B, N) and (mask.ndim == 4 or B != N):
                return None if bool(seen.all()) else seen
        raise NotApplicableError(
            f"{self.name} knows attention masks that hide padding, the same for all queries of an image; this is "
            f"another one ({type(mask).__name__}{f' {tuple(mask.shape)}' if isinstance(mask, torch.Tensor) else ''})."
        )

    def compute(
        self, block: Block, x: torch.Tensor, state: MergingCall, number: int, given: Mapping[str, Any]
    ) -> torch.Tensor:
        """One block from its parts, with its merge between attention and MLP; at the last block unmerged."""
        merge, (B, n) = state.merge, x.shape[:2]
        self.expect(n, state.whole[0] // B if merge is None else merge.kept.shape[1])
        h = block.norm1(x)
        query, key, value = block.query(h), block.key(h), block.value(h)
        self.show(block, query, key, state)
        # tokens of size 0 are padding: nobody sees them
        bias = None if merge is None else merge.sizes.log()[:, None, None]
        x = x + block.attend(query, key, value, bias)
        if some(state.counts[number]):
            step = self.match(key, state.counts[number], merge)
            x = step.merge(x)
            state.merge, state.merged = step if merge is None else merge.then(step), True
        state.tokens.append((B * n, B * x.shape[1], B * n * n, self.pairs(state, given)))
        x = x + block.mlp(block.norm2(x))
        return x if number < self.encoder.last else self.unmerge(x, state)

    def expect(self, n: int, wanted: int) -> None:
        """Raise where a block gets another number of tokens than the one before has left."""
        if n != wanted:
            raise MMAccelError(
                f"{self.name}: something between the blocks of {self.encoder.path} changes the number of tokens "
                f"({wanted} to {n}); remove it, or this method."
            )

    @torch.no_grad()
    def match(self, key: torch.Tensor, count: int | torch.Tensor, merge: Merge | None) -> Merge:
        """Which tokens merge: keys [B, H, n, D] averaged over heads; class and register tokens take no part."""
        metric = key.detach().mean(1)
        protect = torch.zeros(metric.shape[:2], dtype=torch.bool, device=key.device)
        protect[:, : self.encoder.prefix] = True
        size = None if merge is None else merge.sizes
        return bipartite(metric, count, protect=protect, mask=None if size is None else size > 0, size=size)

    def unmerge(self, x: torch.Tensor, state: MergingCall) -> torch.Tensor:
        """Give each token that went in the value of the one it went into."""
        return x if state.merge is None or not state.merged else state.merge.unmerge(x)

    def show(self, block: Block, query: torch.Tensor, key: torch.Tensor, state: MergingCall) -> None:
        """Show queries and keys of all patches to who reads the attention of this block.

        Attention among unmerged tokens gives each patch its share of what the merged token receives.
        """
        for listen in listeners(block.attention):
            q, k = (heads_of(self.unmerge(tokens_of(t), state), t.shape[1]) for t in (query, key))
            listen(q, k, None, {"scaling": block.scale})

    def finish(self, state: MergingCall) -> None:
        """Enter the call in the report."""
        if not state.patches:
            return
        (N, C), joined = state.whole, self.encoder.merge**2 if self.encoder.packed else 1
        left = N // joined if state.merge is None else int((state.merge.kept >= 0).sum())
        left -= state.images * self.encoder.prefix
        self.report.count(self.name, "inside the vision encoder", state.patches * joined, left * joined)
        spent = dense = 0.0
        for (attention, mlp), (n, m, pairs, before) in zip(self.weights, state.tokens, strict=True):
            spent += 2 * n * attention + 4 * pairs * C + 2 * m * mlp
            dense += 2 * N * (attention + mlp) + 4 * before * C
        self.report.compute("vision encoder", spent, dense)


def some(count: Any) -> bool:
    """Whether any image merges anything."""
    return bool((count > 0).any()) if isinstance(count, torch.Tensor) else count > 0


def identity(valid: torch.Tensor) -> Merge:
    """The merge of nothing, in which only valid tokens, bool [B, N], take part."""
    itself = torch.arange(valid.shape[1], device=valid.device).expand(valid.shape).masked_fill(~valid, -1)
    return Merge(itself, itself, valid.float(), valid.float())


def _refuse_checkpoints(encoder: nn.Module) -> None:
    if not torch.is_grad_enabled():
        return
    for module in encoder.modules():
        # transformers looks at it while it trains, timm and open_clip always
        on = getattr(module, "gradient_checkpointing", False) and module.training
        if on or getattr(module, "grad_checkpointing", False):
            raise NotApplicableError(
                "gradient checkpointing computes blocks of this vision encoder a second time, when what was merged is "
                "forgotten; switch it off, or remove the method while you train."
            )
