"""A cache layer that holds fewer tokens than the model believes to have seen.

transformers asks a cache layer two questions: how many tokens have passed (which sets the positions of the next ones,
and how many ids `generate` cuts off) and how many keys there are to attend to (which sizes the mask). After a
reduction the answers differ. The difference is given as the mask's key offset, as sliding-window layers do it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from mmaccel.errors import NotApplicableError

__all__ = ["PrunedLayer", "first_pruned", "pruned_cache"]


class PrunedLayer(DynamicLayer):
    """A `DynamicLayer` that counts tokens which were taken out before they reached it.

    Attributes:
        hidden: tokens that the model has seen and this layer has not.
        valid: bool [B, keys held], False for padding.
        columns: int64 [B, keys held], for each key the index it has among the keys of layer 0; None where they agree.
        shift: int64 [B], how much smaller the next position is than the number of tokens seen says (compacted
            positions); read from layer 0.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hidden = 0
        self.valid: torch.Tensor | None = None
        self.columns: torch.Tensor | None = None
        self.shift: torch.Tensor | None = None

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

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens, which must all be younger than the last reduction."""
        super().crop(tokens_to_remove)
        if tokens_to_remove and self.is_initialized:
            self._cut_to_held()

    def _cut_to_held(self) -> None:
        if self.valid is not None:
            self.valid = self.valid[:, : self.held]
        if self.columns is not None:
            self.columns = self.columns[:, : self.held]

    def reset(self) -> None:
        """Empty the layer."""
        super().reset()
        self.hidden, self.valid, self.columns, self.shift = 0, None, None, None

    def _rows(self, change: Any) -> None:
        for name in ("valid", "columns", "shift"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, change(tensor))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the batch rows for beam search."""
        super().reorder_cache(beam_idx)
        self._rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row."""
        super().batch_repeat_interleave(repeats)
        self._rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the batch rows `indices`."""
        super().batch_select_indices(indices)
        self._rows(lambda tensor: tensor[indices.to(tensor.device)])


def first_pruned(cache: Any) -> PrunedLayer | None:
    """Layer 0 of `cache` if a reduction has turned its layers into pruned ones."""
    layers = getattr(cache, "layers", None)
    return layers[0] if layers and isinstance(layers[0], PrunedLayer) else None


def pruned_cache(cache: Any, config: Any, num_layers: int) -> Cache:
    """`cache` with each of its layers able to hold fewer tokens than were seen; what it holds stays.

    Raises:
        NotApplicableError: a layer is of a kind (static, sliding, quantised) whose length cannot differ.
    """
    if cache is None:
        cache = DynamicCache(config=config)
    if not isinstance(cache, Cache):
        raise NotApplicableError(
            f"past_key_values is a {type(cache).__name__}; pass a transformers DynamicCache or none."
        )
    for index in range(num_layers):
        if index >= len(cache.layers):
            cache.layers.append(PrunedLayer())
            continue
        layer = cache.layers[index]
        if isinstance(layer, PrunedLayer):
            continue
        if type(layer) is not DynamicLayer:
            raise NotApplicableError(
                f"cache layer {index} is a {type(layer).__name__}, whose length cannot shrink; use the default dynamic "
                "cache (no cache_implementation in generate)."
            )
        pruned = PrunedLayer()
        vars(pruned).update(vars(layer))
        cache.layers[index] = pruned
    return cache
