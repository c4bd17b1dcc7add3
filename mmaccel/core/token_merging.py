"""Merge tokens inside a vision encoder, block by block, and give every patch its value back at the end.

Each block that merges is computed from its parts: attention, in which a merged token counts as often as it holds
patches, then the merge, then the MLP on what is left. Behind the last block the tokens are unmerged, so that nothing
that follows has to know.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mmaccel.core.block import Block, heads_of, tokens_of
from mmaccel.core.encoder import Encoder
from mmaccel.core.flops import matrix_weights
from mmaccel.core.patching import Patcher
from mmaccel.core.probe import listeners
from mmaccel.core.run import current, opened
from mmaccel.errors import MMAccelError, NotApplicableError
from mmaccel.kernels.dispatch import recording
from mmaccel.tokens.reduce import Merge, bipartite

__all__ = ["merge_tokens"]

# n patches, L blocks -> how many tokens each block merges away
Plan = Callable[[int, int], list[int]]


@dataclass
class _Call:
    """What one call of an encoder has merged so far.

    counts: for each block how many tokens merge, one int or int64 [images]. merge: from the tokens that went in to
    those of now, None while these are the same and all are valid.
    """

    inside: bool = False
    counts: list[int | torch.Tensor] = field(default_factory=list)
    merge: Merge | None = None
    merged: bool = False
    shape: tuple[int, int, int] = (0, 0, 0)
    patches: int = 0
    tokens: list[tuple[int, int]] = field(default_factory=list)


def merge_tokens(patcher: Patcher, encoder: Encoder, plan: Plan, name: str, report: Any) -> None:
    """Merge in every block up to `encoder.last`: as many tokens of n patches as `plan(n, blocks)` says for each block.

    Pairs are those of ToMe's bipartite matching by head-mean keys, means and attention are weighted by size. Calls of
    the encoder, their time and FLOPs are entered in `report` under `name`.
    """
    merger = _Merger(encoder, plan, name, report)
    # timm's users call the second one by itself
    for method in ("forward", "forward_features"):
        if callable(getattr(encoder.module, method, None)):
            patcher.wrap(encoder.module, method, merger.around_call)
    for number in range(encoder.last + 1):
        block = encoder.blocks[number].module
        patcher.wrap(block, "forward", merger.around_block(number, inspect.signature(block.forward)))


class _Merger:
    def __init__(self, encoder: Encoder, plan: Plan, name: str, report: Any) -> None:
        self.encoder, self.plan, self.name, self.report = encoder, plan, name, report
        self.weights = [
            (matrix_weights(block.attention), matrix_weights(block.module) - matrix_weights(block.attention))
            for block in encoder.blocks[: encoder.last + 1]
        ]

    def around_call(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        """Keep the state of one call of the encoder."""
        with opened(self.encoder.module) as run:
            state = run.get(_Call)
            if state.inside:
                return call(*args, **kwargs)
            state.inside = True
            _refuse_checkpoints(self.encoder.module)
            start = time.perf_counter()
            try:
                with recording() as events:
                    output = call(*args, **kwargs)
            finally:
                run.drop(_Call)
            self.report.spend("vision encoder", time.perf_counter() - start)
            for event in events:
                self.report.kernel(event.op, event.backend, event.reason)
            return output

    def around_block(self, number: int, signature: inspect.Signature) -> Callable[..., Any]:
        """A wrapper of the forward of block `number`."""
        block, last = self.encoder.blocks[number], self.encoder.last

        def around(call: Any, *args: Any, **kwargs: Any) -> Any:
            run = current(self.encoder.module)
            state = run.get(_Call) if run is not None else None
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
            if not (state.merged or _some(state.counts[number])):
                output = call(*args, **kwargs)
                state.tokens.append((x.shape[1], x.shape[1]))
            else:
                output = self.compute(block, x, state, number)
            if number == last:
                self.finish(state)
            return output

        return around

    def start(self, state: _Call, x: torch.Tensor, given: dict[str, Any]) -> None:
        """Look at what comes into the first block, and decide how many tokens each block merges."""
        if given.get("is_causal"):
            raise NotApplicableError(f"{self.name} merges tokens that see each other; this call asks for is_causal.")
        B, N = x.shape[:2]
        valid = self.valid(given.get("attention_mask", given.get("attn_mask")), B, N)
        prefix, blocks = self.encoder.prefix, self.encoder.last + 1
        patches = [N - prefix] * B if valid is None else valid[:, prefix:].sum(1).tolist()
        plans = {n: self.plan(n, blocks) for n in set(patches)}
        if len(plans) == 1:
            state.counts = list(plans.popitem()[1])
        else:
            state.counts = list(torch.tensor([plans[n] for n in patches], device=x.device).T)
        state.merge = None if valid is None else _identity(valid)
        state.merged, state.shape, state.patches, state.tokens = False, (B, N, x.shape[2]), sum(patches), []

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

    def compute(self, block: Block, x: torch.Tensor, state: _Call, number: int) -> torch.Tensor:
        """One block from its parts, with its merge between attention and MLP; at the last block unmerged."""
        merge, n = state.merge, x.shape[1]
        if n != (state.shape[1] if merge is None else merge.kept.shape[1]):
            raise MMAccelError(
                f"{self.name}: something between the blocks of {self.encoder.path} changes the number of tokens ({n}); "
                "remove it, or this method."
            )
        h = block.norm1(x)
        query, key, value = block.query(h), block.key(h), block.value(h)
        self.show(block, query, key, state)
        # tokens of size 0 are padding: nobody sees them
        bias = None if merge is None else merge.sizes.log()[:, None, None]
        x = x + block.attend(query, key, value, bias)
        if _some(state.counts[number]):
            step = self.match(key, state.counts[number], merge)
            x = step.merge(x)
            state.merge, state.merged = step if merge is None else merge.then(step), True
        state.tokens.append((n, x.shape[1]))
        x = x + block.mlp(block.norm2(x))
        return x if number < self.encoder.last else self.unmerge(x, state)

    @torch.no_grad()
    def match(self, key: torch.Tensor, count: int | torch.Tensor, merge: Merge | None) -> Merge:
        """Which tokens merge: keys [B, H, n, D] averaged over heads; class and register tokens take no part."""
        metric = key.detach().mean(1)
        protect = torch.zeros(metric.shape[:2], dtype=torch.bool, device=key.device)
        protect[:, : self.encoder.prefix] = True
        size = None if merge is None else merge.sizes
        return bipartite(metric, count, protect=protect, mask=None if size is None else size > 0, size=size)

    def unmerge(self, x: torch.Tensor, state: _Call) -> torch.Tensor:
        """Give each token that went in the value of the one it went into."""
        return x if state.merge is None or not state.merged else state.merge.unmerge(x)

    def show(self, block: Block, query: torch.Tensor, key: torch.Tensor, state: _Call) -> None:
        """Show queries and keys of all patches to who reads the attention of this block.

        Attention among unmerged tokens gives each patch its share of what the merged token receives.
        """
        for listen in listeners(block.attention):
            q, k = (heads_of(self.unmerge(tokens_of(t), state), t.shape[1]) for t in (query, key))
            listen(q, k, None, {"scaling": block.scale})

    def finish(self, state: _Call) -> None:
        """Enter the call in the report."""
        B, N, C = state.shape
        left = B * N if state.merge is None else int((state.merge.kept >= 0).sum())
        self.report.count(self.name, "inside the vision encoder", state.patches, left - B * self.encoder.prefix)
        spent = dense = 0.0
        for (attention, mlp), (n, m) in zip(self.weights, state.tokens, strict=True):
            spent += 2 * n * attention + 4 * n * n * C + 2 * m * mlp
            dense += 2 * N * (attention + mlp) + 4 * N * N * C
        self.report.compute("vision encoder", B * spent, B * dense)


def _some(count: Any) -> bool:
    return bool((count > 0).any()) if isinstance(count, torch.Tensor) else count > 0


def _identity(valid: torch.Tensor) -> Merge:
    """Nothing has merged yet, and only valid tokens (bool [B, N]) take part."""
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
