"""The modules of a diffusion transformer whose outputs can be held token by token, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from mmaccel.core.flops import linear_weights
from mmaccel.errors import NotApplicableError

__all__ = ["Module", "cached_modules"]


@dataclass(frozen=True)
class Module:
    """One attention or feed-forward of a block: its layer, its kind, and the width of its attention.

    joint: the prompt's tokens go through it beside the latent's. feeds: the module that alone uses its output, and
    computes the same tokens; fed: the name of the module that is so for this one.
    """

    name: str
    layer: int
    kind: str
    module: Any
    width: int
    joint: bool = False
    feeds: str = ""
    fed: str = ""

    def work(self, rows: int, tokens: int, text: int) -> float:
        """Multiply-adds of `rows` of `tokens`; `text` is how many tokens the prompt has, which are never left out."""
        if not rows:
            return 0.0
        weights = linear_weights(self.module)
        beside = text if self.joint else 0
        if self.kind == "mlp":
            return float((rows + beside) * weights)
        if self.kind == "self-attention":
            added = _weights_for_prompt(self.module)
            projections = rows * (weights - added) + beside * (added or weights)
            return float(projections + 2 * (rows + beside) * (tokens + beside) * self.width)
        # queries and outputs belong to tokens, keys and values to the prompt
        return float((rows + text) * weights / 2 + 2 * rows * text * self.width)


def _weights_for_prompt(attention: nn.Module) -> int:
    """Weights of the projections that a joint attention has for the prompt alone; 0 where it has none of its own."""
    return sum(
        part.weight.numel()
        for name, part in attention.named_modules()
        if isinstance(part, nn.Linear) and name.startswith(("add_", "to_add"))
    )


def cached_modules(site: Any, transformer: Any) -> list[Module]:
    """What can be cached of a transformer, in the order in which it runs.

    Raises:
        NotApplicableError: its blocks have other modules, or another stream runs along.
    """
    layout = site.layout
    if layout.companion:
        raise NotApplicableError(
            f"{site.family} has another stream beside the latent's, which needs all of its tokens."
        )
    config = transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    kinds = {"self-attention": layout.attention, "cross-attention": layout.cross, "mlp": layout.feed_forward}
    found: list[Module] = []
    for layer, (name, block) in enumerate(site.blocks(transformer).items()):
        around = [getattr(block, attribute) for attribute in layout.parallel if hasattr(block, attribute)]
        names = [f"{name}.{attribute}" for attribute in layout.parallel]
        if around:
            found.append(Module(names[0], layer, "mlp", around[0], width, joint=True, feeds=names[1]))
        for kind, attributes in kinds.items():
            for attribute in attributes:
                part = getattr(block, attribute, None)
                if part is not None:
                    attends = layout.text != "none" and attribute not in layout.alone
                    joint = attends if kind == "self-attention" else layout.feed_forward_joint
                    found.append(Module(f"{name}.{attribute}", layer, kind, part, width, joint=joint))
        if around:
            found.append(Module(names[1], layer, "mlp", around[1], width, joint=True, fed=names[0]))
    if not found:
        raise NotApplicableError(f"{site.family} has no attention or feed-forward that can be cached.")
    return found
