"""Encode the same clips once for many settings: the encoder method of a model answers from memory.

What stands in memory is what the method returned and what mmaccel noted about that call, so a setting that meets it is
none the wiser. Settings that treat the encoder differently (fewer frames, scores read or not) have a memory of their
own.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmaccel.core.encoding import encoding
from mmaccel.core.patching import Patcher
from mmaccel.method import Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence

    from mmaccel.method import Method

__all__ = ["Replay", "encoder_key"]


@dataclass
class _Kept:
    output: Any
    scores: dict[str, Any]
    thinned: list[Any]


def encoder_key(methods: Sequence[Method]) -> Hashable:
    """Equal for stacks that make the encoder do the same: what works in it, and what is read from it."""
    inside = tuple(method.spec for method in methods if method.info.stage < Stage.BEFORE_LLM)
    read = {need for method in methods if not method.neutral for need in method.needs if "vision" in need}
    return inside, frozenset(read), bool(methods)


class Replay:
    """Stands in for the encoder methods of one model until `patcher` is undone; put on before any handle.

    Set `key` before each setting; calls under a key that is known are answered from memory (unless `share` is off).
    Made for one batch: every call must have the same pixels. `all` and `own` read FLOPs while a call runs, if someone
    counts them: of the model and mmaccel together, and of mmaccel's hooks and listeners; `ran` is what the encoder
    calls that were really made had of the latter.
    """

    def __init__(self, site: Any, patcher: Patcher, *, share: bool) -> None:
        self.site, self.share = site, share
        self.key: Hashable = None
        self.all: Callable[[], int] = int
        self.own: Callable[[], int] = int
        self.ran = 0
        self._own: dict[tuple[str, Hashable], int] = {}
        self._flops: dict[tuple[str, Hashable], int] = {}
        self._kept: dict[tuple[str, Hashable], _Kept] = {}
        for modality, method in site.encoders.items():
            patcher.wrap(site.root, method, self._around(modality))

    @property
    def flops(self) -> int:
        """FLOPs of the tower's blocks under the present key, all items of the batch together.

        Counted, because a method may compute a part of a block only; what `own` counts is left out.
        """
        return sum(flops for (_, key), flops in self._flops.items() if key == self.key)

    @property
    def flops_own(self) -> int:
        """mmaccel's own FLOPs in the encoder under the present key, all items of the batch together."""
        return sum(flops for (_, key), flops in self._own.items() if key == self.key)

    @contextmanager
    def _blocks(self) -> Iterator[list[int]]:
        """FLOPs of each call of a block of the tower."""
        patcher, spent = Patcher(), []

        def enter(_module: Any, _args: Any, _kwargs: Any) -> None:
            spent.append(self.own() - self.all())

        def leave(_module: Any, _args: Any, _kwargs: Any, _output: Any) -> None:
            spent[-1] += self.all() - self.own()

        try:
            for block in self.site.vision_blocks():
                patcher.before(block, enter, first=True)
                patcher.after(block, leave)
            yield spent
        finally:
            patcher.undo()

    def _around(self, modality: str) -> Any:
        def around(call: Any, *args: Any, **kwargs: Any) -> Any:
            key = (modality, self.key)
            record = encoding(self.site)
            kept = self._kept.get(key)
            if kept is None:
                before = self.own()
                with self._blocks() as spent:
                    output = call(*args, **kwargs)
                self._own[key] = self.own() - before
                self.ran += self._own[key]
                self._flops[key] = sum(spent)
                if self.share:
                    scores, thinned = (dict(record.scores), list(record.thinned)) if record else ({}, [])
                    self._kept[key] = _Kept(copy.copy(output), scores, thinned)
                return output
            if record is not None:
                record.scores.update(kept.scores)
                record.thinned.extend(kept.thinned)
            return copy.copy(kept.output)

        return around
