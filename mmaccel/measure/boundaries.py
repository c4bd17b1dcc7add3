"""Where a model's stages begin and end, and which part of them is mmaccel's own work.

The same boundaries serve every meter: a clock, CUDA events, a FLOP counter. Hooks and wrappers go through a `Patcher`,
so the model is afterwards what it was.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mmaccel.adapters import video_lm
from mmaccel.adapters.base import get_module
from mmaccel.core.patching import Chain, Patcher
from mmaccel.core.probe import _LISTENERS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

__all__ = ["Spans", "split", "watch", "watch_module"]


class Spans:
    """Pairs of meter readings by account.

    call: an encoder method such as `get_video_features`. tower: the vision tower inside of it. merger: a projector that
    is a part of the tower. prefill: the language model. own: hooks and listeners of mmaccel. wrapped: what is inside of
    mmaccel's wrappers of the encoder methods, so that call - wrapped is mmaccel's own as well. chain, chained: the same
    for its wrappers of the language model's methods.
    """

    def __init__(self, read: Callable[[], Any]) -> None:
        self.read = read
        self.pairs: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def metered(self, account: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, with a reading before and after it."""

        def run(*args: Any, **kwargs: Any) -> Any:
            start = self.read()
            try:
                return function(*args, **kwargs)
            finally:
                self.pairs[account].append((start, self.read()))

        return run

    def totals(self, difference: Callable[[Any, Any], float]) -> dict[str, float]:
        """What each account adds up to; `difference(start, end)` is the size of one span."""
        return {account: sum(difference(a, b) for a, b in pairs) for account, pairs in self.pairs.items()}


def split(totals: dict[str, float], whole: float) -> tuple[dict[str, float], float]:
    """The disjoint stages of a call, which add up to `whole`, and mmaccel's own part of them."""
    tower, merger = totals.get("tower", 0), totals.get("merger", 0)
    call, prefill = max(totals.get("call", 0), tower), totals.get("prefill", 0)
    encode = tower - merger
    stages = {"encode": encode, "project": call - encode, "prefill": prefill, "rest": whole - call - prefill}
    own = totals.get("own", 0)
    if "wrapped" in totals:
        own += totals["call"] - totals["wrapped"]
    own += totals.get("chain", 0) - totals.get("chained", 0)
    return stages, own


@contextmanager
def watch(model: Any, read: Callable[[], Any]) -> Iterator[Spans]:
    """Collect the spans of what `model` does inside the block.

    Raises:
        AdapterError: the model is no vision-language model that has an adapter.
    """
    site = video_lm(model)
    spans, patcher = Spans(read), Patcher()
    try:
        # first, because the hooks that follow are ours too but do no work of a method
        _watch_own(patcher, spans, site)
        running: list[str] = []
        for method in site.encoders.values():
            _watch_method(patcher, spans, site.root, method, running)
        watch_module(patcher, spans, site.vision_tower, "tower")
        projector = get_module(site.root, site.projector)
        if any(module is projector for module in site.vision_tower.modules()):
            watch_module(patcher, spans, projector, "merger")
        watch_module(patcher, spans, site.language_model, "prefill")
        yield spans
    finally:
        patcher.undo()


def watch_module(patcher: Patcher, spans: Spans, module: nn.Module, account: str) -> None:
    """Put the calls of a module down to `account`, mmaccel's hooks on it included."""
    started: list[Any] = []

    def enter(_module: nn.Module, _args: Any, _kwargs: Any) -> None:
        started.append(spans.read())

    def leave(_module: nn.Module, _args: Any, _kwargs: Any, _output: Any) -> None:
        spans.pairs[account].append((started.pop(), spans.read()))

    # first in and last out: what mmaccel does in hooks of this module is a part of the stage
    patcher.before(module, enter, first=True)
    patcher.after(module, leave)


def _watch_method(patcher: Patcher, spans: Spans, root: nn.Module, name: str, running: list[str]) -> None:
    def outermost(call: Any, *args: Any, **kwargs: Any) -> Any:
        # Qwen3-VL's video method calls its image method
        if running:
            return call(*args, **kwargs)
        running.append(name)
        try:
            return spans.metered("call", call)(*args, **kwargs)
        finally:
            running.clear()

    patcher.wrap(root, name, outermost)
    wrappers = vars(root)[name].wrappers
    if len(wrappers) > 1:

        def innermost(call: Any, *args: Any, **kwargs: Any) -> Any:
            return (spans.metered("wrapped", call) if running == [name] else call)(*args, **kwargs)

        wrappers.insert(0, innermost)
        patcher.on_undo(lambda: wrappers.remove(innermost))


def _watch_own(patcher: Patcher, spans: Spans, site: Any) -> None:
    for module in site.target.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in hooks.items():
                if getattr(hook, "__module__", "").startswith("mmaccel."):
                    _swap(patcher, hooks, key, spans.metered("own", hook))
        if module is site.language_model:
            for value in list(vars(module).values()):
                if isinstance(value, Chain):
                    _watch_chain(patcher, spans, value)
        listeners = vars(getattr(module, "config", spans)).get(_LISTENERS, [])
        for index, listener in enumerate(listeners):
            _swap(patcher, listeners, index, spans.metered("own", listener))


def _watch_chain(patcher: Patcher, spans: Spans, chain: Chain) -> None:
    depth = 0

    def outermost(call: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        depth += 1
        try:
            # a wrapped method may call itself
            return (spans.metered("chain", call) if depth == 1 else call)(*args, **kwargs)
        finally:
            depth -= 1

    def innermost(call: Any, *args: Any, **kwargs: Any) -> Any:
        return (spans.metered("chained", call) if depth == 1 else call)(*args, **kwargs)

    chain.wrappers.insert(0, innermost)
    chain.wrappers.append(outermost)
    patcher.on_undo(lambda: chain.wrappers.remove(innermost))
    patcher.on_undo(lambda: chain.wrappers.remove(outermost))


def _swap(patcher: Patcher, container: Any, key: Any, value: Any) -> None:
    before = container[key]
    container[key] = value

    def back() -> None:
        container[key] = before

    patcher.on_undo(back)
