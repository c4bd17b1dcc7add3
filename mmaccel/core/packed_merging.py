"""Merge tokens inside a vision encoder that packs the patches of all its images into one row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mmaccel.core.block import Block, heads_of, tokens_of
from mmaccel.core.probe import listeners
from mmaccel.core.token_merging import Merger, MergingCall, identity, some
from mmaccel.tokens.reduce import bipartite

__all__ = ["PackedMerger"]


class PackedMerger(Merger):
    """Patches of all frames in one row: merge groups of one frame merge, patch by patch, each frame by itself.

    A group that others went into keeps its place: its rotary positions, its window. Two groups are as alike as the
    head-mean keys of their patches, side by side, before these are turned to their positions. Inferred: the paper knows
    neither merge groups nor rotary positions. Who reads the attention of a block with windows is shown each patch in
    the window where it was, even if it went into a group of another one.
    """

    def start(self, state: MergingCall, x: torch.Tensor, given: dict[str, Any]) -> None:  # noqa: ARG002
        """Look at the frames, and decide how many groups of each merge in every block."""
        unit = self.encoder.merge**2
        groups = [h * w // unit for t, h, w in state.arguments["grid_thw"].tolist() for _ in range(t)]
        self.begin(state, x, groups)
        lengths = torch.tensor(groups, device=x.device)
        state.merge = identity(torch.arange(max(groups), device=x.device) < lengths[:, None])
        state.first, state.whole = lengths.cumsum(0) - lengths, (x.shape[0], x.shape[1])

    def pairs(self, state: MergingCall, given: Mapping[str, Any]) -> int:  # noqa: ARG002
        """How many pairs of a query and a key the dense block computes."""
        return int(given["cu_seqlens"].long().diff().square().sum())

    def compute(
        self, block: Block, x: torch.Tensor, state: MergingCall, number: int, given: Mapping[str, Any]
    ) -> torch.Tensor:
        """One block from its parts, with its merge between attention and MLP; unmerged where its output is read."""
        merge, unit = state.merge, self.encoder.merge**2
        assert merge is not None
        assert block.rotate is not None
        x = x if state.held is None else state.held
        alive = merge.kept >= 0
        groups = (merge.kept + state.first[:, None])[alive]
        self.expect(len(x), len(groups) * unit)
        patches = (groups[:, None] * unit + torch.arange(unit, device=x.device)).flatten()
        cuts = given["cu_seqlens"]
        lengths = torch.bincount(torch.bucketize(patches, cuts[1:], right=True), minlength=len(cuts) - 1).tolist()
        h = block.norm1(x)
        query, plain, value = block.query(h), block.key(h), block.value(h)
        rotary = given["position_embeddings"][0][patches], given["position_embeddings"][1][patches]
        query, key = block.rotate(query, rotary), block.rotate(plain, rotary)
        for listen in listeners(block.attention):
            q, k = (heads_of(self.spread(tokens_of(t), state), len(t))[None] for t in (query, key))
            listen(q, k, None, {"scaling": block.scale, "cu_seq_lens_q": cuts})
        bias = merge.sizes[alive].log().repeat_interleave(unit)
        parts = (t.split(lengths, -2) for t in (query, key, value))
        seen = [
            block.attend(q[None], k[None], v[None], b[None] if state.merged else None)[0]
            for q, k, v, b in zip(*parts, bias.split(lengths), strict=True)
            if len(b)
        ]
        x = x + torch.cat(seen)
        if some(state.counts[number]):
            with torch.no_grad():
                metric = _padded(plain.detach().mean(0), alive, unit)
                step = bipartite(metric, state.counts[number], mask=alive, size=merge.sizes)
            x = step.merge(_padded(x, alive, unit))[step.kept >= 0].reshape(-1, x.shape[1])
            state.merge, state.merged = merge.then(step), True
        state.tokens.append((len(patches), len(x), sum(n * n for n in lengths), self.pairs(state, given)))
        x = x + block.mlp(block.norm2(x))
        state.held = x if number in self.encoder.read else None
        return self.spread(x, state) if number == self.encoder.last or number in self.encoder.read else x

    def spread(self, x: torch.Tensor, state: MergingCall) -> torch.Tensor:
        """Give each patch that went in the value of the one it went into: [n, C] to [patches, C]."""
        merge = state.merge
        assert merge is not None
        rows = merge.unmerge(_padded(x, merge.kept >= 0, self.encoder.merge**2))
        return rows[merge.assignment >= 0].reshape(-1, x.shape[1])


def _padded(x: torch.Tensor, alive: torch.Tensor, unit: int) -> torch.Tensor:
    """Packed patches [n, C] as groups in frames, [frames, K, unit * C], where `alive` [frames, K] says."""
    groups = x.reshape(-1, unit * x.shape[1])
    return groups.new_zeros(alive.numel(), groups.shape[1]).index_copy(
        0, alive.flatten().nonzero().squeeze(1), groups
    ).view(*alive.shape, -1)  # fmt: skip
