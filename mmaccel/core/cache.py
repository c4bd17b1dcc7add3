"""A cache whose layers hold fewer tokens than the model believes to have seen.

transformers asks a cache layer two questions: how many tokens have passed (which sets the positions of the next ones,
and how many ids `generate` cuts off) and how many keys there are to attend to (which sizes the mask). After a
reduction the answers differ. The difference is given as the mask's key offset, as sliding-window layers do it. Which
tokens are held is written in the `Ledger` that all layers of a cache share.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from mmaccel.errors import NotApplicableError

__all__ = ["Kept", "Ledger", "PrunedLayer", "cache_keyword", "ledger_of", "pruned_cache"]


@dataclass(frozen=True)
class Kept:
    """What a group of layers held when the last reduction was done; every token that came later is held as well.

    source: int64 [B, n], the index of each key in the sequence that the model has seen. valid: bool [B, n], False for
    padding. columns: int64 [B, n], the index of each key among those of layer 0, None where they are the same. full:
    whether nothing is padding.
    """

    source: torch.Tensor
    valid: torch.Tensor
    columns: torch.Tensor | None
    full: bool

    def rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Kept:
        """The same for another choice of batch rows."""
        columns = None if self.columns is None else change(self.columns)
        return replace(self, source=change(self.source), valid=change(self.valid), columns=columns)

    def without_last(self, n: int) -> Kept:
        """The same without the last n keys."""
        return self.rows(lambda tensor: tensor[:, :-n])


@dataclass
class Ledger:
    """The book of a cache from which tokens have been taken out.

    groups: what the layers from that number on hold. seen: tokens that the model had seen when the last reduction was
    done; the last `tail` of these are text that every layer holds. shift: int64 [B], how much smaller the next position
    is than the number of tokens seen says (compacted positions), None if nothing was compacted. moved: whether tokens
    were taken out in front of layer 0. served: whether our hooks are at work in the call that is going on.
    """

    groups: dict[int, Kept] = field(default_factory=dict)
    seen: int = 0
    tail: int = 0
    shift: torch.Tensor | None = None
    moved: bool = False
    served: bool = False

    def at(self, layer: int) -> Kept:
        """What layer number `layer` holds."""
        return self.groups[max(first for first in self.groups if first <= layer)]

    def rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Choose batch rows anew."""
        self.groups = {first: kept.rows(change) for first, kept in self.groups.items()}
        self.shift = None if self.shift is None else change(self.shift)

    def crop(self, n: int) -> None:
        """Forget the last n tokens that had been seen when the last reduction was done.

        Raises:
            NotApplicableError: they are more than the text at the end.
        """
        if n > self.tail:
            raise NotApplicableError(
                f"the cache cannot be cropped {n - self.tail} tokens into a prompt that was reduced as a whole; start "
                "with a new cache."
            )
        self.groups = {first: kept.without_last(n) for first, kept in self.groups.items()}
        self.seen, self.tail = self.seen - n, self.tail - n

    def check_unaided(self, queries: int) -> None:
        """Refuse a call without our hooks where the library alone would compute something wrong.

        Raises:
            NotApplicableError: masks, positions or lengths of the layers need the hooks.
        """
        alike = all(kept.full for kept in self.groups.values()) and (queries == 1 or len(self.groups) == 1)
        if self.shift is not None or not alike:
            raise NotApplicableError(
                "this cache holds a reduced prompt and the method that reduced it is removed or paused; put it on "
                "again to go on with the cache, or start with a new one."
            )


class PrunedLayer(DynamicLayer):
    """A `DynamicLayer` that counts tokens which were taken out before they reached it.

    Attributes:
        hidden: tokens that the model has seen and this layer has not.
        ledger: the book of the cache, None before a reduction; layer 0 (`keeper`) keeps it.
    """

    def __init__(self, *, keeper: bool = False) -> None:
        super().__init__()
        self.hidden = 0
        self.keeper = keeper
        self.ledger: Ledger | None = None

    @property
    def held(self) -> int:
        """Number of keys in the layer."""
        return super().get_seq_length()

    def get_seq_length(self) -> int:
        """Number of tokens that the model has seen, those taken out included."""
        return self.held + self.hidden

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys to attend to, and the index of the first of them in the sequence that the model has seen."""
        return self.held + query_length, self.hidden

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add new keys and values.

        Raises:
            NotApplicableError: the hooks that a reduced cache needs have been taken off the model.
        """
        if self.ledger is not None and not self.ledger.served:
            self.ledger.check_unaided(key_states.shape[-2])
        return super().update(key_states, value_states, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens; a positive number is the length to crop to (old transformers).

        Raises:
            NotApplicableError: they reach into the part of the prompt that was reduced.
        """
        seen = self.get_seq_length()
        n = -tokens_to_remove if tokens_to_remove <= 0 else max(0, seen - tokens_to_remove)
        if n == 0 or self.keys is None or self.values is None:
            return
        if self.keeper and self.ledger is not None:
            older = n - (seen - self.ledger.seen)
            if older > 0:
                self.ledger.crop(older)
        self.keys, self.values = self.keys[..., :-n, :], self.values[..., :-n, :]

    def reset(self) -> None:
        """Empty the layer."""
        self.keys = self.values = None
        self.is_initialized = False
        super().reset()
        self.hidden, self.ledger = 0, None

    def _rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.keeper and self.ledger is not None:
            self.ledger.rows(change)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the batch rows for beam search."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row."""
        super().batch_repeat_interleave(repeats)
        self._rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the batch rows `indices`."""
        super().batch_select_indices(indices)
        self._rows(lambda tensor: tensor[indices.to(tensor.device)])


def cache_keyword(module: nn.Module) -> str:
    """The name under which `module` takes its cache: "cache", before transformers 5.24 "past_key_values"."""
    return _cache_keyword(type(module))


@functools.cache
def _cache_keyword(cls: type[nn.Module]) -> str:
    return "cache" if "cache" in inspect.signature(cls.forward).parameters else "past_key_values"


def ledger_of(cache: Any) -> Ledger | None:
    """The book of `cache` if tokens have been taken out of what it has seen."""
    layers = getattr(cache, "layers", None)
    return layers[0].ledger if layers and isinstance(layers[0], PrunedLayer) else None


def pruned_cache(cache: Any, config: Any, num_layers: int) -> Cache:
    """`cache` with each of its layers able to hold fewer tokens than were seen; what it holds stays.

    Raises:
        NotApplicableError: a layer is of a kind (static, sliding, quantised) whose length cannot differ.
    """
    if cache is None:
        cache = DynamicCache(config=config)
    if not isinstance(cache, Cache):
        raise NotApplicableError(f"the cache is a {type(cache).__name__}; pass a transformers DynamicCache or none.")
    for index, layer in enumerate(cache.layers):
        if type(layer) not in (DynamicLayer, PrunedLayer):
            raise NotApplicableError(
                f"cache layer {index} is a {type(layer).__name__}, whose length cannot shrink; use the default dynamic "
                "cache (no cache_implementation in generate)."
            )
    for index in range(num_layers):
        if index >= len(cache.layers):
            cache.layers.append(PrunedLayer(keeper=index == 0))
        elif type(cache.layers[index]) is DynamicLayer:
            pruned = PrunedLayer(keeper=index == 0)
            vars(pruned).update(vars(cache.layers[index]))
            cache.layers[index] = pruned
    return cache
