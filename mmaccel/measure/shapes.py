"""How many tokens each layer really computed."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mmaccel.adapters import video_lm
from mmaccel.core.patching import Patcher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Shapes", "record_shapes"]


@dataclass
class Shapes:
    """What the layers saw in the calls of a block.

    vision: for each layer of the tower the lengths of the sequences that attended together, such as [729] * 32; all
    calls together. language: for each decoder layer (batch, length) of each call, padding included.
    """

    vision: list[list[int]] = field(default_factory=list)
    language: list[list[tuple[int, int]]] = field(default_factory=list)

    @property
    def prefill(self) -> list[int]:
        """Sequence length at each decoder layer in the first call."""
        return [calls[0][1] for calls in self.language]


@contextmanager
def record_shapes(model: Any) -> Iterator[Shapes]:
    """Record shapes while a block runs: `with record_shapes(model) as shapes: model.generate(...)`.

    Raises:
        AdapterError: the model is no vision-language model that has an adapter.
    """
    site = video_lm(model)
    patcher = Patcher()
    blocks = site.vision_blocks()
    shapes = Shapes([[] for _ in blocks], [[] for _ in site.layers])
    try:
        for block, lengths in zip(blocks, shapes.vision, strict=True):
            patcher.before(block, _vision(lengths))
        for layer, calls in zip(site.layers, shapes.language, strict=True):
            patcher.before(layer, _language(calls))
        yield shapes
    finally:
        patcher.undo()


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs["hidden_states"]


def _vision(lengths: list[int]) -> Callable[..., None]:
    def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, borders = _hidden(args, kwargs), kwargs.get("cu_seqlens")
        if borders is not None:  # packed: [patches, C], the borders say what attends together
            lengths.extend((borders[1:] - borders[:-1]).tolist())
        else:
            lengths.extend([hidden.shape[-2]] * hidden.shape[:-2].numel())

    return hook


def _language(calls: list[tuple[int, int]]) -> Callable[..., None]:
    def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch, length = _hidden(args, kwargs).shape[:2]
        calls.append((batch, length))

    return hook
